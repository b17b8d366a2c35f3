"""`--straggler`: the step with one slow device, of one kind of device and of two that work in turns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from case_reports import case
from command_line import PLAN, mistakes, run, written

from shardlab.analysis import attribute
from shardlab.case_report import CaseReport, report_case
from shardlab.cost.instructions import step_cost
from shardlab.hardware.catalog import load_machine
from shardlab.lab.study import stragglers_of
from shardlab.program import Program
from shardlab.report.straggler import MAX_ROWS, stragglers_table
from shardlab.straggler import Straggler, Stragglers, stragglers

MACHINE = load_machine("h100:1x8")
SIDE = 16_384  # a product of milliseconds, beside which the table's small kernels are nothing
PRODUCT = f"bf16[{SIDE},{SIDE}]{{1,0}} dot(x, x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}"
EVEN = f"""\
HloModule step, is_scheduled=true, num_partitions=8

ENTRY main {{
  x = bf16[{SIDE},{SIDE}]{{1,0}} parameter(0)
  ROOT y = {PRODUCT}
}}
"""
X = f"bf16[{SIDE},{SIDE}]{{1,0}}"
STATE = f"(s32[], s32[], {X})"
# Four ticks of two sides that exchange after each: a side runs no product (0) or one (1).
TABLE = ((1, 0), (0, 1), (1, 1), (0, 1))
STAGED = f"""\
HloModule m, is_scheduled=true, num_partitions=8

idle {{ ROOT x = {X} parameter(0) }}

works {{
  x = {X} parameter(0)
  ROOT y = {PRODUCT}
}}

body {{
  s = {STATE} parameter(0)
  i = s32[] get-tuple-element(s), index=0
  side = s32[] get-tuple-element(s), index=1
  x = {X} get-tuple-element(s), index=2
  one = s32[] constant(1)
  table = s32[4,2]{{1,0}} constant({{ {", ".join(f"{{ {one}, {other} }}" for one, other in TABLE)} }})
  cell = s32[1,1]{{1,0}} dynamic-slice(table, i, side), dynamic_slice_sizes={{1,1}}
  index = s32[] reshape(cell)
  y = {X} conditional(index, x, x), branch_computations={{idle, works}}
  exchange = {X} collective-permute(y), channel_id=1, source_target_pairs={{{{0,4}},{{4,0}}}}
  next = s32[] add(i, one)
  ROOT t = {STATE} tuple(next, side, exchange)
}}

cond {{
  s.1 = {STATE} parameter(0)
  i.1 = s32[] get-tuple-element(s.1), index=0
  n = s32[] constant(4)
  ROOT go = pred[] compare(i.1, n), direction=LT
}}

ENTRY main {{
  x.1 = {X} parameter(0)
  i0 = s32[] constant(0)
  pid = u32[] partition-id()
  four = u32[] constant(4)
  half = u32[] divide(pid, four)
  side.1 = s32[] convert(half)
  t.1 = {STATE} tuple(i0, side.1, x.1)
  w = {STATE} while(t.1), condition=cond, body=body
  ROOT out = {X} get-tuple-element(w), index=2
}}
"""


def found(text: str, slowdown: float) -> Stragglers:
    program = Program(name="m", backend="gpu", hlo_text=text, num_devices=8, mesh={"stage": 8})
    parts = tuple(attribute(program, machine=MACHINE))
    slow = stragglers(parts, [step_cost(part.module, "gpu") for part in parts], MACHINE, slowdown)
    assert slow is not None
    return slow


def test_all_wait_for_the_slow_one() -> None:
    slow = found(EVEN, 1.5)
    assert [one.devices for one in slow.slow] == [""]
    assert slow.slow[0].step_time_s == pytest.approx(1.5 * slow.step_time_s)


def test_each_stage_in_turn() -> None:
    """Slow by 3: side 0 holds up ticks 0 and 2, side 1 ticks 1, 2 and 3; each of them by two products."""
    even, slow = found(STAGED, 1.0), found(STAGED, 3.0)
    assert [one.devices for one in slow.slow] == ["0-3", "4-7"]
    product_s = found(EVEN, 1.0).step_time_s
    for one, ticks in zip(slow.slow, (2, 3), strict=True):
        assert one.step_time_s - slow.step_time_s == pytest.approx(2 * ticks * product_s, rel=1e-3)
    assert [one.step_time_s for one in even.slow] == [slow.step_time_s, slow.step_time_s]


def test_without_a_step_time_there_is_no_answer() -> None:
    opaque = EVEN.replace(PRODUCT, f'{X} custom-call(x), custom_call_target="somebody_s"')
    program = Program(name="m", backend="gpu", hlo_text=opaque, num_devices=8, mesh={"stage": 8})
    (part,) = attribute(program, machine=MACHINE)
    assert stragglers([part], [step_cost(part.module, "gpu")], MACHINE, 2.0) is None


@pytest.fixture
def plan(tmp_path: Path) -> str:
    return written(tmp_path / "plan.toml", PLAN)


def made() -> CaseReport:
    program = Program(name="m", backend="gpu", hlo_text=STAGED, num_devices=8, mesh={"stage": 8})
    return report_case(case(machine="h100:1x8"), program, MACHINE)


def test_explain_prints_the_table_and_the_member(
    plan: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardlab.lab.study.explain_plan", lambda *args, **named: made())
    assert run("explain", plan, "--model", "tiny", "--straggler", "3", "--markdown") == 0
    page = capsys.readouterr().out
    assert "its compute takes 3 times as long" in page and "one of 0-3" in page
    assert run("explain", plan, "--model", "tiny", "--straggler", "3", "--json") == 0
    member = json.loads(capsys.readouterr().out)["straggler"]
    slow = stragglers_of(made(), 3.0)
    assert slow is not None and member == slow.to_json()


def test_many_stages_are_shown_worst_first() -> None:
    many = tuple(Straggler(devices=str(at), step_time_s=1.0 + at) for at in range(12))
    table = stragglers_table(Stragglers(slowdown=2.0, step_time_s=1.0, slow=many))
    assert len(table.rows) == MAX_ROWS and "4 more that cost less" in table.caption
    assert table.rows[0][0][0].text == "one of 11"


@pytest.mark.parametrize("text", ["0.5", "x", "-2", "1e9", ""])
def test_a_factor_below_one_is_a_mistake(text: str, plan: str, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = mistakes(capsys, "explain", plan, "--model", "tiny", f"--straggler={text}")
    assert "is not a factor of at least 1 such as 1.2" in line


def test_a_plan_without_a_step_time_says_so(
    plan: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = replace(made(), program=None)
    monkeypatch.setattr("shardlab.lab.study.explain_plan", lambda *args, **named: nothing)
    assert run("explain", plan, "--model", "tiny", "--straggler", "2") == 0
    assert "--straggler: not predicted" in capsys.readouterr().err
