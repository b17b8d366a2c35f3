"""The drawings as Vega-Lite specifications. Values come with the words for them; names are only data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from shardlab.report.figures import percent
from shardlab.report.html.parts import Spec
from shardlab.units import format_seconds

WIDE, NARROW = 1080, 340
_BAR = 30
_LARGEST = 18.0  # pixels, of a unit of a plan
_LETTER = 7.6  # pixels, of a wide font
_LABEL_SHARE = 0.07  # of the width: below it no text fits into a segment
_TIME_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
_BYTE_UNITS = tuple((10.0**power, unit) for power, unit in ((12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")))


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a bar. text: its value in words; value in seconds or bytes."""

    bar: str
    series: str
    value: float
    text: str


@dataclass(frozen=True, slots=True)
class Mark:
    """A value that a bar is held against: a limit."""

    bar: str
    value: float
    text: str


@dataclass(frozen=True, slots=True)
class Span:
    """Something that a lane does. Seconds."""

    lane: str
    series: str
    start_s: float
    end_s: float
    text: str


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of a drawing without axes; x to the right, y downwards. colour: a variable of the page."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    text: str = ""


def unit_of(most: float, seconds: bool) -> tuple[float, str]:
    """The unit in which `most` is 1 or more, as (size, name)."""
    units = _TIME_UNITS if seconds else _BYTE_UNITS
    return next(
        ((size, name) for size, name in units if most >= size), (1.0, "B") if not seconds else units[-1]
    )


def bars(
    segments: Sequence[Segment],
    colours: Mapping[str, str],
    width: int,
    *,
    seconds: bool = False,
    totals: Mapping[str, str] | None = None,
    marks: Sequence[Mark] = (),
) -> Spec:
    """Horizontal bars, stacked in the order of `colours` (series -> colour). totals: words at a bar's end."""
    order = list(dict.fromkeys(segment.bar for segment in segments))
    sums = {bar: sum(one.value for one in segments if one.bar == bar) for bar in order}
    most = max((*sums.values(), *(mark.value for mark in marks)), default=0.0)
    size, unit = unit_of(most, seconds)
    series = [name for name in colours if any(one.series == name for one in segments)]
    least = most * _LABEL_SHARE * WIDE / width
    data = [_bar_row(one, series, size, least) for one in segments]
    y = _names("bar", order, width)
    x = {
        "field": "value",
        "type": "quantitative",
        "title": unit,
        "axis": {"tickCount": 4 if width <= NARROW else 8, "grid": True},
        "scale": {"domainMax": most / size * _stretch(width, totals, order), "domainMin": 0, "nice": False},
    }
    stacked = {"y": y, "x": x, "order": {"field": "rank"}, "description": {"field": "say"}}
    colour = _colour(series, colours)
    layers: list[Spec] = [
        {
            "mark": {"type": "bar", "stroke": "var(--paper)", "strokeWidth": 1},
            "encoding": stacked | {"color": colour},
        },
        {
            "mark": {"type": "text", "color": "var(--on-colour)", "fontSize": 11, "aria": False},
            "encoding": {
                "y": y,
                "x": x | {"stack": "zero", "bandPosition": 0.5},
                "order": {"field": "rank"},
                "detail": {"field": "series"},
                "text": {"field": "label"},
            },
        },
    ]
    if totals:
        layers.append(_totals({bar: (sums[bar] / size, text) for bar, text in totals.items()}, y, x))
    if marks:
        layers += _limits(marks, size, y, x)
    return {
        "width": width,
        "height": {"step": _BAR},
        "autosize": _FIT,
        "data": {"values": data},
        "layer": layers,
    }


def _bar_row(one: Segment, series: Sequence[str], size: float, least: float) -> Spec:
    """A segment as data. least: the value from which on its words fit into it."""
    return {
        "bar": one.bar,
        "series": one.series,
        "rank": series.index(one.series),
        "value": one.value / size,
        "label": one.text if one.value > least else "",
        "say": f"{one.bar}, {one.series}: {one.text}" if one.bar else f"{one.series}: {one.text}",
    }


def _stretch(width: int, totals: Mapping[str, str] | None, names: Sequence[str]) -> float:
    """How much longer than the longest bar an axis must be for the words at its end."""
    words = max(map(len, (totals or {}).values()), default=0) * _LETTER + 8 if totals else 0.0
    room = width - _room(names, width)
    return room / max(room - words, room / 2)


_FIT = {"type": "fit-x", "contains": "padding"}


def _totals(ends: Mapping[str, tuple[float, str]], y: Spec, x: Spec) -> Spec:
    values = [{"bar": bar, "value": value, "label": text} for bar, (value, text) in ends.items()]
    return {
        "data": {"values": values},
        "mark": {"type": "text", "align": "left", "dx": 6, "fontWeight": 600, "aria": False},
        "encoding": {"y": y, "x": x, "text": {"field": "label"}},
    }


