"""What a simulated computation leaves: its events, how much of them is hidden, and what it waited for."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from shardlab.cost.flows import Flow
from shardlab.cost.intervals import Interval, length, overlap, subtract


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that a stream does. Seconds from the start of its block.

    iterations: of a loop's `body`; a part of one where a table chooses the branch. communicates: whether it
    is a collective.
    """

    name: str
    kind: str
    stream: str
    layer: str = ""
    phase: str = ""
    axes: tuple[str, ...] | None = None
    communicates: bool = False
    start_s: float = 0.0
    duration_s: float = 0.0
    iterations: float = 1.0
    body: Block | None = None

    @property
    def interval(self) -> Interval:
        """From its start to its end."""
        return self.start_s, self.start_s + self.duration_s


@dataclass(frozen=True, slots=True, kw_only=True)
class PathEntry:
    """What the step waits for, all executions together: those of one instruction that are on the path."""

    name: str
    kind: str
    stream: str
    layer: str
    axes: tuple[str, ...] | None
    time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One run of a computation. Seconds.

    communication_s: while a collective is under way; exposed_s: of that, while nothing is computed.
    waited_s: for other stages. path: what it waits for, adding up to duration_s. busy: the part of its time
    in which it keeps each link busy. joins: pairs of kinds of devices that its collectives join. lead_s: by
    how much the kind that came to them first is done before the others.
    """

    events: Sequence[Event]
    duration_s: float
    compute_s: float
    communication_s: float
    exposed_s: float
    path: tuple[PathEntry, ...]
    waited_s: float = 0.0
    busy: Mapping[Hashable, float] = field(default_factory=dict)
    joins: frozenset[tuple[int, int]] = frozenset()
    lead_s: float = 0.0


@dataclass(slots=True, eq=False)
class Issued:
    """An event while its block runs. after: the one at whose end it was issued. flow: of what a stream runs
    beside the compute stream, whose times are known when it has ended.
    """

    event: Event
    after: Issued | None = None
    flow: Flow | None = None

    def ended(self) -> Event:
        """The event with its times."""
        flow = self.flow
        if flow is None or flow.begin_s is None or flow.end_s is None:
            return self.event
        return replace(self.event, start_s=flow.begin_s, duration_s=flow.end_s - flow.begin_s)

    def before(self, by_flow: Mapping[int, Issued]) -> Issued | None:
        """The one at whose end this one began: what issued it, or what its stream did first."""
        flow = self.flow
        if flow is not None and flow.after is not None and flow.begin_s != flow.issued_s:
            return by_flow[id(flow.after)]
        return self.after


def made_block(
    issued: Sequence[Issued],
    last: Issued | None,
    duration_s: float,
    joins: frozenset[tuple[int, int]],
    lead_s: float,
) -> Block:
    """From a run whose transfers have all ended. last: what it ends with. joins, lead_s: of its own
    transfers."""
    events = tuple(one.ended() for one in issued)
    computing = [one.event for one in issued if one.flow is None]
    moving = [event.interval for event in events if event.communicates]
    communication_s = length(moving)
    exposed_s = length(subtract(moving, (event.interval for event in computing)))
    compute_s = waited_s = 0.0
    for event in computing:
        if event.body is None:
            compute_s += event.duration_s
            continue
        joins |= event.body.joins
        lead_s = max(lead_s, event.body.lead_s)
        waited_s += event.body.waited_s * event.iterations
        beside = overlap(moving, event.interval) / event.duration_s if event.duration_s else 0.0
        communication_s += event.body.communication_s * event.iterations * (1 - beside)
        exposed_s += event.body.exposed_s * event.iterations
        compute_s += event.body.compute_s * event.iterations
    return Block(
        events=events,
        duration_s=duration_s,
        compute_s=compute_s,
        communication_s=communication_s,
        exposed_s=exposed_s,
        path=merged_path(_path(last, {id(one.flow): one for one in issued if one.flow is not None})),
        waited_s=waited_s,
        busy=_busy(issued, duration_s),
        joins=joins,
        lead_s=lead_s,
    )


def _busy(issued: Sequence[Issued], duration_s: float) -> dict[Hashable, float]:
    """The mean use of each link."""
    used: dict[Hashable, float] = {}
    for one in issued:
        body = one.event.body
        parts = one.flow.needs if one.flow is not None else body.busy if body is not None else {}
        alone_s = one.flow.alone_s if one.flow is not None else one.event.duration_s
        for link, part in parts.items():
            used[link] = used.get(link, 0.0) + part * alone_s
    return {link: busy_s / duration_s for link, busy_s in used.items()} if duration_s else {}


def _path(last: Issued | None, by_flow: Mapping[int, Issued]) -> Iterator[PathEntry]:
    """Backwards from the end."""
    at = last
    while at is not None:
        event = at.ended()
        if event.body is not None:
            yield from scaled_path(event.body, event.iterations)
        elif event.duration_s:
            yield PathEntry(
                name=event.name,
                kind=event.kind,
                stream=event.stream,
                layer=event.layer,
                axes=event.axes,
                time_s=event.duration_s,
            )
        at = at.before(by_flow)


def scaled_path(block: Block, times: float) -> Iterator[PathEntry]:
    """The path of so many runs of a block."""
    return (replace(entry, time_s=entry.time_s * times) for entry in block.path)


def merged_path(entries: Iterable[PathEntry]) -> tuple[PathEntry, ...]:
    """One entry per instruction and layer."""
    merged: dict[tuple[str, str, str], PathEntry] = {}
    for entry in entries:
        key = (entry.name, entry.stream, entry.layer)
        known = merged.get(key)
        merged[key] = replace(entry, time_s=entry.time_s + known.time_s) if known else entry
    return tuple(merged.values())
