"""`shardlab check`: baselines, budgets, tolerances, exit codes, on reports made by hand and a real plan."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from case_reports import analysis, collective, infeasible_report, memory, report
from command_line import PLAN, mistakes, run, written

from shardlab.analysis import Analysis, CollectiveRow
from shardlab.case_report import CaseReport, report_case
from shardlab.hardware.catalog import load_machine
from shardlab.lab.check import check_plans
from shardlab.lab.review import compile_plans
from shardlab.review.baseline import Baseline, Outcome, against, baseline_of, read_baseline, write_text
from shardlab.review.sides import side_of_report

GB = 10**9
CHECKED = PLAN + '[check]\nmodel = "tiny"\nbatch = 2\nseq = 8\n'
Compiles = Callable[..., None]


@pytest.fixture
def plan(tmp_path: Path) -> str:
    return written(tmp_path / "plan.toml", CHECKED)


@pytest.fixture
def compiles_to(monkeypatch: pytest.MonkeyPatch) -> Compiles:
    """Says what plans compile to from now on."""

    def set_reports(*reports: CaseReport) -> None:
        monkeypatch.setattr("shardlab.lab.check.compile_plans", lambda *_, **__: list(reports))

    return set_reports


def sending(gb: int, **changes: object) -> CaseReport:
    """A step that gathers so many GB over fsdp, on NVLink, in 40 + 20 GB of memory."""
    row = collective(executions=(1, 1), wire_bytes=Fraction(gb * GB), traffic={"nvlink": Fraction(gb * GB)})
    return report(analysis=analysis(row), memory=memory(), **changes)


def outcome(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any]]:
    code = run("check", *argv, "--json")
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "shardlab.check/1"
    return code, document["plans"][0]


def test_a_baseline_is_written_then_passes_then_breaks_then_asks_to_be_written_again(
    plan: str, compiles_to: Compiles, capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = mistakes(capsys, "check", plan)
    assert "plan.baseline.json: there is no baseline; write it with --update" in line
    compiles_to(sending(100))
    assert outcome(capsys, plan, "--update")[0] == 0
    assert outcome(capsys, plan)[0] == 0
    compiles_to(sending(102))  # 2 % more
    code, found = outcome(capsys, plan)
    assert (code, found["broken"]) == (1, True)
    worse = {name for name, figure in found["figures"].items() if figure["outcome"] == "worse"}
    assert worse == {"wire_bytes.total", "wire_bytes.fsdp", "traffic.nvlink"}
    assert outcome(capsys, plan, "--tolerance", "2")[0] == 0
    assert outcome(capsys, plan, "--tolerance", "1.9")[0] == 1
    compiles_to(sending(90))
    assert run("check", plan) == 0
    assert "better than its baseline; write it again with --update" in capsys.readouterr().out
    assert outcome(capsys, plan, "--update")[0] == 0
    compiles_to(sending(100))
    assert run("check", plan) == 1
    text = capsys.readouterr().out
    assert text.startswith("Broken") and "+11 %" in text and "90 GB" in text


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"hardware_flops": 3 * 10**14}, "compute.flops"),
        ({"memory": memory(61)}, "memory.peak"),
        ({"memory": None}, "memory.peak"),
    ],
    ids=["flops", "memory", "memory-unknown-now"],
)
def test_memory_and_flops_count_and_what_is_no_longer_known_is_not_better(
    change: dict[str, object], name: str
) -> None:
    before = baseline_of(side_of_report(sending(100)))
    after = baseline_of(side_of_report(replace(sending(100), **change)))  # type: ignore[arg-type]
    (line,) = (one for one in against(before, after, Fraction(1, 100)) if one.outcome != "same")
    assert line.name == name
    assert line.outcome == ("lost" if line.after is None else "worse")


def figures(**known: float | None) -> Baseline:
    return Baseline(figures=known, collectives={}, case={}, versions={})


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (100, 101, "same"),
        (100, 101.5, "worse"),
        (100, 99, "same"),
        (100, 98, "better"),
        (0, 1, "worse"),
        (100, None, "lost"),
        (None, 100, "better"),
        (None, None, "same"),
    ],
)
def test_a_tolerance_is_a_share_of_the_baseline(
    before: float | None, after: float | None, expected: Outcome
) -> None:
    """1 % of 100 is 1, inclusive; of nothing it is nothing; unknown is worse than anything known."""
    (line,) = against(figures(total=before), figures(total=after), Fraction(1, 100))
    assert line.outcome == expected


def test_an_axis_that_was_not_there_carried_nothing() -> None:
    new = {"wire_bytes.fsdp": 1, "wire_bytes.tensor": 1}
    lines = against(figures(**{"wire_bytes.fsdp": 1}), figures(**new), Fraction(1))
    assert [(line.name, line.before, line.outcome) for line in lines] == [
        ("wire_bytes.fsdp", 1, "same"),
        ("wire_bytes.tensor", 0, "worse"),
    ]


def test_the_file_is_sorted_readable_and_comes_back(tmp_path: Path) -> None:
    made = baseline_of(side_of_report(sending(100)))
    path = Path(written(tmp_path / "plan.baseline.json", write_text(made)))
    assert read_baseline(path) == made
    assert json.loads(path.read_text()) == {
        "schema": "shardlab.baseline/1",
        "case": {"model": "tiny", "machine": "h100:1x8", "batch": 8, "seq": 128, "workload": "train"},
        "versions": {},
        "wire_bytes": {"total": 100 * GB, "fsdp": 100 * GB},
        "traffic": {"nvlink": 100 * GB},
        "memory": {"peak": 60 * GB},
        "compute": {"flops": 2 * 10**14},
        "collectives": {"all-gather over fsdp": [1, 1]},
    }
    assert '"all-gather over fsdp": [1, 1]\n' in path.read_text()


def test_budgets_hold_whatever_the_baseline_says(
    plan: str, compiles_to: Compiles, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    compiles_to(sending(100))
    budget = '[plan]\n"traffic.nvlink" = "100 GB"\nmemory.peak = "59.9 GB"\n"wire_bytes.tensor" = 0\n'
    written(tmp_path / "budgets.toml", budget)
    code, found = outcome(capsys, plan, "--update")
    assert code == 1
    assert found["over_budget"] == {"memory.peak": {"budget": 59_900_000_000, "now": 60 * GB}}
    assert run("check", plan) == 1
    assert "above its budget" in capsys.readouterr().out


def test_all_mistakes_are_said_before_anything_is_compiled(
    plan: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    budget = '[plam]\n"memory.peak" = 1\n[plan]\nmemory.peak = "many"\nspeed = 3\n"compute.flops" = true\n'
    written(tmp_path / "budgets.toml", budget)
    found = mistakes(capsys, "check", plan)
    assert len(found) == 5
    for line, part in zip(
        found,
        (
            "plam: no such plan",
            "'many' is not an amount of bytes",
            "'speed' is no figure",
            "FLOPs such as",
            "no baseline",
        ),
        strict=True,
    ):
        assert part in line


def test_a_plan_without_a_model_or_no_plan_at_all_is_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (line,) = mistakes(capsys, "check", written(tmp_path / "plan.toml", PLAN))
    assert "names no model in [check]" in line
    monkeypatch.chdir(tmp_path)
    (line,) = mistakes(capsys, "check")
    assert line == "meshes: no plan to check; name mesh files: shardlab check MESH..."
    assert "is not a percentage" in mistakes(capsys, "check", "plan.toml", "--tolerance", "1e3")[0]


def silent(rows: Sequence[CollectiveRow] = ()) -> Analysis:
    """Nothing was parsed."""
    nothing = replace(analysis().totals, wire_bytes=(Fraction(0),) * 2, by_axes={}, traffic={})
    return replace(analysis(), collectives=tuple(rows), totals=nothing)


def test_nothing_parsed_is_no_improvement(
    plan: str, compiles_to: Compiles, capsys: pytest.CaptureFixture[str]
) -> None:
    compiles_to(report(analysis=silent()))
    (line,) = mistakes(capsys, "check", plan, "--update")
    assert "no collective was found in a training step on 8 devices" in line
    compiles_to(sending(100))
    assert outcome(capsys, plan, "--update")[0] == 0
    compiles_to(report(analysis=silent()))
    (line,) = mistakes(capsys, "check", plan)
    assert "no collective was found, and the baseline has some" in line


def test_a_plan_that_cannot_be_any_more_is_broken_and_one_that_failed_was_not_run(
    plan: str, compiles_to: Compiles, capsys: pytest.CaptureFixture[str]
) -> None:
    compiles_to(sending(100))
    assert outcome(capsys, plan, "--update")[0] == 0
    before = Path(plan).with_name("plan.baseline.json").read_text()
    compiles_to(infeasible_report("3 sequences over 2 devices"))
    code, found = outcome(capsys, plan)
    assert (code, found["broken"], found["why_not"]) == (1, True, "infeasible: 3 sequences over 2 devices")
    assert "there is nothing to write a baseline of" in mistakes(capsys, "check", plan, "--update")[0]
    compiles_to(report(analysis=None, failure="no compiler"))
    assert "no compiler" in mistakes(capsys, "check", plan)[0]
    assert Path(plan).with_name("plan.baseline.json").read_text() == before


def test_another_case_or_compiler_is_said(
    plan: str, compiles_to: Compiles, capsys: pytest.CaptureFixture[str]
) -> None:
    made = sending(100)
    assert made.analysis is not None
    compiles_to(replace(made, analysis=replace(made.analysis, made_by={"versions": {"jax": "0.10"}})))
    assert outcome(capsys, plan, "--update")[0] == 0
    newer = replace(made, analysis=replace(made.analysis, made_by={"versions": {"jax": "0.12"}}))
    compiles_to(replace(newer, case=newer.case.model_copy(update={"batch": 16})))
    code, found = outcome(capsys, plan)
    assert (code, found["notes"]) == (
        0,
        ["batch: 8 in the baseline, 16 now", "versions changed since the baseline: jax 0.10 → 0.12"],
    )


def test_a_real_plan_is_compiled_with_its_check_and_equals_itself(
    plan: str, compiles_to: Compiles, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[CaseReport] = []

    def compile_once(*args: Any, **named: Any) -> list[CaseReport]:
        compiled[:] = compiled or compile_plans(*args, **named)
        return compiled

    monkeypatch.setattr("shardlab.lab.check.compile_plans", compile_once)
    assert run("check", plan, "--update") == 0
    assert run("check", plan) == 0
    assert "1 checked, 0 broken, 0 better" in capsys.readouterr().out
    saved = read_baseline(Path(plan).with_name("plan.baseline.json"))
    assert dict(saved.case) == {
        "model": "tiny",
        "machine": "cpu:2",
        "batch": 2,
        "seq": 8,
        "workload": "train",
    }
    (made,) = compiled
    assert made.analysis is not None and made.program is not None
    whole = report_case(made.case, made.program, load_machine("cpu:2"))  # `check` asks for its figures alone
    assert saved.figures["compute.flops"] == whole.hardware_flops
    assert whole.hardware_flops is not None and whole.hardware_flops > 0
    rows = made.analysis.collectives
    assert saved.figures["wire_bytes.total"] == sum(row.wire_bytes * row.executions[0] for row in rows) > 0


def test_plans_are_checked_in_order_and_written_all_or_none(tmp_path: Path, compiles_to: Compiles) -> None:
    paths = [written(tmp_path / f"{name}.toml", CHECKED) for name in "ba"]
    compiles_to(sending(1), sending(2))
    (tmp_path / "log").touch()
    with (tmp_path / "log").open("w") as log:
        checks = check_plans(paths, update=True, tolerance=Fraction(0), progress=log)
        assert [check.plan for check in checks] == ["b", "a"]
        assert read_baseline(tmp_path / "a.baseline.json").figures["wire_bytes.total"] == 2 * GB
        compiles_to(sending(3), infeasible_report("no"))
        with pytest.raises(Exception, match="nothing to write"):
            check_plans(paths, update=True, tolerance=Fraction(0), progress=log)
    assert read_baseline(tmp_path / "b.baseline.json").figures["wire_bytes.total"] == GB
