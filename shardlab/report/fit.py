"""The page and the document of `shardlab fit`: what was tried, what fits, what each change buys."""

from __future__ import annotations

from collections.abc import Sequence

from shardlab.capacity import Fit, FitRow
from shardlab.case_document import Json, case_json
from shardlab.case_report import CaseReport
from shardlab.report.figures import NONE
from shardlab.report.page import Cell, Column, Line, Page, Table, cell
from shardlab.spec.names import strategy_names
from shardlab.units import format_bytes

SCHEMA = "shardlab.fit/1"


def fit_json(fit: Fit) -> Json:
    """`shardlab.fit/1`: `tried`, the base first, and what fits; what is not known is absent."""
    found: Json = {
        "schema": SCHEMA,
        "case": case_json(fit.rows[0].report),
        "tried": [_row_json(row) for row in fit.rows],
        "advice": list(fit.advice),
    }
    answers = {"remat": fit.remat, "largest_batch": fit.largest_batch, "longest_seq": fit.longest_seq}
    return found | {key: value for key, value in answers.items() if value is not None}


def _row_json(row: FitRow) -> Json:
    memory = row.report.memory
    members: dict[str, object] = {
        "needed_bytes": row.needed_bytes,
        "limit_bytes": memory.limit_bytes if memory is not None else None,
        "fits": memory.fits if memory is not None else None,
        "saved_bytes": row.saved_bytes,
        "infeasible": row.report.infeasible,
        "failure": row.report.failure,
    }
    axes = dict(row.report.case.plan.axes)
    known = {key: value for key, value in members.items() if value is not None}
    return {"change": row.change, "axes": axes, **known}


def fit_page(fit: Fit) -> Page:
    """What fits, then what was tried, the base first."""
    case = fit.rows[0].report.case
    facts = [
        ("plan", f"{case.plan.name}: {', '.join(strategy_names(case.plan))}"),
        ("asked", f"{case.workload}, batch {case.batch} sequences of {case.seq} tokens"),
        ("largest batch", _largest_batch(fit, case.seq)),
        ("longest sequence", _longest_seq(fit)),
    ]
    return Page(
        title=f"What fits: {case.subject} on {case.machine}",
        facts=tuple(facts),
        tables=(_tried(fit.rows),),
        notes=fit.advice,
    )


def _largest_batch(fit: Fit, seq: int | None) -> str:
    if fit.largest_batch is None:
        return "none that was tried fits"
    return f"{fit.largest_batch} sequences of {seq} tokens, with remat = {fit.remat}"


def _longest_seq(fit: Fit) -> str:
    if fit.longest_seq is None:
        return "none that was tried fits"
    return f"{fit.longest_seq} tokens, at the least batch"


def _tried(rows: Sequence[FitRow]) -> Table:
    columns = (
        Column("change", keep=False),
        Column("memory per device", "right"),
        Column("fits"),
        Column("saves", "right"),
    )
    shown = tuple(
        (cell(row.change, "strong"), _needed(row.report), _fits(row.report), _saved(row)) for row in rows
    )
    return Table(title="Tried", columns=columns, rows=shown)


def _needed(report: CaseReport) -> Cell:
    memory = report.memory
    if memory is None or memory.needed_bytes is None:
        return (Line("unknown"), Line(report.infeasible or report.failure or "", "dim"))
    return cell(f"{format_bytes(memory.needed_bytes)} of {format_bytes(memory.limit_bytes)}")


def _fits(report: CaseReport) -> Cell:
    fits = report.memory.fits if report.memory is not None else None
    return {"yes": cell("yes", "good"), "tight": cell("tight", "warn"), "no": cell("no", "bad")}.get(
        fits or "", cell("unknown")
    )


def _saved(row: FitRow) -> Cell:
    if row.saved_bytes is None:
        return cell(NONE)
    sign = "" if row.saved_bytes >= 0 else "−"
    return cell(sign + format_bytes(abs(row.saved_bytes)))
