"""What `check` runs: every plan compiled with its [check], against the baseline and the budget beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TextIO

from shardlab.case_report import CaseReport, figures_of_case
from shardlab.errors import Problem, UserError
from shardlab.hardware.catalog import load_machine
from shardlab.lab.cases import Question, load_plans
from shardlab.lab.compilers import Compilers, Old, with_old_compilers
from shardlab.lab.review import compile_plans
from shardlab.lab.run import Steps
from shardlab.program import Program, write_atomically
from shardlab.review.baseline import TOTAL, Baseline, baseline_of, baseline_path, read_baseline, write_text
from shardlab.review.check import BUDGETS, Budget, PlanCheck, check_figures, no_figures, read_budgets
from shardlab.review.records import Side
from shardlab.review.sides import side_of_report
from shardlab.spec.step import AnyCase

FOLDER = "meshes"


def check_plans(
    paths: Sequence[str],
    *,
    update: bool,
    tolerance: Fraction,
    step: str | None = None,
    progress: TextIO,
    jobs: int | None = None,
    steps: Steps | None = None,
    compilers: Compilers | None = None,
) -> tuple[PlanCheck, ...]:
    """A check per plan, in order. paths: mesh files; those of `meshes/` when there are none. step: the user's
    own step function for all of them, in place of what each names. compilers: other environments, for plans
    whose baseline was made with another compiler.

    update: write baselines, of all plans or of none. Every mistake that can be known is raised as UserError
    before anything is compiled: no plan, no baseline, a wrong budget; a plan that cannot be compiled is one
    after.
    """
    paths = plans_to_check(paths)
    if step is None:
        _check_models(paths)
    baselines, budgets = _read_all(paths, update)
    steps = replace(steps or Steps(), report=_figures)
    reports = compile_plans(paths, Question(step=step), progress=progress, jobs=jobs, steps=steps)
    by_path = dict(zip(paths, reports, strict=True))
    olds = with_old_compilers(
        by_path, baselines, compilers or Compilers(), steps, progress=progress, jobs=jobs
    )
    checks: list[PlanCheck] = []
    texts: dict[Path, str] = {}
    problems: list[Problem] = []
    for path, report in by_path.items():
        try:
            side = side_of_report(report)
            if side.analysis is None:
                checks.append(_without_figures(path, side, update))
                continue
            now = baseline_of(side)
            was = baselines[path]
            _refuse_nothing(path, side, now, was)
            found = check_figures(Path(path).stem, path, now, was, budgets[path], tolerance)
            texts[baseline_path(path)] = write_text(now)
            old = olds.get(path, Old())
            notes = (*found.notes, *filter(None, (old.note,)))
            checks.append(replace(found, written=update, old_compiler=old.figures, notes=notes))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    if update:
        for file, text in texts.items():
            write_atomically(file, text.encode())
    return tuple(checks)


def plans_to_check(paths: Sequence[str]) -> Sequence[str]:
    """The mesh files named, else those of `meshes/`. Raises UserError where there are none."""
    paths = paths or sorted(str(path) for path in Path(FOLDER).glob("*.toml") if path.name != BUDGETS)
    if not paths:
        raise UserError(Problem(FOLDER, "no plan to check", "name mesh files: shardlab check MESH..."))
    return paths


def _figures(case: AnyCase, program: Program) -> CaseReport:
    return figures_of_case(case, program, load_machine(case.machine))


def _check_models(paths: Sequence[str]) -> None:
    problems = [
        Problem(path, "names no model in [check]", 'add model = "…" or step = "…" under [check]')
        for path, plan in zip(paths, load_plans(paths), strict=True)
        if plan.check.model is None and plan.check.step is None
    ]
    if problems:
        raise UserError(*problems)


def _read_all(paths: Sequence[str], update: bool) -> tuple[dict[str, Baseline | None], dict[str, Budget]]:
    """The baseline and budget of each plan. Missing baselines are mistakes unless they are to be written."""
    baselines: dict[str, Baseline | None] = {}
    budgets: dict[str, Budget] = {}
    problems: list[Problem] = []
    for folder in dict.fromkeys(Path(path).parent for path in paths):
        try:
            here = read_budgets(folder)
        except UserError as error:
            problems += error.problems
            here = {}
        budgets |= {path: here.get(Path(path).stem, {}) for path in paths if Path(path).parent == folder}
    for path in paths:
        file = baseline_path(path)
        try:
            baselines[path] = None if update and not file.exists() else read_baseline(file)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return baselines, budgets


def _without_figures(path: str, side: Side, update: bool) -> PlanCheck:
    """A plan that cannot be. Raises UserError when its baseline was to be written."""
    if update:
        raise UserError(Problem(path, side.why_not, "there is nothing to write a baseline of"))
    return no_figures(Path(path).stem, side, path)


def _refuse_nothing(path: str, side: Side, now: Baseline, was: Baseline | None) -> None:
    """A first baseline of a training step on many devices that communicates nothing is somebody's mistake:
    every such step at least sums its loss."""
    devices = side.analysis.modules[0].num_devices if side.analysis is not None else 1
    training = side.case.get("workload") == "train"
    if was is None and devices > 1 and training and now.figures[TOTAL] == 0:
        what = f"no collective was found in a training step on {devices} devices"
        raise UserError(Problem(path, what, "look with: shardlab explain"))
