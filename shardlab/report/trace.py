"""A timeline as a Chrome trace (the JSON that Perfetto and chrome://tracing load): one thread per stream.

Loops are expanded, iteration by iteration, as long as the trace stays within a bound; what does not fit is
one event that says how many iterations it stands for. Loops themselves are on threads of their own. Format:
the "Trace Event Format" document of Chromium's catapult, complete events (`ph` X), times in microseconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from shardlab.case_document import Json
from shardlab.cost.blocks import Block, Event
from shardlab.cost.timeline import Timeline
from shardlab.report.figures import axes_text

MAX_EVENTS = 50_000
LOOPS = "loops"
_MICRO = 1e6


@dataclass(frozen=True, slots=True)
class Shown:
    """An event at its place in the step. stream: the thread's name, before lanes are told apart. folded: how
    many iterations of its loop it stands for."""

    event: Event
    stream: str
    start_s: float
    end_s: float
    folded: float = 1.0


def chrome_trace(timeline: Timeline, name: str, max_events: int = MAX_EVENTS) -> Json:
    """The trace of a step. name: of the process; max_events: about how many events loops are expanded to.

    Events that overlap on one stream (transfers of a loop beside one from outside) go on lanes of their own.
    """
    lanes = _lanes(sorted(spread(timeline, max_events), key=lambda one: (one.start_s, -one.end_s)))
    threads = {lane: number for number, lane in enumerate(sorted(lanes), start=1)}
    placed = [(one.start_s, threads[lane], one) for lane, shown in lanes.items() for one in shown]
    placed.sort(key=lambda place: place[:2])
    events = [_event(one, thread) for _, thread, one in placed]
    names = [_named("thread_name", thread, lane) for lane, thread in threads.items()]
    return {"displayTimeUnit": "ms", "traceEvents": [_named("process_name", 0, name), *names, *events]}


def spread(timeline: Timeline, max_events: int = MAX_EVENTS) -> list[Shown]:
    """Every event of a step at its place, loops expanded up to about so many; what is left of a loop is one
    event. Loops themselves are on streams whose names begin with `LOOPS`.
    """
    found = _Spread(max_events)
    found.block(timeline.root, 0.0, 0)
    return found.shown


@dataclass(slots=True)
class _Spread:
    """Collects the events of nested blocks."""

    room: int
    shown: list[Shown] = field(default_factory=list)

    def block(self, block: Block, start_s: float, depth: int) -> None:
        """One run of a block that begins at `start_s`."""
        for event in block.events:
            at_s = start_s + event.start_s
            if event.body is None:
                self._add(Shown(event, event.stream, at_s, at_s + event.duration_s))
                continue
            if event.duration_s:
                outer = f"{LOOPS} {depth}" if depth else LOOPS
                self._add(Shown(event, outer, at_s, at_s + event.duration_s, event.iterations))
                self._iterations(event, event.body, at_s, depth + 1)

    def _iterations(self, event: Event, body: Block, at_s: float, depth: int) -> None:
        """As many iterations as there is room for, and one event for the rest."""
        size, whole = _size(body), int(event.iterations)
        shown = min(whole, max(self.room // max(size, 1), 0))
        for number in range(shown):
            self.block(body, at_s + number * body.duration_s, depth)
        if event.iterations > shown:
            rest_s = at_s + shown * body.duration_s
            end_s = at_s + event.duration_s
            self._add(Shown(event, event.stream, rest_s, end_s, event.iterations - shown))

    def _add(self, one: Shown) -> None:
        self.shown.append(one)
        self.room -= 1


def _size(block: Block) -> int:
    """Events of one run, loops expanded."""
    return sum(
        1 if event.body is None else 2 + _size(event.body) * max(int(event.iterations), 1)
        for event in block.events
    )


def _lanes(shown: Sequence[Shown]) -> dict[str, list[Shown]]:
    """Thread name -> events in order of time, none of which overlap."""
    lanes: dict[str, list[Shown]] = {}
    for one in shown:
        lane = next(name for name in _names(one.stream) if _is_free(lanes.get(name), one))
        lanes.setdefault(lane, []).append(one)
    return lanes


def _names(stream: str) -> Iterator[str]:
    yield stream
    number = 2
    while True:
        yield f"{stream} ({number})"
        number += 1


def _is_free(lane: Sequence[Shown] | None, one: Shown) -> bool:
    """Whether the last event of a lane has ended, to the nanosecond that a trace resolves."""
    return not lane or _rounded(lane[-1].end_s) <= _rounded(one.start_s)


def _rounded(time_s: float) -> float:
    """Microseconds, to the nanosecond."""
    return round(time_s * _MICRO, 3)


def _event(one: Shown, thread: int) -> Json:
    event = one.event
    start, end = _rounded(one.start_s), _rounded(one.end_s)
    known: Json = {"kind": event.kind, "layer": event.layer, "phase": event.phase}
    if event.axes is not None:
        known["axes"] = axes_text(event.axes)
    if event.body is not None:
        known["iterations"] = one.folded
    where = f" {event.layer}" if event.layer else ""
    over = f" over {axes_text(event.axes)}" if event.axes else ""
    times = f" × {one.folded:g}" if event.body is not None and one.folded != 1 else ""
    return {
        "ph": "X",
        "name": f"{event.kind}{over}{where}{times}" if event.body is None else f"{event.name}{times}",
        "cat": "communication" if event.communicates else "loop" if event.body is not None else "compute",
        "ts": start,
        "dur": round(end - start, 3),
        "pid": 0,
        "tid": thread,
        "args": {"instruction": event.name} | {key: value for key, value in known.items() if value},
    }


def _named(what: str, thread: int, name: str) -> Json:
    return {"ph": "M", "name": what, "pid": 0, "tid": thread, "ts": 0, "args": {"name": name}}
