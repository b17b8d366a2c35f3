"""The benchmark is a program: a small run measures everything it says it does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MEASURED = (
    "unrolled Llama: XLA hlo_module_from_text",
    "unrolled Llama: shardlab.analyze",
    "unrolled Llama: peak memory",
    "dense: XLA hlo_module_from_text",
    "dense: shardlab.analyze",
    "dense: peak memory",
    "h100_1x2x8.ppermute_scan6.send_recv.hlo",
    "dense, 2 times: shardlab.analyze",
    "dense, 4 times: shardlab.analyze",
    "16 devices in listed groups",
    "shardlab analyze, whole process",
)


@pytest.mark.matrix
def test_a_small_run_measures_everything() -> None:
    script = str(ROOT / "experiments" / "bench_parse.py")
    dump = ROOT / "tests" / "golden" / "hlo" / "printed" / "h100_1x2x8.ppermute_scan6.send_recv.hlo"
    small = ["--megabytes=0.3", "--layers=1", "--model_layers=1", "--repeats=1", "--devices=16"]
    small.append(f"--dump={dump}")
    done = subprocess.run(
        [sys.executable, script, *small], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(MEASURED), done.stdout
    for line, start in zip(lines, MEASURED, strict=True):
        assert start in line
