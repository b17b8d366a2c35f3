"""A predicted step for the HTML report: what it is made of, what fills each moment, one turn of its loops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from shardlab.cost.blocks import Block, Event, PathEntry
from shardlab.cost.intervals import Interval, subtract, union
from shardlab.cost.timeline import Timeline
from shardlab.prediction import Prediction
from shardlab.report.figures import axes_text, percent
from shardlab.report.html.charts import NARROW, WIDE, Segment, Span, bars, lanes, moments
from shardlab.report.html.parts import Chart
from shardlab.report.page import Column, Table, cell
from shardlab.report.trace import LOOPS, spread
from shardlab.units import format_seconds

COMPUTE, HIDDEN = "compute", "compute that hides communication"
EXPOSED, WAITING = "exposed communication", "waiting"
UNFOLDED = "loop, not drawn apart"
COLOURS = {
    COMPUTE: "var(--compute)",
    HIDDEN: "var(--hidden)",
    EXPOSED: "var(--exposed)",
    WAITING: "var(--waiting)",
    UNFOLDED: "var(--other)",
}
LOOPS_SHOWN = 3
_STRETCHES = 100
_THINNEST = 1 / 1500  # of a drawing: what is shorter cannot be seen, and is counted


def path_chart(line: Timeline) -> tuple[Chart, ...]:
    """What the step waits for: the critical path, by what its entries are."""
    step_s = line.step_time_s
    if not step_s:
        return ()
    parts: dict[str, float] = {}
    for entry in line.critical_path:
        label = part_of(entry)
        parts[label] = parts.get(label, 0.0) + entry.time_s
    names = sorted(parts, key=lambda name: (name != COMPUTE, name == WAITING, -parts[name]))
    moving = [name for name in names if name not in (COMPUTE, WAITING)]
    colours = {name: COLOURS.get(name) or f"var(--series-{moving.index(name) % 8 + 1})" for name in names}
    segments = [Segment("", name, parts[name], percent(parts[name] / step_s)) for name in names]
    rows = tuple(
        (cell(name), cell(format_seconds(parts[name])), cell(percent(parts[name] / step_s))) for name in names
    )
    columns = (Column("on the critical path", keep=False), Column("time", "right"), Column("share", "right"))
    said = ", ".join(f"{name} {percent(parts[name] / step_s)}" for name in names)
    return (
        Chart(
            title="What a step waits for",
            alt=f"Of {format_seconds(step_s)}: {said}.",
            wide=bars(segments, colours, WIDE, seconds=True),
            narrow=bars(segments, colours, NARROW, seconds=True),
            legend=colours,
            caption=f"the critical path; its parts add up to {format_seconds(step_s)}",
            table=Table(title="What a step waits for", columns=columns, rows=rows),
        ),
    )


def part_of(entry: PathEntry) -> str:
    """`compute`, `waiting`, or `all-gather over fsdp`."""
    if entry.kind == "wait":
        return WAITING
    return COMPUTE if entry.axes is None else f"{entry.kind} over {axes_text(entry.axes)}"


def moment_chart(line: Timeline) -> tuple[Chart, ...]:
    """What fills the step: its loops (of a pipeline its ticks), and what is between them."""
    if not line.step_time_s:
        return ()
    parts = step_parts(line)
    shown = {name: COLOURS[name] for name in COLOURS if parts[name]}
    stretches = list(pairwise(_cuts(line)))
    filled = {name: _overlaps(parts[name], stretches) for name in shown}
    found = [
        (start, end, {name: filled[name][number] / (end - start) for name in shown})
        for number, (start, end) in enumerate(stretches)
    ]
    rows = tuple((cell(name), cell(format_seconds(_length(parts[name])))) for name in shown)
    return (
        Chart(
            title="What fills the step, from its start to its end",
            alt="; ".join(f"{name} {format_seconds(_length(parts[name]))}" for name in shown),
            wide=moments(found, shown, WIDE, line.step_time_s),
            narrow=moments(found, shown, NARROW, line.step_time_s),
            legend=shown,
            caption="the device that ends last; a loop (of a pipeline, a tick) is one stretch, on average",
            table=Table(
                title="What fills the step", columns=(Column("what"), Column("time", "right")), rows=rows
            ),
        ),
    )


def _cuts(line: Timeline) -> list[float]:
    """Where stretches begin and end: at the outer loops, at the ticks of a pipeline, else evenly."""
    whole_s = line.root.duration_s
    found = {0.0, whole_s, *(number * whole_s / _STRETCHES for number in range(_STRETCHES))}
    for event in line.root.events:
        if event.body is None or not event.duration_s:
            continue
        start, end = event.interval
        found = {at for at in found if not start < at < end} | {start, end}
        found |= {start + tick.start_s for tick in event.body.events if tick.kind == "tick"}
    ordered = sorted(found)
    least_s = whole_s * 1e-9  # cuts that rounding has put beside each other
    return [at for at, after in pairwise([*ordered, float("inf")]) if after - at > least_s]


def _overlaps(intervals: Iterable[Interval], stretches: list[Interval]) -> list[float]:
    """How much of each stretch they cover; both disjoint and in order."""
    found, at = [0.0] * len(stretches), 0
    for start, end in intervals:
        while at and stretches[at][0] > start:
            at -= 1
        while at < len(stretches) and stretches[at][1] <= start:
            at += 1
        number = at
        while number < len(stretches) and stretches[number][0] < end:
            first, last = stretches[number]
            found[number] += min(end, last) - max(start, first)
            number += 1
    return found


def step_parts(line: Timeline) -> dict[str, list[Interval]]:
    """When a device computes with nothing beside it, with communication beside it, only communicates, or
    neither. Disjoint; together they are the step."""
    events = [one for one in spread(line) if not one.stream.startswith(LOOPS)]
    folded = [(one.start_s, one.end_s) for one in events if one.event.body is not None]
    computing = union((o.start_s, o.end_s) for o in events if o.stream == "compute" and o.event.body is None)
    moving = union((one.start_s, one.end_s) for one in events if one.event.communicates)
    exposed = subtract(moving, [*computing, *folded])
    alone = subtract(computing, moving)
    whole = [(0.0, line.root.duration_s)]
    busy = [*computing, *exposed, *folded]
    return {
        COMPUTE: alone,
        HIDDEN: subtract(computing, alone),
        EXPOSED: exposed,
        WAITING: subtract(whole, busy),
        UNFOLDED: union(folded),
    }


def _length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


@dataclass(frozen=True, slots=True)
class _Loop:
    """A loop without loops inside. turns, time_s: of all its runs in a step."""

    event: Event
    body: Block
    turns: float
    time_s: float


def loop_charts(line: Timeline, colours: Mapping[str, str]) -> tuple[Chart, ...]:
    """One turn of each of the loops that take most time. colours: of sets of axes."""
    if not line.step_time_s:
        return ()
    found: dict[str, _Loop] = {}
    for event, body, turns in _innermost(line.root, 1.0):
        known = found.get(event.name)
        first = known if known is not None else _Loop(event, body, 0.0, 0.0)
        time_s = first.time_s + turns * body.duration_s
        found[event.name] = _Loop(first.event, first.body, first.turns + turns, time_s)
    loops = sorted(found.values(), key=lambda loop: -loop.time_s)
    return tuple(_loop_chart(loop, line.step_time_s, colours) for loop in loops[:LOOPS_SHOWN])


def _innermost(block: Block, times: float) -> Iterator[tuple[Event, Block, float]]:
    for event in block.events:
        if event.body is None or not event.duration_s:
            continue
        inner = list(_innermost(event.body, times * event.iterations))
        if inner:
            yield from inner
        elif event.kind == "while":
            yield event, event.body, times * event.iterations


def _loop_chart(loop: _Loop, step_s: float, colours: Mapping[str, str]) -> Chart:
    body, name = loop.body, loop.event.name
    spans, left_out = _spans(body)
    used = {span.series for span in spans}
    known = {COMPUTE: COLOURS[COMPUTE], **colours, EXPOSED: COLOURS[EXPOSED], "copies": "var(--other)"}
    shown = {series: colour for series, colour in known.items() if series in used}
    phases = Counter(event.phase for event in body.events if event.phase)
    phase = f", {phases.most_common(1)[0][0]}" if phases else ""
    caption = (
        f"a turn takes {format_seconds(body.duration_s)}, {format_seconds(body.exposed_s)} of it exposed "
        f"communication; ×{_count(loop.turns)} turns, {percent(loop.time_s / step_s)} of the step{left_out}"
    )
    return Chart(
        title=f"One turn of the loop {name}{phase}",
        alt=caption,
        wide=lanes(spans, shown, WIDE, body.duration_s),
        narrow=lanes(spans, shown, NARROW, body.duration_s),
        legend=shown,
        caption=caption,
    )


def _count(turns: float) -> str:
    """Part turns where a table chooses the branch."""
    return f"{turns:,.0f}" if turns.is_integer() else f"{turns:,.2f}"


def _spans(body: Block) -> tuple[list[Span], str]:
    """The events of a turn by stream, then what is exposed; and what is too short to be drawn."""
    thinnest_s = body.duration_s * _THINNEST
    events = [event for event in body.events if event.duration_s]
    drawn = [event for event in events if event.duration_s >= thinnest_s]
    spans = [
        _span(event) for event in sorted(drawn, key=lambda event: (event.stream != "compute", event.stream))
    ]
    computing = [event.interval for event in events if event.stream == "compute"]
    exposed = subtract((event.interval for event in events if event.communicates), computing)
    spans += [
        Span("exposed", EXPOSED, start, end, f"exposed communication: {format_seconds(end - start)}")
        for start, end in exposed
        if end - start >= thinnest_s
    ]
    short_s = sum(event.duration_s for event in events if event.duration_s < thinnest_s)
    count = len(events) - len(drawn)
    number = "1 event" if count == 1 else f"{count} events"
    return spans, f"; {number} too short to draw, {format_seconds(short_s)} together" if count else ""


def _span(event: Event) -> Span:
    series = COMPUTE if event.stream == "compute" and not event.communicates else "copies"
    if event.communicates:
        series = axes_text(event.axes)
    over = f" over {axes_text(event.axes)}" if event.axes else ""
    where = f", {event.layer}" if event.layer else ""
    text = f"{event.kind}{over} {event.name}{where}: {format_seconds(event.duration_s)}"
    return Span(event.stream, series, *event.interval, text)


def stage_chart(predicted: Prediction) -> tuple[Chart, ...]:
    """What each stage of a pipeline does; none where all devices do the same."""
    stages = predicted.timeline.stages
    if not stages:
        return ()
    segments, totals = [], {}
    for number, stage in enumerate(stages):
        name = f"stage {number}"
        rest_s = max(
            stage.step_time_s - stage.compute_s - stage.exposed_communication_s - stage.waited_s, 0.0
        )
        for series, value in (
            (COMPUTE, stage.compute_s),
            (EXPOSED, stage.exposed_communication_s),
            (WAITING, stage.waited_s + rest_s),
        ):
            segments.append(Segment(name, series, value, format_seconds(value)))
        totals[name] = format_seconds(stage.step_time_s)
    columns = (Column("stage"), *(Column(name, "right") for name in (COMPUTE, "exposed", "waits", "step")))
    rows = tuple(
        (
            cell(f"stage {number}"),
            cell(format_seconds(stage.compute_s)),
            cell(format_seconds(stage.exposed_communication_s)),
            cell(format_seconds(stage.waited_s)),
            cell(format_seconds(stage.step_time_s)),
        )
        for number, stage in enumerate(stages)
    )
    return (
        Chart(
            title="What each kind of device does (pipeline stages)",
            alt="; ".join(f"{name}: {text}" for name, text in totals.items()),
            wide=bars(segments, COLOURS, WIDE, seconds=True, totals=totals),
            narrow=bars(segments, COLOURS, NARROW, seconds=True, totals=totals),
            legend={name: COLOURS[name] for name in (COMPUTE, EXPOSED, WAITING)},
            caption="in order of the first device; waiting: for other stages, the bubble",
            table=Table(title="Pipeline stages", columns=columns, rows=rows),
        ),
    )
