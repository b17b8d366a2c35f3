"""The HTML report of one case (`explain --html`) and of an analysed dump (`analyze --html`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from shardlab.analysis import Analysis
from shardlab.audit import Finding
from shardlab.case_document import PATH_ENTRIES
from shardlab.case_report import CaseReport
from shardlab.compare import dominant
from shardlab.hardware.catalog import load_machine
from shardlab.hardware.machine import Machine
from shardlab.order import Orders
from shardlab.report.breakdown import TOP, analysis_page, audit_tables, ledger_table
from shardlab.report.comparison import FITS_MOOD, memory_cell
from shardlab.report.cost import cost_tables
from shardlab.report.explain import explain_page, owner_tables, warning_tables
from shardlab.report.figures import NONE, axes_text, percent
from shardlab.report.html.busiest import Busiest, busiest
from shardlab.report.html.charts import NARROW, WIDE, Mark, Segment, bars
from shardlab.report.html.communication import axes_chart, axis_colours, collectives_listing, heat_map
from shardlab.report.html.mesh import mesh_blocks
from shardlab.report.html.parts import Block, Card, Chart, Facts, Prose, Report, Tab
from shardlab.report.html.timeline import loop_charts, moment_chart, path_chart, stage_chart
from shardlab.report.order import orders_table
from shardlab.report.page import Mood, Page
from shardlab.report.step import path_tables
from shardlab.spec.step import AnyCase
from shardlab.units import format_bytes, format_seconds

_OWNERS = (
    "parameters", "optimizer", "gradients", "activations", "cache", "collectives", "temporaries", "inputs",
)  # fmt: skip
_GAPS = "padding and gaps"


def case_report(report: CaseReport, orders: Orders | None = None) -> Report:
    """One case; of one without an analysis, why."""
    case, page = report.case, explain_page(report)
    analysis = report.analysis
    work = (
        "" if case.batch is None else f", batch {case.batch}" + (f" × {case.seq} tokens" if case.seq else "")
    )
    subtitle = f"{case.subject} · {case.workload}{work} · {case.machine}"
    answer, mood = verdict(report)
    device = busiest(analysis) if analysis is not None else None
    tabs = case_tabs(report, device, orders) if device is not None else ()
    return Report(
        title=f"{case.plan.name} on {case.machine}",
        subtitle=subtitle,
        verdict=answer,
        mood=mood,
        cards=_case_cards(report) if analysis is not None else (),
        tabs=(overview(page, _case_overview(report, device)), *tabs),
        made_by=made_by(analysis),
    )


def _size_text(case: AnyCase) -> str:
    batch = f", batch {case.batch}" if case.batch is not None else ""
    return batch + (f" × {case.seq} tokens" if batch and case.seq is not None else "")


def analysis_report(
    analysis: Analysis, findings: Sequence[Finding] | None, orders: Orders | None = None
) -> Report:
    """An analysed dump: what it sends, on what machine is known of it."""
    page, device = analysis_page(analysis, findings=findings), busiest(analysis)
    machine = load_machine(analysis.machine) if analysis.machine else None
    names = ", ".join(module.name for module in analysis.modules)
    cards = (
        Card(
            label="sent per device and step",
            value=format_bytes(analysis.totals.wire_bytes),
            detail=_top_text(analysis),
        ),
        Card(
            label="collectives",
            value=f"{len(analysis.collectives):,}",
            detail=f"{len(analysis.modules)} module(s)",
        ),
        _ledger_card(analysis),
    )
    tabs = (
        *communication_tabs(analysis, device, machine, None, orders),
        Tab(name="audit", title="Audit & ledger", blocks=_audit_blocks(analysis, findings)),
    )
    return Report(
        title="What this program communicates",
        subtitle=names,
        verdict=_sent_text(analysis),
        mood="",
        cards=cards,
        tabs=(overview(page, axes_chart(device)), *tabs),
        made_by=made_by(analysis),
    )


def overview(page: Page, blocks: Sequence[Block]) -> Tab:
    """The answer: charts first, then the facts of the terminal's page and its notes."""
    facts = (Facts(page.facts),) if page.facts else ()
    notes = (Prose(title="Notes", lines=page.notes),) if page.notes else ()
    return Tab(name="overview", title="Overview", blocks=(*blocks, *facts, *notes))


