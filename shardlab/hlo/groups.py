"""Replica groups in all three notations, source-target pairs, and what their ids mean (HLO.md section 3).

V1 `{{0,1},{2,3}}`, V2 `[2,2]<=[2,2]T(1,0)`, V3 `mesh['x'=2,'y'=2] {'y'}`. All are expanded to tuples of ids
and memoised by their text, since large programs repeat few texts many times.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NoReturn

from shardlab.errors import ParseError
from shardlab.hlo.attributes import channel_id, instruction_error, is_true
from shardlab.hlo.lexer import Text, without_comments
from shardlab.hlo.module import Instruction

IdGroups = tuple[tuple[int, ...], ...]

MAX_IDS = 1 << 17
"""Largest number of ids that a notation may stand for: a short text must not expand without bound."""

_INT = r"[0-9]{1,18}"
_INTS = rf"\s*+{_INT}(?:\s*+,\s*+{_INT})*+\s*+"
_LIST = re.compile(rf"\{{\s*+(?:\{{(?:{_INTS}|\s*+)\}}\s*+(?:,\s*+(?=\{{)|(?=\}})))*+\}}", re.ASCII)
_GROUP = re.compile(r"\{([^{}]*)\}")
_IOTA = re.compile(rf"\[({_INTS})\]\s*<=\s*\[({_INTS})\]\s*(?:T\(({_INTS})\))?", re.ASCII)
_MAXIMAL = re.compile(rf"maximal_mesh\[device_id=({_INT})\]\s*\{{[^{{}}]*\}}", re.DOTALL | re.ASCII)
_AXIS_NAME = r"'[^']*+'|\"[^\"]*+\"|[^\s'\"=,:\[\]{}()]++"
_MESH_AXIS = re.compile(rf"\s*+({_AXIS_NAME})\s*+=\s*+({_INT})\s*+", re.ASCII)
_AXIS_REF = re.compile(rf"\s*+({_AXIS_NAME})\s*+(?::\(({_INT})\)({_INT}))?+\s*+", re.ASCII)
_IOTA_IDS = re.compile(rf"\s*\[({_INTS})\]\s*(?:T\(({_INTS})\))?\s*", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisRef:
    """A mesh axis as V3 prints it, or its middle part in [pre, size, rest]; size None: all of it."""

    name: str
    pre: int = 1
    size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Replica groups.

    groups: ids of each group in member order; empty when the text lists none (then: everything).
    notation: `V1`, `V2` or `V3`. mesh, axes: what V3 printed; the names need not be the user's.
    """

    groups: IdGroups
    notation: str
    mesh: tuple[tuple[str, int], ...] = ()
    axes: tuple[AxisRef, ...] = ()


@lru_cache(maxsize=64)
def parse_replica_groups(text: str) -> Groups:
    """Read and expand replica groups in any notation.

    Raises ParseError on anything else, on an id that is listed twice and on more than MAX_IDS ids.
    """
    text = text.strip()
    if text.startswith("mesh["):
        return _parse_mesh_groups(text)
    if maximal := _MAXIMAL.fullmatch(text):
        return Groups(groups=((int(maximal.group(1)),),), notation="V3")
    text = without_comments(text).strip()
    if iota := _IOTA.fullmatch(text):
        return Groups(groups=_iota_groups(text, *iota.groups()), notation="V2")
    if not _LIST.fullmatch(text):
        _fail(text, "not replica groups")
    groups = tuple(_ints(inner) for inner in _GROUP.findall(text[1:-1]) if inner.strip())
    _check_distinct(text, groups)
    return Groups(groups=groups, notation="V1")


@lru_cache(maxsize=64)
def parse_source_target_pairs(text: str) -> tuple[tuple[int, int], ...]:
    """Read `{{0,1},{1,0}}`; `{}` is no pair. Raises ParseError on anything else."""
    text = without_comments(text).strip()
    if not _LIST.fullmatch(text):
        _fail(text, "not source-target pairs")
    pairs = []
    for inner in _GROUP.findall(text[1:-1]):
        pair = _ints(inner)
        if len(pair) != 2:
            _fail(text, f"{{{inner}}} is not a pair")
        pairs.append((pair[0], pair[1]))
    return tuple(pairs)


def _fail(text: str, why: str) -> NoReturn:
    raise ParseError(f"{why}: {text[:80]!r}")


def _ints(text: str | None) -> tuple[int, ...]:
    return tuple(map(int, text.split(","))) if text and text.strip() else ()


def _check_distinct(text: str, groups: IdGroups) -> None:
    ids = [member for group in groups for member in group]
    if len(set(ids)) != len(ids):
        _fail(text, "an id is listed twice in the replica groups")


def _check_size(text: str, sizes: Iterable[int]) -> int:
    """The product of `sizes`, refused when an extent is 0 or the product is absurd."""
    product = math.prod(sizes)
    if not 0 < product <= MAX_IDS:
        _fail(text, f"{product} ids in the replica groups are not between 1 and {MAX_IDS}")
    return product


