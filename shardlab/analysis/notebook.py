"""An Analysis in a notebook: what it sends by mesh axes, the largest collectives, the ledger."""

from __future__ import annotations

from fractions import Fraction

from shardlab.analysis.records import Analysis, ByteRange, CollectiveRow, axes_key
from shardlab.text import html_fragment, html_table
from shardlab.units import format_bytes

TOP = 8


def analysis_html(analysis: Analysis) -> str:
    """A fragment of HTML, no script in it."""
    modules = ", ".join(module.name for module in analysis.modules)
    devices = ", ".join(
        sorted({f"{module.backend}, {module.num_devices} devices" for module in analysis.modules})
    )
    mesh = " × ".join(f"{axis} {size}" for axis, size in (analysis.mesh or {}).items())
    ledger = len(analysis.ledger)
    lines = (
        "; ".join(
            filter(None, (devices, mesh and f"mesh {mesh}", analysis.machine and f"on {analysis.machine}"))
        ),
        f"each device sends {format_bytes(analysis.totals.wire_bytes)} per step",
        f"{ledger} on the ledger: not counted, or not exactly" if ledger else "",
    )
    return html_fragment(modules, lines, (_axes_table(analysis), _collectives_table(analysis)))


def _axes_table(analysis: Analysis) -> str:
    found = sorted(analysis.totals.by_axes.items(), key=lambda item: (-_most(item[1]["wire_bytes"]), item[0]))
    rows = [
        (key, format_bytes(sums["payload_bytes"]), format_bytes(sums["wire_bytes"])) for key, sums in found
    ]
    return html_table("by mesh axes, per device and step", ("axes", "payload", "sent"), rows, 2)


def _collectives_table(analysis: Analysis) -> str:
    ordered = sorted(analysis.collectives, key=lambda row: (-_most(_sent(row)), row.name))
    rows = [
        (row.kind, axes_key(row.axes), row.phase, row.layer, row.source, row.name, format_bytes(_sent(row)))
        for row in ordered[:TOP]
    ]
    header = ("collective", "axes", "phase", "layer", "source", "name", "sent")
    left = len(ordered) - TOP
    more = f"; {left} more" if left > 0 else ""
    return html_table(f"collectives, what sends most first{more}", header, rows, 1)


def _sent(row: CollectiveRow) -> ByteRange:
    low, high = row.executions
    return low * row.wire_bytes, None if high is None else high * row.wire_bytes


def _most(value: ByteRange) -> Fraction:
    return value[0] if value[1] is None else value[1]
