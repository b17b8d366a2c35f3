"""How devices fill the logical grid: jax.make_mesh, row-major, or a list."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from shardlab.compile.target import Target, open_target
from shardlab.errors import Problem, UserError
from shardlab.hardware.catalog import load_machine

Order = Literal["make_mesh", "row-major"] | tuple[int, ...]

# jax.make_mesh lets one physical axis serve several logical ones on these alone (jax/_src/sharding_impls.py).
_SPLITS_PHYSICAL_AXES = ("TPU v5 lite", "TPU v5e")


def fill_mesh(
    axes: Mapping[str, int], order: Order, target: Target
) -> tuple[Mesh, tuple[int, ...], tuple[str, ...]]:
    """(mesh with Auto axes, machine device id at each position in row-major order, notes).

    Raises UserError when the grid and the devices differ in number, or an explicit order is not a
    permutation.
    """
    shape = tuple(axes.values())
    _check(shape, order, len(target.devices))
    grid, notes = _grid(shape, order, target)
    index_of = {device.id: index for index, device in enumerate(target.devices)}
    device_ids = tuple(index_of[device.id] for device in grid.flat)
    mesh = Mesh(grid, tuple(axes), axis_types=(AxisType.Auto,) * len(shape))
    return mesh, device_ids, notes


def mesh_on(machine: str, axes: Mapping[str, int], order: Order = "make_mesh") -> Mesh:
    """The mesh in this process; of emulated devices the first so many.

    Raises UserError where the process has fewer, and as `open_target`.
    """
    found = load_machine(machine)
    if found.family != "cpu":
        return fill_mesh(axes, order, open_target(found))[0]
    devices = tuple(jax.devices("cpu"))
    if len(devices) < found.num_devices:
        flag = f"--xla_force_host_platform_device_count={found.num_devices}"
        fix = f"set XLA_FLAGS={flag} and JAX_PLATFORMS=cpu before jax is used (in conftest.py)"
        raise UserError(Problem(machine, f"this process has {len(devices)} emulated devices", fix))
    target = Target(family="cpu", platform="cpu", devices=devices[: found.num_devices])
    return fill_mesh(axes, order, target)[0]


def _check(shape: Sequence[int], order: Order, num_devices: int) -> None:
    if math.prod(shape) != num_devices:
        what = f"{' x '.join(map(str, shape))} = {math.prod(shape)} positions for {num_devices} devices"
        raise UserError(Problem("axes", what, "make the product of the axes the number of devices"))
    if isinstance(order, tuple) and sorted(order) != list(range(num_devices)):
        fix = f"list each of 0 … {num_devices - 1} once"
        raise UserError(Problem("order", f"not an order of the {num_devices} devices", fix))


def _grid(
    shape: tuple[int, ...], order: Order, target: Target
) -> tuple[np.ndarray[Any, Any], tuple[str, ...]]:
    if isinstance(order, tuple):
        return _array([target.devices[index] for index in order], shape), ()
    if order == "row-major":
        return _array(target.devices, shape), ()
    try:
        return _make_mesh(shape, target), ()
    except (ValueError, NotImplementedError, AssertionError) as error:  # how jax refuses a shape; it is noted
        reason = str(error).partition("\n")[0][:200]
        note = (
            f"make_mesh refuses {'x'.join(map(str, shape))} here, devices are in row-major order ({reason})"
        )
        return _array(target.devices, shape), (note,)


def _array(devices: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    grid = np.empty(len(devices), dtype=object)
    grid[:] = devices
    return grid.reshape(shape)


def _make_mesh(shape: tuple[int, ...], target: Target) -> np.ndarray[Any, Any]:
    """What jax.make_mesh does; across slices, the leading axes of product `slices` go over DCN."""
    devices = list(target.devices)
    if target.slices > 1:
        dcn_shape = _dcn_shape(shape, target.slices)
        slice_shape = [size // dcn for size, dcn in zip(shape, dcn_shape, strict=True)]
        split = devices[0].device_kind in _SPLITS_PHYSICAL_AXES
        grid = mesh_utils.create_hybrid_device_mesh(
            slice_shape, dcn_shape, devices, allow_split_physical_axes=split
        )
        return np.asarray(grid)
    names = tuple(f"axis_{i}" for i in range(len(shape)))
    mesh = jax.make_mesh(shape, names, devices=devices, axis_types=(AxisType.Auto,) * len(shape))
    return np.asarray(mesh.devices)


def _dcn_shape(shape: Sequence[int], slices: int) -> list[int]:
    """How much of each axis crosses slices: all of the leading axes until `slices` is used up.

    So a slice is one run of positions, as in row-major order. Raises ValueError when the axes do not divide
    so.
    """
    dcn_shape = [1] * len(shape)
    for i, size in enumerate(shape):
        dcn_shape[i] = math.gcd(size, slices)
        slices //= dcn_shape[i]
        if slices == 1:
            return dcn_shape
        if dcn_shape[i] != size:
            break
    raise ValueError(f"the leading axes of {tuple(shape)} cannot be split over {slices} more slices")