def _limits(marks: Sequence[Mark], size: float, y: Spec, x: Spec) -> list[Spec]:
    values = [{"bar": one.bar, "value": one.value / size, "say": one.text} for one in marks]
    return [
        {
            "data": {"values": values},
            "mark": {"type": "tick", "color": "var(--bad)", "thickness": 3, "height": _BAR - 4},
            "encoding": {"y": y, "x": x, "description": {"field": "say"}},
        }
    ]


def lanes(spans: Sequence[Span], colours: Mapping[str, str], width: int, end_s: float) -> Spec:
    """What each lane does, from 0 to `end_s`. Lanes stand in the order in which they come."""
    size, unit = unit_of(end_s, True)
    series = [name for name in colours if any(one.series == name for one in spans)]
    data = [
        {
            "lane": one.lane,
            "series": one.series,
            "a": one.start_s / size,
            "b": one.end_s / size,
            "say": one.text,
        }
        for one in spans
    ]
    return {
        "width": width,
        "height": {"step": _BAR},
        "autosize": _FIT,
        "data": {"values": data},
        "mark": {"type": "bar", "stroke": "var(--paper)", "strokeWidth": 0.5},
        "encoding": {
            "y": _names("lane", list(dict.fromkeys(one.lane for one in spans)), width),
            "x": _time_axis(end_s / size, unit, width),
            "x2": {"field": "b"},
            "color": _colour(series, colours),
            "description": {"field": "say"},
        },
    }


def _time_axis(end: float, unit: str, width: int) -> Spec:
    """From 0 to `end`, in `unit`."""
    return {
        "field": "a",
        "type": "quantitative",
        "title": unit,
        "axis": {"tickCount": 4 if width <= NARROW else 10},
        "scale": {"domain": [0, end], "nice": False},
    }


def _names(field: str, order: Sequence[str], width: int) -> Spec:
    """An axis of names, wide enough in any font: Vega measures them in one that the reader may not have."""
    axis = {
        "ticks": False,
        "labelColor": "var(--ink)",
        "labelLimit": width // 3,
        "minExtent": _room(order, width),
        "labelPadding": 8,
    }
    return {"field": field, "type": "nominal", "sort": list(order), "title": None, "axis": axis}


def _room(names: Sequence[str], width: int) -> float:
    return min(width // 3, max(map(len, names), default=0) * _LETTER)


def _colour(series: Sequence[str], colours: Mapping[str, str]) -> Spec:
    """The legend is the page's: it wraps, and can be read aloud."""
    scale = {"domain": list(series), "range": [colours[name] for name in series]}
    return {"field": "series", "type": "nominal", "scale": scale, "legend": None}


def moments(
    shares: Iterable[tuple[float, float, Mapping[str, float]]],
    colours: Mapping[str, str],
    width: int,
    end_s: float,
) -> Spec:
    """What fills each stretch of time: (start_s, end_s, series -> share), stacked
    in the order of `colours`."""
    size, unit = unit_of(end_s, True)
    data = []
    for start, end, parts in shares:
        low = 0.0
        for name in colours:
            share = parts.get(name, 0.0)
            if share > 0:
                say = f"{format_seconds(start)} to {format_seconds(end)}, {name}: {percent(min(share, 1.0))}"
                data.append(
                    {
                        "a": start / size,
                        "b": end / size,
                        "c": low,
                        "d": low + share,
                        "series": name,
                        "say": say,
                    }
                )
            low += share
    return {
        "width": width,
        "height": 140,
        "autosize": _FIT,
        "data": {"values": data},
        "mark": {"type": "rect"},
        "encoding": {
            "x": _time_axis(end_s / size, unit, width),
            "x2": {"field": "b"},
            "y": {
                "field": "c",
                "type": "quantitative",
                "title": None,
                "axis": {"format": ".0%", "tickCount": 2},
                "scale": {"domain": [0, 1]},
            },
            "y2": {"field": "d"},
            "color": _colour(list(colours), colours),
            "description": {"field": "say"},
        },
    }


def plan_of(boxes: Sequence[Box], width: float, height: float) -> Spec:
    """Rectangles as they are, on `width` x `height` units."""
    scale = min(WIDE / width, _LARGEST)
    data = [
        {
            "a": one.x,
            "b": one.x + one.width,
            "c": one.y,
            "d": one.y + one.height,
            "f": one.colour,
            "say": one.text,
        }
        for one in boxes
    ]
    axis = {"axis": None, "type": "quantitative"}
    encoding = {
        "x": axis | {"field": "a", "scale": {"domain": [0, width], "nice": False}},
        "x2": {"field": "b"},
        "y": axis | {"field": "c", "scale": {"domain": [0, height], "reverse": True, "nice": False}},
        "y2": {"field": "d"},
        "color": {"field": "f", "type": "nominal", "scale": None},
    }
    said = encoding | {"description": {"field": "say"}}
    return {
        "width": width * scale,
        "height": height * scale,
        "padding": 0,
        "data": {"values": data},
        "layer": [
            {
                "transform": [{"filter": "datum.say == ''"}],
                "mark": {"type": "rect", "aria": False},
                "encoding": encoding,
            },
            {"transform": [{"filter": "datum.say != ''"}], "mark": {"type": "rect"}, "encoding": said},
        ],
    }
