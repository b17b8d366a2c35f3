"""A target as jax sees it: devices in the machine's order, and the platform to lower for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shardlab.hardware.machine import Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Devices of one machine, real or compile-only.

    family: what the program is for (`cpu`, `gpu`, `tpu`). platform: jax's lowering platform (`cpu`, `cuda`,
    `tpu`). devices: jax devices by machine device id (hardware/machine.py); coords: their torus coordinates,
    same order. slices: how many equal runs of `devices` are joined only by DCN. autotuned: as in `Program`.
    """

    family: str
    platform: str
    devices: tuple[Any, ...]
    coords: tuple[tuple[int, ...], ...] | None = None
    slices: int = 1
    autotuned: bool | None = None


def open_target(machine: Machine) -> Target:
    """The target for a machine, in this process. Raises TargetMissing or CompileFailed when there is none."""
    from shardlab.compile import attached, cpu, gpu, tpu

    families: dict[str, Callable[[Machine], Target]] = {
        "cpu": cpu.open_target,
        "gpu": gpu.open_target,
        "tpu": tpu.open_target,
        "attached": attached.open_target,
    }
    return families[machine.family](machine)
