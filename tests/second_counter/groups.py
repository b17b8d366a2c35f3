"""Which devices take part in a collective, and which mesh axes that is, by brute force.

Ids are flattened: replica * partitions + partition. The order inside a group carries no meaning.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

from second_counter.proto import Instruction, group, integers, message, scalar

Groups = tuple[tuple[int, ...], ...]

# Collectives whose ids are partitions (of the sender's replica), whatever use_global_device_ids says.
PARTITION_KINDS = {"all-to-all", "ragged-all-to-all", "collective-permute", "collective-broadcast"}


def listed_groups(instruction: Instruction) -> Groups:
    """The groups as written: fields 49 and 87 list ids, 92 is an iota, 93 names mesh axes; () when empty."""
    raw = instruction.raw
    wrapper = group(message(raw, 87) or b"")
    iota = message(raw, 92) or message(wrapper, 2)
    mesh_axes = message(raw, 93)
    if mesh_axes is not None:
        return mesh_groups(mesh_axes)
    if iota is not None:
        return iota_groups(iota)
    lists = raw.get(49) or wrapper.get(1, [])
    return tuple(tuple(integers(group(ids).get(1, []))) for ids in lists if isinstance(ids, bytes))


def iota_groups(data: bytes) -> Groups:
    """IotaReplicaGroupListProto: 1 groups, 2 devices per group, 3 reshape dims, 4 transpose permutation."""
    raw = group(data)
    dims = integers(raw.get(3, []))
    order = integers(raw.get(4, [])) or list(range(len(dims)))
    ids = transposed(range(math.prod(dims)), dims, order)
    return chunks(ids, scalar(raw, 2))


def mesh_groups(data: bytes) -> Groups:
    """MeshAxesReplicaGroupListProto: 1 mesh {1 axes {2 size}, 2 device ids, 3 iota {1 dims, 2 order}}, 2 axes
    {1 index, 2 sub-axis}.
    """
    raw = group(data)
    mesh = group(message(raw, 1) or b"")
    sizes = [scalar(group(axis), 2) for axis in mesh.get(1, []) if isinstance(axis, bytes)]
    ids = integers(mesh.get(2, [])) or list(range(math.prod(sizes)))
    iota = group(message(mesh, 3) or b"")
    if iota:
        dims = integers(iota.get(1, []))
        ids = transposed(ids, dims, integers(iota.get(2, [])) or list(range(len(dims))))
    wanted = [axis_factors(axis, sizes) for axis in raw.get(2, []) if isinstance(axis, bytes)]
    # Split each axis at every border of a sub-axis in use, then move the wanted pieces to the end.
    cuts = [{1, size} for size in sizes]
    for axis, pre, part in wanted:
        cuts[axis] |= {pre, pre * part}
    pieces = [
        (axis, low, high // low)
        for axis, cut in enumerate(cuts)
        for low, high in itertools.pairwise(sorted(cut))
    ]
    inner = [
        pieces.index(piece)
        for axis, pre, part in wanted
        for piece in pieces
        if piece[0] == axis and pre <= piece[1] < pre * part
    ]
    outer = [index for index in range(len(pieces)) if index not in inner]
    group_size = math.prod(part for _, _, part in wanted)
    return chunks(transposed(ids, [size for _, _, size in pieces], outer + inner), group_size)


def axis_factors(data: bytes, sizes: Sequence[int]) -> tuple[int, int, int]:
    """An AxisRefProto as (axis index, product of the more major factors, size)."""
    raw = group(data)
    axis = scalar(raw, 1)
    sub_axis = message(raw, 2)
    if sub_axis is None:
        return axis, 1, sizes[axis]
    info = group(sub_axis)
    return axis, scalar(info, 1), scalar(info, 2)


def transposed(ids: Sequence[int], dims: Sequence[int], order: Sequence[int]) -> list[int]:
    """`ids`, laid out over `dims` row-major, read after a transpose of the dimensions to `order`."""
    strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    result = [0]
    for dimension in order:
        result = [base + k * strides[dimension] for base in result for k in range(dims[dimension])]
    return [ids[position] for position in result]


def chunks(ids: Sequence[int], size: int) -> Groups:
    return tuple(tuple(ids[start : start + size]) for start in range(0, len(ids), size))


def device_groups(instruction: Instruction, kind: str, replicas: int, partitions: int) -> Groups:
    """The groups as flattened ids: channel and flag say what the listed ids mean."""
    listed = listed_groups(instruction)
    has_channel = scalar(instruction.raw, 26) > 0
    if not has_channel:  # ids are replicas, the groups of one partition
        listed = listed or (tuple(range(replicas)),)
        return tuple(tuple(r * partitions + p for r in ids) for p in range(partitions) for ids in listed)
    if kind in PARTITION_KINDS:
        listed = listed or (tuple(range(partitions)),)
        return tuple(tuple(r * partitions + p for p in ids) for r in range(replicas) for ids in listed)
    if scalar(instruction.raw, 71):
        return listed
    listed = listed or (tuple(range(replicas)),)
    return tuple(tuple(r * partitions + p for r in ids for p in range(partitions)) for ids in listed)


def prime_factors(size: int) -> Iterator[int]:
    divisor = 2
    while size > 1:
        while size % divisor == 0:
            yield divisor
            size //= divisor
        divisor += 1


class Axes:
    """Names the mesh axes of device groups by trying sets of axes until the same device sets come out."""

    def __init__(self, mesh: Mapping[str, int]) -> None:
        self.mesh = {name: size for name, size in mesh.items() if size > 1}
        self.size = math.prod(self.mesh.values())
        self._known: dict[Groups, str] = {}

    def name(self, groups: Groups) -> str:
        """`data+model`, `data:(1)2` for part of an axis, `` for groups of one, `unknown` if nothing fits."""
        if groups not in self._known:
            self._known[groups] = self._search({frozenset(ids) for ids in groups if len(ids) > 1})
        return self._known[groups]

    def _search(self, wanted: set[frozenset[int]]) -> str:
        if not wanted:
            return ""
        whole = [(name, 1, size) for name, size in self.mesh.items()]
        split = [
            (name, math.prod(factors[:i]), factors[i])
            for name, size in self.mesh.items()
            for factors in [list(prime_factors(size))]
            for i in range(len(factors))
        ]
        for pieces in (whole, split):
            for count in range(1, len(pieces) + 1):
                for chosen in itertools.combinations(range(len(pieces)), count):
                    if self._fits(wanted, [size for _, _, size in pieces], chosen):
                        return self._label([pieces[i] for i in chosen])
        return "unknown"

    def _fits(self, wanted: set[frozenset[int]], dims: list[int], chosen: tuple[int, ...]) -> bool:
        """Whether the groups that vary exactly the chosen pieces include every wanted group."""
        size = math.prod(dims[i] for i in chosen)
        sample = next(iter(wanted))
        if len(sample) != size or max(sample) >= self.size:
            return False
        rest = [i for i in range(len(dims)) if i not in chosen]
        made = chunks(transposed(range(self.size), dims, [*rest, *chosen]), size)
        return wanted <= {frozenset(ids) for ids in made}

    def _label(self, pieces: list[tuple[str, int, int]]) -> str:
        """Adjacent factors of one axis are written as one sub-axis, a whole axis by its name."""
        merged: list[tuple[str, int, int]] = []
        for name, pre, size in pieces:
            if merged and merged[-1][0] == name and merged[-1][1] * merged[-1][2] == pre:
                merged[-1] = (name, merged[-1][1], merged[-1][2] * size)
            else:
                merged.append((name, pre, size))
        return "+".join(
            name if size == self.mesh[name] else f"{name}:({pre}){size}" for name, pre, size in merged
        )

    def spanned(self, pairs: Sequence[tuple[int, int]]) -> str:
        """The axes on which the two ends of any pair differ."""
        strides = {name: math.prod(list(self.mesh.values())[i + 1 :]) for i, name in enumerate(self.mesh)}
        if any(max(pair) >= self.size for pair in pairs):
            return "unknown"
        return "+".join(
            name
            for name, size in self.mesh.items()
            if any(a // strides[name] % size != b // strides[name] % size for a, b in pairs)
        )
