"""A mark for what the XLA of an older JAX does otherwise: such a test says why, and fails where it passes."""

from __future__ import annotations

import jax
import pytest


def otherwise_in_jax_0_10(why: str) -> pytest.MarkDecorator:
    """Expected to fail with JAX 0.10, for which Python 3.11 resolves; strictly."""
    return pytest.mark.xfail(
        jax.__version_info__ < (0, 11), strict=True, raises=AssertionError, reason=f"XLA of JAX 0.10 {why}"
    )
