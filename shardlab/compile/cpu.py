"""Emulated CPU devices. They run, so results can be checked; bytes are what the partitioner does, not a
backend.
"""

from __future__ import annotations

import jax

from shardlab.compile.target import Target
from shardlab.errors import CompileFailed
from shardlab.hardware.machine import Machine


def open_target(machine: Machine) -> Target:
    """All of the host's emulated devices; their number was set in XLA_FLAGS before jax was imported."""
    devices = tuple(jax.devices("cpu"))
    if len(devices) != machine.num_devices:
        raise CompileFailed(machine.spec, f"{len(devices)} emulated devices, not {machine.num_devices}")
    return Target(family="cpu", platform="cpu", devices=devices)