def _iota(text: str, dims: Sequence[int], perm: Sequence[int]) -> list[int]:
    """`arange(prod(dims)).reshape(dims).transpose(perm).ravel()`; an empty `perm` leaves the order alone."""
    size = _check_size(text, dims)
    if not perm:
        return list(range(size))
    if sorted(perm) != list(range(len(dims))):
        _fail(text, f"T({','.join(map(str, perm))}) is not a permutation of the {len(dims)} dimensions")
    strides = _strides(dims)
    return _offsets((dims[axis], strides[axis]) for axis in perm)


def _strides(dims: Sequence[int]) -> list[int]:
    """Row-major strides, in elements."""
    strides = [1] * len(dims)
    for axis in range(len(dims) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * dims[axis + 1]
    return strides


def _offsets(factors: Iterable[tuple[int, int]]) -> list[int]:
    """Offsets of all index tuples over (size, stride) factors, the last factor varying fastest."""
    offsets = [0]
    for size, stride in factors:
        offsets = [offset + index * stride for offset in offsets for index in range(size)]
    return offsets


def _iota_groups(text: str, shape: str, dims: str, perm: str | None) -> IdGroups:
    sizes = _ints(shape)
    ids = _iota(text, _ints(dims), _ints(perm))
    if len(sizes) != 2 or _check_size(text, sizes) != len(ids):
        _fail(text, "the group shape does not hold as many ids as the iota")
    members = sizes[1]
    return tuple(tuple(ids[start : start + members]) for start in range(0, len(ids), members))


def _parse_mesh_groups(text: str) -> Groups:
    """Read V3: `mesh['x'=2,'y'=4], device_ids=(…) {'y'}`. Axis names may hold any character but a quote."""
    scanner = Text(text, "replica_groups")
    mesh_end = scanner.bracket_end(len("mesh"))
    mesh = tuple(
        (_bare(name), int(size)) for name, size in _items(text, _MESH_AXIS, len("mesh["), mesh_end - 1)
    )
    offset = scanner.skip(mesh_end)
    ids_text = None
    if text.startswith(",", offset):
        start = scanner.expect(scanner.skip(offset + 1), "device_ids=", "after the mesh")
        offset = (
            scanner.bracket_end(start)
            if text.startswith("(", start)
            else _fail(text, "device_ids in no brackets")
        )
        ids_text, offset = text[start + 1 : offset - 1], scanner.skip(offset)
    end = (
        scanner.bracket_end(offset) if text.startswith("{", offset) else _fail(text, "no axes after the mesh")
    )
    if end != len(text):
        _fail(text, "more text after the axes")
    axes = tuple(_axis_ref(text, mesh, *item) for item in _items(text, _AXIS_REF, offset + 1, end - 1))
    groups = _expand_mesh(text, mesh, axes, ids_text)
    return Groups(groups=groups, notation="V3", mesh=mesh, axes=axes)


def _items(text: str, pattern: re.Pattern[str], start: int, end: int) -> list[tuple[str, ...]]:
    """Comma-separated matches of `pattern` that fill text[start:end]."""
    items: list[tuple[str, ...]] = []
    if not text[start:end].strip():
        return items
    while True:
        match = pattern.match(text, start, end)
        if not match:
            _fail(text, f"cannot read {text[start:end][:40]!r}")
        items.append(match.groups())
        if match.end() == end:
            return items
        if text[match.end()] != ",":
            _fail(text, f"cannot read {text[match.end() : end][:40]!r}")
        start = match.end() + 1


def _bare(name: str) -> str:
    return name[1:-1] if name[0] in "'\"" else name


def _axis_ref(
    text: str, mesh: Sequence[tuple[str, int]], name: str, pre: str | None, size: str | None
) -> AxisRef:
    """A quoted or bare axis name, or the axis's index in digits."""
    known = [axis for axis, _ in mesh]
    bare = _bare(name)
    if bare not in known and bare.isdigit() and int(bare) < len(known):
        bare = known[int(bare)]
    if bare not in known:
        _fail(text, f"axis {bare!r} is not in the mesh")
    if pre is not None and size is not None and (int(pre) < 1 or int(size) < 1):
        _fail(text, f"a sub-axis of {bare!r} is empty")
    return AxisRef(name=bare, pre=int(pre or 1), size=int(size) if size else None)


def _expand_mesh(
    text: str, mesh: Sequence[tuple[str, int]], axes: Sequence[AxisRef], ids_text: str | None
) -> IdGroups:
    """Lay the ids out over the mesh, move the listed (sub-)axes to the end: rows are the groups."""
    sizes = [size for _, size in mesh]
    ids = _mesh_ids(text, _check_size(text, sizes), ids_text)
    factors: list[tuple[int, int]] = []
    listed: dict[int, tuple[int, int]] = {}
    for (name, size), stride in zip(mesh, _strides(sizes), strict=True):
        refs = {index: ref for index, ref in enumerate(axes) if ref.name == name}
        for index, factor in _split_axis(text, size, stride, refs):
            if index is None:
                factors.append(factor)
            else:
                listed[index] = factor
    rows = _offsets(factors)
    columns = _offsets(listed[index] for index in sorted(listed))
    return tuple(tuple(ids[row + column] for column in columns) for row in rows)


def _mesh_ids(text: str, count: int, ids_text: str | None) -> list[int]:
    if ids_text is None:
        return list(range(count))
    iota = _IOTA_IDS.fullmatch(ids_text)
    if iota:
        ids = _iota(text, _ints(iota.group(1)), _ints(iota.group(2)))
    elif re.fullmatch(_INTS, ids_text):
        ids = list(_ints(ids_text))
    else:
        _fail(text, "cannot read device_ids")
    if len(ids) != count or len(set(ids)) != count:
        _fail(text, f"device_ids do not list {count} different ids")
    return ids


def _split_axis(
    text: str, size: int, stride: int, refs: dict[int, AxisRef]
) -> list[tuple[int | None, tuple[int, int]]]:
    """Cut one axis into (size, stride) factors, each with the reference that takes it, if any.

    A sub-axis `(pre)part` takes the middle factor of [pre, part, size / (pre * part)].
    """
    spans = sorted((ref.pre, ref.pre * (ref.size or size), index) for index, ref in refs.items())
    pieces: list[tuple[int | None, tuple[int, int]]] = []
    done = 1
    for pre, end, index in [*spans, (size, size, None)]:
        if pre % done:
            _fail(text, f"the sub-axes of an axis of {size} overlap or do not divide it")
        for taken, low, high in ((None, done, pre), (index, pre, end)):
            if high > low:
                pieces.append((taken, (high // low, stride * (size // high))))
        done = end
    return pieces


CROSS_REPLICA, CROSS_PARTITION = "cross_replica", "cross_partition"
CROSS_REPLICA_AND_PARTITION, FLATTENED_ID = "cross_replica_and_partition", "flattened_id"
_REDUCERS = ("all-reduce", "all-gather", "reduce-scatter")


def group_mode(instruction: Instruction) -> str:
    """What the ids of a collective are (XLA: collective_op_group_mode.cc).

    Raises ParseError for `use_global_device_ids=true` without a channel id, which XLA forbids.
    """
    has_global_ids = is_true(instruction, "use_global_device_ids")
    if channel_id(instruction) is None:
        if has_global_ids:
            raise instruction_error(instruction, "use_global_device_ids without channel_id")
        return CROSS_REPLICA
    if instruction.opcode.removesuffix("-start") not in _REDUCERS:
        return CROSS_PARTITION
    return FLATTENED_ID if has_global_ids else CROSS_REPLICA_AND_PARTITION


def flattened_groups(instruction: Instruction, num_replicas: int, num_partitions: int) -> IdGroups:
    """Groups of a collective as flattened positions, replica * num_partitions + partition.

    Groups that the text leaves empty are spelled out. Raises ParseError for an id that does not exist.
    """
    text, mode = instruction.attributes.get("replica_groups", "{}"), group_mode(instruction)
    try:
        return flatten(text, mode, num_replicas, num_partitions)
    except ParseError as error:
        raise instruction_error(instruction, error.message) from None


def flattened_pairs(
    instruction: Instruction, num_replicas: int, num_partitions: int
) -> tuple[tuple[int, int], ...]:
    """Source-target pairs of a permute as flattened positions: once per partition, or once per replica."""
    text, mode = instruction.attributes.get("source_target_pairs", "{}"), group_mode(instruction)
    try:
        spread = _spread(parse_source_target_pairs(text), mode, num_replicas, num_partitions)
    except ParseError as error:
        raise instruction_error(instruction, error.message) from None
    return tuple((source, target) for source, target in spread)


@lru_cache(maxsize=64)
def flatten(text: str, mode: str, num_replicas: int, num_partitions: int) -> IdGroups:
    """`flattened_groups` for the text of the groups and a group mode."""
    groups = parse_replica_groups(text).groups
    if not groups:
        if mode == FLATTENED_ID:
            _fail(text, "empty replica groups with use_global_device_ids")
        _check_size(text, (num_replicas, num_partitions))
        groups = (tuple(range(num_partitions if mode == CROSS_PARTITION else num_replicas)),)
    return _spread(groups, mode, num_replicas, num_partitions)


def _spread(groups: IdGroups, mode: str, num_replicas: int, num_partitions: int) -> IdGroups:
    """Ids of a mode to flattened ids."""
    replicas, partitions = range(num_replicas), range(num_partitions)
    limits = {CROSS_PARTITION: num_partitions, FLATTENED_ID: num_replicas * num_partitions}
    limit = limits.get(mode, num_replicas)
    highest = max((max(group) for group in groups), default=-1)
    if highest >= limit:
        raise ParseError(f"id {highest} in a collective's groups, but only {limit} exist ({mode})")
    if mode == CROSS_REPLICA:
        return tuple(tuple(r * num_partitions + p for r in group) for p in partitions for group in groups)
    if mode == CROSS_PARTITION:
        return tuple(tuple(r * num_partitions + p for p in group) for r in replicas for group in groups)
    if mode == CROSS_REPLICA_AND_PARTITION:
        return tuple(tuple(r * num_partitions + p for r in group for p in partitions) for group in groups)
    return groups
