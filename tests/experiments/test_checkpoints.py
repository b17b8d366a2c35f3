"""Checkpoints as a user meets them: another mesh goes on, damage is skipped, another run is refused."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "experiments")))}
QUICK = '[compiler]\nflags = ["--xla_backend_optimization_level=0"]\n'
FSDP = f'on = "cpu:8"\n[axes]\nfsdp = 8\n[params]\nembed = ["fsdp"]\n[activations]\nbatch = ["fsdp"]\n{QUICK}'
TENSOR = (
    'on = "cpu:8"\n[axes]\ndata = 2\ntensor = 4\n[params]\nheads = ["tensor"]\nkv_heads = ["tensor"]\n'
    f'mlp = ["tensor"]\nvocab = ["tensor"]\n[activations]\nbatch = ["data"]\n{QUICK}'
)


def train(folder: Path, plan: str, metrics: str, *more: str) -> subprocess.CompletedProcess[str]:
    (folder / "plan.toml").write_text(plan)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 50)
    command = [
        sys.executable, str(ROOT / "experiments" / "train.py"), f"--mesh={folder}/plan.toml",
        f"--text={folder}/text.txt", "--batch=8", "--seq=16", f"--metrics={folder}/{metrics}",
        f"--checkpoints={folder}/kept", "--checkpoint_every=3", *more,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)


def losses(path: Path) -> dict[int, float]:
    with path.open(newline="") as file:
        return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file)}


def damage(checkpoint: Path) -> None:
    """Turn bytes in the middle of its largest file."""
    largest = max(
        (path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    content = bytearray(largest.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(byte ^ 0xFF for byte in content[middle : middle + 64])
    largest.write_bytes(content)


@pytest.mark.matrix
def test_another_mesh_goes_on_with_the_same_curve_past_a_damaged_checkpoint(tmp_path: Path) -> None:
    """FSDP 8 to tensor 4 x data 2. The newest checkpoint is damaged, an unfinished one lies beside it."""
    first = train(tmp_path, FSDP, "fsdp.csv", "--steps=9")
    assert first.returncode == 0, first.stderr
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["3", "6", "9", "checksums"]
    damage(tmp_path / "kept" / "9")
    (tmp_path / "kept" / "10.orbax-checkpoint-tmp-1").mkdir()
    other = train(tmp_path, TENSOR, "tensor.csv", "--steps=9")
    assert other.returncode == 0, other.stderr
    assert f"checkpoint {tmp_path}/kept/9: skipped, " in other.stderr
    assert f"goes on after step 6 of {tmp_path}/kept" in other.stderr
    assert "Traceback" not in other.stderr
    expected, found = losses(tmp_path / "fsdp.csv"), losses(tmp_path / "tensor.csv")
    assert set(found) == {7, 8, 9}
    np.testing.assert_allclose(list(found.values()), [expected[step] for step in found], rtol=1e-5)
    refused = train(tmp_path, TENSOR, "x.csv", "--steps=12", "--seed=1")
    assert refused.returncode == 2
    assert "--seed: 1, but checkpoint" in refused.stderr
    assert "--steps: 12, but checkpoint" in refused.stderr


_POOLS = """
import ctypes, sys, threading
from checkpoints import share_memory_pools
if sys.argv[1] == "shared":
    share_memory_pools()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
together = threading.Barrier(6)
def allocate():
    libc.malloc(100_000)
    together.wait()
threads = [threading.Thread(target=allocate) for _ in range(6)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
file = ctypes.c_void_p(libc.fopen(sys.argv[2].encode(), b"w"))
libc.malloc_info(0, file), libc.fclose(file)
"""


@pytest.mark.parametrize("which", ["shared", "not"])
def test_threads_share_two_pools_of_memory(which: str, tmp_path: Path) -> None:
    """glibc's own report, after six threads have allocated; without the call they have a pool each."""
    report = tmp_path / "pools.xml"
    subprocess.run([sys.executable, "-c", _POOLS, which, str(report)], check=True, env=ENVIRONMENT)
    pools = report.read_text().count("<heap nr=")
    assert pools <= 2 if which == "shared" else pools > 2
