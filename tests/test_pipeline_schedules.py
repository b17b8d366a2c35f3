"""Conditionals that a table of tick and stage decides: compiled for three targets, against the table itself.

The expected counts are read off `pipeline_programs.TABLE` in plain Python; bytes are those of an all-reduce
over two devices, which sends what it sums once (2 (n-1)/n = 1).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from pipeline_programs import ARRAY_BYTES, DATA, IDLE, MESH, PLAIN, REDUCING, STAGES, TABLE, TICKS, runs

from shardlab.analysis import Analysis, analysis_from_json, analyze
from shardlab.analysis.records import CollectiveRow
from shardlab.attribute.calls import call_graph
from shardlab.compile.environment import child_environment
from shardlab.hardware.catalog import load_machine
from shardlab.hlo.inputs import read_sources

SCRIPT = Path(__file__).parent / "pipeline_programs.py"
DEVICES = range(STAGES * DATA)
REDUCED = [runs(REDUCING, stage) for stage in range(STAGES)]
HALVED = [runs(PLAIN, 0), 0, 0, 0]  # only stage 0 sums in the plain branch


@pytest.fixture(
    scope="module",
    params=[
        "cpu:8",
        pytest.param("h100:1x8", marks=pytest.mark.gpu),
        pytest.param("v5p:2x2x2", marks=pytest.mark.tpu),
    ],
)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with NAME.hlo and NAME.pb of every program, compiled in a process of its own."""
    folder = tmp_path_factory.mktemp("pipelines")
    environment = child_environment(load_machine(request.param), (), os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, str(SCRIPT), request.param, str(folder)]
    subprocess.run(command, env=environment, check=True, timeout=600, capture_output=True)
    return folder


def analysis(folder: Path, name: str) -> Analysis:
    """Of the text; that of the proto must say the same."""
    printed = analyze((folder / f"{name}.hlo").read_text(), axes=MESH)
    serialised = analyze((folder / f"{name}.pb").read_bytes(), axes=MESH)
    assert printed.totals == serialised.totals
    assert analysis_from_json(printed.to_json()).collectives == printed.collectives
    in_text, in_proto = ({row.name: row for row in found.collectives} for found in (printed, serialised))
    assert {n: row.by_device for n, row in in_text.items()} == {n: r.by_device for n, r in in_proto.items()}
    return printed


def by_stage(row: CollectiveRow) -> list[tuple[int, int | None]]:
    """Executions of each stage; all devices of a stage must agree."""
    found = [row.executions] * len(DEVICES)
    for part in row.by_device or ():
        for piece in part.devices.split(","):
            first, _, last = piece.partition("-")
            for device in range(int(first), int(last or first) + 1):
                found[device] = part.executions
    assert all(found[i] == found[i - i % DATA] for i in DEVICES)
    return found[::DATA]


def counted(found: Analysis) -> dict[int, list[tuple[int, int | None]]]:
    """Executions by stage of each sum over data, by the bytes that it sums."""
    return {row.payload_bytes: by_stage(row) for row in found.collectives if row.axes == ("data",)}


def exactly(counts: list[int], times: int = 1) -> list[tuple[int, int]]:
    return [(times * count, times * count) for count in counts]


@pytest.mark.parametrize(("name", "times"), [("scanned", 1), ("flat", 1), ("twice", 3)])
def test_each_stage_runs_what_the_table_says(compiled: Path, name: str, times: int) -> None:
    found = analysis(compiled, name)
    assert counted(found) == {
        ARRAY_BYTES: exactly(REDUCED, times),
        ARRAY_BYTES // 2: exactly(HALVED, times),
    }
    (hop,) = [row for row in found.collectives if row.axes == ("stage",)]
    assert hop.executions == (TICKS * times, TICKS * times)
    assert not hop.by_device
    # A device's total is its stage's: reducing ticks in full, plain ticks of stage 0 by half.
    sums = [
        times * (whole * ARRAY_BYTES + half * ARRAY_BYTES // 2)
        for whole, half in zip(REDUCED, HALVED, strict=True)
    ]
    assert found.totals.by_axes["data"]["wire_bytes"] == (min(sums), max(sums))
    hops = TICKS * times * ARRAY_BYTES
    assert found.totals.wire_bytes == (Fraction(hops + min(sums)), Fraction(hops + max(sums)))
    assert found.ledger == ()


def test_the_bubble_is_the_idle_ticks_of_the_table(compiled: Path) -> None:
    (source,) = read_sources(compiled / "scanned.hlo")
    schedule = call_graph(source.modules[0]).schedule
    (switch,) = [key for key, branches in schedule.branches.items() if len(branches) == 3]
    for device in DEVICES:
        spent = [runs(branch, device // DATA) for branch in (IDLE, PLAIN, REDUCING)]
        assert list(schedule.on_device(switch, device)) == exactly(spent)
    idle = sum(schedule.on_device(switch, device)[IDLE][0] for device in DEVICES)
    assert idle == DATA * sum(row.count(IDLE) for row in TABLE)


def test_outside_loops_the_stage_alone_decides(compiled: Path) -> None:
    found = analysis(compiled, "once")
    assert counted(found)[ARRAY_BYTES] == exactly([1, 1, 0, 0])
    assert found.totals.by_axes["data"]["wire_bytes"] == (0, ARRAY_BYTES)
    assert found.ledger == ()


def test_a_table_that_was_left_out_is_on_the_ledger(compiled: Path) -> None:
    """XLA's own text has `{...}` for it."""
    text = (compiled / "scanned.hlo").read_text()
    elided = re.sub(rf"(s32\[{TICKS},{STAGES}\]\S* constant)\([^)]*\)", r"\1({...})", text)
    assert elided != text
    found = analyze(elided, axes=MESH)
    assert counted(found)[ARRAY_BYTES] == [(0, TICKS)] * STAGES
    (entry,) = found.ledger
    assert entry.what == "conditional"
    assert "which branch runs is unknown" in entry.why
    assert "left out of the text" in entry.why


def test_what_data_decide_stays_a_range(compiled: Path) -> None:
    found = analysis(compiled, "by_data")
    # Of what may run, stage 0 alone can run the half sum.
    assert counted(found) == {
        ARRAY_BYTES: [(0, TICKS)] * STAGES,
        ARRAY_BYTES // 2: [(0, TICKS), (0, 0), (0, 0), (0, 0)],
    }
