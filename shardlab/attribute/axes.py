"""Which mesh axes a set of devices spans: compared with the mesh by positions, never by the names in the
text.

Positions count the mesh row-major, axes major to minor (HLO.md section 3.4). A part of an axis is written as
Shardy
does: `fsdp:(8)8` is the minor 8 of a 64-way axis whose major part is 8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Groups = Sequence[Sequence[int]]
Pairs = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Axes:
    """names: axes in mesh order; () when nothing varies; None when no axes fit, and then `reason` says
    why.
    """

    names: tuple[str, ...] | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class _Part:
    """Every `stride`-th coordinate of an axis, `size` of them, aligned."""

    stride: int
    size: int


@dataclass(frozen=True, slots=True)
class _Axis:
    name: str
    size: int
    stride: int  # positions from one coordinate to the next


def axes_of_groups(groups: Groups, mesh: Mapping[str, int]) -> Axes:
    """The axes and parts of axes that vary inside every group, when the groups are their product."""
    real = [group for group in groups if len(group) > 1]
    if not real:
        return Axes(())
    sizes = sorted({len(group) for group in groups})
    if len(sizes) > 1:
        return Axes(None, f"groups of different sizes ({', '.join(map(str, sizes))})")
    axes = _axes(mesh)
    shapes = {_shape(group, axes) for group in real}
    shape = shapes.pop()
    if shapes or shape is None:
        return Axes(
            None, f"groups vary over {_varying(real, axes)} but are not a product of axes or parts of axes"
        )
    return Axes(tuple(name for axis, parts in zip(axes, shape, strict=True) for name in _names(axis, parts)))


def axes_of_pairs(pairs: Pairs, mesh: Mapping[str, int]) -> Axes:
    """The union of the axes on which the source and the target of a pair differ."""
    axes = _axes(mesh)
    differing = [
        axis.name
        for axis in axes
        if any(a // axis.stride % axis.size != b // axis.stride % axis.size for a, b in pairs)
    ]
    return Axes(tuple(differing))


def _axes(mesh: Mapping[str, int]) -> list[_Axis]:
    stride = math.prod(mesh.values())
    axes = []
    for name, size in mesh.items():
        stride //= size
        if size > 1:
            axes.append(_Axis(name, size, stride))
    return axes


def _shape(group: Sequence[int], axes: Sequence[_Axis]) -> tuple[tuple[_Part, ...], ...] | None:
    """Per axis the parts that vary in the group, major to minor; None when the group is not their product."""
    shape = []
    members = 1
    for axis in axes:
        coordinates = sorted({position // axis.stride % axis.size for position in group})
        parts = _parts(coordinates, axis.size)
        if parts is None:
            return None
        members *= len(coordinates)
        shape.append(parts)
    return tuple(shape) if members == len(group) == len(set(group)) else None


def _parts(coordinates: Sequence[int], extent: int) -> tuple[_Part, ...] | None:
    """Coordinates as a base plus a product of strided runs, each aligned to its own period; None if they are
    not.
    """
    base = coordinates[0]
    offsets = [coordinate - base for coordinate in coordinates]
    parts: list[_Part] = []
    block = 1  # offsets explained so far
    while block < len(offsets):
        stride = offsets[block]
        size = _run(offsets, block, stride)
        period = parts[-1].stride * parts[-1].size if parts else 1
        if not size or stride % period or extent % (stride * size) or base // stride % size:
            return None
        parts.append(_Part(stride, size))
        block *= size
    return tuple(reversed(parts))


def _run(offsets: Sequence[int], block: int, stride: int) -> int:
    """How often the first `block` offsets repeat, `stride` apart, before something else comes; 0 if they do
    not.
    """
    count = 1
    while (count + 1) * block <= len(offsets) and all(
        offsets[count * block + i] == offsets[i] + count * stride for i in range(block)
    ):
        count += 1
    return count if count > 1 and len(offsets) % (count * block) == 0 else 0


def _names(axis: _Axis, parts: tuple[_Part, ...]) -> list[str]:
    if parts == (_Part(1, axis.size),):
        return [axis.name]
    return [f"{axis.name}:({axis.size // (part.stride * part.size)}){part.size}" for part in parts]


def _varying(groups: Groups, axes: Sequence[_Axis]) -> str:
    pairs = [(group[0], member) for group in groups for member in group]
    found = [
        axis.name
        for axis in axes
        if any(a // axis.stride % axis.size != b // axis.stride % axis.size for a, b in pairs)
    ]
    return ", ".join(found)
