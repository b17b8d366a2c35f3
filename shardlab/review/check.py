"""One plan against its baseline and its budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from shardlab.errors import Problem, UserError
from shardlab.hardware.toml_file import did_you_mean, parse_toml, read_text
from shardlab.review.baseline import FIGURES, FLOPS, TOTAL, Baseline, Figure, Line, against
from shardlab.review.records import Side, version_changes
from shardlab.units import parse_bytes

SCHEMA = "shardlab.check/1"
BUDGETS = "budgets.toml"
Budget = Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Over:
    """A figure above its budget. figure: None where no bound is known, which is within no budget."""

    name: str
    budget: int
    figure: Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanCheck:
    """A plan's figures against its baseline (`lines`, none without one) and its budget (`over`).

    why_not: why it has no figures (infeasible, does not fit), "" when it has. written: by --update.
    old_compiler: this code's figures with the baseline's compiler, where that was another and is at hand.
    """

    plan: str
    path: str
    lines: tuple[Line, ...] = ()
    over: tuple[Over, ...] = ()
    why_not: str = ""
    written: bool = False
    notes: tuple[str, ...] = ()
    old_compiler: Mapping[str, Figure] = field(default_factory=dict)

    @property
    def broken(self) -> bool:
        """Whether the check fails: worse than the baseline, above the budget, or no figures any more."""
        worse = any(line.outcome in ("worse", "lost") for line in self.lines)
        return bool((worse and not self.written) or self.over or self.why_not)

    @property
    def better(self) -> bool:
        """Whether a figure is better than the baseline by more than the tolerance."""
        return any(line.outcome == "better" for line in self.lines)


def check_figures(
    plan: str, path: str, now: Baseline, baseline: Baseline | None, budget: Budget, tolerance: Fraction
) -> PlanCheck:
    """now: of the plan as compiled. baseline: None where there is none yet.

    Raises UserError where nothing was found that the baseline has: no collective at all is no improvement.
    """
    if baseline is not None and baseline.figures.get(TOTAL) != 0 and now.figures.get(TOTAL) == 0:
        what = "no collective was found, and the baseline has some"
        raise UserError(Problem(path, what, "look with: shardlab explain; if it is right, --update"))
    return PlanCheck(
        plan=plan,
        path=path,
        lines=() if baseline is None else against(baseline, now, tolerance),
        over=tuple(_over(now, budget)),
        notes=() if baseline is None else tuple(_notes(baseline, now)),
    )


def read_budgets(folder: Path) -> dict[str, Budget]:
    """`budgets.toml` of a folder, {} without one: plan -> figure -> most, in bytes or FLOPs.

    Raises UserError with every mistake: a plan that is not there, a figure that is none, what is no amount.
    """
    path = folder / BUDGETS
    if not path.exists():
        return {}
    problems: list[Problem] = []
    budgets: dict[str, Budget] = {}
    plans = sorted(file.stem for file in folder.glob("*.toml") if file.name != BUDGETS)
    for plan, table in parse_toml(read_text(path, "budgets file"), str(path)).items():
        where = f"{path}: {plan}"
        if plan not in plans:
            problems.append(Problem(where, "no such plan beside it", did_you_mean(plan, plans, "plans")))
        elif not isinstance(table, dict):
            problems.append(
                Problem(where, "not a table of figures", f'write [{plan}] and "memory.peak" = "70 GB"')
            )
        else:
            budgets[plan] = _budget(table, where, problems)
    if problems:
        raise UserError(*problems)
    return budgets


def _budget(table: Mapping[str, Any], where: str, problems: list[Problem]) -> Budget:
    budget: dict[str, int] = {}
    for name, value in _flat(table):
        group, _, member = name.partition(".")
        if group not in FIGURES or not member or (group in ("memory", "compute") and name not in SINGLE):
            fix = "write wire_bytes.AXES or .total, traffic.LINK, memory.peak or compute.flops"
            problems.append(Problem(where, f"{name!r} is no figure", fix))
            continue
        try:
            budget[name] = _amount(name, value)
        except ValueError as error:
            problems.append(Problem(f"{where}.{name}", str(error), ""))
    return budget


SINGLE = ("memory.peak", FLOPS)


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`traffic.nvlink = …` and `"traffic.nvlink" = …` alike."""
    for name, value in table.items():
        if isinstance(value, dict) and not prefix:
            yield from _flat(value, f"{name}.")
        else:
            yield prefix + name, value


def _amount(name: str, value: object) -> int:
    if isinstance(value, str) and name != FLOPS:
        return parse_bytes(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1 << 63:
        return int(value)
    kind = "FLOPs such as 2.2e15" if name == FLOPS else "bytes such as '20 GB'"
    raise ValueError(f"{str(value)[:60]!r} is not an amount of {kind}")


def _over(now: Baseline, budget: Budget) -> Iterator[Over]:
    for name, most in budget.items():
        absent: Figure = 0 if name.startswith(("wire_bytes.", "traffic.")) else None
        figure = now.figures.get(name, absent)
        if figure is None or figure > most:
            yield Over(name=name, budget=most, figure=figure)


def _notes(baseline: Baseline, now: Baseline) -> Iterator[str]:
    for member in sorted(baseline.case.keys() & now.case.keys()):
        if baseline.case[member] != now.case[member]:
            yield f"{member}: {baseline.case[member]} in the baseline, {now.case[member]} now"
    if changed := version_changes(baseline.versions, now.versions):
        yield f"versions changed since the baseline: {changed}"


def whose_change(line: Line, old_compiler: Mapping[str, Figure]) -> tuple[Fraction, Fraction] | None:
    """(the compiler's, the code's) part of what a figure changed by, as shares of the baseline; None where
    that is not known."""
    between = old_compiler.get(line.name, 0 if line.name.startswith(("wire_bytes.", "traffic.")) else None)
    if not old_compiler or not line.before or line.after is None or between is None:
        return None
    before = Fraction(line.before)
    return (Fraction(line.after) - Fraction(between)) / before, (Fraction(between) - before) / before


def no_figures(plan: str, side: Side, path: str) -> PlanCheck:
    """A plan that had a baseline, and now is infeasible or does not fit."""
    return PlanCheck(plan=plan, path=path, why_not=side.why_not)


def check_json(checks: tuple[PlanCheck, ...], tolerance: Fraction) -> dict[str, Any]:
    """The document of `check --json`, `shardlab.check/1`. An unknown bound is null."""
    return {
        "schema": SCHEMA,
        "tolerance_percent": float(tolerance * 100),
        "broken": any(check.broken for check in checks),
        "plans": [_check_json(check) for check in checks],
    }


def _check_json(check: PlanCheck) -> dict[str, Any]:
    old = check.old_compiler
    document: dict[str, Any] = {"plan": check.plan, "path": check.path, "broken": check.broken}
    if check.why_not:
        return document | {"why_not": check.why_not}
    return document | {
        "figures": {
            line.name: {"baseline": line.before, "now": line.after, "outcome": line.outcome}
            | ({"old_compiler": old[line.name]} if line.name in old else {})
            for line in check.lines
        },
        "over_budget": {one.name: {"budget": one.budget, "now": one.figure} for one in check.over},
        "written": check.written,
        "notes": list(check.notes),
    }
