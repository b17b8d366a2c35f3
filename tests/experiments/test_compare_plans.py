"""The experiment is a program: it is run as one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLAN = """\
on = "cpu:2"
[axes]
data = 2
[activations]
batch = ["data"]
[compiler]
flags = ["--xla_backend_optimization_level=0"]
"""


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "experiments" / "compare_plans.py")
    return subprocess.run(
        [sys.executable, script, *argv], capture_output=True, text=True, cwd=ROOT, check=False
    )


@pytest.mark.matrix
def test_it_prints_one_report_of_all_plans(tmp_path: Path) -> None:
    (tmp_path / "data.toml").write_text(PLAN)
    (tmp_path / "fsdp.toml").write_text(PLAN.replace("[act", '[params]\nembed = ["data"]\n[act'))
    meshes = f"{tmp_path}/data.toml,{tmp_path}/fsdp.toml"
    page = tmp_path / "report.html"
    done = run(f"--meshes={meshes}", "--model=tiny", "--batch=2", "--sequence=64", f"--html={page}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("## tiny on cpu:2: 2 plans, train, batch 2, sequence 64")
    assert done.stdout.count("\n| **1** | **") == 1
    assert "**data**<br>data parallel" in done.stdout
    assert "**fsdp**<br>FSDP" in done.stdout
    assert "Traceback" not in done.stderr
    assert "tiny on cpu:2: 2 plans" in page.read_text()


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    done = run(f"--meshes={tmp_path}/missing.toml", "--model=tiny")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "missing.toml" in done.stderr
