"""The page of `shardlab compare`: ranked plans, emulated ones, and those without an answer, at a glance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shardlab.agreement import Agreement, AgreementRow
from shardlab.analysis import Analysis
from shardlab.case_report import EMULATED_NOTE, CaseReport
from shardlab.compare import Comparison, Unranked, dominant
from shardlab.report.breakdown import mesh_text
from shardlab.report.cost import token_text
from shardlab.report.figures import (
    NONE,
    axes_text,
    key_text,
    largest_first,
    percent,
)
from shardlab.report.page import Cell, Column, Line, Mood, Page, Table, cell, lines
from shardlab.spec.names import strategy_names
from shardlab.spec.step import StepCase
from shardlab.units import format_bytes, format_count, format_seconds

WIDE_COLUMNS, COMPACT_COLUMNS = 150, 100
RANKINGS = {
    "step_time_s": "Ranked by predicted step time, under the memory limit",
    "communication_s": "Ranked by communication time (not all have a step time); no compute, no overlap",
}
EMULATED = "Emulated devices, ordered by bytes sent; not ranked among real machines"
FITS_MOOD: dict[str | None, Mood] = {"yes": "good", "tight": "warn", "no": "bad", None: ""}


@dataclass(frozen=True, slots=True)
class Field:
    """A column of the comparison, and what it shows of a report."""

    column: Column
    cell: Callable[[CaseReport], Cell]


def comparison_page(comparison: Comparison, width: int = WIDE_COLUMNS) -> Page:
    """The page for `width` columns; in fewer than 150, what each plan moves has a table of its own."""
    reports = comparison.reports
    machines = len({report.case.machine for report in reports}) > 1
    tables = (
        *_section(RANKINGS[comparison.by], comparison.ranked, machines, _layout(width, comparison.by)),
        *_section(EMULATED, comparison.emulated, machines, _emulated_layout(width)),
        *((_unranked_table(comparison.unranked, machines),) if comparison.unranked else ()),
        *((_agreement_table(comparison.agreement),) if comparison.agreement is not None else ()),
    )
    notes = (*comparison.notes, *_common_notes(reports))
    return Page(title=_title(reports), tables=tables, notes=notes)


def _title(reports: Sequence[CaseReport]) -> str:
    case = reports[0].case
    machines = sorted({report.case.machine for report in reports})
    plans = len({report.case.plan.name for report in reports})
    count = "1 plan" if plans == 1 else f"{plans} plans"
    work = ", ".join([case.workload, *_sizes(reports[0])])
    return f"{case.subject} on {', '.join(machines)}: {count}, {work}; figures are per device and step"


def _sizes(report: CaseReport) -> list[str]:
    """Batch and sequence; of a step function those that it asked for."""
    case = report.case
    if not isinstance(case, StepCase):
        return [f"batch {case.batch}", f"sequence {case.seq}"]
    given = report.program.given if report.program is not None else {}
    return [f"{name} {value}" for name, value in given.items() if name != "workload"]


def _layout(width: int, by: str) -> tuple[tuple[Field, ...], ...]:
    """The fields of each table: one where they fit, else the verdict first and what moves in a second."""
    time = STEP_TIME if by == "step_time_s" else TIME
    if width >= WIDE_COLUMNS:
        return ((MEMORY, time, DOMINANT, AXES, LINKS, FLOPS),)
    if width >= COMPACT_COLUMNS or by == "step_time_s":
        return ((MEMORY, time, DOMINANT), (AXES, LINKS if width >= COMPACT_COLUMNS else TRAFFIC, FLOPS))
    return ((MEMORY, TIME_AND_FLOPS, DOMINANT), (AXES, TRAFFIC))


def _emulated_layout(width: int) -> tuple[tuple[Field, ...], ...]:
    """Emulated devices have neither links nor a capacity."""
    if width >= COMPACT_COLUMNS:
        return ((MEMORY, SENT, AXES, DOMINANT, FLOPS),)
    return ((MEMORY, SENT, DOMINANT), (AXES, FLOPS))


def _section(
    title: str, reports: Sequence[CaseReport], machines: bool, layout: Sequence[Sequence[Field]]
) -> tuple[Table, ...]:
    """The tables of one group of reports; the first names each plan in full, the others by name."""
    if not reports:
        return ()
    names = [_plan_cell(report, machines) for report in reports]
    tables = []
    for number, fields in enumerate(layout):
        rows = tuple(
            (
                cell(str(rank), "strong"),
                name[:1] if number else name,
                *(field.cell(report) for field in fields),
            )
            for rank, (name, report) in enumerate(zip(names, reports, strict=True), start=1)
        )
        columns = (Column("#", "right"), Column("plan", keep=False), *(field.column for field in fields))
        tables.append(Table(title="What each sends" if number else title, columns=columns, rows=rows))
    return tuple(tables)


def _plan_cell(report: CaseReport, machines: bool) -> Cell:
    name = Line(report.case.plan.name, "strong")
    machine = (Line(f"on {report.case.machine}"),) if machines else ()
    token = token_text(report)
    per_token = () if token is None else (Line(f"{token} per token", "dim"),)
    plan = report.case.plan
    own = isinstance(report.case, StepCase)  # which need not follow the plan's rules
    label = mesh_text(plan.axes) if own else ", ".join(strategy_names(plan))
    return (name, *machine, Line(label, "dim"), *per_token)


def memory_cell(report: CaseReport) -> Cell:
    """`61.2 GB of 80.0 GB`, `fits`; the verdict by its colour too. A dash where the memory is unknown."""
    memory = report.memory
    if memory is None or memory.needed_bytes is None:
        return cell(NONE)
    needed = format_bytes(memory.needed_bytes)
    if memory.limit_bytes is None:
        return cell(needed) if report.emulated else (Line(needed), Line("capacity unknown", "dim"))
    verdict = {"yes": "fits", "tight": "tight", "no": "does not fit", None: "unknown"}[memory.fits]
    if memory.deficit_bytes:
        verdict = f"{format_bytes(memory.deficit_bytes)} too much"
    return (Line(f"{needed} of {format_bytes(memory.limit_bytes)}"), Line(verdict, FITS_MOOD[memory.fits]))


def axes_cell(analysis: Analysis | None) -> Cell:
    """One line per set of axes, the largest first: `fsdp 12.3 GB`; `nothing` where nothing moves."""
    if analysis is None:
        return cell(NONE)
    wire = {key: entry["wire_bytes"] for key, entry in analysis.totals.by_axes.items()}
    moved = [f"{key_text(key)} {format_bytes(value)}" for key, value in largest_first(wire) if any(value)]
    return lines(moved) if moved else cell("nothing")


def links_cell(report: CaseReport, seconds: bool = True) -> Cell:
    """One line per link tier, the largest first: `infiniband 1.23 GB 24.6 ms`."""
    if report.analysis is None or not report.analysis.totals.traffic:
        return cell(NONE)
    tier_s = report.tier_s if seconds and report.tier_s is not None else {}
    return lines(
        f"{tier} {format_bytes(value)}" + (f" {format_seconds(tier_s[tier])}" if tier in tier_s else "")
        for tier, value in largest_first(report.analysis.totals.traffic)
    )


def time_text(report: CaseReport) -> str:
    """The communication time; a dash where it is unknown."""
    return NONE if report.communication_s is None else format_seconds(report.communication_s)


def _step_cell(report: CaseReport) -> Cell:
    """`4.61 s`, of which so much communication is exposed, and the share of the peak that is used."""
    if report.predicted is None or report.step_time_s is None:
        return cell(NONE)
    exposed = report.predicted.timeline.exposed_communication_s or 0.0
    used = (Line(f"MFU {percent(report.mfu)}", "dim"),) if report.mfu is not None else ()
    return (
        Line(format_seconds(report.step_time_s), "strong"),
        Line(f"{format_seconds(exposed)} exposed", "dim"),
        *used,
    )


def _flops_text(report: CaseReport) -> str:
    return NONE if report.hardware_flops is None else format_count(report.hardware_flops)


def _sent_cell(report: CaseReport) -> Cell:
    return cell(NONE if report.analysis is None else format_bytes(report.analysis.totals.wire_bytes))


def _dominant_cell(report: CaseReport) -> Cell:
    top = dominant(report.analysis.collectives) if report.analysis is not None else None
    if top is None:
        return cell(NONE)
    return lines((top.kind, f"over {axes_text(top.axes)}", f"{percent(top.share)} of {top.of}"))


MEMORY = Field(Column("memory"), memory_cell)
TIME = Field(Column("comm. time", "right"), lambda report: cell(time_text(report)))
STEP_TIME = Field(Column("step time", "right"), _step_cell)
TIME_AND_FLOPS = Field(
    Column("comm. time", "right"), lambda report: (*cell(time_text(report)), Line(_flops_text(report), "dim"))
)
DOMINANT = Field(Column("dominated by", keep=False), _dominant_cell)
SENT = Field(Column("sent", "right"), _sent_cell)
AXES = Field(Column("sent per axis"), lambda report: axes_cell(report.analysis))
LINKS = Field(Column("traffic per link"), links_cell)
TRAFFIC = Field(Column("traffic per link"), lambda report: links_cell(report, seconds=False))
FLOPS = Field(Column("FLOPs", "right"), lambda report: cell(_flops_text(report)))


def _unranked_table(rows: Sequence[Unranked], machines: bool) -> Table:
    return Table(
        title="Not ranked",
        columns=(Column("plan", keep=False), Column("why", keep=False)),
        rows=tuple((_plan_cell(row.report, machines), cell(row.reason, "warn")) for row in rows),
    )


def _agreement_table(found: Agreement) -> Table:
    """Every kind over every set of axes, one column per target."""
    columns = (
        Column("axes", keep=False),
        Column("kind", keep=False),
        *(Column(target, "right") for target in found.targets),
        Column("why", keep=False),
    )
    rows = tuple(
        (
            cell(key_text(row.axes)),
            cell(row.kind),
            *(cell(NONE if figure[1] == 0 else format_bytes(figure)) for figure in row.wire_bytes),
            _why_cell(row),
        )
        for row in found.rows
    )
    caption = "bytes each device sends per step; both branches of a conditional count"
    return Table(title="Where targets agree", columns=columns, rows=rows, caption=caption)


def _why_cell(row: AgreementRow) -> Cell:
    if not row.agree:
        return lines(row.why, "warn")
    return (Line("the same", "good"), *lines(row.why, "dim"))


def _common_notes(reports: Sequence[CaseReport]) -> tuple[str, ...]:
    """Each note once, and what it is about unless that is every case with an answer."""
    holders: dict[str, list[CaseReport]] = {}
    for report in reports:
        emulated = (EMULATED_NOTE,) if report.emulated else ()
        for note in dict.fromkeys((*emulated, *report.notes, *_ledger_note(report))):
            holders.setdefault(note, []).append(report)
    answered = [report for report in reports if report.analysis is not None]
    return tuple(
        note if note == EMULATED_NOTE else _about(held, answered) + note for note, held in holders.items()
    )


def _about(held: Sequence[CaseReport], answered: Sequence[CaseReport]) -> str:
    """`h100:64x8: ` for every plan on a machine, `fsdp8: ` for a plan on every machine, else each case."""
    missing = [report for report in answered if report not in held]
    if not missing:
        return ""
    ways: tuple[Callable[[CaseReport], str], ...] = (
        lambda report: report.case.machine,
        lambda report: report.case.plan.name,
        lambda report: f"{report.case.plan.name} on {report.case.machine}",
    )
    others = ({way(report) for report in missing} for way in ways)
    way = next(way for way, other in zip(ways, others, strict=True) if not other & set(map(way, held)))
    return f"{', '.join(dict.fromkeys(map(way, held)))}: "


def _ledger_note(report: CaseReport) -> tuple[str, ...]:
    count = len(report.analysis.ledger) if report.analysis is not None else 0
    entries = "1 entry" if count == 1 else f"{count} entries"
    return (f"{entries} on the ledger (not counted, or not exactly): see shardlab explain",) if count else ()
