"""A loop over ticks whose devices take branches of their own: the stages of a pipeline, side by side.

At each tick a stage runs the branch that the table says. In one program it ends a tick when those that it
exchanges with there have ended too: a transfer needs both of its devices (of gloo's turns the one that came
first is done a turn before the other). Stages that are programs of their
own, as Megatron's are, do the same items in the same order, each as soon as what it needs has arrived. What a
stage waits for others is the bubble.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

from shardlab.cost.blocks import Block, Event, PathEntry, merged_path, scaled_path
from shardlab.spec.schedule import Schedule, needed

WAIT = "wait"  # the kind of a path's entry for other stages
Turn = tuple[int, float, Block]  # tick, start in seconds, and what is run
Joins = frozenset[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class FreeStages:
    """Stages that wait for nothing but what the schedule says that they need. kinds: the kind of device that
    each stage is."""

    schedule: Schedule
    kinds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Events(Sequence[Event]):
    """The ticks of one device as events, made when they are looked at: of a long pipeline few are."""

    name: str
    turns: Sequence[Turn]

    @overload
    def __getitem__(self, at: int) -> Event: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Event, ...]: ...
    def __getitem__(self, at: int | slice) -> Event | tuple[Event, ...]:
        if isinstance(at, slice):
            return tuple(map(self._event, self.turns[at]))
        return self._event(self.turns[at])

    def __len__(self) -> int:
        return len(self.turns)

    def _event(self, turn: Turn) -> Event:
        tick, start_s, body = turn
        return Event(
            name=f"{self.name} tick {tick}",
            kind="tick",
            stream="compute",
            start_s=start_s,
            duration_s=body.duration_s,
            body=body,
        )


def staged(
    name: str, ticks: int, kinds: Sequence[int], block: Callable[[int, int], Block]
) -> Mapping[int, Block]:
    """The loop `name` on each kind of device. block: what a kind runs at a tick; its `joins` name the kinds
    that it exchanges with there.
    """
    ends, leads = dict.fromkeys(kinds, 0.0), dict.fromkeys(kinds, 0.0)
    turns: dict[int, list[Turn]] = {kind: [] for kind in kinds}
    beside: dict[frozenset[Joins], Mapping[int, Sequence[int]]] = {}
    for tick in range(ticks):
        own: dict[int, float] = {}
        met: set[Joins] = set()
        for kind in kinds:
            body, start_s = block(kind, tick), ends[kind]
            own[kind], leads[kind] = start_s + body.duration_s, body.lead_s
            met.add(body.joins)
            if body.duration_s:
                turns[kind].append((tick, start_s, body))
        key = frozenset(met)
        if key not in beside:
            beside[key] = _beside(kinds, key)
        ends = {kind: max([own[other] for other in others]) for kind, others in beside[key].items()}
        for kind in kinds:
            if own[kind] < ends[kind]:  # it came first
                ends[kind] = max(own[kind], ends[kind] - leads[kind])
    return {kind: _joined(name, turns[kind], ends[kind]) for kind in kinds}


def _beside(kinds: Sequence[int], joins: Iterable[Joins]) -> Mapping[int, Sequence[int]]:
    """Whom each kind exchanges with, itself among them."""
    found: dict[int, set[int]] = {kind: {kind} for kind in kinds}
    for one, other in {pair for each in joins for pair in each}:
        if one in found and other in found:
            found[one].add(other)
            found[other].add(one)
    return {kind: tuple(others) for kind, others in found.items()}


def free_stages(name: str, free: FreeStages, block: Callable[[int, int], Block]) -> Mapping[int, Block]:
    """The same loop on stages that run free. A tick without an item is none of theirs."""
    schedule = free.schedule
    ends = [0.0] * schedule.stages
    turns: list[list[Turn]] = [[] for _ in range(schedule.stages)]
    done: dict[tuple[str, int, int], float] = {}
    for tick, stage, work in schedule.items():
        link = work.chunk * schedule.stages + stage
        body = block(free.kinds[stage], tick)
        arrived = [done[need] for need in needed(work, link, schedule.links)]
        start_s = max([ends[stage], *arrived])
        turns[stage].append((tick, start_s, body))
        done[work.kind, work.microbatch, link] = ends[stage] = start_s + body.duration_s
    return {kind: _joined(name, turns[stage], ends[stage]) for stage, kind in enumerate(free.kinds)}


def _joined(name: str, turns: Sequence[Turn], end_s: float) -> Block:
    """The ticks of one device as a block."""
    bodies: dict[int, tuple[Block, int]] = {}  # many ticks run the same one
    for _, _, body in turns:
        bodies[id(body)] = body, bodies.get(id(body), (body, 0))[1] + 1
    found = tuple(bodies.values())

    def total(of: Callable[[Block], float]) -> float:
        return sum(of(body) * times for body, times in found)

    waited_s = max(end_s - total(lambda body: body.duration_s), 0.0)
    path = [entry for body, times in found for entry in scaled_path(body, float(times))]
    if waited_s > 0:
        path.append(
            PathEntry(name=name, kind=WAIT, stream="other stages", layer="", axes=None, time_s=waited_s)
        )
    return Block(
        events=_Events(name, turns),
        duration_s=end_s,
        compute_s=total(lambda body: body.compute_s),
        communication_s=total(lambda body: body.communication_s),
        exposed_s=total(lambda body: body.exposed_s),
        path=merged_path(path),
        waited_s=waited_s,
        joins=frozenset(pair for body, _ in found for pair in body.joins),
    )
