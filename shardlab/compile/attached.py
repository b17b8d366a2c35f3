"""Whatever jax.devices() has: the target that is really there."""

from __future__ import annotations

import jax

from shardlab.compile.target import Target
from shardlab.hardware.machine import Machine

_PLATFORMS = {"gpu": "cuda", "tpu": "tpu", "cpu": "cpu"}


def open_target(machine: Machine) -> Target:
    """This process's devices, by id. A real GPU compile is autotuned, unlike one ahead of time."""
    devices = tuple(sorted(jax.devices(), key=lambda device: int(device.id)))
    family = str(devices[0].platform)
    has_coords = all(hasattr(device, "coords") for device in devices)
    return Target(
        family=family,
        platform="rocm"
        if "rocm" in str(devices[0].client.platform_version).lower()
        else _PLATFORMS.get(family, family),
        devices=devices,
        coords=tuple(tuple(device.coords) for device in devices) if has_coords else None,
        autotuned=True if family == "gpu" else None,
    )
