"""The best plans for a model on a machine: compile what its shape suggests, then refine the best."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TextIO

from shardlab.case_report import CaseReport, unanswered
from shardlab.compare import Comparison, rank
from shardlab.cost.memory import memory_limit
from shardlab.errors import Infeasible, Problem, UserError
from shardlab.hardware.catalog import load_machine
from shardlab.lab.cases import Question
from shardlab.lab.progress import progress_on
from shardlab.lab.run import Steps, run_cases
from shardlab.spec.candidates import Candidate, candidate, candidates, state_bytes
from shardlab.spec.case import Case, make_case
from shardlab.spec.models import find_model
from shardlab.units import format_bytes

REFINED = 2  # the best so many of the first round are tried with less rematerialisation
LESS_REMAT = ("matmuls", "none")


@dataclass(frozen=True, slots=True)
class Found:
    """The plans tried, ranked, and the mesh file of each by the plan's name."""

    comparison: Comparison
    texts: dict[str, str]


def search_plans(
    question: Question, *, progress: TextIO, jobs: int | None = None, steps: Steps | None = None
) -> Found:
    """Compile and rank the candidates on one machine, then the best two again with less rematerialisation.

    All have one global batch: the user's, else one sequence per device. What cannot hold its own parameters
    and optimizer state is a row without a compile. Raises UserError for mistakes in flags.
    """
    question = replace(question, workload=question.workload or "train")
    config, spec = find_model(question.model or ""), _only_machine(question)
    machine = load_machine(spec)
    made = candidates(config, machine)
    first = _round(made, question, progress, jobs, steps)
    best = rank(first).ranked[:REFINED]
    refined = [
        candidate(report.case.plan.axes, spec, remat, report.case.plan.method.microbatches)
        for report in best
        for remat in LESS_REMAT
        if report.case.plan.method.pipeline == "none" and question.workload == "train"
    ]
    second = _round(refined, question, progress, jobs, steps)
    texts = {one.plan.name: one.text for one in (*made, *refined)}
    count = len(first) + len(second)
    notes = (f"{count} plans tried, of one batch; the best {REFINED} also with less rematerialisation",)
    return Found(rank((*first, *second), notes), texts)


def _only_machine(question: Question) -> str:
    if len(question.machines) != 1:
        raise UserError(Problem("--on", f"{len(question.machines)} machines", "search on one machine"))
    return question.machines[0]


def _round(
    made: Iterable[Candidate], question: Question, progress: TextIO, jobs: int | None, steps: Steps | None
) -> list[CaseReport]:
    cases, rejected = _cases(tuple(made), question)
    with progress_on(progress, len(cases)) as reporter:
        return [*run_cases(cases, jobs, reporter, steps), *rejected]


def _cases(made: Sequence[Candidate], question: Question) -> tuple[list[Case], list[CaseReport]]:
    """Those worth compiling, and the others with their reason."""
    (spec,) = question.machines
    machine, config = load_machine(spec), find_model(question.model or "")
    batch = question.batch or machine.num_devices
    seq = question.seq or min(config.context, 4_096)
    limit = memory_limit(machine)[0]
    cases, rejected = [], []
    for one in made:
        workload = question.workload or "train"
        whole = Case(plan=one.plan, model=config, machine=spec, batch=batch, seq=seq, workload=workload)
        try:
            case = make_case(one.plan, config, spec, batch, seq, question.workload)
            needed = state_bytes(case) if question.workload == "train" else 0
        except Infeasible as error:
            rejected.append(unanswered(whole, infeasible="; ".join(str(error).splitlines())))
            continue
        if limit is not None and needed > limit:
            reason = (
                f"parameters and optimizer state alone need {format_bytes(needed)} of {format_bytes(limit)}"
            )
            rejected.append(unanswered(whole, infeasible=reason))
        else:
            cases.append(case)
    return cases, rejected
