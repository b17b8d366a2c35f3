"""When the compiler changed too: this code as the baseline's compiler has it, where that is installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TextIO

from shardlab.case_report import CaseReport
from shardlab.compile.interpreter import Interpreter
from shardlab.compile.versions import compiler_versions
from shardlab.errors import UserError
from shardlab.lab.progress import progress_on
from shardlab.lab.run import Steps, run_cases
from shardlab.review.baseline import Baseline, Figure, baseline_of
from shardlab.review.sides import side_of_report


@dataclass(frozen=True, slots=True, kw_only=True)
class Compilers:
    """Environments that the user named, and how cases are compiled in one."""

    pythons: Sequence[Interpreter] = ()
    steps_of: Callable[[Interpreter], Steps] = lambda _: Steps()


@dataclass(frozen=True, slots=True, kw_only=True)
class Old:
    """This code's figures with the baseline's compiler, {} where they are not known; and what to say."""

    figures: Mapping[str, Figure] = field(default_factory=dict)
    note: str = ""


def with_old_compilers(
    reports: Mapping[str, CaseReport],
    baselines: Mapping[str, Baseline | None],
    compilers: Compilers,
    steps: Steps,
    *,
    progress: TextIO,
    jobs: int | None = None,
) -> dict[str, Old]:
    """For each plan whose baseline was made with another compiler. steps: with the report that is wanted.

    Raises UserError for a Python that cannot be used.
    """
    found: dict[str, Old] = {}
    waiting: dict[Interpreter, list[str]] = {}
    for path, report in reports.items():
        was = baselines[path]
        if was is None or report.program is None:
            continue
        old = _changed(was, report.program.versions)
        python = _with(compilers, was, report) if old else None
        if python is not None:
            waiting.setdefault(python, []).append(path)
        elif old:
            found[path] = Old(note=_missing(old, compilers.pythons))
    for python, paths in waiting.items():
        cases = [reports[path].case for path in paths]
        there = replace(compilers.steps_of(python), report=steps.report)
        with progress_on(progress, len(cases)) as reporter:
            made = run_cases(cases, jobs, reporter, there)
        found |= {path: _old(report) for path, report in zip(paths, made, strict=True)}
    return found


def _changed(was: Baseline, now: Mapping[str, str]) -> str:
    """`jax 0.10.2, jaxlib 0.10.2` of what the baseline was compiled with and is not here; "" without."""
    old = {name: version for name, version in compiler_versions(was.versions).items() if name in now}
    return ", ".join(f"{name} {version}" for name, version in old.items() if now[name] != version)


def _with(compilers: Compilers, was: Baseline, report: CaseReport) -> Interpreter | None:
    """The first Python that has the baseline's compiler."""
    wanted = compiler_versions(was.versions)
    family = report.case.load_machine().family
    for python in compilers.pythons:
        there = python.versions(family)
        if all(there.get(name) == version for name, version in wanted.items()):
            return python
    return None


def _missing(old: str, pythons: Sequence[Interpreter]) -> str:
    named = f"none of {', '.join(python.executable for python in pythons)} has {old}" if pythons else ""
    where = named or f"name a Python that has {old} with --python"
    return f"how much of a change is the compiler's is not known: {where}"


def _old(report: CaseReport) -> Old:
    try:
        side = side_of_report(report)
    except UserError as error:
        why = "; ".join(problem.what for problem in error.problems)
        return Old(note=f"with the baseline's compiler it cannot be compiled: {why}")
    if side.analysis is None:
        return Old(note=f"with the baseline's compiler it cannot run: {side.why_not}")
    return Old(figures=baseline_of(side).figures)
