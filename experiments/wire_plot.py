"""The wire lab's plot: the step of each plan over the rate of its links, predicted and measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shardlab.errors import Problem, UserError

_COLOURS = ("#1f6fb2", "#d1603d", "#2f8f5b", "#8a5fb0")
_MARKS = {"predicted": {"type": "line"}, "measured": {"type": "point", "filled": True, "size": 45}}
_SECONDS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]
_INK, _GRID = "#333", "#ddd"


@dataclass(frozen=True, slots=True)
class Point:
    """One plan on one network. where: sites x devices. Seconds; predicted_s: None where it is unknown."""

    plan: str
    where: str
    mbit_per_s: float
    predicted_s: float | None
    measured_s: float


def write_plot(path: Path, points: Sequence[Point]) -> None:
    """An SVG file, one panel for each plan, both axes logarithmic. Raises UserError without vl-convert."""
    try:
        from shardlab.report.html.draw import svg_of

        drawing = svg_of(spec_of(points))
    except ImportError:
        what, fix = "vl-convert is not installed", "pip install 'shardlab[report]'"
        raise UserError(Problem("--plot", what, fix)) from None
    path.write_text(drawing, encoding="utf-8")


def spec_of(points: Sequence[Point]) -> dict[str, object]:
    """The Vega-Lite specification."""
    rows = [
        {"plan": point.plan, "where": point.where, "rate": point.mbit_per_s, "of": of, "step": step_s}
        for point in points
        for of, step_s in (("predicted", point.predicted_s), ("measured", point.measured_s))
        if step_s is not None
    ]
    rates = sorted({point.mbit_per_s for point in points})
    log: dict[str, object] = {"type": "quantitative", "scale": {"type": "log", "nice": False}}
    x = {**log, "field": "rate", "title": "Mbit/s", "axis": {"values": rates, "format": "~g"}}
    y = {**log, "field": "step", "title": "s per step", "axis": {"values": _SECONDS, "format": "~g"}}
    colour = {"field": "where", "scale": {"range": list(_COLOURS)}, "title": "network"}
    layers = [
        {
            "transform": [{"filter": f"datum.of == '{of}'"}],
            "mark": mark,
            "encoding": {"x": x, "y": y, "color": {**colour, "type": "nominal"}},
        }
        for of, mark in _MARKS.items()
    ]
    order = list(dict.fromkeys(point.plan for point in points))
    axis = {"labelColor": _INK, "titleColor": _INK, "gridColor": _GRID, "tickColor": _GRID, "domain": False}
    return {
        "background": "white",
        "config": {"axis": axis, "view": {"stroke": None}, "font": "sans-serif"},
        "title": "Step of the wire lab: predicted (lines) and measured (points)",
        "data": {"values": rows},
        "facet": {"field": "plan", "type": "nominal", "sort": order, "title": None},
        "columns": 4,
        "spec": {"width": 190, "height": 150, "layer": layers},
    }
