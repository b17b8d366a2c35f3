"""How long a compiled program takes, for the programs that calibrate."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any


def timed_s(run: Callable[[], Any], repeats: int) -> float:
    """The median of several runs in seconds, after one that compiles."""
    import jax

    jax.block_until_ready(run())
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - began)
    return median(found)
