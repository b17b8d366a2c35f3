"""Rules about all-gathers: too wide, twice, mostly thrown away, once per trip of a loop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

from shardlab.analysis import CollectiveRow
from shardlab.attribute.collectives import Collective
from shardlab.attribute.origin import source_of
from shardlab.audit.findings import Audited, Finding, Part, finding
from shardlab.audit.flow import Use
from shardlab.audit.loops import steady_loops
from shardlab.hlo.attributes import metadata
from shardlab.hlo.module import Instruction, Shape

_FLOAT_BITS = {"f64": 64, "f32": 32, "bf16": 16, "f16": 16, "f8e4m3fn": 8, "f8e5m2": 8}


def gathered_wide(audited: Audited) -> Iterator[Finding]:
    """A gather of floats that every user converts to a narrower type at once: convert first, gather half.

    Not where XLA:CPU widened the collective by itself: its own converts carry no op_name.
    """
    for collective, row in audited.of_kind("all-gather"):
        if collective.logical is not None:
            continue
        for part in audited.parts(collective, row):
            narrow = _converted_to(audited, part)
            if narrow is None:
                continue
            saved = part.wire_bytes * (1 - Fraction(_FLOAT_BITS[narrow], _FLOAT_BITS[part.shape.dtype]))
            yield finding(
                "gathered-wide",
                row,
                saved,
                evidence=f"{_text(part.shape)} shards are gathered in {part.shape.dtype}, "
                f"and every use of the result converts it to {narrow}.",
                remedy=f"Convert to {narrow} before the gather: cast, then constrain the sharding.",
            )


def _converted_to(audited: Audited, part: Part) -> str | None:
    wide = _FLOAT_BITS.get(part.shape.dtype)
    uses = list(audited.flow.uses(part.value))
    types = {use.instruction.shape.dtype for use in uses}
    if wide is None or len(types) != 1 or any(use.instruction.opcode != "convert" for use in uses):
        return None
    if audited.backend not in ("tpu", "gpu") and not all(metadata(use.instruction).op_name for use in uses):
        return None
    (narrow,) = types
    return narrow if _FLOAT_BITS.get(narrow, wide) < wide else None


def gathered_twice(audited: Audited) -> Iterator[Finding]:
    """The same tensor gathered again over the same groups, in one computation and one phase.

    A gather that is repeated in the backward pass, or for rematerialization, is the plan's own choice.
    """
    first: dict[tuple[object, ...], CollectiveRow] = {}
    for collective, row in audited.of_kind("all-gather"):
        if row.recompute:
            continue
        for part in audited.parts(collective, row):
            key = _gathered(audited, collective, row, part)
            before = first.setdefault(key, row)
            if before is row:
                continue
            yield finding(
                "gathered-twice",
                row,
                part.wire_bytes,
                evidence=f"{before.name} has gathered the same {_text(part.shape)} shards "
                "over the same groups.",
                remedy="Use the first result again: gather once, before both uses.",
            )


def _gathered(audited: Audited, collective: Collective, row: CollectiveRow, part: Part) -> tuple[object, ...]:
    """Equal for gathers that give equal arrays: tensor (through converts), shape, groups, dimension."""
    attributes = collective.instruction.attributes
    said = tuple(attributes.get(key, "") for key in ("replica_groups", "dimensions", "use_global_device_ids"))
    value, types = audited.flow.origin(part.operand), []
    while (made := audited.flow.instruction(value)) is not None and made.opcode == "convert":
        types.append(made.shape.dtype)
        before = audited.flow.operand(value, 0)
        if before is None:
            break
        value = audited.flow.origin(before)
    return collective.outermost, row.phase, said, value, tuple(types), part.shape.dtype, part.shape.dims


def gathered_then_sliced(audited: Audited) -> Iterator[Finding]:
    """A gathered array of which only slices are used, together smaller than half of it.

    A slice in a loop counts on every trip, since each may take another part.
    """
    for collective, row in audited.of_kind("all-gather"):
        for part in audited.parts(collective, row):
            full = _elements(part.shape) * row.group_size
            uses = audited.uses(collective, part)
            kept = [_kept(audited, row, use) for use in uses]
            total = sum(one for one in kept if one is not None)
            if not full or not uses or None in kept or 2 * total >= full:
                continue
            # A device needs no more than what it keeps.
            needed = part.wire_bytes * row.group_size / (row.group_size - 1) * total / full
            yield finding(
                "gathered-then-sliced",
                row,
                part.wire_bytes - needed,
                evidence=f"of the gathered array only {uses[0].instruction.name}"
                f"{' and others' if len(uses) > 1 else ''} is used: "
                f"{float(100 * total / full):.3g} % of its elements.",
                remedy="Slice before the gather, or give the result the sharding of the slice, "
                "so that only the part is moved.",
            )


def _kept(audited: Audited, row: CollectiveRow, use: Use) -> Fraction | None:
    """Elements that a slice takes for one execution of the gather; None when it is no slice, or unknown."""
    if use.instruction.opcode.removesuffix("-start") not in ("slice", "dynamic-slice") or use.position != 0:
        return None
    (low, high), (runs, most) = row.executions, audited.runs(use.place)
    if low != high or runs != most or not low:
        return None
    shape = use.instruction.shape
    if shape.dtype == "tuple":  # of a start: its operands, what its done gives, and more
        shape = shape.leaves[1] if len(shape.leaves) > 1 else shape
    return Fraction(_elements(shape) * runs, low) if _elements(shape) else None


def _elements(shape: Shape) -> int:
    """Elements of an array; 0 where that is not known."""
    extents = [extent for extent in shape.dims if extent is not None]
    known = len(extents) == len(shape.dims) and not shape.bounded and shape.dtype != "tuple"
    return math.prod(extents) if known else 0


def gathered_every_trip(audited: Audited) -> Iterator[Finding]:
    """A gather in a loop that gives the same on every trip: weights gathered once per microbatch.

    One finding for all the arrays of a gather that stay the same in the same loops.
    """
    for collective, row in audited.of_kind("all-gather"):
        steady: dict[tuple[str, int], list[Part]] = {}
        for part in audited.parts(collective, row):
            loops = steady_loops(audited, collective.outermost, part.operand)
            trips = math.prod(trips for _, trips in loops)
            if trips > 1:
                names = ", ".join(_loop_name(audited, loop) for loop, _ in loops)
                steady.setdefault((names, trips), []).append(part)
        for (names, trips), parts in steady.items():
            once_bytes = sum((part.wire_bytes for part in parts), Fraction(0))
            shapes = ", ".join(dict.fromkeys(_text(part.shape) for part in parts))
            yield finding(
                "gathered-every-trip",
                row,
                once_bytes * (1 - Fraction(1, trips)),
                evidence=f"{shapes} shards are gathered on each of {trips} trips of {names}, "
                "which does not change them.",
                remedy="Gather before the loop where memory allows, or take fewer and larger microbatches.",
            )


def _loop_name(audited: Audited, loop: Instruction) -> str:
    """`while.7 (train.py:12)`."""
    source = source_of(audited.module, metadata(loop))
    return f"{loop.name} ({source})" if source else loop.name


def _text(shape: Shape) -> str:
    return f"{shape.dtype}[{','.join('?' if extent is None else str(extent) for extent in shape.dims)}]"
