"""Rules about all-reduces: one that is sliced and could be a reduce-scatter, one that is an all-gather."""

from __future__ import annotations

from collections.abc import Iterator

from shardlab.analysis import CollectiveRow
from shardlab.attribute.collectives import Collective
from shardlab.audit.findings import Audited, Finding, finding
from shardlab.audit.flow import Use, Value
from shardlab.audit.positions import tiles
from shardlab.hlo.module import Shape

_ON_CPU = "Compile for the real target: XLA:CPU makes no reduce-scatters, XLA:TPU and XLA:GPU do."
_SCATTER = (
    "Constrain the result to the slice's sharding (or use psum_scatter), so that XLA makes a reduce-scatter."
)


def reduced_then_sliced(audited: Audited) -> Iterator[Finding]:
    """An all-reduce of which each device of the group keeps its own 1/n: a reduce-scatter sends half."""
    for collective, row in audited.of_kind("all-reduce"):
        for part in audited.parts(collective, row):
            uses = audited.uses(collective, part)
            if not uses or not all(_keeps_its_part(audited, collective, row, use) for use in uses):
                continue
            yield finding(
                "reduced-then-sliced",
                row,
                part.wire_bytes / 2,
                evidence=f"only {uses[0].instruction.name} uses the sum, and each of the {row.group_size} "
                f"devices of a group keeps another 1/{row.group_size} of it.",
                remedy=_ON_CPU if audited.backend == "cpu" else _SCATTER,
            )


def _keeps_its_part(audited: Audited, collective: Collective, row: CollectiveRow, use: Use) -> bool:
    instruction = use.instruction
    if instruction.opcode != "dynamic-slice" or use.position != 0 or use.shape is None:
        return False
    return _shared_out(audited, collective, row, use, (use.shape, instruction.shape), first=1)


def _shared_out(
    audited: Audited,
    collective: Collective,
    row: CollectiveRow,
    use: Use,
    shapes: tuple[Shape, Shape],
    first: int,
) -> bool:
    """Whether a slice (or update) is smaller in one dimension only, and the group's slices make the whole.

    shapes: of the whole and of the slice. first: which operand is the index of the first dimension.
    """
    whole, part = (shape.dims for shape in shapes)
    differing = [position for position, (a, b) in enumerate(zip(whole, part, strict=False)) if a != b]
    if len(differing) != 1 or len(whole) != len(part):
        return False
    (dimension,) = differing
    extent, size = whole[dimension], part[dimension]
    start = audited.flow.operand(Value(use.place, use.instruction.name), first + dimension)
    if extent is None or size is None or start is None or size * row.group_size != extent:
        return False
    return tiles(audited.flow, audited.module, collective.instruction, start, extent, size)


def gathered_by_reduction(audited: Audited) -> Iterator[Finding]:
    """An all-reduce of shards padded with zeros, each at its own place: an all-gather at twice the bytes.

    libtpu does this for gathers over a whole torus.
    """
    for collective, row in audited.of_kind("all-reduce"):
        for part in audited.parts(collective, row):
            update = audited.flow.origin(part.operand)
            if not _is_padded_shard(audited, collective, row, update):
                continue
            yield finding(
                "gathered-by-reduction",
                row,
                part.wire_bytes / 2,
                evidence=f"{update.name} writes this device's 1/{row.group_size} into zeros, so the sum over "
                "the group is an all-gather.",
                remedy="Ask for an all-gather; where the compiler made this of one, shard over fewer devices "
                "(not the whole torus).",
            )


def _is_padded_shard(audited: Audited, collective: Collective, row: CollectiveRow, update: Value) -> bool:
    flow = audited.flow
    instruction = flow.instruction(update)
    if instruction is None or instruction.opcode != "dynamic-update-slice":
        return False
    into, shard = flow.operand(update, 0), flow.operand(update, 1)
    shape = flow.shape(shard) if shard is not None else None
    if into is None or shape is None or not _is_zero(audited, into):
        return False
    use = Use(update.place, instruction, 1, shape)
    return _shared_out(audited, collective, row, use, (instruction.shape, shape), first=2)


def _is_zero(audited: Audited, value: Value) -> bool:
    """A constant zero, or a broadcast of one."""
    flow = audited.flow
    made = flow.origin(value)
    instruction = flow.instruction(made)
    if instruction is not None and instruction.opcode == "broadcast":
        operand = flow.operand(made, 0)
        instruction = flow.instruction(flow.origin(operand)) if operand is not None else None
    if instruction is None or instruction.opcode != "constant":
        return False
    try:
        return float(instruction.literal or "") == 0
    except ValueError:
        return False
