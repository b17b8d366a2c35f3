"""`shardlab check` in processes of its own: what is compiled, when, and by how many at once. Counted, not
timed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import PLAN

import shardlab

PACKAGE = Path(shardlab.__file__).parent


def plans(folder: Path, count: int) -> list[str]:
    """Plans that differ in their sequence: as many programs, quick to compile."""
    for number in range(count):
        check = f'[check]\nmodel = "tiny"\nbatch = 2\nseq = {8 * (number + 1)}\nworkload = "prefill"\n'
        (folder / f"plan{number:02d}.toml").write_text(PLAN + check)
    return sorted(str(path) for path in folder.glob("*.toml"))


def check(*argv: str, cache: Path, tree: Path = PACKAGE.parent) -> tuple[dict[str, Any], str]:
    """The document and what was said; tree: where the package is."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "shardlab", "check", *argv, "--cache", str(cache), "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tree)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def counts(document: dict[str, Any]) -> tuple[int, int, int]:
    found = document["programs"]
    return found["compiled"], found["lowered"], found["unchanged"]


def changed_copy(tree: Path) -> Path:
    """The package with every line of one of its sources moved: another source, the same program."""
    shutil.copytree(PACKAGE, tree / "shardlab", ignore=shutil.ignore_patterns("__pycache__"))
    source = tree / "shardlab" / "model" / "layers.py"
    source.write_text(source.read_text().replace('"""', '"""Moved.\n\n\n', 1))
    return tree


def test_cold_compiles_two_at_a_time_warm_compiles_nothing_and_a_refactoring_only_lowers(
    tmp_path: Path,
) -> None:
    paths, cache = plans(tmp_path, 2), tmp_path / "cache"
    cold, said = check(*paths, "--update", "--jobs", "2", cache=cache)
    assert counts(cold) == (2, 0, 0)
    assert cold["programs"]["most_at_once"] == 2
    assert said.count("compiled in") == 2
    warm, said = check(*paths, cache=cache)
    assert counts(warm) == (0, 0, 2)
    assert warm["programs"]["most_at_once"] == 0
    assert said.count("not compiled again") == 2
    again, _ = check(*paths[:1], cache=cache, tree=changed_copy(tmp_path / "tree"))
    assert counts(again) == (0, 1, 0)
    assert {line["outcome"] for line in again["plans"][0]["figures"].values()} == {"same"}


@pytest.mark.full
def test_twenty_plans(tmp_path: Path) -> None:
    paths, cache = plans(tmp_path, 20), tmp_path / "cache"
    cold, _ = check(*paths, "--update", cache=cache)
    assert counts(cold) == (20, 0, 0)
    assert cold["programs"]["most_at_once"] >= 2
    warm, _ = check(*paths, cache=cache)
    assert counts(warm) == (0, 0, 20)
