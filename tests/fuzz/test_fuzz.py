"""Hostile input: a minute of random damage to the samples gives analyses and errors that point."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = 60
FEWEST = 2_000
"""Fewer inputs than this in a minute means that the fuzzer, or the reader, got a hundred times slower."""


@pytest.mark.matrix
def test_a_minute_of_damaged_samples(capsys) -> None:  # type: ignore[no-untyped-def]
    here = Path(__file__).parent
    command = [sys.executable, str(here / "run.py"), "--seconds", str(SECONDS), "--jobs", "1", "--seed", "0"]
    found = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(here.parents[1])},
        capture_output=True,
        text=True,
        check=False,
        timeout=5 * SECONDS,
    )
    summary = found.stdout.strip().rpartition("\n")[2]
    with capsys.disabled():
        print(f"\n{summary}")
    assert found.returncode == 0, found.stdout + found.stderr
    assert int(summary.split(" inputs")[0]) > FEWEST
    assert " analysis" in summary
    assert " ParseError" in summary
