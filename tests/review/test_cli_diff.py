"""`shardlab diff` on every kind of input; exit 0 whether or not they differ, 2 when it cannot run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import HLO, PLAN, mistakes, run, written

from shardlab.analysis import analyze
from shardlab.program import Memory, Program, save

AXES = ("--axes", "data=2")
DOUBLE = HLO.replace("f32[4]", "f32[8]")
PROGRAM = Program(name="step", backend="cpu", hlo_text=HLO, num_devices=2, mesh={"data": 2})


def told(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert run("diff", *argv, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "shardlab.diff/1"
    return found


def test_dumps_programs_and_documents_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dump = written(tmp_path / "step.hlo", HLO)
    document = written(tmp_path / "step.json", json.dumps(analyze(HLO, axes={"data": 2}).to_json()))
    program = str(tmp_path / "step.program")
    save(PROGRAM, program)
    for base, head in ((dump, document), (document, program), (program, dump)):
        found = told(capsys, base, head, *AXES)
        assert (found["verdict"]["is"], found["changes"]) == ("same", [])
        assert found["unchanged"]["collectives"] == 1


def test_twice_the_array_is_twice_the_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """2 · (2-1)/2 · 16 bytes before, of 32 after; on one host over NVLink."""
    base, head = written(tmp_path / "a", HLO), written(tmp_path / "b", DOUBLE)
    found = told(capsys, base, head, *AXES, "--on", "h100:1x2")
    (row,) = found["changes"]
    assert (row["change"], row["base"]["wire_bytes"], row["head"]["wire_bytes"]) == (
        "grew",
        [16, 16],
        [32, 32],
    )
    assert row["head"]["tiers"] == ["nvlink"]
    assert found["totals"]["head"]["traffic"] == {"nvlink": [32, 32]}
    assert found["verdict"]["is"] == "worse"
    assert run("diff", base, head, *AXES) == 0
    assert "Worse: bytes sent +16 B (+100 %)" in capsys.readouterr().out
    assert run("diff", base, head, *AXES, "--markdown") == 0
    assert "| grew | all-reduce over data" in capsys.readouterr().out


def test_memory_comes_from_saved_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(tmp_path / name) for name in ("a.program", "b.program")]
    for path, temp_bytes in zip(paths, (100, 150), strict=True):
        memory = Memory(argument_bytes=1000, output_bytes=0, alias_bytes=0, temp_bytes=temp_bytes)
        save(replace(PROGRAM, memory=memory), path)
    found = told(capsys, *paths)
    assert (found["base"]["memory_bytes"], found["head"]["memory_bytes"]) == (1100, 1150)
    assert found["verdict"]["text"] == "Worse: memory +50 B (+4.5 %)"


def test_mistakes_of_both_inputs_are_said_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone, wrong = str(tmp_path / "gone.json"), written(tmp_path / "wrong.json", '{"schema": "x/1"}')
    first, second = mistakes(capsys, "diff", gone, wrong)
    assert gone in first
    assert "its schema is 'x/1'; give a document of" in second
    (only,) = mistakes(capsys, "diff", written(tmp_path / "cut.json", '{"schema'), wrong, "--on", "h100:1x2")[
        :1
    ]
    assert "not JSON" in only


def test_mesh_files_are_compiled_and_a_batch_that_cannot_be_split_is_an_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check = '[check]\nmodel = "tiny"\nbatch = 2\nseq = 8\n'
    base = written(tmp_path / "base.toml", PLAN + check)
    head = written(tmp_path / "head.toml", PLAN + check.replace("batch = 2", "batch = 3"))
    found = told(capsys, base, head)
    assert found["base"]["case"]["batch"] == 2
    assert found["base"]["memory_bytes"] > 0
    assert found["verdict"]["text"].startswith("Worse: the head cannot run: infeasible: ")
    assert "3 sequences over 2 devices" in found["head"]["why_not"]
