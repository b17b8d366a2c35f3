"""What is read of each kind of source: a saved report says what the report itself says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from case_reports import infeasible_report, memory, refused, report
from command_line import HLO

from shardlab.case_document import to_json
from shardlab.case_report import CaseReport
from shardlab.errors import ParseError, UserError
from shardlab.hardware.catalog import load_machine
from shardlab.program import Memory, Program
from shardlab.review.sides import side_of

REPORTS = {
    "analysed": report(notes=("a note",)),
    "too-large": report(memory=memory(90)),
    "infeasible": infeasible_report("6 heads over 4 devices"),
}


@pytest.mark.parametrize("made", REPORTS.values(), ids=REPORTS)
def test_a_saved_report_says_what_the_report_says(made: CaseReport) -> None:
    saved = json.loads(json.dumps(to_json(made)))
    assert side_of(saved, "x") == side_of(made, "x")


def test_a_program_that_the_compiler_refused_has_a_reason_and_no_analysis() -> None:
    made = refused("large", 90, 80, None)
    assert "does not fit" in side_of(made).why_not
    assert side_of(made).analysis is None
    assert "does not fit" in side_of(to_json(made)).why_not


def test_one_report_of_a_comparison_will_do_and_several_will_not() -> None:
    document = {"schema": "shardlab.comparison/1", "reports": [to_json(report())]}
    assert side_of(document, "x") == side_of(report(), "x")
    with pytest.raises(UserError, match="comparison/1"):
        side_of({**document, "reports": [to_json(report())] * 2})


def test_a_machine_prices_a_program_and_judges_its_memory() -> None:
    """One all-reduce of 16 bytes: 16 on the wire, over NVLink. 90 GB are more than an H100's pool of 63.7."""
    held = Memory(argument_bytes=90 * 10**9, output_bytes=0, alias_bytes=0, temp_bytes=0)
    program = Program(name="step", backend="gpu", hlo_text=HLO, num_devices=2, mesh={"d": 2}, memory=held)
    bare, priced = side_of(program), side_of(program, machine=load_machine("h100:1x2"))
    assert (bare.memory_bytes, bare.limit_bytes, bare.fits) == (90 * 10**9, None, None)
    assert (priced.memory_bytes, priced.fits) == (90 * 10**9, "no")
    assert priced.analysis is not None
    assert dict(priced.analysis.totals.traffic) == {"nvlink": (16, 16)}


def test_several_modules_are_one_side_and_have_no_step_time() -> None:
    two = HLO + "\n" + HLO.replace("HloModule m,", "HloModule n,")
    side = side_of(two, axes={"d": 2}, machine=load_machine("h100:1x2"))
    assert (side.name, side.flops, side.step_time_s) == ("<hlo>", 0, None)
    assert side.analysis is not None
    assert side.analysis.totals.wire_bytes == (32, 32)


DOT = """\
HloModule m, is_scheduled=true, num_partitions=2

ENTRY main {
  a = f32[4,8]{1,0} parameter(0)
  b = f32[8,2]{1,0} parameter(1)
  ROOT d = f32[4,2]{1,0} dot(a, b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


def test_the_programs_of_a_saved_step_count_as_often_as_they_run() -> None:
    """16 products of 2 · 4 · 8 · 2 FLOPs and two; the memory of the one that needs most."""
    small, large = (Memory(argument_bytes=size, temp_bytes=0) for size in (10, 30))
    one = Program(name="one", backend="cpu", hlo_text=DOT, num_devices=2, memory=small, runs_per_step=16)
    step = replace(one, then=(replace(one, name="other", memory=large, runs_per_step=2),))
    side = side_of(step)
    assert (side.flops, side.memory_bytes) == (18 * 128, 30)
    unknown = replace(step, then=(replace(one, memory=None),))
    assert side_of(unknown).memory_bytes is None


def test_what_is_neither_is_a_mistake_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text('{"schema": "shardlab.report/1", "memory": 3}')
    with pytest.raises(UserError, match=r"report\.json: not a report"):
        side_of(path)
    path.write_text(json.dumps(to_json(replace(report(), failure="no compiler", analysis=None))))
    with pytest.raises(UserError, match="no compiler"):
        side_of(path)
    path.write_text("[1, 2]")
    with pytest.raises(ParseError):
        side_of(path)
