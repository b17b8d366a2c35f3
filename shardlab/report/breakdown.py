"""The page of `shardlab analyze`, and the tables that `explain` shares with it: what one program moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from shardlab.analysis import Analysis, ByteRange, CollectiveRow
from shardlab.cost.network import communication
from shardlab.report.figures import (
    axes_text,
    key_text,
    largest_first,
    most,
    scaled,
    shares,
    times,
)
from shardlab.report.page import Cell, Column, Line, Page, Table, cell, code
from shardlab.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from shardlab.audit import Finding

TOP = 12
TIME_MEANS = "of collectives one after another; no compute, no overlap"
Breakdown = Mapping[str, Mapping[str, ByteRange]]


def analysis_page(analysis: Analysis, top: int = TOP, findings: Sequence[Finding] | None = None) -> Page:
    """An analysed dump: the same breakdown, without a case. findings: None when no audit was asked for."""
    names = ", ".join(module.name for module in analysis.modules)
    backends = ", ".join(sorted({module.backend for module in analysis.modules}))
    devices = ", ".join(sorted({str(module.num_devices) for module in analysis.modules}))
    facts = [
        ("module", names),
        ("backend", f"{backends}, {devices} devices"),
        ("mesh", mesh_text(analysis.mesh)),
    ]
    if any(module.runs_per_step != 1 for module in analysis.modules):
        runs = ", ".join(f"{module.runs_per_step} × {module.name}" for module in analysis.modules)
        facts.append(("a step", runs))
    facts += [("machine", analysis.machine)] if analysis.machine else []
    facts.append(("sent", f"{format_bytes(analysis.totals.wire_bytes)} per device and step"))
    time = communication(analysis)
    if analysis.machine and time.communication_s is not None:
        facts.append(("comm. time", f"{format_seconds(time.communication_s)} {TIME_MEANS}"))
    if findings is not None and not findings:
        facts.append(("audit", "nothing found"))
    tables = (*traffic_tables(analysis, top, time.tier_s), *audit_tables(findings or ()))
    return Page(title="What this program communicates", facts=tuple(facts), tables=tables)


def mesh_text(mesh: Mapping[str, int] | None) -> str:
    """`data 4 × tensor 2`, or that no mesh was given."""
    return " × ".join(f"{axis} {size}" for axis, size in mesh.items()) if mesh else "not given"


def traffic_tables(analysis: Analysis, top: int, tier_s: Mapping[str, float]) -> tuple[Table, ...]:
    """What is sent by axis, kind, phase, layer and link, the largest collectives, and the ledger.

    top: rows of the longer tables. tier_s: seconds per link tier; empty without a machine.
    """
    totals = analysis.totals
    tables = [
        _breakdown("By kind", "kind", totals.by_kind),
        _breakdown("By mesh axes", "axes", totals.by_axes),
        _breakdown("By phase", "phase", totals.by_phase),
        _breakdown("By layer", "layer", totals.by_layer, top),
        _links(analysis, tier_s),
        _collectives(analysis, top),
        ledger_table(analysis),
    ]
    return tuple(table for table in tables if table.rows)


def _breakdown(title: str, header: str, parts: Breakdown, top: int | None = None) -> Table:
    wire = {key: entry["wire_bytes"] for key, entry in parts.items()}
    ordered = largest_first(wire)
    portions = shares(value for _, value in ordered)
    rows = tuple(
        (
            code(key_text(key)),
            cell(format_bytes(parts[key]["payload_bytes"])),
            cell(format_bytes(value)),
            cell(portion),
        )
        for (key, value), portion in zip(ordered, portions, strict=True)
    )
    columns = (
        Column(header, keep=False),
        Column("payload", "right"),
        Column("sent", "right"),
        Column("share", "right"),
    )
    return Table(title=title, columns=columns, rows=rows[:top], caption=_left_out(len(rows), top, ordered))


def _left_out(count: int, top: int | None, ordered: list[tuple[str, ByteRange]]) -> str:
    if top is None or count <= top:
        return ""
    rest = sum((most(value) for _, value in ordered[top:]), most(ordered[top][1]) * 0)
    return f"{count - top} smaller ones not shown, {format_bytes(rest)} together; --json has all"


def _links(analysis: Analysis, tier_s: Mapping[str, float]) -> Table:
    rows = tuple(
        (
            cell(tier),
            cell(format_bytes(value)),
            cell(format_seconds(tier_s[tier]) if tier in tier_s else "unknown"),
        )
        for tier, value in largest_first(analysis.totals.traffic)
    )
    columns = (Column("link"), Column("each device sends", "right"), Column("time", "right"))
    return Table(title="By link", columns=columns, rows=rows)


def _collectives(analysis: Analysis, top: int) -> Table:
    sent = {id(row): scaled(row.executions, row.wire_bytes) for row in analysis.collectives}
    ordered = sorted(analysis.collectives, key=lambda row: (-most(sent[id(row)]), row.name))
    shown = ordered[:top]
    caption = _left_out(len(ordered), top, [(row.name, sent[id(row)]) for row in ordered])
    return Table(
        title="Collectives by bytes sent" if len(ordered) <= top else f"The {top} collectives that send most",
        columns=(
            Column("sent", "right"),
            Column("collective", keep=False),
            Column("over", keep=False),
            Column("where", keep=False),
        ),
        rows=tuple(collective_cells(row, sent[id(row)]) for row in shown),
        caption=caption,
    )


def collective_cells(row: CollectiveRow, sent: ByteRange) -> tuple[Cell, ...]:
    """How much, what, over which axes, and where: phase, layer, source line. sent: by all executions."""
    bound = "at most " if row.bound == "upper" else ""
    realizes = f" (realizes {row.realizes})" if row.realizes else ""
    each = f"{times(row.executions)} {bound}{format_bytes(row.wire_bytes)}"
    over = (
        Line(axes_text(row.axes)),
        Line(f"{row.num_groups} × {row.group_size}" + (f", {row.tier}" if row.tier else "")),
    )
    reason = (Line(row.axes_reason, "dim"),) if row.axes is None and row.axes_reason else ()
    phase = row.phase + (", recompute" if row.recompute else "")
    return (
        (
            Line("unknown" if sent[1] is None and not sent[0] else bound + format_bytes(sent), "strong"),
            Line(each, "dim"),
        ),
        (Line(f"{row.kind} {', '.join(row.dtypes)}{realizes}"), *code(row.name)),
        (*over, *reason),
        (Line(phase), *code(row.layer), *code(row.source)),
    )


def audit_tables(findings: Sequence[Finding]) -> tuple[Table, ...]:
    """The findings, in the order of the rules; no table when there are none."""
    columns = (
        Column("at stake", "right"),
        Column("found", keep=False),
        Column("where", keep=False),
        Column("remedy", keep=False),
    )
    rows = tuple(
        (
            cell(_at_stake(one), "strong"),
            (Line(one.rule, "warn"), Line(one.evidence)),
            (*code(one.module or ""), *code(one.instruction), Line(axes_text(one.axes)), *code(one.source)),
            cell(one.remedy),
        )
        for one in findings
    )
    caption = (
        "per device: bytes sent per step that the remedy saves (or takes off the slow link), or memory; "
        "findings may overlap"
    )
    return (Table(title="Audit", columns=columns, rows=rows, caption=caption),) if rows else ()


def _at_stake(finding: Finding) -> str:
    if finding.memory_bytes is not None:
        return f"{format_bytes(finding.memory_bytes)} of memory"
    return "unknown" if finding.wire_bytes is None else format_bytes(finding.wire_bytes)


def ledger_table(analysis: Analysis) -> Table:
    """What was not counted, or not exactly, and why."""
    columns = (Column("what"), Column("name", keep=False), Column("why", keep=False))
    rows = tuple((code(entry.what), code(entry.name), cell(entry.why)) for entry in analysis.ledger)
    return Table(title="Ledger: not counted, or not exactly", columns=columns, rows=rows)
