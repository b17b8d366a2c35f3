"""Which cases a comparison runs: every plan on every machine, with one model, batch and sequence for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import TypeVar

from shardlab.case_report import CaseReport, unanswered
from shardlab.errors import Infeasible, Problem, UserError
from shardlab.hardware.catalog import load_machine
from shardlab.spec.case import Case, Workload, default_batch, make_case
from shardlab.spec.models import find_model
from shardlab.spec.plan import Plan, load_plan
from shardlab.spec.step import AnyCase, make_step_case

Answer = TypeVar("Answer")
Value = TypeVar("Value")
ATTACHED = "attached"  # however many devices the plan has


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What the user asked for; None is for the plans to say. `machines`: () is each plan's own. step: their
    own step function, `package.module:make_step`; folder: where its package is looked for first."""

    model: str | None = None
    machines: tuple[str, ...] = ()
    batch: int | None = None
    seq: int | None = None
    workload: Workload | None = None
    step: str | None = None
    folder: str = "."


@dataclass(frozen=True, slots=True, kw_only=True)
class Cases:
    """`cases` to compile, `rejected` ones with their reason, and what was chosen for the user (`notes`)."""

    cases: tuple[AnyCase, ...]
    rejected: tuple[CaseReport, ...]
    notes: tuple[str, ...]


def load_plans(paths: Iterable[str]) -> tuple[Plan, ...]:
    """Read mesh files. Raises UserError with every mistake of every file."""
    return _all_or_every_mistake(partial(load_plan, path) for path in paths)


def _all_or_every_mistake(calls: Iterable[Callable[[], Answer]]) -> tuple[Answer, ...]:
    """What the calls return; when some raise UserError, one UserError with the problems of all."""
    answers: list[Answer] = []
    problems: list[Problem] = []
    for call in calls:
        try:
            answers.append(call())
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return tuple(answers)


def comparison_cases(plans: Sequence[Plan], question: Question) -> Cases:
    """Every plan on every machine, one batch and sequence for all.

    A plan that cannot be put on a model or machine is `rejected` with its reason. Raises UserError when a
    mistake leaves nothing to compare, or when no model is named.
    """
    step = question.step or _common_step(plans)
    if step is not None:
        return _step_cases(plans, replace(question, step=step))
    model = question.model or _common_model(plans)
    # Names that no plan can make up for; a plan that does not suit a machine is a row instead.
    named = (machine for machine in question.machines if machine != ATTACHED)
    names: list[Callable[[], object]] = [partial(load_machine, machine) for machine in named]
    names.insert(0, partial(find_model, model))
    _all_or_every_mistake(names)
    own = () if question.machines else _all_or_every_mistake(partial(_own_machine, plan) for plan in plans)
    pairs = list(zip(plans, own, strict=True)) if own else list(product(plans, question.machines))
    workload = question.workload or _common_workload(plans)
    question, notes = _settled(pairs, replace(question, model=model, workload=workload))
    made = [_try_case(plan, machine, question) for plan, machine in pairs]
    cases = tuple(item for item in made if isinstance(item, Case))
    mistakes = [item for item in made if isinstance(item, UserError)]
    if mistakes and not cases:
        raise UserError(*dict.fromkeys(problem for error in mistakes for problem in error.problems))
    rejected = tuple(
        unanswered(_unchecked(plan, machine, question), infeasible="; ".join(str(item).splitlines()))
        for (plan, machine), item in zip(pairs, made, strict=True)
        if not isinstance(item, Case)
    )
    return Cases(cases=cases, rejected=rejected, notes=notes)


def _common_step(plans: Sequence[Plan]) -> str | None:
    """The step that the plans name in [check]; None where they name a model."""
    names = {plan.check.step for plan in plans}
    if len(names) > 1:
        listed = ", ".join(sorted(name or "a model" for name in names))
        raise UserError(Problem("--step", f"the plans are for {listed} in [check]", "give --step or --model"))
    return names.pop() if names else None


