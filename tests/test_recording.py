"""What recordings made by hand are read as: runs per step, what is left out, folders of something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import HLO

from shardlab.analysis import analyze
from shardlab.cli import main
from shardlab.errors import UserError
from shardlab.recording import SCHEMA, read_recording

SENT = 16  # of HLO: one all-reduce of 4 f32 over both devices


def program(name: str, runs: int, number: int, **changes: Any) -> dict[str, Any]:
    known: dict[str, Any] = {
        "name": name,
        "file": f"{number:016x}.hlo",
        "runs": runs,
        "num_devices": 2,
        "mesh": {"axes": {"data": 2}, "device_ids": [0, 1]},
        "memory": {"argument_bytes": 32, "temp_bytes": 8 * number},
    }
    return known | changes


def record(folder: Path, *programs: dict[str, Any], pid: int = 1, **changes: Any) -> None:
    known = {
        "schema": SCHEMA,
        "finished": True,
        "process_index": 0,
        "process_count": 1,
        "backend": "cpu",
        "versions": {"jax": "0.4.26"},
        "xla_flags": "--a=1 --b=2",
        "programs": list(programs),
        "on_one_device": [{"name": "jit_add", "runs": 70}],
        "problems": [],
    }
    (folder / f"recording-host-{pid}.json").write_text(json.dumps(known | changes))
    for number, one in enumerate(programs):
        path = folder / str(one["file"]).replace("/", "_")
        path.write_text(HLO.replace("HloModule m", f"HloModule {one['name'] or number}"))


def trainer(folder: Path) -> None:
    record(folder, program("init", 1, 1), program("accumulate", 160, 2), program("update", 10, 3))


def test_programs_run_as_often_as_the_steps_say(tmp_path: Path) -> None:
    trainer(tmp_path)
    step = read_recording(tmp_path, steps=10)
    assert [(one.name, one.runs_per_step) for one in step.programs] == [("accumulate", 16), ("update", 1)]
    assert step.left_out == (("init", "it ran once in 10 steps: not counted"),)
    assert (step.mesh, step.device_ids, step.versions) == ({"data": 2}, (0, 1), {"jax": "0.4.26"})
    assert step.flags.effective == ("--a=1", "--b=2")
    assert [one.memory.temp_bytes for one in step.programs if one.memory] == [16, 24]
    analysis = analyze(step)
    assert analysis.totals.wire_bytes == (17 * SENT, 17 * SENT)
    assert [(entry.what, entry.name) for entry in analysis.ledger] == [("program", "init")]


def test_by_default_the_program_that_ran_most_is_a_step(tmp_path: Path) -> None:
    trainer(tmp_path)
    analysis = analyze(tmp_path)
    assert analysis.totals.wire_bytes == (SENT, SENT)
    assert [(entry.name, entry.why) for entry in analysis.ledger] == [
        ("init", "it ran once in 160 steps: not counted"),
        (
            "update",
            "it ran 10 times in 160 steps: not counted (--steps 10 if a step is 16 × accumulate, 1 × update)",
        ),
    ]


@pytest.mark.parametrize(
    ("runs", "steps", "per_step", "why"),
    [
        (20, 10, 2, None),
        (19, 10, 2, "it ran 19 times in 10 steps: counted as 2 per step"),
        (5, 10, 1, "it ran 5 times in 10 steps: counted as 1 per step"),
        (14, 10, 1, "it ran 14 times in 10 steps: counted as 1 per step"),
    ],
)
def test_what_does_not_come_out_even_is_rounded_and_said(
    tmp_path: Path, runs: int, steps: int, per_step: int, why: str | None
) -> None:
    record(tmp_path, program("step", runs, 1))
    step = read_recording(tmp_path, steps)
    assert step.runs_per_step == per_step
    assert step.left_out == (() if why is None else (("step", why),))


def test_steps_that_nobody_ran(tmp_path: Path) -> None:
    trainer(tmp_path)
    with pytest.raises(
        UserError, match="--steps: no program ran in every one of 1000 steps, the most often 160"
    ):
        read_recording(tmp_path, steps=1000)


def test_of_a_job_one_process_counts(tmp_path: Path) -> None:
    job: dict[str, Any] = {"process_count": 3}
    record(tmp_path, program("step", 10, 1), pid=1, process_index=1, **job)
    record(tmp_path, program("step", 10, 1), pid=2, process_index=0, **job)
    record(tmp_path, program("step", 9, 1), pid=3, process_index=2, **job)
    step = read_recording(tmp_path)
    assert step.runs_per_step == 1
    assert step.left_out == (
        (
            "recording-host-3",
            "process 2 did not run what process 0 ran, as often: its programs are not counted",
        ),
    )


def test_of_processes_that_are_no_job_the_busiest_counts(tmp_path: Path) -> None:
    record(tmp_path, program("other", 3, 1), pid=1)
    record(tmp_path, program("step", 10, 2), pid=2)
    record(tmp_path, pid=3)
    step = read_recording(tmp_path)
    assert step.name == "step"
    assert step.left_out == (
        ("recording-host-1", "another process, which ran 1 programs 3 times: not counted"),
    )


def test_what_went_wrong_is_on_the_ledger(tmp_path: Path) -> None:
    record(tmp_path, program("step", 10, 1), finished=False, problems=["a program could not be described: x"])
    assert read_recording(tmp_path).left_out == (
        ("recording-host-1", "a program could not be described: x"),
        ("recording-host-1", "it was killed: its counts may be a second old"),
    )


def test_without_a_mesh_axes_can_be_given(tmp_path: Path) -> None:
    record(tmp_path, program("step", 10, 1, mesh=None, memory={}))
    step = read_recording(tmp_path)
    assert (step.mesh, step.device_ids, step.memory) == (None, None, None)
    assert analyze(tmp_path, axes={"x": 2}).totals.by_axes["x"]["wire_bytes"] == (SENT, SENT)


def test_device_ids_that_do_not_count_from_zero_are_no_places(tmp_path: Path) -> None:
    mesh = {"axes": {"data": 2}, "device_ids": [100000, 200000]}
    record(tmp_path, program("step", 10, 1, mesh=mesh))
    step = read_recording(tmp_path)
    assert (step.mesh, step.device_ids) == ({"data": 2}, None)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schema": "x/1"}, "not a recording (its schema is 'x/1', not 'shardlab.recording/1')"),
        ({"programs": [program("p", 1, 1, file="../../etc/passwd")]}, "is not called after its content"),
        ({"programs": [program("p", -1, 1)]}, "'-1' is not a count"),
        ({"programs": [program("p", 1, 1, num_devices=True)]}, "'True' is not a count"),
        ({"programs": [{}]}, "not a recording ('file')"),
        ({"programs": []}, "nothing ran on several devices"),
        (
            {"programs": [], "problems": ["this JAX runs programs in a way"]},
            "this JAX runs programs in a way",
        ),
    ],
    ids=["schema", "outside", "negative", "bool", "empty", "none", "problem"],
)
def test_what_is_no_recording_is_a_mistake(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    record(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        read_recording(tmp_path)
    assert says in str(caught.value)


def test_a_program_whose_text_is_gone(tmp_path: Path) -> None:
    record(tmp_path, program("step", 1, 1))
    (tmp_path / f"{1:016x}.hlo").unlink()
    with pytest.raises(UserError, match="No such file or directory; record it again"):
        read_recording(tmp_path)


def test_the_command_line_takes_the_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path)
    assert main(["analyze", str(tmp_path), "--steps", "10", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["totals"]["wire_bytes"] == [17 * SENT, 17 * SENT]
    assert main(["analyze", str(tmp_path), "--steps", "10"]) == 0
    assert "16 × accumulate, 1 × update" in capsys.readouterr().out


def test_steps_are_for_recordings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.hlo"
    path.write_text(HLO)
    assert main(["analyze", str(path), "--steps", "10"]) == 2
    assert "--steps is for what shardlab record wrote" in capsys.readouterr().err