def case_tabs(report: CaseReport, device: Busiest, orders: Orders | None = None) -> tuple[Tab, ...]:
    """Everything but the overview of a case that was analysed."""
    analysis = report.analysis
    if analysis is None:
        return ()
    machine = load_machine(report.case.machine)
    tabs = (
        *communication_tabs(analysis, device, machine, report.step_time_s, orders),
        Tab(name="timeline", title="Timeline", blocks=_timeline_blocks(report)),
        Tab(name="memory", title="Memory & compute", blocks=_memory_blocks(report)),
        Tab(
            name="audit",
            title="Audit & ledger",
            count=len(report.findings) + len(analysis.ledger),
            blocks=(*_audit_blocks(analysis, report.findings), *warning_tables(report)),
        ),
    )
    return tuple(tab for tab in tabs if tab.blocks)


def communication_tabs(
    analysis: Analysis,
    device: Busiest,
    machine: Machine | None,
    step_s: float | None,
    orders: Orders | None = None,
) -> tuple[Tab, ...]:
    """Bytes, collectives, and the mesh."""
    return (
        Tab(name="bytes", title="Communication", blocks=(*axes_chart(device), *heat_map(device))),
        Tab(
            name="collectives",
            title="Collectives",
            count=len(analysis.collectives),
            blocks=collectives_listing(analysis),
        ),
        Tab(
            name="mesh",
            title="Mesh & links",
            blocks=(*mesh_blocks(analysis, device, machine, step_s), *_order_blocks(orders)),
        ),
    )


def _order_blocks(orders: Orders | None) -> tuple[Block, ...]:
    return () if orders is None else (orders_table(orders),)


def _audit_blocks(analysis: Analysis, findings: Sequence[Finding] | None) -> tuple[Block, ...]:
    blocks: list[Block] = [*audit_tables(findings or ())]
    if findings is None:
        blocks.append(Prose(title="Audit", lines=("Not asked for: --audit lists what could be saved.",)))
    elif not findings:
        blocks.append(Prose(title="Audit", lines=("Nothing found that could be saved.",), mood="good"))
    if analysis.ledger:
        blocks.append(ledger_table(analysis))
    else:
        words = "Empty: every collective was counted, exactly."
        blocks.append(Prose(title="Ledger: not counted, or not exactly", lines=(words,), mood="good"))
    return tuple(blocks)


def _case_overview(report: CaseReport, device: Busiest | None) -> tuple[Block, ...]:
    if device is None:
        return ()
    line = report.predicted.timeline if report.predicted is not None else None
    path = path_chart(line) if line is not None else ()
    return (*path, *axes_chart(device), *memory_chart((report,)))


def _timeline_blocks(report: CaseReport) -> tuple[Block, ...]:
    predicted = report.predicted
    if predicted is None or predicted.timeline.step_time_s is None or report.analysis is None:
        why = "of emulated devices" if report.emulated else "of this program; the notes say why"
        return (Prose(title="", lines=(f"There is no predicted step {why}.",)),)
    line = predicted.timeline
    keys = [axes_text(row.axes) for row in report.analysis.collectives]
    colours = axis_colours(report.analysis.mesh, keys)
    return (
        *moment_chart(line),
        *stage_chart(predicted),
        *loop_charts(line, colours),
        *path_tables(report, PATH_ENTRIES),
    )


def memory_chart(reports: Sequence[CaseReport], names: Mapping[int, str] | None = None) -> tuple[Chart, ...]:
    """Who holds the memory of each case, against its limit; none where nothing is known of any. names: of
    reports, by their id."""
    segments, totals, marks = [], {}, []
    for report in reports:
        memory, bar = report.memory, (names or {}).get(id(report), "")
        if memory is None or memory.needed_bytes is None:
            continue
        owners = (
            dict(report.owners.by_owner) if report.owners is not None else {"reserved": memory.needed_bytes}
        )
        if report.owners is not None and report.owners.unexplained_bytes > 0:
            owners[_GAPS] = report.owners.unexplained_bytes
        segments += [Segment(bar, owner, float(size), format_bytes(size)) for owner, size in owners.items()]
        totals[bar] = format_bytes(memory.needed_bytes)
        if memory.limit_bytes is not None:
            marks.append(Mark(bar, float(memory.limit_bytes), f"limit {format_bytes(memory.limit_bytes)}"))
    if not segments:
        return ()
    known = [*_OWNERS, *(one.series for one in segments if one.series not in (*_OWNERS, _GAPS))]
    colours = {owner: f"var(--series-{number % 8 + 1})" for number, owner in enumerate(dict.fromkeys(known))}
    colours[_GAPS] = "var(--cell)"
    wide, narrow = (bars(segments, colours, width, totals=totals, marks=marks) for width in (WIDE, NARROW))
    limits = ", ".join(dict.fromkeys(mark.text for mark in marks))
    return (
        Chart(
            title="Memory of a device, by owner",
            alt="; ".join(f"{bar} {text}".strip() for bar, text in totals.items()),
            wide=wide,
            narrow=narrow,
            legend={name: colours[name] for name in colours if any(one.series == name for one in segments)},
            caption="; ".join(["at the step's fullest moment", *([f"in red: {limits}"] if limits else [])]),
        ),
    )


