"""The best mesh for a step function of the user's own: every grid of a machine's devices over named axes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TextIO

from shardlab.compare import rank
from shardlab.errors import CompileFailed, Problem, UserError
from shardlab.hardware.catalog import load_machine
from shardlab.lab.cases import Question
from shardlab.lab.progress import progress_on
from shardlab.lab.run import Steps, run_cases
from shardlab.lab.search import Found
from shardlab.spec.plan import Plan, plan_from_text
from shardlab.spec.step import StepCase, make_step_case

MAX_GRIDS = 100


def search_grids(
    question: Question,
    names: Sequence[str],
    *,
    progress: TextIO,
    jobs: int | None = None,
    steps: Steps | None = None,
) -> Found:
    """Compile and rank the step on every grid. names: of the mesh axes, major to minor.

    A grid that the step refuses is a row with its reason. Raises UserError for mistakes in flags, and
    CompileFailed when no grid could be compiled.
    """
    if len(question.machines) != 1 or not names:
        what = "no mesh axes" if not names else f"{len(question.machines)} machines"
        fix = "name those of your step: --axes data,tensor" if not names else "search on one machine"
        raise UserError(Problem("--axes" if not names else "--on", what, fix))
    (spec,) = question.machines
    grids = list(_grids(load_machine(spec).num_devices, len(names)))
    if len(grids) > MAX_GRIDS:
        what = f"{len(grids)} grids of {len(names)} axes, of which at most {MAX_GRIDS} are tried"
        raise UserError(Problem("--axes", what, "name fewer axes, or write mesh files and compare them"))
    texts = {_name(names, grid): _text(names, grid, spec, question) for grid in grids}
    plans = [plan_from_text(text, name) for name, text in texts.items()]
    cases = [_case(plan, question) for plan in plans]
    with progress_on(progress, len(cases)) as reporter:
        reports = run_cases(cases, jobs, reporter, steps)
    if all(report.failure is not None for report in reports):
        reasons = dict.fromkeys(str(report.failure) for report in reports)
        raise CompileFailed(question.step or "", "; ".join(reasons))
    return Found(rank(reports, (f"{len(cases)} grids tried",)), texts)


def _case(plan: Plan, question: Question) -> StepCase:
    return make_step_case(
        plan,
        question.step or "",
        folder=question.folder,
        model=question.model,
        batch=question.batch,
        seq=question.seq,
        workload=question.workload,
    )


def _grids(devices: int, axes: int) -> Iterator[tuple[int, ...]]:
    """Every way to write `devices` as so many factors."""
    if axes == 1:
        yield (devices,)
        return
    for first in range(1, devices + 1):
        if devices % first == 0:
            yield from ((first, *rest) for rest in _grids(devices // first, axes - 1))


def _name(names: Sequence[str], grid: Sequence[int]) -> str:
    """Axes of one are there, and not named."""
    parts = [f"{name}{size}" for name, size in zip(names, grid, strict=True) if size > 1]
    return "-".join(parts) or "one-device"


def _text(names: Sequence[str], grid: Sequence[int], machine: str, question: Question) -> str:
    """The mesh file."""
    axes = "\n".join(f"{name} = {size}" for name, size in zip(names, grid, strict=True))
    return f"on = {json.dumps(machine)}\n[axes]\n{axes}\n[check]\nstep = {json.dumps(question.step)}\n"
