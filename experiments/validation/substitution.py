"""One program for rows that differ in how many layers and microbatches they have.

Such a program is compiled with numbers of both that no other extent of it is like: `SHARED_LAYERS` on each
stage, `SHARED_MICROBATCHES`. Its layers are scanned, so that the number of layers is the trip count of the
layer loops and an extent of the stacks of weights, gradients and optimizer state; the number of microbatches
is the trip count of the accumulation loop, or chooses the table of a pipeline's ticks. Both are put into the
text. `tests/experiments/test_substitution.py` holds it against programs that were compiled for their counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shardlab.spec.schedule import make_schedule
from shardlab.spec.stages import StageLayout, split_layers
from shardlab.spec.tick_table import TickTable, Transfer, tick_table

SHARED_LAYERS = 23  # on each stage: prime, and no factor of a width, a vocabulary or a batch
SHARED_MICROBATCHES = 13
_SHAPE = re.compile(r"\b((?:pred|bf16|[fsu]\d+\w*)\[)([0-9,]+)(\])")
_SIZES = re.compile(r"(dynamic_slice_sizes=\{)([0-9,]+)(\})")
_TABLE = re.compile(r"(= s32\[)([0-9,]+)(\]\S* constant\()(\{[^()]*\})(\))")


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What a row has of each. layers: on one stage. stages: 1 without a pipeline. data: ways of data
    parallelism (`data_ways.py`), None where the program has its own. machine: the row's own."""

    layers: int
    microbatches: int
    stages: int = 1
    data: int | None = None
    machine: str = ""


def with_counts(text: str, counts: Counts) -> str:
    """The text of a shared program with a row's numbers in the place of the shared ones.

    Raises ValueError where it is no shared program.
    """
    text = _with_layers(text, counts.layers)
    if counts.stages > 1:
        return _with_ticks(text, counts.stages, counts.microbatches)
    return _with_trips(text, SHARED_MICROBATCHES, counts.microbatches)


def _with_trips(text: str, shared: int, count: int) -> str:
    old = f'"known_trip_count":{{"n":"{shared}"}}'
    if old not in text:
        raise ValueError(f"no loop of the program runs {shared} times")
    return text.replace(old, f'"known_trip_count":{{"n":"{count}"}}')


def _with_layers(text: str, count: int) -> str:
    """Every extent that the shared number of layers divides is one of stacked layers."""

    def extents(match: re.Match[str]) -> str:
        found = (int(extent) for extent in match[2].split(","))
        kept = (e // SHARED_LAYERS * count if e and e % SHARED_LAYERS == 0 else e for e in found)
        return f"{match[1]}{','.join(map(str, kept))}{match[3]}"

    return _SIZES.sub(extents, _SHAPE.sub(extents, _with_trips(text, SHARED_LAYERS, count)))


def _with_ticks(text: str, stages: int, count: int) -> str:
    shared, own = (_table(stages, microbatches) for microbatches in (SHARED_MICROBATCHES, count))
    columns = _columns(shared, own)
    old, new = len(shared.transfer), len(own.transfer)

    def table(match: re.Match[str]) -> str:
        values = tuple(int(value) for value in re.findall(r"-?\d+", match[4]))
        if values not in columns or match[2] not in (f"{old},{stages}", f"{old}"):
            return match[0]
        flat = match[2] == f"{old}"
        return f"{match[1]}{match[2]}{match[3]}{_literal(columns[values], 1 if flat else stages)}{match[5]}"

    text, found = _TABLE.subn(table, text)
    if not found:
        raise ValueError("the program has no table of ticks")
    for shape in (f"{old},{stages}", f"{old}"):
        text = text.replace(f"s32[{shape}]", f"s32[{shape.replace(str(old), str(new), 1)}]")
    return _with_trips(text, old, new)


def _table(stages: int, microbatches: int) -> TickTable:
    counts = split_layers(SHARED_LAYERS * stages, stages)
    layout = StageLayout(stages=stages, virtual=1, counts=counts)
    return tick_table(make_schedule("1f1b", stages, microbatches), layout)


def _columns(shared: TickTable, own: TickTable) -> Mapping[tuple[int, ...], tuple[int, ...]]:
    """What a column holds in the shared table -> what it holds in the row's own, flat.

    Branches and transfers keep the numbers that the program has for them.
    """
    branches = [shared.branches.index(branch) for branch in own.branches]
    transfers = [_least(transfer, shared.transfers) for transfer in own.transfers]
    found: dict[tuple[int, ...], tuple[int, ...]] = {}
    for name in (
        "microbatch", "input", "stash", "cotangent", "receive_input", "receive_cotangent", "keep_cotangent",
    ):  # fmt: skip
        found[_flat(getattr(shared, name))] = _flat(getattr(own, name))
    found[_flat(shared.branch)] = tuple(branches[value] for value in _flat(own.branch))
    found[shared.transfer] = tuple(transfers[value] for value in own.transfer)
    return found


def _least(wanted: Transfer, among: Sequence[Transfer]) -> int:
    """Which transfer does what is wanted, and the least beside it."""
    fitting = [
        at
        for at, one in enumerate(among)
        if set(wanted.forward) <= set(one.forward) and set(wanted.backward) <= set(one.backward)
    ]
    return min(fitting, key=lambda at: len(among[at].forward) + len(among[at].backward))


def _flat(column: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(value for row in column for value in row)


def _literal(values: Sequence[int], width: int) -> str:
    if width == 1:
        return "{" + ", ".join(map(str, values)) + "}"
    rows = (values[at : at + width] for at in range(0, len(values), width))
    return "{ " + ", ".join("{ " + ", ".join(map(str, row)) + " }" for row in rows) + " }"
