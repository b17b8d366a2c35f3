"""What a program sends, for the HTML report: by axes, phase and layer, by link, and one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

from shardlab.analysis import Analysis, ByteRange, CollectiveRow, axes_key
from shardlab.cost.network import communication
from shardlab.report.breakdown import collective_cells
from shardlab.report.figures import NONE, key_text, most, percent, scaled
from shardlab.report.html.busiest import Busiest
from shardlab.report.html.charts import NARROW, WIDE, Segment, bars
from shardlab.report.html.parts import Chart, Heat, Item, Listing, Warm
from shardlab.report.page import Column, Table, cell, lines
from shardlab.units import format_bytes, format_seconds

PHASES = {
    "forward": "var(--forward)",
    "backward": "var(--backward)",
    "optimizer": "var(--optimizer)",
    "other": "var(--other)",
}
LAYERS, ITEMS = 24, 2000  # what is not shown is counted
NO_LAYER = "(no layer)"
Key = TypeVar("Key")


@dataclass(frozen=True, slots=True)
class _Rows:
    collectives: Sequence[CollectiveRow]


def sent(rows: Iterable[CollectiveRow], key: Callable[[CollectiveRow], Key]) -> dict[Key, ByteRange]:
    """Executions x wire bytes, summed by key, the largest first."""
    found: dict[Key, ByteRange] = {}
    for row in rows:
        low, high = scaled(row.executions, row.wire_bytes)
        least, greatest = found.get(key(row), (Fraction(0), Fraction(0)))
        found[key(row)] = (least + low, None if high is None or greatest is None else greatest + high)
    return dict(sorted(found.items(), key=lambda item: -most(item[1])))


def axis_colours(mesh: Mapping[str, int] | None, keys: Iterable[str]) -> dict[str, str]:
    """The colour of each set of axes: the same all over the report."""
    known = [*(mesh or {}), *keys]
    return {key: f"var(--series-{number % 8 + 1})" for number, key in enumerate(dict.fromkeys(known))}


def amount_text(value: ByteRange) -> str:
    """`1.2 GB`, `up to 1.2 GB` where some devices or branches send nothing."""
    low, high = value
    if low == 0 and high:
        return f"up to {format_bytes(high)}"
    return format_bytes(value)


def axes_chart(device: Busiest) -> tuple[Chart, ...]:
    """Bytes sent over each set of axes, split by phase; none where nothing is sent."""
    by_axes = sent(device.rows, lambda row: axes_key(row.axes))
    by_both = sent(device.rows, lambda row: (axes_key(row.axes), row.phase))
    keys = [key for key, value in by_axes.items() if most(value)]
    segments = [
        Segment(key_text(key), phase, float(most(by_both[key, phase])), amount_text(by_both[key, phase]))
        for key in keys
        for phase in PHASES
        if (key, phase) in by_both and most(by_both[key, phase])
    ]
    if not segments:
        return ()
    totals = {key_text(key): amount_text(by_axes[key]) for key in keys}
    said = "; ".join(f"{key} {text}" for key, text in totals.items())
    wide, narrow = (bars(segments, PHASES, width, totals=totals) for width in (WIDE, NARROW))
    return (
        Chart(
            title="Bytes sent, by mesh axes and phase",
            alt=f"Each device sends per step: {said}.",
            wide=wide,
            narrow=narrow,
            legend={phase: PHASES[phase] for phase in PHASES if any(one.series == phase for one in segments)},
            caption=device.caption("per device and step"),
        ),
    )


def heat_map(device: Busiest) -> tuple[Heat, ...]:
    """Layers against axes and phases: the largest layers, and one row for the rest."""
    rows = [row for row in device.rows if row.wire_bytes and row.executions[1] != 0]
    if not rows:
        return ()
    layers = list(sent(rows, lambda row: row.layer or NO_LAYER))
    named, rest = layers[:LAYERS], set(layers[LAYERS:])
    others = f"{len(rest)} smaller layers"

    def label(row: CollectiveRow) -> str:
        layer = row.layer or NO_LAYER
        return others if layer in rest else layer

    cells = sent(rows, lambda row: (label(row), axes_key(row.axes), row.phase))
    sums = sent(rows, label)
    axes = list(sent(rows, lambda row: axes_key(row.axes)))
    groups = [(key, [p for p in PHASES if any((la, key, p) in cells for la in sums)]) for key in axes]
    warmest = max(float(most(value)) for value in cells.values()) or 1.0
    body = tuple(
        (
            name,
            (
                Warm(amount_text(sums[name]), 0.0),
                *(
                    _warm(cells.get((name, key, phase)), warmest)
                    for key, phases in groups
                    for phase in phases
                ),
            ),
        )
        for name in [*named, *([others] if rest else [])]
    )
    columns = (("all", ("sum",)), *((key_text(key), tuple(phases)) for key, phases in groups))
    caption = "sent per device and step; the stronger the colour, the more"
    return (
        Heat(
            title="Bytes sent, by layer, mesh axes and phase",
            header="layer",
            groups=columns,
            rows=body,
            caption=device.caption(caption),
        ),
    )


def _warm(value: ByteRange | None, warmest: float) -> Warm | None:
    if value is None or not most(value):
        return None
    return Warm(amount_text(value), float(most(value)) / warmest)


def link_table(device: Busiest, step_s: float | None) -> tuple[Table, ...]:
    """Which links are hot, and through which axes: bytes, and the time that they are busy."""
    rows = []
    for key in sent(device.rows, lambda row: axes_key(row.axes)):
        here = [row for row in device.rows if axes_key(row.axes) == key]
        tier_s = communication(_Rows(here)).tier_s
        for tier, value in _traffic(here).items():
            if most(value):
                busy_s = tier_s.get(tier)
                share = percent(busy_s / step_s) if busy_s is not None and step_s else NONE
                rows.append(
                    (most(value), busy_s or 0.0, (tier, key_text(key), amount_text(value), busy_s, share))
                )
    rows.sort(key=lambda row: (-row[1], -row[0]))
    shown = tuple(
        (cell(tier, "strong"), cell(over), cell(text), cell(format_seconds(busy_s)), cell(share))
        for _, _, (tier, over, text, busy_s, share) in rows
    )
    columns = (
        Column("link"),
        Column("for collectives over"),
        Column("each device sends", "right"),
        Column("busy", "right"),
        Column("of the step", "right"),
    )
    caption = device.caption("hottest first; busy: all executions one after another, nothing beside them")
    return (
        (Table(title="Which links are hot", columns=columns, rows=shown, caption=caption),) if shown else ()
    )


def _traffic(rows: Iterable[CollectiveRow]) -> dict[str, ByteRange]:
    found: dict[str, ByteRange] = {}
    for row in rows:
        for tier, each in (row.traffic or {}).items():
            low, high = scaled(row.executions, each)
            least, greatest = found.get(tier, (Fraction(0), Fraction(0)))
            found[tier] = (least + low, None if high is None or greatest is None else greatest + high)
    return found


def collectives_listing(analysis: Analysis, name: str = "collectives") -> tuple[Listing, ...]:
    """Every collective, what sends most first."""
    rows = [(scaled(row.executions, row.wire_bytes), row) for row in analysis.collectives]
    rows.sort(key=lambda pair: (-most(pair[0]), pair[1].name))
    rest = sum((most(value) for value, _ in rows[ITEMS:]), Fraction(0))
    left_out = f"{len(rows) - ITEMS} smaller ones not shown, {format_bytes(rest)} together; --json has all; "
    caption = "sent and time: of all executions in a step; time of one collective alone on its links"
    listing = Listing(
        title="Collectives",
        name=name,
        columns=(
            ("sent", True), ("time", True), ("collective", False), ("over", False),
            ("phase", False), ("layer", False), ("source", False),
        ),
        filters=("kind", "axes", "phase", "link"),
        items=tuple(_item(row, value) for value, row in rows[:ITEMS]),
        caption=(left_out if len(rows) > ITEMS else "") + caption,
    )  # fmt: skip
    return (listing,) if rows else ()


def _item(row: CollectiveRow, value: ByteRange) -> Item:
    amount, what, over, where = collective_cells(row, value)
    runs = row.executions[1]
    time_s = None if row.time_s is None or runs is None else runs * row.time_s
    phase, rest = where[:1], where[1:]
    layer, source = rest[:1] if row.layer else (), rest[-1:] if row.source else ()
    return Item(
        cells=(
            amount,
            lines([NONE if time_s is None else format_seconds(time_s)]),
            what,
            over,
            phase,
            layer,
            source,
        ),
        order=(float(most(value)), -1.0 if time_s is None else time_s, None, None, None, None, None),
        keys=(row.kind, key_text(axes_key(row.axes)), row.phase, row.tier or NONE),
    )
