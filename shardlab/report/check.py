"""The page of `shardlab check`: what is worse than its baseline or above its budget, plan by plan."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from shardlab.report.page import Cell, Column, Mood, Page, Table, cell
from shardlab.review.baseline import FLOPS, Figure, Line
from shardlab.review.check import PlanCheck, whose_change
from shardlab.review.verdict import share_text
from shardlab.units import format_bytes, format_count

_MOODS: dict[str, Mood] = {"worse": "bad", "lost": "bad", "better": "good"}


def check_page(checks: Sequence[PlanCheck], tolerance: Fraction, limits: Sequence[str] = ()) -> Page:
    """Plans that are as they were are counted, not listed. limits: budgets and baselines that were moved."""
    broken = [check for check in checks if check.broken]
    better = [check for check in checks if check.better and not check.broken and not check.written]
    written = sum(check.written for check in checks)
    rows = [row for check in checks for row in _rows(check, tolerance)]
    columns = (
        Column("plan", keep=False),
        Column("figure"),
        *(Column(name, "right") for name in ("baseline, budget", "now", "change")),
        Column("verdict"),
    )
    notes = [*limits]
    notes += [f"{check.plan}: {note}" for check in checks for note in check.notes]
    notes += [f"{check.plan}: better than its baseline; write it again with --update" for check in better]
    facts = (
        ("plans", f"{len(checks)} checked, {len(broken)} broken, {len(better)} better"),
        ("tolerance", f"{float(tolerance * 100):g} % of the baseline"),
        *((("written", f"{written} of {len(checks)} baselines"),) if written else ()),
    )
    table = Table(title="What is not as it was", columns=columns, rows=tuple(rows))
    return Page(
        title="Broken" if broken else "All within their baselines and budgets",
        facts=facts,
        tables=(table,) if rows else (),
        notes=tuple(notes),
    )


def _rows(check: PlanCheck, tolerance: Fraction) -> list[tuple[Cell, ...]]:
    if check.why_not:
        return [(cell(check.plan), cell("–"), *[cell("")] * 3, cell(check.why_not, "bad"))]
    rows: list[tuple[Cell, ...]] = [
        (
            cell(check.plan),
            cell(line.name),
            cell(_text(line.name, line.before)),
            cell(_text(line.name, line.after)),
            cell(_change(line)),
            cell(_outcome(line, check), _MOODS.get(line.outcome, "")),
        )
        for line in check.lines
        if line.outcome != "same" or _cancels(line, check, tolerance)
    ]
    rows += [
        (
            cell(check.plan),
            cell(one.name),
            cell(_text(one.name, one.budget)),
            cell(_text(one.name, one.figure)),
            cell(""),
            cell("above its budget", "bad"),
        )
        for one in check.over
    ]
    return rows


def _outcome(line: Line, check: PlanCheck) -> str:
    """`worse: compiler +26 %, your change 0`."""
    outcome = "no bound is known any more" if line.outcome == "lost" else line.outcome
    parts = whose_change(line, check.old_compiler)
    if parts is None:
        return outcome
    compiler, code = ("0" if not part else _signed(part) for part in parts)
    return f"{outcome}: compiler {compiler}, your change {code}"


def _cancels(line: Line, check: PlanCheck, tolerance: Fraction) -> bool:
    """Whether the compiler took back what the change did, or the other way round."""
    parts = whose_change(line, check.old_compiler)
    return parts is not None and max(map(abs, parts)) > tolerance


def _signed(share: Fraction) -> str:
    return ("+" if share > 0 else "−") + share_text(abs(share))


def _text(name: str, value: Figure) -> str:
    return format_count(value) if name == FLOPS else format_bytes(value)


def _change(line: Line) -> str:
    if line.before is None or line.after is None or not line.before:
        return ""
    share = (Fraction(line.after) - Fraction(line.before)) / Fraction(line.before)
    return _signed(share)
