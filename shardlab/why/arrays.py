"""What a collective does to the sharding of its arrays, as far as the compiled text says.

Compiled text has the shape that one device holds, not the sharding of the whole: a gather shows which
dimension was split, and over which devices; how the others are split stands nowhere in it.
"""

from __future__ import annotations

from collections.abc import Sequence

from shardlab.analysis import CollectiveRow
from shardlab.attribute.collectives import Collective
from shardlab.hlo.attributes import computation_names
from shardlab.hlo.module import Module, Shape
from shardlab.hlo.shape import array_leaves, format_shape
from shardlab.why.records import UNKNOWN, Change

_SUMS = {"add": "sums", "maximum": "maxima", "minimum": "minima", "and": "conjunctions", "or": "disjunctions"}


def shapes(module: Module, collective: Collective) -> list[tuple[Shape | None, Shape | None]]:
    """Each array of a collective, what a device gives and what it gets; None where it is not known."""
    instruction = collective.instruction
    instructions = module.computations[collective.computation].instructions
    given: list[Shape | None] = []
    for operand in instruction.operands:
        shape: Shape | None = instructions[operand.name].shape if operand.name in instructions else None
        for position in operand.index:
            shape = shape.leaves[position] if shape is not None and position < len(shape.leaves) else None
        given += array_leaves(shape) if shape is not None else [None]
    result = instruction.shape
    if instruction.opcode.endswith("-start") and len(result.leaves) >= 2:
        result = result.leaves[1]  # (operands, results, …)
    got: list[Shape | None] = [*array_leaves(result)]
    got = got if len(got) == len(given) else [None] * len(given)
    return list(zip(given, got, strict=True))


def change_of(
    module: Module,
    collective: Collective,
    row: CollectiveRow,
    pair: tuple[Shape | None, Shape | None],
    arrays: tuple[str, ...],
) -> Change:
    """What happens to one array."""
    over = " and ".join(row.axes) if row.axes else f"devices ({row.axes_reason or 'no mesh axis'})"
    dimension = _dimension(collective)
    before, after = _told(row.kind, over, dimension, row.group_size, _reduction(module, collective))
    if collective.instruction.opcode.removesuffix("-start") != row.kind and row.kind == "reduce-scatter":
        after = (
            f"{after.partition(',')[0]}, one part of it on each of the {row.group_size}; a fusion keeps it"
        )
    return Change(*_side(pair[0], before), *_side(pair[1], after), arrays)


def _side(shape: Shape | None, told: str) -> tuple[str, str]:
    return (UNKNOWN if shape is None else format_shape(shape), told)


def _told(kind: str, over: str, dimension: str | None, size: int, reduced: str) -> tuple[str, str]:
    split = f"dimension {dimension} split {size} ways over {over}" if dimension else f"split over {over}"
    whole = f"whole along dimension {dimension} over {over}" if dimension else f"whole over {over}"
    partial = f"partial {reduced} on each of {size} devices of {over}"
    known = {
        "all-gather": (split, whole),
        "all-reduce": (partial, f"reduced, the same on all {size} devices of {over}"),
        "reduce-scatter": (partial, f"reduced, {split}"),
        "all-to-all": (f"one dimension split over {over}", f"another dimension split over {over}"),
        "ragged-all-to-all": (f"rows by owner over {over}", f"rows by destination over {over}"),
        "collective-broadcast": (f"on one device of {over}", f"the same on all devices of {over}"),
        "collective-permute": ("as after, on another device", f"moved to another device of {over}"),
        "send": ("as after, on another device", f"moved to another device of {over}"),
    }
    return known.get(kind, (UNKNOWN, UNKNOWN))


def _dimension(collective: Collective) -> str | None:
    text = collective.instruction.attributes.get("dimensions", "").strip("{} ")
    return text if text.isdecimal() else None


def _reduction(module: Module, collective: Collective) -> str:
    """`sums`, or what else the reduction's computation makes."""
    names = computation_names(collective.instruction, "to_apply")
    computation = module.computations.get(names[0]) if names else None
    root = computation.instructions.get(computation.root) if computation is not None else None
    return _SUMS.get(root.opcode if root is not None else "", "results")


def text_of(collective: Collective, pairs: Sequence[tuple[Shape | None, Shape | None]]) -> str:
    """The instruction in a line: shapes without layouts, and the attributes that matter here."""
    instruction = collective.instruction
    given = ", ".join(
        f"{UNKNOWN if pair[0] is None else format_shape(pair[0])} %{operand.name}"
        for operand, pair in zip(instruction.operands, pairs, strict=False)
    )
    got = ", ".join(UNKNOWN if pair[1] is None else format_shape(pair[1]) for pair in pairs)
    kept = ("dimensions", "replica_groups", "source_target_pairs", "channel_id")
    attributes = [f"{name}={instruction.attributes[name]}" for name in kept if name in instruction.attributes]
    result = f"({got})" if len(pairs) != 1 else got
    return ", ".join([f"%{instruction.name} = {result} {instruction.opcode}({given})", *attributes])