def _memory_blocks(report: CaseReport) -> tuple[Block, ...]:
    tables = (*owner_tables(report), *(cost_tables(report.cost, TOP) if report.cost is not None else ()))
    return (*memory_chart((report,)), *tables)


def _case_cards(report: CaseReport) -> tuple[Card, ...]:
    analysis, cards = report.analysis, []
    line = report.predicted.timeline if report.predicted is not None else None
    if line is not None and line.step_time_s is not None and report.predicted is not None:
        exposed_s = line.exposed_communication_s or 0.0
        moving = format_seconds(line.communication_s)
        cards.append(
            Card(
                label="step time",
                value=format_seconds(line.step_time_s),
                detail=f"predicted, {report.predicted.error_class}",
            )
        )
        cards.append(
            Card(
                label="exposed communication",
                value=percent(exposed_s / line.step_time_s) if line.step_time_s else NONE,
                detail=f"{format_seconds(exposed_s)} of {moving} of communication",
            )
        )
    elif report.communication_s is not None:
        cards.append(
            Card(
                label="communication",
                value=format_seconds(report.communication_s),
                detail="no overlap counted",
            )
        )
    if report.mfu is not None:
        cards.append(Card(label="MFU", value=percent(report.mfu), detail=_tokens_text(report)))
    cards.append(_memory_card(report))
    if analysis is not None:
        cards.append(
            Card(
                label="sent per device",
                value=format_bytes(analysis.totals.wire_bytes),
                detail=_top_text(analysis),
            )
        )
        cards.append(_ledger_card(analysis))
    return tuple(cards)


def _memory_card(report: CaseReport) -> Card:
    memory = memory_cell(report)
    fits = report.memory.fits if report.memory is not None else None
    value, _, limit = memory[0].text.partition(" of ")
    detail = ", ".join([*([f"of {limit}"] if limit else []), *(line.text for line in memory[1:])])
    return Card(label="memory", value=value, detail=detail, mood=FITS_MOOD[fits])


def _tokens_text(report: CaseReport) -> str:
    rate = report.tokens_per_s_per_device
    return "" if rate is None else f"{rate:,.0f} tokens/s per device"


def _ledger_card(analysis: Analysis) -> Card:
    count = len(analysis.ledger)
    detail, mood = ("not counted, or not exactly", "warn") if count else ("all counted, exactly", "good")
    return Card(label="ledger", value=f"{count:,}" if count else "empty", detail=detail, mood=mood)  # type: ignore[arg-type]


def _top_text(analysis: Analysis) -> str:
    top = dominant(analysis.collectives)
    if top is None:
        return "nothing moves"
    of = "communication time" if top.of == "time" else "bytes sent"
    return f"{top.kind} over {axes_text(top.axes)} is {percent(top.share)} of {of}"


def _sent_text(analysis: Analysis) -> str:
    return f"Each device sends {format_bytes(analysis.totals.wire_bytes)} per step; {_top_text(analysis)}."


def verdict(report: CaseReport) -> tuple[str, Mood]:
    """The answer in a sentence or two."""
    if report.analysis is None:
        (label, why) = explain_page(report).facts[-1]
        return f"{label}: {why}", "bad"
    memory = memory_cell(report)
    fits = report.memory.fits if report.memory is not None else None
    words = f" Memory: {', '.join(line.text for line in memory)}." if len(memory) > 1 else ""
    return _time_words(report, report.analysis) + words, "bad" if fits == "no" else ""


def _time_words(report: CaseReport, analysis: Analysis) -> str:
    line = report.predicted.timeline if report.predicted is not None else None
    if line is None or not line.step_time_s:
        return _sent_text(analysis)
    parts = [f"{format_seconds(line.step_time_s)} a step"]
    if line.exposed_communication_s is not None:
        parts.append(
            f"{percent(line.exposed_communication_s / line.step_time_s)} of it exposed communication"
        )
    if line.root.waited_s:
        parts.append(f"{percent(line.root.waited_s / line.step_time_s)} waiting for other stages")
    return ", ".join(parts) + f"; {_top_text(analysis)}."


def made_by(analysis: Analysis | None) -> str:
    """Versions and flags, as text."""
    if analysis is None:
        return ""
    known = {key: value for key, value in analysis.made_by.items() if key != "device_order"}
    return json.dumps(known, ensure_ascii=False) if known else ""
