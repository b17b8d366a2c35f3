"""Run many cases: compile what is not compiled yet, in child processes side by side, and report every one.

A case that fails is a report with its reason; only a mistake of ours or Ctrl-C ends the run.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from shardlab.case_report import CaseReport, report_case, unanswered
from shardlab.compile import compile_case, program_key
from shardlab.compile.launch import stop_children
from shardlab.errors import CompileFailed, Infeasible, ShardlabError, TargetMissing, UserError
from shardlab.hardware.catalog import load_machine
from shardlab.lab.progress import Progress, Quiet
from shardlab.program import Program
from shardlab.spec.step import AnyCase

# What one compile of the largest shipped plan needs (405B on 16,384 GPUs stays below it).
COMPILE_BYTES = 6 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """What a run does with a case; tests put their own here."""

    key: Callable[[AnyCase], str] = program_key
    compile: Callable[[AnyCase], Program] = compile_case
    stop: Callable[[], None] = stop_children
    report: Callable[[AnyCase, Program], CaseReport] = lambda case, program: report_case(
        case, program, load_machine(case.machine)
    )


def run_cases(
    cases: Sequence[AnyCase],
    jobs: int | None = None,
    progress: Progress | None = None,
    steps: Steps | None = None,
) -> tuple[CaseReport, ...]:
    """One report per case, in the order of the cases; cases with equal program keys are compiled once.

    jobs: compiles at a time, `default_jobs()` when None. Interrupted, it kills the compiling children and
    raises.
    """
    steps, progress = steps or Steps(), progress or Quiet()
    groups: dict[str, list[int]] = {}
    for position, case in enumerate(cases):
        groups.setdefault(steps.key(case), []).append(position)
    reports: dict[int, CaseReport] = {}
    pool = ThreadPoolExecutor(max_workers=max(1, min(jobs or default_jobs(), len(groups) or 1)))
    try:
        waiting = {
            pool.submit(_run_group, [cases[position] for position in group], steps): group
            for group in groups.values()
        }
        _collect(waiting, reports, progress)
    except BaseException:
        _abandon(pool, steps)
        raise
    pool.shutdown()
    return tuple(reports[position] for position in range(len(cases)))


def _abandon(pool: ThreadPoolExecutor, steps: Steps) -> None:
    """Start nothing more and stop what runs, also a child that a thread was just about to start."""
    pool.shutdown(wait=False, cancel_futures=True)
    ended = threading.Thread(target=pool.shutdown)
    ended.start()
    while ended.is_alive():
        steps.stop()
        ended.join(0.05)


def default_jobs() -> int:
    """Compiles at a time: one per core, and no more than free memory holds; at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    free = available_bytes()
    return max(1, cores if free is None else min(cores, free // COMPILE_BYTES))


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Memory that is free for new processes, None where the system does not say (not Linux)."""
    try:
        text = meminfo.read_text()
    except OSError:
        return None
    found = [line.split()[1] for line in text.splitlines() if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def _collect(
    waiting: dict[Future[list[CaseReport]], list[int]], reports: dict[int, CaseReport], progress: Progress
) -> None:
    while waiting:
        done, _ = wait(waiting, return_when=FIRST_COMPLETED)
        for future in done:
            for position, report in zip(waiting.pop(future), future.result(), strict=True):
                reports[position] = report
                progress.finish(f"{report.case.plan.name} on {report.case.machine}", outcome(report))


def outcome(report: CaseReport) -> str:
    """How a case ended, in a few words."""
    if report.infeasible is not None:
        return "infeasible"
    if report.failure is not None:
        return "failed"
    if report.refusal is not None:
        return "does not fit"
    seconds = report.program.compile_s if report.program is not None else None
    return "not compiled again" if seconds is None else f"compiled in {seconds:.1f} s"


def _run_group(cases: Sequence[AnyCase], steps: Steps) -> list[CaseReport]:
    """Compile the first of cases that share a program, and report all of them on it."""
    try:
        program = steps.compile(cases[0])
    except Infeasible as error:
        return [unanswered(case, infeasible=str(error)) for case in cases]
    except (TargetMissing, CompileFailed, UserError) as error:
        reason = "; ".join(str(error).splitlines())
        return [unanswered(case, failure=reason) for case in cases]
    return [_reported(case, program, steps) for case in cases]


def _reported(case: AnyCase, program: Program, steps: Steps) -> CaseReport:
    try:
        return steps.report(case, program)
    except ShardlabError as error:
        reason = "; ".join(str(error).splitlines())
        return unanswered(case, failure=f"the compiled program cannot be analysed: {reason}")
