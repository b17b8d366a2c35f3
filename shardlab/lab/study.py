"""From mesh files and a question to an answer: what `compare`, `explain` and experiments run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from shardlab.analysis import attribute
from shardlab.case_report import CaseReport
from shardlab.compare import Comparison, rank
from shardlab.cost.instructions import step_cost
from shardlab.errors import CompileFailed
from shardlab.hardware.catalog import load_machine
from shardlab.lab.cases import Question, comparison_cases, load_plans
from shardlab.lab.progress import progress_on
from shardlab.lab.run import Steps, run_cases
from shardlab.order import OWN, Orders, orders
from shardlab.spec.case import Case
from shardlab.straggler import Stragglers, stragglers
from shardlab.why import Why, why


def compare_plans(
    paths: Sequence[str],
    question: Question,
    *,
    progress: TextIO,
    jobs: int | None = None,
    steps: Steps | None = None,
) -> Comparison:
    """Compile and rank the plans. `progress` is where progress goes (standard error).

    A plan without an answer is a row with its reason. Raises UserError for mistakes in files and flags, and
    CompileFailed when not one case could be compiled.
    """
    wanted = comparison_cases(load_plans(paths), question)
    with progress_on(progress, len(wanted.cases)) as reporter:
        reports = run_cases(wanted.cases, jobs, reporter, steps)
    failures = list(dict.fromkeys(report.failure for report in reports if report.failure is not None))
    if failures and all(report.failure is not None for report in reports):
        raise NothingCompiled(failures)
    return rank((*reports, *wanted.rejected), wanted.notes)


def explain_plan(
    path: str, question: Question, *, progress: TextIO, steps: Steps | None = None
) -> CaseReport:
    """Compile and analyse one plan; infeasible and too large are answers. Raises as `compare_plans`."""
    return compare_plans([path], question, progress=progress, jobs=1, steps=steps).reports[0]


def orders_of(report: CaseReport) -> Orders | None:
    """Other device orders for a case's program, its own called what the plan calls it; None without one."""
    if report.program is None or report.analysis is None:
        return None
    asked = report.case.plan.order
    refused = any(note.startswith("make_mesh refuses") for note in report.program.notes)
    own_name = asked if isinstance(asked, str) and not refused else OWN
    return orders(report.program, load_machine(report.case.machine), own_name=own_name)


def stragglers_of(report: CaseReport, slowdown: float) -> Stragglers | None:
    """The step with one device that computes so many times as long; None without a step time."""
    if report.program is None or report.analysis is None:
        return None
    machine = load_machine(report.case.machine)
    parts = tuple(attribute(report.program, machine=machine))
    costs = [step_cost(part.module, report.program.backend) for part in parts]
    return stragglers(parts, costs, machine, slowdown)


def why_of(report: CaseReport, name: str) -> tuple[Why, ...] | None:
    """Why a collective of a case is there; None without an analysis. Raises UserError for an unknown name."""
    if report.program is None or report.analysis is None:
        return None
    case, machine = report.case, load_machine(report.case.machine)
    model = case.model if isinstance(case, Case) else None
    parts = tuple(attribute(report.program, machine=machine))
    return why(parts, name, plan=case.plan, model=model, machine=machine)


class NothingCompiled(CompileFailed):
    """Not one case could be compiled; one line per reason."""

    def __init__(self, reasons: Sequence[str]) -> None:
        super().__init__("compile", "; ".join(reasons))
        self.args = ("\n".join(reasons),)
