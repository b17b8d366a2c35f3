"""shard_map programs against their closed forms, to the byte: the second counter and the analysis.

The programs (second_counter/shard_map_programs.py) are compiled here and now, for eight emulated CPU devices
and for eight GPUs. XLA:TPU pads reduce-scatters and repairs them with permutes: no closed form here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from compiled_plans import QUICK
from second_counter import count
from second_counter.counter import Range
from second_counter.shard_map_programs import NUM_DEVICES, Program, programs, wire_bytes

from shardlab.analysis import analyze
from shardlab.compile.environment import child_environment
from shardlab.hardware.catalog import load_machine

SCRIPT = Path(__file__).parent / "second_counter" / "shard_map_programs.py"
NOTHING = (0, 0)
every_program = pytest.mark.parametrize("program", programs(), ids=lambda program: program.name)


@pytest.fixture(
    scope="module",
    params=["cpu:8", pytest.param("h100:1x8", marks=[pytest.mark.gpu, pytest.mark.full])],
)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with NAME.hlo and NAME.pb of every program, compiled in a process of its own."""
    folder = tmp_path_factory.mktemp("shard_map")
    machine = load_machine(request.param)
    environment = child_environment(machine, QUICK[machine.family], os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, str(SCRIPT), request.param, str(folder)]
    subprocess.run(command, env=environment, check=True, timeout=600, capture_output=True)
    return folder


def expected(program: Program, breakdown: str) -> dict[str, Range]:
    """The closed form's figures of one breakdown: axes, kind, or total."""
    return {
        key: value
        for (name, key), value in wire_bytes(program.nodes, program.mesh).items()
        if name == breakdown
    }


def moving(figures: Mapping[str, Mapping[str, Range]]) -> dict[str, Range]:
    """The wire bytes of an Analysis breakdown, without what moves nothing."""
    return {key: value["wire_bytes"] for key, value in figures.items() if value["wire_bytes"] != NOTHING}


@every_program
def test_second_counter_equals_closed_form(program: Program, compiled: Path) -> None:
    result = count((compiled / f"{program.name}.pb").read_bytes(), NUM_DEVICES, program.mesh)
    assert result.by_axes == expected(program, "axes")
    assert result.by_kind == expected(program, "kind")
    assert result.total == expected(program, "total")[""]


@every_program
def test_analysis_equals_closed_form(program: Program, compiled: Path) -> None:
    totals = analyze((compiled / f"{program.name}.hlo").read_text(), axes=program.mesh).totals
    assert moving(totals.by_axes) == expected(program, "axes")
    assert moving(totals.by_kind) == expected(program, "kind")
    assert totals.wire_bytes == expected(program, "total")[""]
