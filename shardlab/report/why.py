"""The page of `--why NAME`: one collective, what it does to its arrays, and the rule behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shardlab.report.breakdown import audit_tables
from shardlab.report.figures import axes_text, scaled, times
from shardlab.report.page import Column, Line, Page, Table, cell, code, lines
from shardlab.units import format_bytes, format_seconds
from shardlab.why import Why

ARRAYS = 12
NO_PARAMETER = "no parameter of this layer has its shape"
NO_MODEL = "unknown: nothing says of which model it is"
NOT_SAID = "unknown: the compiled text does not say"


def why_pages(found: Sequence[Why]) -> Iterator[Page]:
    """A page for each collective of the name."""
    return map(why_page, found)


def why_page(one: Why) -> Page:
    """Why one collective is there."""
    row = one.row
    title = f"Why {row.name}" + (f" of {row.module}" if row.module else "")
    groups = "1 group" if row.num_groups == 1 else f"{row.num_groups} groups"
    over = f"over {axes_text(row.axes)}, {groups} of {row.group_size}"
    sent = format_bytes(scaled(row.executions, row.wire_bytes))
    time = f", {format_seconds(row.time_s)} each" if row.time_s is not None else ""
    each = f"{times(row.executions)} {format_bytes(row.wire_bytes)}{time}"
    facts = (
        ("collective", f"{row.kind} {', '.join(row.dtypes)} {over}" + (f", {row.tier}" if row.tier else "")),
        ("sends", f"{sent} per device and step: {each}"),
        ("source", row.source or NOT_SAID),
        ("layer", ", ".join(filter(None, (row.layer or NOT_SAID, row.phase, "recompute" * row.recompute)))),
        ("operation", row.op_name or NOT_SAID),
        ("compiled", one.text + (f" (line {one.line})" if one.line else "")),
        *(("rule", rule) for rule in one.rules),
        ("rules are", one.rules_reason),
        *(("warning", warning) for warning in one.warnings),
        *(("remedy", remedy) for remedy in one.remedies or ("unknown: nothing here says what made it",)),
    )
    return Page(title=title, facts=facts, tables=(_arrays(one), *audit_tables(one.findings)))


def _arrays(one: Why) -> Table:
    columns = (Column("array", keep=False), Column("before", keep=False), Column("after", keep=False))
    rows = tuple(
        (
            lines(change.arrays) or cell(NO_PARAMETER if one.model_known else NO_MODEL, "dim"),
            (*code(change.before_shape), Line(change.before)),
            (*code(change.after_shape), Line(change.after)),
        )
        for change in one.changes[:ARRAYS]
    )
    left = len(one.changes) - ARRAYS
    more = f"{left} more arrays; --json has all; " if left > 0 else ""
    caption = f"{more}shapes on one device; how other dimensions are split, compiled text does not say"
    return Table(title="What it does to its arrays", columns=columns, rows=rows, caption=caption)
