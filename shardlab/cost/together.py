"""A step of several programs: what each costs, as often as it runs, put together.

The programs run one after another, with nothing between them: what the host does to start each is not known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from shardlab.attribute.schedule import Range
from shardlab.cost.blocks import Block, Event, PathEntry, scaled_path
from shardlab.cost.flops import Flops
from shardlab.cost.instructions import InstructionCost, StepCost
from shardlab.cost.timeline import Timeline


@dataclass(frozen=True, slots=True)
class CostPart:
    """What one run of a program costs, and how often a step runs it."""

    name: str
    runs: int
    cost: StepCost


@dataclass(frozen=True, slots=True)
class TimePart:
    """One run of a program on a timeline, and how often a step runs it."""

    name: str
    runs: int
    line: Timeline


def costs_together(parts: Sequence[CostPart]) -> StepCost:
    """The cost of a step. Instructions of several programs have the program's name before that of their
    computation."""
    if len(parts) == 1 and parts[0].runs == 1:
        return parts[0].cost

    def total(of: Callable[[StepCost], int | None]) -> int | None:
        return _sum((of(part.cost), part.runs) for part in parts)

    return StepCost(
        flops=flops_together([(part.cost.flops, part.runs) for part in parts]),
        recompute_flops=total(lambda cost: cost.recompute_flops),
        read_bytes=total(lambda cost: cost.read_bytes),
        written_bytes=total(lambda cost: cost.written_bytes),
        other_bytes=total(lambda cost: cost.other_bytes),
        host_bytes=total(lambda cost: cost.host_bytes),
        instructions=tuple(
            _of_program(row, part, len(parts) > 1) for part in parts for row in part.cost.instructions
        ),
        not_counted=tuple(one for part in parts for one in part.cost.not_counted),
        unpriced=frozenset(place for part in parts for place in part.cost.unpriced),
    )


def timelines_together(parts: Sequence[TimePart]) -> Timeline:
    """The programs' timelines one after another, each as often as it runs."""
    if len(parts) == 1 and parts[0].runs == 1:
        return parts[0].line
    lines = [part.line for part in parts]
    unknown = tuple(dict.fromkeys(name for line in lines for name in line.unknown))
    root = _root(parts)
    return Timeline(
        step_time_s=None if unknown else root.duration_s,
        compute_s=None if unknown else root.compute_s,
        communication_s=None if unknown else root.communication_s,
        exposed_communication_s=None if unknown else root.exposed_s,
        critical_path=() if unknown else tuple(sorted(root.path, key=lambda entry: -entry.time_s)),
        root=root,
        unknown=unknown,
        stages=lines[0].stages if len(lines) == 1 and parts[0].runs == 1 else (),
    )


def _root(parts: Sequence[TimePart]) -> Block:
    """One event for each program, whose body it runs so many times."""
    events: list[Event] = []
    start_s = 0.0
    for part in parts:
        duration_s = part.line.root.duration_s * part.runs
        events.append(
            Event(
                name=part.name,
                kind="program",
                stream="programs",
                start_s=start_s,
                duration_s=duration_s,
                iterations=float(part.runs),
                body=part.line.root,
            )
        )
        start_s += duration_s

    def total(of: Callable[[Block], float]) -> float:
        return sum(of(part.line.root) * part.runs for part in parts)

    return Block(
        events=tuple(events),
        duration_s=start_s,
        compute_s=total(lambda block: block.compute_s),
        communication_s=total(lambda block: block.communication_s),
        exposed_s=total(lambda block: block.exposed_s),
        waited_s=total(lambda block: block.waited_s),
        path=tuple(entry for part in parts for entry in _path(part, len(parts) > 1)),
    )


def _path(part: TimePart, several: bool) -> Iterable[PathEntry]:
    for entry in scaled_path(part.line.root, float(part.runs)):
        yield replace(entry, name=f"{part.name}/{entry.name}") if several else entry


def _of_program(row: InstructionCost, part: CostPart, several: bool) -> InstructionCost:
    low, high = row.executions
    executions: Range = (low * part.runs, None if high is None else high * part.runs)
    where = f"{part.name}/{row.computation}" if several else row.computation
    return replace(row, executions=executions, computation=where)


def flops_together(parts: Sequence[tuple[Flops, int]]) -> Flops:
    """FLOPs of one run of each program times its runs."""
    dtypes = sorted({dtype for flops, _ in parts for dtype in flops.by_dtype})
    return Flops(
        matmul=_sum((flops.matmul, runs) for flops, runs in parts),
        attention=_sum((flops.attention, runs) for flops, runs in parts),
        by_dtype={
            dtype: _sum((flops.by_dtype.get(dtype, 0), runs) for flops, runs in parts) for dtype in dtypes
        },
        unknown=tuple(one for flops, _ in parts for one in flops.unknown),
        notes=tuple(dict.fromkeys(note for flops, _ in parts for note in flops.notes)),
    )


def _sum(amounts: Iterable[tuple[int | None, int]]) -> int | None:
    """Amounts times runs; unknown where one is."""
    together = 0
    for amount, runs in amounts:
        if amount is None:
            return None
        together += amount * runs
    return together
