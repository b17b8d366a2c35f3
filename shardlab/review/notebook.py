"""A Diff in a notebook: the verdict, what a step is judged by, and the largest changes."""

from __future__ import annotations

from shardlab.analysis import axes_key
from shardlab.review.records import Diff, Row, minus
from shardlab.review.verdict import measures, verdict
from shardlab.text import html_fragment, html_table
from shardlab.units import UNKNOWN, format_bytes

TOP = 10


def diff_html(found: Diff) -> str:
    """A fragment of HTML, no script in it."""
    totals = [
        (one.name, one.text(one.before), one.text(one.after), one.change_text) for one in measures(found)
    ]
    changes = found.changes
    left = len(changes) - TOP
    return html_fragment(
        verdict(found).text,
        (f"{found.base.name} → {found.head.name}", *found.notes),
        (
            html_table("per device and step", ("", "base", "head", "change"), totals, 3),
            html_table(
                "what changed" + (f"; {left} more" if left > 0 else ""),
                ("change", "collective", "axes", "phase", "layer", "source", "bytes sent"),
                [_change(row) for row in changes[:TOP]],
                1,
            ),
        ),
    )


def _change(row: Row) -> tuple[str, ...]:
    flow = (*row.head, *row.base)[0]
    low, high = minus(row.after.wire_bytes, row.before.wire_bytes)
    sign = "" if high is None or not high else "+" if high > 0 else "−"
    size = UNKNOWN if high is None else sign + format_bytes(max(abs(low), abs(high)))
    what = ", ".join((row.what, *row.moved))
    return (what, flow.kind, axes_key(flow.axes), flow.phase, flow.layer, ", ".join(flow.sources[:1]), size)
