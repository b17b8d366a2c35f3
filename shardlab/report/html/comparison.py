"""The HTML report of a comparison: the ranking first, then each plan."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from shardlab.case_report import CaseReport
from shardlab.compare import Comparison
from shardlab.hardware.catalog import load_machine
from shardlab.report.breakdown import audit_tables, ledger_table
from shardlab.report.comparison import comparison_page
from shardlab.report.figures import most
from shardlab.report.html.busiest import busiest
from shardlab.report.html.case import made_by, memory_chart, overview, verdict
from shardlab.report.html.charts import NARROW, WIDE, Segment, bars
from shardlab.report.html.communication import PHASES, collectives_listing, heat_map, sent
from shardlab.report.html.mesh import mesh_blocks
from shardlab.report.html.parts import Block, Card, Chart, Prose, Report, Tab
from shardlab.report.html.timeline import COLOURS, COMPUTE, EXPOSED, WAITING, path_chart
from shardlab.report.page import Mood
from shardlab.review.verdict import share_text
from shardlab.units import format_bytes, format_seconds

PLANS = 8  # with a tab of their own; what is left out is said


def comparison_report(comparison: Comparison) -> Report:
    """Every plan side by side; a tab for each of the best."""
    page = comparison_page(comparison)
    subtitle, _, _ = page.title.partition("; ")
    reports = [report for report in comparison.reports if report.analysis is not None]
    answer, mood = _verdict(comparison)
    left_out = len(reports) - PLANS
    more = f"{left_out} more plans have no tab here: shardlab explain PLAN --html shows one."
    blocks = (
        *page.tables,
        *step_chart(reports),
        *sent_chart(reports),
        *memory_chart(reports, _name_of(reports)),
        *((Prose(title="", lines=(more,)),) if left_out > 0 else ()),
    )
    return Report(
        title=answer,
        subtitle=subtitle,
        verdict=_second(comparison),
        mood=mood,
        cards=tuple(_card(number, report) for number, report in enumerate(comparison.ranked[:4], start=1)),
        tabs=(
            overview(page, blocks),
            *(_plan_tab(number, report, reports) for number, report in enumerate(reports[:PLANS], start=1)),
        ),
        made_by=made_by(reports[0].analysis) if reports else "",
    )


def _label(report: CaseReport) -> str:
    return f"{report.case.plan.name} on {report.case.machine}"


def _name_of(reports: Sequence[CaseReport]) -> dict[int, str]:
    """A short name for each report by its id: what is the same of all is left out."""
    plans = {report.case.plan.name for report in reports}
    machines = {report.case.machine for report in reports}
    if len(plans) == 1 < len(machines):
        return {id(report): report.case.machine for report in reports}
    return {id(one): one.case.plan.name if len(machines) == 1 else _label(one) for one in reports}


def _verdict(comparison: Comparison) -> tuple[str, Mood]:
    if not comparison.ranked:
        return "No plan is ranked", "warn"
    best = comparison.ranked[0]
    fits = best.memory.fits if best.memory is not None else None
    return f"Best: {_label(best)}", "bad" if fits == "no" else ""


def _second(comparison: Comparison) -> str:
    """The best plan in a sentence, and how far behind the next one is."""
    if not comparison.ranked:
        return "; ".join(dict.fromkeys(row.reason for row in comparison.unranked)) or "Emulated plans only."
    best, *others = comparison.ranked
    words = [verdict(best)[0]]
    if others and best.step_time_s and others[0].step_time_s:
        behind = share_text(Fraction(others[0].step_time_s) / Fraction(best.step_time_s) - 1)
        words.append(f"The next, {_label(others[0])}, takes {behind} longer.")
    return " ".join(words)


def _card(number: int, report: CaseReport) -> Card:
    seconds = report.step_time_s if report.step_time_s is not None else report.communication_s
    what = "" if report.step_time_s is not None else "communication; "
    return Card(label=f"rank {number}", value=format_seconds(seconds), detail=f"{what}{_label(report)}")


def step_chart(reports: Sequence[CaseReport]) -> tuple[Chart, ...]:
    """What the steps consist of, side by side; only those that are predicted."""
    names = _name_of(reports)
    segments, totals = [], {}
    for report in reports:
        line = report.predicted.timeline if report.predicted is not None else None
        if line is None or not line.step_time_s:
            continue
        compute_s, exposed_s = line.compute_s or 0.0, line.exposed_communication_s or 0.0
        parts = (
            (COMPUTE, compute_s),
            (EXPOSED, exposed_s),
            (WAITING, max(line.step_time_s - compute_s - exposed_s, 0.0)),
        )
        bar = names[id(report)]
        segments += [Segment(bar, name, value, format_seconds(value)) for name, value in parts if value]
        totals[bar] = format_seconds(line.step_time_s)
    if not segments:
        return ()
    wide, narrow = (bars(segments, COLOURS, width, seconds=True, totals=totals) for width in (WIDE, NARROW))
    return (
        Chart(
            title="The step of each plan",
            alt="; ".join(f"{bar}: {text}" for bar, text in totals.items()),
            wide=wide,
            narrow=narrow,
            legend={name: COLOURS[name] for name in (COMPUTE, EXPOSED, WAITING)},
            caption="waiting: for other stages, copies, launches; what hides communication is compute",
        ),
    )


def sent_chart(reports: Sequence[CaseReport]) -> tuple[Chart, ...]:
    """Bytes that each plan sends, by phase."""
    names = _name_of(reports)
    segments, totals = [], {}
    for report in reports:
        if report.analysis is None:
            continue
        bar = names[id(report)]
        by_phase = sent(busiest(report.analysis).rows, lambda row: row.phase)
        known = [(phase, by_phase[phase]) for phase in PHASES if phase in by_phase]
        segments += [Segment(bar, phase, float(most(value)), format_bytes(value)) for phase, value in known]
        totals[bar] = format_bytes(report.analysis.totals.wire_bytes)
    if not any(segment.value for segment in segments):
        return ()
    wide, narrow = (bars(segments, PHASES, width, totals=totals) for width in (WIDE, NARROW))
    return (
        Chart(
            title="Bytes that a device sends, by phase",
            alt="; ".join(f"{bar}: {text}" for bar, text in totals.items()),
            wide=wide,
            narrow=narrow,
            legend={name: PHASES[name] for name in PHASES if any(one.series == name for one in segments)},
            caption="per step, of the device that sends most; a bar's end says the range over devices",
        ),
    )


def _plan_tab(number: int, report: CaseReport, reports: Sequence[CaseReport]) -> Tab:
    """One plan: what it waits for, what it sends where, every collective, what could be saved."""
    analysis = report.analysis
    blocks: list[Block] = [Prose(title=_label(report), lines=(verdict(report)[0],))]
    if report.predicted is not None:
        blocks += path_chart(report.predicted.timeline)
    if analysis is not None:
        device = busiest(analysis)
        blocks += heat_map(device)
        blocks += mesh_blocks(analysis, device, load_machine(report.case.machine), report.step_time_s)
        blocks += audit_tables(report.findings)
        blocks += [ledger_table(analysis)] if analysis.ledger else []
        blocks += collectives_listing(analysis)
    return Tab(name=f"plan-{number}", title=_name_of(reports)[id(report)], blocks=tuple(blocks))
