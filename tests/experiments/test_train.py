"""experiments/train.py as a user runs it: a mesh file in, metrics and the bytes of the step that ran out."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]

PLAN = """
on = "cpu:4"
[axes]
{axis} = 4
[params]
{params}
[activations]
batch = ["{axis}"]
[compiler]
flags = ["--xla_backend_optimization_level=0"]
"""


def train(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "experiments" / "train.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def mesh_file(folder: Path, axis: str, params: str = "", on: str = "cpu:4") -> str:
    path = folder / f"{axis}.toml"
    path.write_text(PLAN.format(axis=axis, params=params).replace("cpu:4", on))
    return f"--mesh={path}"


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 50)
    return f"--text={path}"


def read_metrics(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def test_trains_and_says_what_the_step_moved(tmp_path: Path, text_file: str) -> None:
    """The same curve on two plans, and for data parallelism the closed form of the bytes.

    Four devices all-reduce every f32 gradient once: 2 · 3/4 of 4 bytes for each parameter of tiny
    (2 layers of 4 · 128² + 3 · 128 · 512 + 2 · 128, 2 · 512 · 128 and 128), plus the loss of 4 bytes.
    """
    curves = {}
    for axis, params in {"data": "", "fsdp": 'embed = ["fsdp"]'}.items():
        metrics = tmp_path / f"{axis}.csv"
        done = train(
            mesh_file(tmp_path, axis, params),
            text_file,
            "--steps=4",
            "--batch=4",
            "--seq=16",
            f"--metrics={metrics}",
            "--report_every=2",
        )
        assert done.returncode == 0, done.stderr
        assert (
            len(re.findall(r"^step [24]/4  loss \d+\.\d{4}  [\d,]+ tokens/s$", done.stderr, re.MULTILINE))
            == 2
        )
        curves[axis] = (read_metrics(metrics), done.stdout)
    data, fsdp = (rows for rows, _ in curves.values())
    assert [row["step"] for row in data] == [1, 2, 3, 4]
    np.testing.assert_allclose([row["loss"] for row in fsdp], [row["loss"] for row in data], rtol=1e-5)
    assert data[-1]["loss"] < data[0]["loss"]
    assert all(row["tokens_per_s"] > 0 for row in data)
    parameters = 2 * (4 * 128**2 + 3 * 128 * 512 + 2 * 128) + 2 * 512 * 128 + 128
    wire_bytes = 2 * 3 * 4 * (parameters + 1) // 4
    assert f"wire bytes per device and step on cpu:4: {wire_bytes:,} " in curves["data"][1]
    assert f"  data: {wire_bytes:,} " in curves["data"][1]


def wrong_machine(folder: Path) -> list[str]:
    return [mesh_file(folder, "data", on="h100:1x4")]


def unknown_model(folder: Path) -> list[str]:
    return [mesh_file(folder, "data"), "--model=tinny"]


def no_text(folder: Path) -> list[str]:
    return [mesh_file(folder, "data"), f"--text={folder}/none"]


def missing_mesh(folder: Path) -> list[str]:
    return [f"--mesh={folder}/none.toml"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(wrong_machine, "--on=cpu:4", id="not-attached"),
        pytest.param(unknown_model, "unknown model 'tinny'", id="unknown-model"),
        pytest.param(no_text, "nothing to read", id="no-text"),
        pytest.param(missing_mesh, "none.toml", id="no-mesh"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, arguments: object, said: str) -> None:
    assert callable(arguments)
    done = train(*arguments(tmp_path))
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
