"""What `diff` runs: mesh files are compiled, everything else is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TextIO

from shardlab.case_report import CaseReport
from shardlab.errors import Problem, UserError
from shardlab.hardware.catalog import load_machine
from shardlab.lab.cases import Question, comparison_cases, load_plans
from shardlab.lab.progress import progress_on
from shardlab.lab.run import Steps, run_cases
from shardlab.review import Diff, Side, diff
from shardlab.review.sides import side_of, side_of_report
from shardlab.spec.plan import Plan


def diff_of(
    base: str,
    head: str,
    question: Question,
    *,
    progress: TextIO,
    axes: Mapping[str, int] | None = None,
    steps: Steps | None = None,
) -> Diff:
    """The diff of two paths. Mesh files are compiled each with its own [check], unless the question says.

    Raises UserError with the mistakes of both, ParseError for what is no HLO, CompileFailed or TargetMissing.
    """
    if len(question.machines) > 1:
        what = "two files are compared on one machine"
        raise UserError(Problem("--on", what, "name one, or compare revisions"))
    plans = [path for path in dict.fromkeys((base, head)) if path.endswith(".toml")]
    compiled = dict(zip(plans, compile_plans(plans, question, progress=progress, steps=steps), strict=True))
    read = {base, head} - compiled.keys()
    machine = load_machine(question.machines[0]) if question.machines and read else None
    sides: list[Side] = []
    problems: list[UserError] = []
    for path in (base, head):
        try:
            report = compiled.get(path)
            known = (
                side_of(path, path, axes=axes, machine=machine) if report is None else side_of_report(report)
            )
            sides.append(known)
        except UserError as error:
            problems.append(error)
    if problems:
        raise UserError(*dict.fromkeys(one for error in problems for one in error.problems))
    return diff(*sides)


def of_its_own(plan: Plan, question: Question) -> Question:
    """What [check] says holds, also where it cannot be put on the devices: that is what changed."""
    check = plan.check
    return replace(question, batch=question.batch or check.batch, seq=question.seq or check.seq)


def compile_plans(
    paths: Sequence[str],
    question: Question,
    *,
    progress: TextIO,
    jobs: int | None = None,
    steps: Steps | None = None,
) -> list[CaseReport]:
    """A report per mesh file, in order; each with its own machine, model, batch and sequence unless said.

    Infeasible plans are reports with a reason. Raises UserError with the mistakes of all files.
    """
    wanted = [comparison_cases([plan], of_its_own(plan, question)) for plan in load_plans(paths)]
    cases = [case for one in wanted for case in one.cases]
    with progress_on(progress, len(cases)) as reporter:
        compiled = iter(run_cases(cases, jobs, reporter, steps))
    return [next(compiled) if one.cases else one.rejected[0] for one in wanted]
