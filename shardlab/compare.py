"""Stage 6 COMPARE: reports of several cases, best first.

Plans that fit come first, then the shorter predicted step. Where the step of one of them cannot be
predicted, all are ranked by communication time instead (Σ executions · max over tiers of bytes /
bandwidth), which ranks plans by what they move, not by what a step takes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from shardlab.agreement import Agreement, agreement, agreement_json
from shardlab.analysis import Analysis, CollectiveRow
from shardlab.case_document import Json, to_json
from shardlab.case_report import CaseReport
from shardlab.units import format_bytes

SCHEMA = "shardlab.comparison/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unranked:
    """A case without a rank, and why."""

    report: CaseReport
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Cases side by side: `ranked` best first, `emulated` by wire bytes, `unranked` with their reasons.

    agreement: of one plan on several backends, what each sends side by side. by: what ranks.
    """

    ranked: tuple[CaseReport, ...]
    emulated: tuple[CaseReport, ...]
    unranked: tuple[Unranked, ...]
    notes: tuple[str, ...] = ()
    agreement: Agreement | None = None
    by: Literal["step_time_s", "communication_s"] = "communication_s"

    @property
    def reports(self) -> tuple[CaseReport, ...]:
        """Every case once, best first: real machines, emulated ones, those without an answer."""
        return (*self.ranked, *self.emulated, *(row.report for row in self.unranked))


def rank(reports: Iterable[CaseReport], notes: Iterable[str] = ()) -> Comparison:
    """Order the reports. Raises ValueError when they differ in batch, sequence, workload or model.

    Fits (yes and tight) before unknown before no; then step time (communication time where one is not
    known), wire bytes, name. A case that was not analysed, or whose time is not known, has no rank.
    """
    reports = tuple(reports)
    if len({r.case.work for r in reports}) > 1:
        raise ValueError("only cases of one model, batch, sequence and workload can be compared")
    unranked = [Unranked(report=r, reason=why) for r in reports if (why := reason_unranked(r)) is not None]
    rest = [r for r in reports if reason_unranked(r) is None]
    real = [r for r in rest if not r.emulated]
    predicted = bool(real) and all(r.step_time_s is not None for r in real)
    return Comparison(
        ranked=tuple(sorted(real, key=lambda report: _real_key(report, predicted))),
        emulated=tuple(sorted((r for r in rest if r.emulated), key=_emulated_key)),
        unranked=tuple(sorted(unranked, key=lambda row: _label_key(row.report))),
        notes=tuple(notes),
        agreement=agreement(reports),
        by="step_time_s" if predicted else "communication_s",
    )


def reason_unranked(report: CaseReport) -> str | None:
    """Why a case has no place in the order: it has no analysis, or no time. None when it has one."""
    if report.infeasible is not None:
        return f"infeasible: {report.infeasible}"
    if report.failure is not None:
        return report.failure
    if report.refusal is not None:
        return refusal_reason(report)
    if report.analysis is None:
        return "not analysed"
    if report.communication_s is None and not report.emulated:
        return _why_no_time(report.analysis, report.case.machine)
    return None


def _why_no_time(analysis: Analysis, machine: str) -> str:
    endless = [row.name for row in analysis.collectives if row.executions[1] is None]
    if endless:
        return f"communication time unknown: {endless[0]} is in a loop that could not be bounded"
    return f"communication time unknown: no bandwidth known for every link of {machine}"


def refusal_reason(report: CaseReport) -> str:
    """`does not fit: needs 33.1 GB of 15.8 GB, 17.3 GB too much; largest batch that compiles: 64`."""
    refusal = report.refusal
    if refusal is None:
        return ""
    needed, limit = refusal.needed_bytes, refusal.limit_bytes
    sizes = f"needs {format_bytes(needed)} of {format_bytes(limit)}, {format_bytes(needed - limit)} too much"
    batch = refusal.largest_batch
    return f"does not fit: {sizes}; " + (
        f"largest batch that compiles: {batch}"
        if batch is not None
        else "no smaller batch that compiles is known"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Dominant:
    """The kind of collective over one set of axes that costs most, and its part of the whole (0 to 1).

    of: what it is a part of, `time` where every collective has one, else `bytes`.
    """

    kind: str
    axes: tuple[str, ...] | None
    share: float
    of: str


def dominant(rows: Iterable[CollectiveRow]) -> Dominant | None:
    """What costs most: by time where every row has one, else by wire bytes; None when nothing moves."""
    rows = tuple(rows)
    timed = all(row.time_s is not None for row in rows)
    costs: dict[tuple[str, tuple[str, ...] | None], float] = {}
    for row in rows:
        each = row.time_s if timed and row.time_s is not None else float(row.wire_bytes)
        key = (row.realizes or row.kind, row.axes)
        costs[key] = costs.get(key, 0.0) + each * most_executions(row)
    total = sum(costs.values())
    if not total:
        return None
    kind, axes = max(costs, key=lambda key: costs[key])
    return Dominant(kind=kind, axes=axes, share=costs[kind, axes] / total, of="time" if timed else "bytes")


def most_executions(row: CollectiveRow) -> int:
    """The upper end of the executions; the lower end where the upper one is unknown."""
    low, high = row.executions
    return low if high is None else high


def comparison_json(comparison: Comparison) -> Json:
    """`shardlab.comparison/1`: the reports best first. `rank` counts from 1 within `ranking`, which is `real`
    or `emulated`; a case without an answer has `unranked`, the reason, instead. `agreement`: see there.
    """
    reports: list[Json] = []
    for ranking, group in (("real", comparison.ranked), ("emulated", comparison.emulated)):
        for number, report in enumerate(group, start=1):
            reports.append({"rank": number, "ranking": ranking} | to_json(report))
    reports += [{"unranked": row.reason} | to_json(row.report) for row in comparison.unranked]
    document: Json = {"schema": SCHEMA, "reports": reports, "notes": list(comparison.notes)}
    if comparison.ranked:
        document["ranked_by"] = comparison.by
    if comparison.agreement is not None:
        document["agreement"] = agreement_json(comparison.agreement)
    return document


def _real_key(report: CaseReport, predicted: bool) -> tuple[int, float, Fraction, str, str]:
    fits = report.memory.fits if report.memory is not None else None
    order = {"yes": 0, "tight": 0, None: 1, "no": 2}[fits]
    time_s = report.step_time_s if predicted else report.communication_s
    return (order, time_s or 0.0, _wire_bytes(report), *_label_key(report))


def _emulated_key(report: CaseReport) -> tuple[Fraction, str, str]:
    return (_wire_bytes(report), *_label_key(report))


def _wire_bytes(report: CaseReport) -> Fraction:
    """The upper end of the step's wire bytes; the lower end where the upper one is unknown."""
    if report.analysis is None:
        return Fraction(0)
    low, high = report.analysis.totals.wire_bytes
    return low if high is None else high


def _label_key(report: CaseReport) -> tuple[str, str]:
    return (report.case.plan.name, report.case.machine)