def _step_cases(plans: Sequence[Plan], question: Question) -> Cases:
    """Every plan on every machine with the user's own step. Raises UserError with every mistake."""
    workload = question.workload or _common_workload(plans)
    own = () if question.machines else _all_or_every_mistake(partial(_own_machine, plan) for plan in plans)
    pairs = list(zip(plans, own, strict=True)) if own else list(product(plans, question.machines))
    cases = _all_or_every_mistake(
        partial(
            make_step_case,
            plan,
            question.step or "",
            folder=question.folder,
            machine=machine,
            model=question.model or _common_value("--model", (one.check.model for one in plans)),
            batch=question.batch or _common_value("--batch", (one.check.batch for one in plans)),
            seq=question.seq or _common_value("--seq", (one.check.seq for one in plans)),
            workload=workload,
        )
        for plan, machine in pairs
    )
    return Cases(cases=cases, rejected=(), notes=())


def _common_value(flag: str, values: Iterable[Value | None]) -> Value | None:
    """What the plans say in [check], which must not differ; None where none says anything."""
    found = {value for value in values if value is not None}
    if len(found) > 1:
        what = f"the plans are for {', '.join(sorted(map(str, found)))} in [check]"
        raise UserError(Problem(flag, what, f"give {flag}, or compare plans for one"))
    return found.pop() if found else None


def _own_machine(plan: Plan) -> str:
    if plan.on is None:
        raise UserError(
            Problem(plan.path or plan.name, "names no machine", 'add on = "…" to it or give --on MACHINE')
        )
    return plan.on


def _common_model(plans: Sequence[Plan]) -> str:
    names = {plan.check.model for plan in plans}
    name = names.pop()
    if names or name is None:
        raise UserError(Problem("--model", "the plans do not name one model in [check]", "give --model NAME"))
    return name


def _common_workload(plans: Sequence[Plan]) -> Workload:
    found = {plan.check.workload for plan in plans}
    if len(found) > 1:
        what = f"the plans are for {', '.join(sorted(found))} in [check]"
        raise UserError(Problem("--workload", what, "give --workload, or compare plans for one"))
    return found.pop()


def _try_case(plan: Plan, machine: str, question: Question) -> Case | Infeasible | UserError:
    try:
        return make_case(
            plan,
            model=question.model,
            machine=machine,
            batch=question.batch,
            seq=question.seq,
            workload=question.workload,
        )
    except (Infeasible, UserError) as error:
        return error


def _settled(pairs: Sequence[tuple[Plan, str]], question: Question) -> tuple[Question, tuple[str, ...]]:
    """The question with one batch and sequence: least common multiple and minimum of the plans' own."""
    if question.batch is not None and question.seq is not None:
        return question, ()
    made = [_try_case(plan, machine, question) for plan, machine in pairs]
    cases = [item for item in made if isinstance(item, Case)]
    batches = [case.batch for case in cases] or [p.check.batch or default_batch(p) for p, _ in pairs]
    seqs = [case.seq for case in cases] or [find_model(question.model or "").context]
    batch, seq = question.batch or math.lcm(*batches), question.seq or min(seqs)
    notes: list[str] = []
    if question.batch is None and len(pairs) > 1:
        notes.append(f"global batch {batch}: a multiple of what each plan asks for; --batch N sets it")
    if question.seq is None and len(set(seqs)) > 1:
        notes.append(f"sequence {seq}: the shortest that a plan asks for; --seq N sets it")
    return replace(question, batch=batch, seq=seq), tuple(notes)


def _unchecked(plan: Plan, machine: str, question: Question) -> Case:
    """The case as it was asked for (a settled question), though it cannot be: for the row that says why."""
    assert question.model is not None and question.batch is not None and question.seq is not None
    assert question.workload is not None
    return Case(
        plan=plan,
        model=find_model(question.model),
        machine=f"{ATTACHED}:{plan.num_devices}" if machine == ATTACHED else machine,
        batch=question.batch,
        seq=question.seq,
        workload=question.workload,
    )
