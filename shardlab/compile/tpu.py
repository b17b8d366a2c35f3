"""Any TPU, compiled by the libtpu wheel alone: no TPU, no metadata server."""

from __future__ import annotations

from typing import Any

from jax.experimental import topologies

from shardlab.compile.target import Target
from shardlab.errors import CompileFailed
from shardlab.hardware.machine import Machine

# libtpu numbers the devices of slice s from (s + 1) * 100000 when there are several slices.
_SLICE_STRIDE = 100_000


def open_target(machine: Machine) -> Target:
    """Compile-only devices of a TPU machine. Raises CompileFailed when libtpu does not know the topology."""
    name = f"{machine.chip.compile_as}:{'x'.join(str(extent) for extent in machine.torus)}"
    options: dict[str, Any] = {"num_slices": machine.slices} if machine.slices > 1 else {}
    if machine.chip.compile_as == "v4":
        # Without it libtpu compiles for two devices a chip, a machine that nobody runs.
        options["chip_config_name"] = "megacore"
    try:
        described = topologies.get_topology_desc(name, "tpu", **options).devices
    except Exception as error:  # jaxlib raises its own types, which differ between versions
        raise CompileFailed(machine.spec, f"libtpu refuses topology {name}: {error}") from None
    if len(described) != machine.num_devices:
        raise CompileFailed(
            machine.spec, f"libtpu has {len(described)} devices for {name}, not {machine.num_devices}"
        )
    per_slice = len(described) // machine.slices
    devices = tuple(sorted(described, key=lambda device: device_index(device, per_slice)))
    coords = tuple(tuple(device.coords) for device in devices)
    return Target(family="tpu", platform="tpu", devices=devices, coords=coords, slices=machine.slices)


def device_index(device: Any, per_slice: int) -> int:
    """Index in the machine: slice * devices per slice + id in the slice (x fastest, then y, z; cores of a
    chip last).

    The id within a slice agrees with the coordinates, though the order of jax's device list does not: that
    goes process by process. tests/compile/test_targets.py checks both.
    """
    if device.id < _SLICE_STRIDE:
        return int(device.id)
    slice_index = device.id // _SLICE_STRIDE - 1
    return int(slice_index * per_slice + device.id % _SLICE_STRIDE)
