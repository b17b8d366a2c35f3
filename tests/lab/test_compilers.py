"""When the compiler changed too: whose change it is, on environments that are faked, and on a real one."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from case_reports import GB, infeasible_report
from command_line import PLAN, mistakes, run, written
from review.test_check import CHECKED, sending

from shardlab.case_report import CaseReport
from shardlab.compile.interpreter import HERE, Interpreter
from shardlab.lab.cache import Cache
from shardlab.lab.run import Steps
from shardlab.program import Program
from shardlab.review.baseline import Line
from shardlab.review.check import whose_change

PROGRAM = Program(name="step", backend="gpu", hlo_text="m", num_devices=8, compile_s=1.0)
OLD, NEW = {"jax": "0.10.2", "jaxlib": "0.10.2"}, {"jax": "0.12.0", "jaxlib": "0.12.0"}
Checks = Callable[..., tuple[int, dict[str, Any]]]


def python(folder: Path, versions: dict[str, str], name: str = "python") -> str:
    """An interpreter that knows nothing but its versions."""
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{json.dumps(versions)}'\n")
    path.chmod(0o755)
    return str(path)


def made_with(report: CaseReport, versions: dict[str, str]) -> CaseReport:
    assert report.analysis is not None
    analysis = replace(report.analysis, made_by={"versions": versions})
    return replace(report, analysis=analysis, program=replace(PROGRAM, versions=versions))


@pytest.fixture
def plan(tmp_path: Path) -> str:
    return written(tmp_path / "plan.toml", CHECKED)


@pytest.fixture
def checks(plan: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Checks:
    """`check` of a plan that compiles to `now` here, and to `there` in another environment."""

    def of(now: CaseReport, *argv: str, there: CaseReport | None = None) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr("shardlab.lab.check.compile_plans", lambda *_, **__: [now])
        monkeypatch.setattr("shardlab.lab.compilers.run_cases", lambda *_, **__: (there,))
        code = run("check", plan, *argv, "--json")
        document: dict[str, Any] = json.loads(capsys.readouterr().out)
        return code, document["plans"][0]

    return of


@pytest.mark.parametrize(
    ("there_gb", "now_gb", "said"),
    [
        (100, 74, "better: compiler −26 %, your change 0"),
        (126, 126, "worse: compiler 0, your change +26 %"),
        (110, 121, "worse: compiler +11 %, your change +10 %"),
        (110, 100, "same: compiler −10 %, your change +10 %"),
    ],
    ids=["compiler", "code", "both", "they cancel"],
)
def test_each_figure_says_whose_change_it_is(
    there_gb: int,
    now_gb: int,
    said: str,
    plan: str,
    checks: Checks,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """100 GB in the baseline; this code with its compiler, and with this one. Shares are of the baseline."""
    checks(made_with(sending(100), OLD), "--update")
    other = python(tmp_path, OLD)
    there = made_with(sending(there_gb), OLD)
    _, found = checks(made_with(sending(now_gb), NEW), "--python", other, there=there)
    assert found["figures"]["wire_bytes.total"]["old_compiler"] == there_gb * GB
    run("check", plan, "--python", other, "--markdown")
    rows = [line for line in capsys.readouterr().out.splitlines() if "wire\\_bytes.total" in line]
    assert [row.split("|")[-2].strip() for row in rows] == [said]


def test_a_python_that_has_it_is_found_among_several_and_others_are_named(
    checks: Checks, tmp_path: Path
) -> None:
    checks(made_with(sending(100), OLD), "--update")
    now, there = made_with(sending(126), NEW), made_with(sending(100), OLD)
    new, old = python(tmp_path, NEW, "new"), python(tmp_path, OLD, "old")
    _, found = checks(now, "--python", new, "--python", old, there=there)
    assert found["figures"]["wire_bytes.total"]["old_compiler"] == 100 * GB
    code, found = checks(now, "--python", new, there=there)
    assert code == 1
    assert "old_compiler" not in found["figures"]["wire_bytes.total"]
    assert found["notes"][-1] == (
        f"how much of a change is the compiler's is not known: none of {new} has jax 0.10.2, jaxlib 0.10.2"
    )
    _, found = checks(now)
    assert "name a Python that has jax 0.10.2, jaxlib 0.10.2 with --python" in found["notes"][-1]


def test_what_does_not_compile_is_no_other_compiler(checks: Checks, tmp_path: Path) -> None:
    checks(made_with(sending(100), {**OLD, "flax": "1", "python": "3.11"}), "--update")
    _, found = checks(made_with(sending(100), {**OLD, "flax": "2", "python": "3.12"}))
    assert [note for note in found["notes"] if "compiler" in note] == []


def test_code_that_the_old_compiler_does_not_take_is_said(checks: Checks, tmp_path: Path) -> None:
    checks(made_with(sending(100), OLD), "--update")
    now, other = made_with(sending(126), NEW), python(tmp_path, OLD)
    failed = CaseReport(case=now.case, failure="no such primitive")
    _, found = checks(now, "--python", other, there=failed)
    assert found["notes"][-1] == "with the baseline's compiler it cannot be compiled: no such primitive"
    _, found = checks(now, "--python", other, there=infeasible_report("no"))
    assert found["notes"][-1] == "with the baseline's compiler it cannot run: infeasible: no"


def test_parts_are_shares_of_the_baseline_where_all_three_are_known() -> None:
    def parts(before: float | None, between: float | None, after: float | None) -> object:
        line = Line(name="memory.peak", before=before, after=after, outcome="same")
        return whose_change(line, {"memory.peak": between, "x": 1})

    assert parts(100, 150, 120) == (Fraction(-30, 100), Fraction(50, 100))
    assert parts(None, 1, 1) is parts(1, None, 1) is parts(1, 1, None) is parts(0, 1, 1) is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "No such file"),
        ("#!/bin/sh\necho no module named pydantic >&2; exit 1\n", "no module named pydantic"),
        ("#!/bin/sh\necho what\n", "Expecting value"),
        ("#!/bin/sh\necho '[]'\n", "it said nothing"),
    ],
    ids=["missing", "fails", "no JSON", "no versions"],
)
def test_a_python_that_cannot_be_used_is_a_mistake(
    text: str | None, why: str, checks: Checks, plan: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checks(made_with(sending(100), OLD), "--update")
    checks(made_with(sending(126), NEW))
    path = tmp_path / "python"
    if text is not None:
        path.write_text(text)
        path.chmod(0o755)
    (line,) = mistakes(capsys, "check", plan, "--python", str(path))
    assert line.startswith(f"--python {path}: cannot be used: ")
    assert why in line and "name a Python of 3.11 or later" in line


def test_the_key_of_another_environment_is_of_its_versions(plan: str, tmp_path: Path) -> None:
    from shardlab.spec.case import make_case
    from shardlab.spec.plan import load_plan

    case = make_case(load_plan(plan), model="tiny")
    other = Interpreter(python(tmp_path, OLD))
    compiled: list[Interpreter] = []

    def compile_with(case: Any, *, python: Interpreter, **_: object) -> Any:
        compiled.append(python)
        return PROGRAM

    cache = Cache(compile_with=compile_with)
    there: Steps = cache.steps_in(other)
    assert there.key(case) != cache.steps().key(case) == cache.steps_in(HERE).key(case)
    there.compile(case)
    assert compiled == [other]
    assert cache.counts.compiled == 1


@pytest.mark.full
def test_two_real_environments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SHARDLAB_OTHER_PYTHON: of an environment with another jax, which `.ci/full` makes. The plan is not
    changed, so that whatever changed is the compiler's."""
    other = os.environ.get("SHARDLAB_OTHER_PYTHON")
    assert other, "set SHARDLAB_OTHER_PYTHON to a Python with shardlab[jax] and another jax; .ci/full does"
    plan = written(tmp_path / "plan.toml", PLAN + '[check]\nmodel = "tiny"\nbatch = 2\nseq = 8\n')
    assert run("check", plan, "--update") == 0
    baseline = Path(plan).with_name("plan.baseline.json")
    document = json.loads(baseline.read_text())
    there = Interpreter(other).versions("cpu")
    assert there["jax"] != document["versions"]["jax"], "SHARDLAB_OTHER_PYTHON has the same jax as this one"
    document["versions"] = there
    baseline.write_text(json.dumps(document))
    capsys.readouterr()
    run("check", plan, "--python", other, "--json")
    (found,) = json.loads(capsys.readouterr().out)["plans"]
    for name, figure in found["figures"].items():  # the text of both compilers moves the same bytes
        if name != "memory.peak":
            assert figure["old_compiler"] == figure["now"] == figure["baseline"]
    assert sys.executable != other
