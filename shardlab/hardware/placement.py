"""Where a device sits: its domain at each level, its torus coordinates. Device ids as in `machine.py`."""

from __future__ import annotations

from collections.abc import Iterable

from shardlab.hardware.machine import Machine


def domain_index(machine: Machine, device_id: int, level: int) -> int:
    """Which domain of this level (0 is the innermost) holds the device; equal indices are in one domain."""
    return _checked(machine, device_id) // machine.domains[level].size


def spanning_level(machine: Machine, device_ids: Iterable[int]) -> int | None:
    """The innermost level whose one domain holds all these devices; None for fewer than two devices."""
    devices = {_checked(machine, device_id) for device_id in device_ids}
    if len(devices) < 2:
        return None
    for level, domain in enumerate(machine.domains):
        if len({device // domain.size for device in devices}) == 1:
            return level
    raise ValueError(f"{machine.spec}: no domain holds all devices")


def slice_index(machine: Machine, device_id: int) -> int:
    """The TPU slice of a device; 0 where there are no slices."""
    return _checked(machine, device_id) // machine.devices_per_slice


def torus_coords(machine: Machine, device_id: int) -> tuple[int, ...]:
    """The chip's coordinates within its slice, (x, y[, z]); () without a torus.

    Chips count with x fastest, and the devices of one chip follow each other: what libtpu's topology
    descriptions do for v4, v5e, v5p, v6e and tpu7x (`device.coords` by `device.id`).
    """
    chip = _checked(machine, device_id) % machine.devices_per_slice // machine.chip.xla_devices
    coords = []
    for extent in machine.torus:
        coords.append(chip % extent)
        chip //= extent
    return tuple(coords)


def core_on_chip(machine: Machine, device_id: int) -> int:
    """Which of the chip's JAX devices this is: 0 or 1 on tpu7x, else 0."""
    return _checked(machine, device_id) % machine.chip.xla_devices


def _checked(machine: Machine, device_id: int) -> int:
    if not 0 <= device_id < machine.num_devices:
        raise ValueError(f"{machine.spec} has devices 0 to {machine.num_devices - 1}, not {device_id}")
    return device_id
