"""Running many cases: who is compiled, how often, and what becomes of a failure."""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path

import pytest
from case_reports import case, report

from shardlab.case_report import CaseReport
from shardlab.errors import (
    CompileFailed,
    Infeasible,
    ParseError,
    Problem,
    ShardlabError,
    TargetMissing,
    UserError,
)
from shardlab.lab.progress import PlainProgress, progress_on
from shardlab.lab.run import Steps, available_bytes, default_jobs, run_cases
from shardlab.program import Program
from shardlab.spec.case import Case


def program(name: str) -> Program:
    return Program(name=name, backend="gpu", hlo_text="HloModule m", num_devices=8, compile_s=1.25)


class Lab:
    """Steps that note what was compiled; a plan called like an error fails with it."""

    def __init__(self, errors: dict[str, ShardlabError] | None = None) -> None:
        self.compiled: list[str] = []
        self.errors = errors or {}

    def compile(self, wanted: Case) -> Program:
        self.compiled.append(wanted.plan.name)
        if wanted.plan.name in self.errors:
            raise self.errors[wanted.plan.name]
        return program(wanted.plan.name)

    def steps(self) -> Steps:
        return Steps(
            key=lambda wanted: wanted.plan.name,
            compile=self.compile,
            report=lambda wanted, made: CaseReport(case=wanted, program=made),
        )


def test_reports_come_in_the_order_of_the_cases() -> None:
    cases = [case(name) for name in ("c", "a", "b")]
    reports = run_cases(cases, jobs=3, steps=Lab().steps())
    assert [one.case for one in reports] == cases
    assert [one.program.name for one in reports if one.program] == ["c", "a", "b"]


def test_cases_that_share_a_program_are_compiled_once_and_reported_each() -> None:
    lab = Lab()
    cases = [case("one", "h100:1x8"), case("two"), case("one", "h100:8x1")]
    reports = run_cases(cases, jobs=2, steps=lab.steps())
    assert sorted(lab.compiled) == ["one", "two"]
    assert [(one.case.plan.name, one.case.machine) for one in reports] == [
        ("one", "h100:1x8"),
        ("two", "h100:1x8"),
        ("one", "h100:8x1"),
    ]


@pytest.mark.parametrize(
    ("error", "infeasible", "failure"),
    [
        (Infeasible("6 heads over 4 devices", "use 2"), "6 heads over 4 devices; use 2", None),
        (TargetMissing("tpu", "no libtpu", "pip install x"), None, "target tpu: no libtpu; pip install x"),
        (CompileFailed("bad", "the compiler crashed"), None, "bad: the compiler crashed"),
        (UserError(Problem("a", "b", "c"), Problem("d", "e", "")), None, "a: b; c; d: e"),
    ],
    ids=["infeasible", "missing", "failed", "mistake"],
)
def test_a_failure_is_a_row_and_the_others_go_on(
    error: ShardlabError, infeasible: str | None, failure: str | None
) -> None:
    bad, good = run_cases([case("bad"), case("good")], jobs=1, steps=Lab({"bad": error}).steps())
    assert (bad.infeasible, bad.failure) == (infeasible, failure)
    assert good.program is not None


def test_a_program_that_cannot_be_analysed_is_a_row() -> None:
    def unreadable(wanted: Case, made: Program) -> CaseReport:
        raise ParseError("no such opcode", source="m", line=3, column=7)

    steps = Steps(key=lambda wanted: "", compile=Lab().compile, report=unreadable)
    (row,) = run_cases([case()], steps=steps)
    assert row.failure == "the compiled program cannot be analysed: m:3:7: no such opcode"


def test_no_more_than_jobs_compile_at_a_time() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def busy(wanted: Case) -> Program:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        return program(wanted.plan.name)

    steps = Steps(key=lambda c: c.plan.name, compile=busy, report=lambda c, p: CaseReport(case=c, program=p))
    run_cases([case(str(number)) for number in range(8)], jobs=3, steps=steps)
    assert most == 3


def test_progress_is_one_plain_line_per_case_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    lab = Lab({"bad": CompileFailed("bad", "crashed")})
    with progress_on(stream, 2) as progress:
        assert isinstance(progress, PlainProgress)
        run_cases([case("good"), case("bad")], jobs=1, progress=progress, steps=lab.steps())
    assert stream.getvalue() == "[1/2] good on h100:1x8: compiled in 1.2 s\n[2/2] bad on h100:1x8: failed\n"


def test_a_mistake_of_ours_ends_the_run() -> None:
    def broken(wanted: Case) -> Program:
        raise RuntimeError("a bug")

    steps = Steps(key=lambda c: c.plan.name, compile=broken, report=lambda c, p: report())
    with pytest.raises(RuntimeError, match="a bug"):
        run_cases([case("a"), case("b")], jobs=1, steps=steps)


def test_memory_is_read_from_the_kernel_where_it_says(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       32768000 kB\nMemAvailable:   16384000 kB\n")
    assert available_bytes(meminfo) == 16384000 * 1024
    assert available_bytes(tmp_path / "nothing") is None
    assert default_jobs() >= 1


def test_an_interrupt_stops_what_runs_and_starts_nothing_more() -> None:
    """Two workers: the first case ends once the second hangs; the third may start, and then hangs too."""
    started: list[str] = []
    second_runs, stopped = threading.Event(), threading.Event()

    def hang(wanted: Case) -> Program:
        name = wanted.plan.name
        started.append(name)
        if name == "first":
            assert second_runs.wait(timeout=30)
            return program(name)
        second_runs.set()
        assert stopped.wait(timeout=30)
        raise CompileFailed(name, "killed")

    class Interrupted:
        def finish(self, label: str, outcome: str) -> None:
            raise KeyboardInterrupt

    steps = Steps(
        key=lambda c: c.plan.name,
        compile=hang,
        stop=stopped.set,
        report=lambda c, p: CaseReport(case=c, program=p),
    )
    with pytest.raises(KeyboardInterrupt):
        run_cases([case(name) for name in ("first", "second", "third", "fourth")], 2, Interrupted(), steps)
    assert stopped.is_set()
    assert "fourth" not in started
