"""Orders worth trying: ways to lay mesh axes on a machine's dimensions.

An order is made of digits. A device id counts the machine's dimensions, innermost first (cores of a chip,
torus x, y, z; devices of a domain, domains of the next); an axis is split into digits, each of which runs
along a part of one dimension. So the device at a mesh position is the sum of digit times stride.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, permutations, product

from shardlab.hardware.machine import Machine

Ids = tuple[int, ...]
Digit = tuple[int, int]  # (radix, stride in device ids)

TORUS_NAMES = ("x", "y", "z")


@dataclass(frozen=True, slots=True)
class Dim:
    """A dimension of the machine: what it is called, its devices (or domains), whether nesting in it matters.

    On a torus a group with stride 2 is not one with stride 1; in a domain all devices are alike.
    """

    name: str
    extent: int
    strides_matter: bool


@dataclass(frozen=True, slots=True)
class Layout:
    """An order and how to say it. device_ids: the device at each mesh position, row-major."""

    name: str
    device_ids: Ids


def machine_dims(machine: Machine) -> tuple[Dim, ...]:
    """The machine's dimensions of more than one, innermost first; their product is its number of devices."""
    dims = []
    if machine.torus:
        dims.append(Dim("core", machine.chip.xla_devices, False))
        dims += [Dim(name, extent, True) for name, extent in zip(TORUS_NAMES, machine.torus, strict=False)]
        inner = machine.devices_per_slice
    else:
        inner = 1
    for domain in machine.domains:
        if domain.size > inner:
            dims.append(Dim(domain.tier, domain.size // inner, False))
            inner = domain.size
    return tuple(dim for dim in dims if dim.extent > 1)


def nested(mesh: Mapping[str, int]) -> Iterator[Layout]:
    """Row-major orders of the axes in every nesting, the mesh's own first: 0 … n-1 in other sequences."""
    sizes = {axis: size for axis, size in mesh.items() if size > 1}
    for nesting in permutations(sizes):
        digits: dict[str, list[Digit]] = {}
        stride = 1
        for axis in reversed(nesting):
            digits[axis] = [(sizes[axis], stride)]
            stride *= sizes[axis]
        yield Layout(f"nested {' > '.join(nesting)}", _placed([digits[axis] for axis in sizes]))


def factored(mesh: Mapping[str, int], dims: Sequence[Dim], limit: int) -> tuple[Iterator[Layout], bool]:
    """Layouts that split axes over dimensions, few splits first, and whether these are all there are.

    limit: ways to split that are kept, after each axis.
    """
    sizes = {axis: size for axis, size in mesh.items() if size > 1}
    splits, complete = _splits(tuple(sizes.values()), tuple(dim.extent for dim in dims), limit)
    return (layout for split in splits for layout in _nestings_of(tuple(sizes), dims, split)), complete


def _placed(axes: Sequence[Sequence[Digit]]) -> Ids:
    """Digits of each axis, major to minor, to the device at each position."""
    ids = [0]
    for radix, stride in (digit for digits in axes for digit in digits):
        ids = [start + stride * step for start in ids for step in range(radix)]
    return tuple(ids)


Split = tuple[Ids, ...]  # by axis, by dimension: how much of the axis runs along it


def _splits(sizes: Ids, extents: Ids, limit: int) -> tuple[list[Split], bool]:
    """Ways to write each size as a product over the dimensions that fills every dimension."""
    kept: list[tuple[Split, Ids]] = [((), extents)]
    complete = True
    for size in sizes:
        grown = [
            ((*split, part), tuple(left // taken for left, taken in zip(free, part, strict=True)))
            for split, free in kept
            for part in _parts(size, free)
        ]
        grown.sort(key=lambda way: sum(factor > 1 for part in way[0] for factor in part))
        complete = complete and len(grown) <= limit
        kept = grown[:limit]
    return [split for split, free in kept if set(free) <= {1}], complete


def _parts(size: int, free: Ids) -> Iterator[Ids]:
    """One factor per dimension, which divides what is free of it, whose product is `size`."""
    ways: list[tuple[Ids, int]] = [((), size)]
    for extent in free:
        ways = [
            ((*part, factor), left // factor)
            for part, left in ways
            for factor in range(1, math.gcd(left, extent) + 1)
            if math.gcd(left, extent) % factor == 0
        ]
    return (part for part, left in ways if left == 1)


def _nestings_of(axes: tuple[str, ...], dims: Sequence[Dim], split: Split) -> Iterator[Layout]:
    """Every nesting of the axes that share a dimension, where nesting makes a difference."""
    sharing = [tuple(a for a in range(len(axes)) if split[a][d] > 1) for d in range(len(dims))]
    ways = [
        permutations(sharers) if dim.strides_matter else iter([sharers])
        for dim, sharers in zip(dims, sharing, strict=True)
    ]
    for nesting in product(*ways):
        digits: list[list[Digit]] = [[] for _ in axes]
        unit = 1
        for d, outer_to_inner in enumerate(nesting):
            for axis in reversed(outer_to_inner):
                digits[axis].insert(0, (split[axis][d], unit))
                unit *= split[axis][d]
        yield Layout(_split_name(axes, dims, split, nesting), _placed(digits))


def _split_name(axes: tuple[str, ...], dims: Sequence[Dim], split: Split, nesting: tuple[Ids, ...]) -> str:
    """`tensor on x, fsdp on y and z`; `fsdp on 2 of x` for a part; who is outside whom where that matters."""
    placed = []
    for axis, part in zip(axes, split, strict=True):
        along = [
            dim.name if factor == dim.extent else f"{factor} of {dim.name}"
            for dim, factor in zip(dims, part, strict=True)
            if factor > 1
        ]
        placed.append(f"{axis} on {' and '.join(along)}")
    nested_in = [
        f"{dim.name}: {' > '.join(axes[a] for a in order)}"
        for dim, order in zip(dims, nesting, strict=True)
        if dim.strides_matter and len(order) > 1
    ]
    return ", ".join(placed) + (f" ({'; '.join(nested_in)})" if nested_in else "")


def candidates(
    mesh: Mapping[str, int], machine: Machine, devices: Sequence[int], limit: int
) -> tuple[tuple[Layout, ...], bool]:
    """At most `limit` different layouts of the mesh on these devices (sorted), row-major first, and whether
    there are no others of these two families. Layouts on the machine's dimensions need all its devices.
    """
    found: dict[Ids, Layout] = {}
    families: list[Iterator[Layout]] = [nested(mesh)]
    complete = True
    if len(devices) == machine.num_devices:
        layouts, complete = factored(mesh, machine_dims(machine), limit)
        families.append(layouts)
    for position, family in enumerate(families):
        # The nestings of many axes must not leave the other family without its turn.
        room = limit // (len(families) - position) if position == 0 else limit - len(found)
        for layout in islice(family, room):
            ids = tuple(devices[index] for index in layout.device_ids)
            found.setdefault(ids, Layout(layout.name, ids))
        complete = complete and next(family, None) is None
    return tuple(found.values()), complete
