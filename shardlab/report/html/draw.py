"""Vega-Lite specifications -> SVG text, by vl-convert: Vega itself, run when the report is written.

The page thus needs no plotting script: it paints at once, prints, and shows its charts where scripts are
blocked. Colours are CSS variables of the page, so that one drawing serves light and dark. Every mark has an
`aria-label`, which the page shows as its tooltip.
"""

from __future__ import annotations

from typing import Any

from shardlab.report.html.parts import Spec
from shardlab.report.page import visible

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"  # a name: nothing is loaded from there
VERSION = "6.4"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
_AXIS = {
    "labelColor": "var(--muted)",
    "titleColor": "var(--muted)",
    "titleFontWeight": "normal",
    "domain": False,
    "tickColor": "var(--line)",
    "gridColor": "var(--line)",
    "labelFontSize": 12,
    "titleFontSize": 12,
    "labelLimit": 300,
}
CONFIG = {
    "font": FONT,
    "view": {"stroke": None},
    "axis": _AXIS,
    "text": {"color": "var(--ink)", "fontSize": 12},
}


def svg_of(spec: Spec) -> str:
    """The drawing."""
    import vl_convert

    whole = {"$schema": SCHEMA, "background": None, "config": CONFIG, **_visible(spec)}
    return vl_convert.vegalite_to_svg(whole, vl_version=VERSION, allowed_base_urls=[])


def _visible(value: object) -> Any:
    """The specification with control characters of every text spelled out, as in every other writer."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {key: _visible(member) for key, member in value.items()}
    return [_visible(member) for member in value] if isinstance(value, list | tuple) else value
