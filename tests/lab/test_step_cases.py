"""The user's own step on the command line: which cases it makes, and a compile in a child process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from own_steps import SUM, mesh_plan, write_step

from shardlab.cli import main
from shardlab.errors import UserError
from shardlab.lab.cases import Question, comparison_cases
from shardlab.lab.check import check_plans
from shardlab.spec.plan_schema import Check
from shardlab.spec.step import StepCase

STEP = "mine:make_step"
ALL_REDUCE_BYTES = 7
TRAINER = str(Path(__file__).parents[2] / "experiments" / "steps" / "fsdp4-tensor2.toml")


def checked(**fields: Any) -> Any:
    return mesh_plan(check=Check(**fields))


def test_a_step_makes_a_case_of_every_plan_and_machine(tmp_path: Path) -> None:
    question = Question(step=STEP, folder=str(tmp_path), machines=("cpu:8", "h100:1x8"), batch=4)
    made = comparison_cases([mesh_plan(), mesh_plan({"x": 4, "y": 2})], question).cases
    assert all(isinstance(one, StepCase) for one in made)
    assert [(dict(one.plan.axes), one.machine) for one in made] == [
        ({"x": 8}, "cpu:8"),
        ({"x": 8}, "h100:1x8"),
        ({"x": 4, "y": 2}, "cpu:8"),
        ({"x": 4, "y": 2}, "h100:1x8"),
    ]
    assert {(one.batch, one.seq, one.workload) for one in made} == {(4, None, "train")}


def test_what_is_not_asked_comes_from_the_plan() -> None:
    (case,) = comparison_cases([checked(step=STEP, model="mine-7b", batch=8, seq=16)], Question()).cases
    assert isinstance(case, StepCase)
    assert (case.step, case.model, case.batch, case.seq) == (STEP, "mine-7b", 8, 16)
    assert case.folder == str(Path.cwd())


@pytest.mark.parametrize(
    ("plans", "question", "says"),
    [
        ([checked(step=STEP), checked()], Question(), "--step: the plans are for a model, mine:make_step in"),
        (
            [checked(batch=8), checked(batch=9)],
            Question(step=STEP),
            "--batch: the plans are for 8, 9 in [check]",
        ),
        (
            [mesh_plan()],
            Question(step="steps.py:f"),
            "--step: 'steps.py:f' is no function of a module; write it",
        ),
        (
            [mesh_plan()],
            Question(step="mine"),
            "--step: 'mine' is no function of a module; write it as package",
        ),
        (
            [mesh_plan()],
            Question(step=STEP, machines=("cpu:4",)),
            "own: the plan has x 8 = 8 devices, but cpu:4 has 4",
        ),
    ],
    ids=["step-and-model", "batches", "path", "no-function", "machine"],
)
def test_mistakes_are_found_before_anything_is_compiled(plans: Any, question: Question, says: str) -> None:
    with pytest.raises(UserError) as caught:
        comparison_cases(plans, question)
    assert str(caught.value).startswith(says)


def own_files(folder: Path) -> str:
    write_step(folder, SUM)
    path = folder / "plan.toml"
    path.write_text(f'on = "cpu:8"\n[axes]\nx = 8\n[check]\nstep = "{STEP}"\n')
    return str(path)


def test_explain_and_check_compile_it_in_a_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two compiles: the first writes the baseline, which the second meets as the report of the same step."""
    plan = own_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["check", plan, "--update"]) == 0
    baseline = json.loads((tmp_path / "plan.baseline.json").read_text())
    assert baseline["case"] == {"step": STEP, "machine": "cpu:8", "workload": "train"}
    assert baseline["wire_bytes"] == {"total": ALL_REDUCE_BYTES, "x": ALL_REDUCE_BYTES}
    capsys.readouterr()
    assert main(["explain", plan, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["case"]["step"] == STEP
    assert report["case"]["programs"] == [{"name": "total", "runs_per_step": 1}]
    assert {"model", "batch", "seq", "strategies"}.isdisjoint(report["case"])
    assert report["analysis"]["totals"]["wire_bytes"] == [ALL_REDUCE_BYTES, ALL_REDUCE_BYTES]


def test_a_mistake_in_it_is_exit_2_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = own_files(tmp_path)
    (tmp_path / "mine.py").write_text("def make_step(mesh):\n    raise ValueError('not today')\n")
    monkeypatch.chdir(tmp_path)
    assert main(["explain", plan]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1] == "mine.py:2 (make_step): ValueError: not today"


def test_a_plan_with_neither_model_nor_step_cannot_be_checked(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text('on = "cpu:8"\n[axes]\nx = 8\n')
    with pytest.raises(UserError, match=r'names no model in \[check\]; add model = "…" or step = "…"'):
        check_plans([str(path)], update=True, tolerance=0, progress=None)  # type: ignore[arg-type]


@pytest.mark.matrix
@pytest.mark.gpu
def test_a_trainer_of_two_programs_on_h100(capsys: pytest.CaptureFixture[str]) -> None:
    """Gathers and scatters of 3/4 of a shard over four, reductions of activations over two, for 16
    microbatches of 4 layers; and one scalar for the norm, which XLA:GPU reduces over all eight at once."""
    assert main(["explain", TRAINER, "--on", "h100:1x8", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    layer_runs, shard, activation = 16 * 4, 128 * 512 * 4 // 2, 512 // 16 // 4 * 128 * 4
    sent = {
        axes: measure["wire_bytes"][0] for axes, measure in report["analysis"]["totals"]["by_axes"].items()
    }
    assert sent == {
        "fsdp": layer_runs * (4 + 2) * shard * 3 // 4,
        "tensor": layer_runs * 2 * activation,
        "fsdp+tensor": 7,
    }
    # 2 x 8 rows x 128 x 256 of each weight: twice forward, again in the recomputed first one, four backward
    assert report["compute"]["flops"] == layer_runs * 7 * 2 * 8 * 128 * 256
    assert report["prediction"]["step_time_s"] > 0
    assert "tokens_per_s_per_device" not in report["prediction"]
