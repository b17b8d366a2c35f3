"""Puts this folder on the import path, and sets up JAX for all tests before anything imports it.

Eight emulated CPU devices; an operation that promotes ranks silently raises (model code says its shapes).
"""

from __future__ import annotations

import os
from typing import Any

import pytest

FAKE_DEVICES = 8

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["SHARDLAB_CACHE"] = "off"  # a test that means the cache names one
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# LLVM's optimisation is most of the time of a small compile; it comes after everything that shardlab reads.
os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count={FAKE_DEVICES} --xla_backend_optimization_level=0"
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests stay on one worker, so that what its fixtures and caches compile is compiled once."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)
