"""The page of `shardlab compare`: ranked plans, emulated ones, and those without an answer, at a glance."""

from __future__ import annotations

from collections.abc import Sequence

from shardlab.analysis import Analysis
from shardlab.case_report import EMULATED_NOTE, CaseReport
from shardlab.compare import Comparison, Unranked, dominant
from shardlab.report.figures import (
    NONE,
    axes_text,
    key_text,
    largest_first,
    percent,
)
from shardlab.report.page import Cell, Column, Line, Mood, Page, Table, cell, lines
from shardlab.spec.names import strategy_names
from shardlab.units import format_bytes, format_count, format_seconds

WIDE_COLUMNS = 150
RANKING = "by communication time: bytes on each link over its bandwidth; no compute, no overlap"
FITS_MOOD: dict[str | None, Mood] = {"yes": "good", "tight": "warn", "no": "bad", None: ""}


def comparison_page(comparison: Comparison, wide: bool = True) -> Page:
    """The page. Not `wide` puts what each plan moves into a table of its own, for 80 columns."""
    reports = comparison.reports
    machines = len({report.case.machine for report in reports}) > 1
    tables: list[Table] = []
    if comparison.ranked:
        ranks = [str(number) for number in range(1, len(comparison.ranked) + 1)]
        tables += _section("Ranked " + RANKING, comparison.ranked, ranks, machines, wide)
    if comparison.emulated:
        title = "Emulated, not ranked: ordered by bytes sent"
        tables += _section(title, comparison.emulated, [NONE] * len(comparison.emulated), machines, wide)
    if comparison.unranked:
        tables.append(_unranked_table(comparison.unranked, machines))
    notes = (*comparison.notes, *_common_notes(reports))
    return Page(title=_title(reports), tables=tuple(tables), notes=notes)


def _title(reports: Sequence[CaseReport]) -> str:
    case = reports[0].case
    machines = sorted({report.case.machine for report in reports})
    count = f"{len({r.case.plan.name for r in reports})} plans"
    work = f"{case.workload}, batch {case.batch}, sequence {case.seq}"
    return f"{case.model.name} on {', '.join(machines)}: {count}, {work}; figures are per device and step"


def _section(
    title: str, reports: Sequence[CaseReport], ranks: Sequence[str], machines: bool, wide: bool
) -> list[Table]:
    names = [_plan_cell(report, machines) for report in reports]
    numbers = [cell(number, "strong") for number in ranks]
    place = (Column("#", "right"), Column("plan", keep=False))
    verdict = (Column("memory"), Column("comm. time", "right"), Column("dominated by", keep=False))
    moves = (Column("sent per axis"), Column("traffic per link"), Column("FLOPs", "right"))
    verdicts = [(memory_cell(r), _time_cell(r), _dominant_cell(r)) for r in reports]
    moved = [(axes_cell(r.analysis), links_cell(r), _flops_cell(r)) for r in reports]
    if wide:
        rows = zip(numbers, names, verdicts, moved, strict=True)
        return [_table(title, (*place, *verdict, *moves), [(n, p, *v, *m) for n, p, v, m in rows])]
    upper = [(n, p, *v) for n, p, v in zip(numbers, names, verdicts, strict=True)]
    lower = [(n, p[:1], *m) for n, p, m in zip(numbers, names, moved, strict=True)]
    return [_table(title, (*place, *verdict), upper), _table("What each sends", (*place, *moves), lower)]


def _table(title: str, columns: tuple[Column, ...], rows: Sequence[tuple[Cell, ...]]) -> Table:
    return Table(title=title, columns=columns, rows=tuple(rows))


def _plan_cell(report: CaseReport, machines: bool) -> Cell:
    name = Line(report.case.plan.name, "strong")
    machine = (Line(f"on {report.case.machine}"),) if machines else ()
    return (name, *machine, Line(", ".join(strategy_names(report.case.plan)), "dim"))


def memory_cell(report: CaseReport) -> Cell:
    """`61.2 GB of 80.0 GB`, `fits`; the verdict by its colour too. A dash where the memory is unknown."""
    memory = report.memory
    if memory is None or memory.peak_bytes is None:
        return cell(NONE)
    peak = format_bytes(memory.peak_bytes)
    if memory.limit_bytes is None:
        return (Line(peak), Line("capacity unknown", "dim"))
    verdict = {"yes": "fits", "tight": "tight", "no": "does not fit", None: "unknown"}[memory.fits]
    if memory.deficit_bytes:
        verdict = f"{format_bytes(memory.deficit_bytes)} too much"
    return (Line(f"{peak} of {format_bytes(memory.limit_bytes)}"), Line(verdict, FITS_MOOD[memory.fits]))


def axes_cell(analysis: Analysis | None) -> Cell:
    """One line per set of axes, the largest first: `fsdp 12.3 GB`."""
    if analysis is None or not analysis.totals.by_axes:
        return cell("nothing") if analysis is not None else cell(NONE)
    wire = {key: entry["wire_bytes"] for key, entry in analysis.totals.by_axes.items()}
    return lines(f"{key_text(key)} {format_bytes(value)}" for key, value in largest_first(wire) if any(value))


def links_cell(report: CaseReport) -> Cell:
    """One line per link tier, the largest first: `infiniband 1.23 GB 24.6 ms`."""
    if report.analysis is None or not report.analysis.totals.traffic:
        return cell(NONE)
    seconds = report.tier_s or {}
    return lines(
        f"{tier} {format_bytes(value)}" + (f" {format_seconds(seconds[tier])}" if tier in seconds else "")
        for tier, value in largest_first(report.analysis.totals.traffic)
    )


def _time_cell(report: CaseReport) -> Cell:
    return cell(time_text(report))


def time_text(report: CaseReport) -> str:
    """The communication time; a dash where it is unknown."""
    if report.communication_s is None:
        return NONE
    return format_seconds(report.communication_s)


def _dominant_cell(report: CaseReport) -> Cell:
    top = dominant(report.analysis.collectives) if report.analysis is not None else None
    if top is None:
        return cell(NONE)
    return cell(f"{top.kind} over {axes_text(top.axes)}, {percent(top.share)} of {top.of}")


def _flops_cell(report: CaseReport) -> Cell:
    return cell(NONE if report.hardware_flops is None else format_count(report.hardware_flops))


def _unranked_table(rows: Sequence[Unranked], machines: bool) -> Table:
    return Table(
        title="No answer",
        columns=(Column("plan", keep=False), Column("why", keep=False)),
        rows=tuple((_plan_cell(row.report, machines), cell(row.reason, "warn")) for row in rows),
    )


def _common_notes(reports: Sequence[CaseReport]) -> tuple[str, ...]:
    """Each note once; one that not every plan has names the plans."""
    holders: dict[str, list[str]] = {}
    for report in reports:
        for note in (*((EMULATED_NOTE,) if report.emulated else ()), *report.notes, *_ledger_note(report)):
            names = holders.setdefault(note, [])
            if report.case.plan.name not in names:
                names.append(report.case.plan.name)
    everyone = len({report.case.plan.name for report in reports})
    return tuple(note if len(n) == everyone else f"{', '.join(n)}: {note}" for note, n in holders.items())


def _ledger_note(report: CaseReport) -> tuple[str, ...]:
    count = len(report.analysis.ledger) if report.analysis is not None else 0
    entries = "1 entry" if count == 1 else f"{count} entries"
    return (f"{entries} on the ledger (not counted, or not exactly): see shardlab explain",) if count else ()
