"""Stages side by side: closed forms of pipelines, and a table in HLO walked tick by tick."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from case_reports import case
from hypothesis import given
from hypothesis import strategies as st

from shardlab.attribute.calls import call_graph
from shardlab.case_document import to_json
from shardlab.case_report import report_case
from shardlab.cost.blocks import Block, Event, PathEntry
from shardlab.cost.stages import WAIT, staged
from shardlab.cost.timeline import Timeline, simulate
from shardlab.cost.walk import Kernel, Transfer
from shardlab.hardware.catalog import load_machine
from shardlab.hlo.reader import parse
from shardlab.program import Program

Joins = frozenset[tuple[int, int]]


def block(duration_s: float, joins: Joins = frozenset()) -> Block:
    """A branch that computes for so long and then exchanges."""
    event = Event(name="k", kind="fusion", stream="compute", duration_s=duration_s)
    path = PathEntry(name="k", kind="fusion", stream="compute", layer="", axes=None, time_s=duration_s)
    return Block(
        events=(event,) if duration_s else (),
        duration_s=duration_s,
        compute_s=duration_s,
        communication_s=0.0,
        exposed_s=0.0,
        path=(path,) if duration_s else (),
        joins=joins,
    )


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 3), (4, 8), (8, 8)])
def test_a_pipeline_of_equal_stages_takes_m_plus_p_minus_1(stages: int, microbatches: int) -> None:
    """Stage s has microbatch m at tick s + m: (m + p - 1) ticks, and a bubble of (p - 1) of them."""
    ticks = stages + microbatches - 1
    chain = frozenset((stage, stage + 1) for stage in range(stages - 1))
    loops = staged(
        "loop",
        ticks,
        range(stages),
        lambda stage, tick: block(3.0 if stage <= tick < stage + microbatches else 0.0, chain),
    )
    last = loops[stages - 1]
    assert last.duration_s == 3 * ticks
    assert (last.compute_s, last.waited_s) == (3 * microbatches, 3 * (stages - 1))
    for loop in loops.values():
        assert sum(entry.time_s for entry in loop.path) == pytest.approx(loop.duration_s)
        assert loop.compute_s + loop.waited_s == pytest.approx(loop.duration_s)
    assert [entry.time_s for entry in last.path if entry.kind == WAIT] == [3 * (stages - 1)]


TIMES = st.integers(1, 5).flatmap(
    lambda kinds: st.lists(
        st.lists(st.integers(0, 9), min_size=kinds, max_size=kinds), min_size=1, max_size=8
    )
)


@given(TIMES)
def test_who_exchanges_with_nobody_waits_for_nobody(times: list[list[int]]) -> None:
    kinds = range(len(times[0]))
    loops = staged("loop", len(times), kinds, lambda kind, tick: block(times[tick][kind]))
    assert [loops[kind].duration_s for kind in kinds] == [sum(row[kind] for row in times) for kind in kinds]
    assert all(loop.waited_s == 0 for loop in loops.values())


@given(TIMES)
def test_where_all_exchange_each_tick_takes_the_longest(times: list[list[int]]) -> None:
    kinds = range(len(times[0]))
    every = frozenset((one, other) for one in kinds for other in kinds if one < other)
    loops = staged("loop", len(times), kinds, lambda kind, tick: block(times[tick][kind], every))
    assert {loop.duration_s for loop in loops.values()} == {sum(map(max, times))}


TABLE = ((0, 1), (1, 2), (2, 0), (1, 1), (1, 0))  # tick x side: the branch, where side = partition-id / 4
SECONDS = (3.0, 4.0, 5.0)  # of the branches
STATE = "(s32[], s32[], f32[])"
LITERAL = "{ " + ", ".join("{ " + ", ".join(map(str, row)) + " }" for row in TABLE) + " }"
BRANCHES = "".join(
    f"b{n} {{ x{n} = f32[] parameter(0)\n  ROOT k{n} = f32[] negate(x{n}) }}\n\n" for n in range(3)
)
HLO = f"""\
HloModule m, is_scheduled=true, num_partitions=8

{BRANCHES}body {{
  s = {STATE} parameter(0)
  i = s32[] get-tuple-element(s), index=0
  side = s32[] get-tuple-element(s), index=1
  x = f32[] get-tuple-element(s), index=2
  one = s32[] constant(1)
  table = s32[5,2]{{1,0}} constant({LITERAL})
  cell = s32[1,1]{{1,0}} dynamic-slice(table, i, side), dynamic_slice_sizes={{1,1}}
  index = s32[] reshape(cell)
  y = f32[] conditional(index, x, x, x), branch_computations={{b0, b1, b2}}
  exchange = f32[] collective-permute(y), channel_id=1, source_target_pairs={{{{0,4}},{{4,0}}}}
  next = s32[] add(i, one)
  ROOT t = {STATE} tuple(next, side, exchange)
}}

cond {{
  s.1 = {STATE} parameter(0)
  i.1 = s32[] get-tuple-element(s.1), index=0
  n = s32[] constant(5)
  ROOT go = pred[] compare(i.1, n), direction=LT
}}

ENTRY main {{
  x.1 = f32[] parameter(0)
  i0 = s32[] constant(0)
  pid = u32[] partition-id()
  four = u32[] constant(4)
  half = u32[] divide(pid, four)
  side.1 = s32[] convert(half)
  t.1 = {STATE} tuple(i0, side.1, x.1)
  ROOT w = {STATE} while(t.1), condition=cond, body=body
}}
"""


def walked(joins: Joins, slowdown: float = 1.0, slow_kind: int = 0) -> Timeline:
    (module,) = parse(HLO)
    kernels = {
        (f"b{n}", f"k{n}"): Kernel(name=f"k{n}", kind="fusion", layer="", phase="other", time_s=seconds)
        for n, seconds in enumerate(SECONDS)
    }
    exchange = Transfer(
        name="exchange",
        kind="collective-permute",
        axes=("stage",),
        layer="",
        phase="other",
        stream="p2p",
        time_s=1.0,
        tier_s={"nvlink": 1.0},
        asynchronous=False,
        joins=joins,
    )
    graph = call_graph(module)
    assert set(graph.schedule.kinds) == {0, 1}
    moving = {("body", "exchange"): (exchange,)}
    return simulate(module, graph, kernels, moving, slowdown=slowdown, slow_kind=slow_kind)


def seconds_of(side: int, slowdown: float = 1.0) -> Sequence[float]:
    return [SECONDS[row[side]] * slowdown for row in TABLE]


def test_a_table_is_walked_tick_by_tick_on_both_sides() -> None:
    """Each tick the longer branch of the two sides, and an exchange of 1: 5 + 6 + 6 + 5 + 5."""
    line = walked(frozenset({(0, 1)}))
    assert line.step_time_s == sum(map(max, seconds_of(0), seconds_of(1))) + 5 == 27
    assert (line.compute_s, line.exposed_communication_s) == (sum(seconds_of(0)), 5)
    assert [(one.compute_s, one.waited_s) for one in line.stages] == [
        (sum(seconds_of(side)), 22 - sum(seconds_of(side))) for side in (0, 1)
    ]
    assert sum(entry.time_s for entry in line.critical_path) == pytest.approx(27)


def test_a_report_says_what_each_stage_does() -> None:
    """With its devices; an exchange takes what its row says."""
    program = Program(name="m", backend="gpu", hlo_text=HLO, num_devices=8, mesh={"stage": 8})
    made = report_case(case(), program, load_machine("h100:1x8"))
    assert made.predicted is not None and made.predicted.timeline.step_time_s
    document = to_json(made)["prediction"]
    assert isinstance(document, dict)
    stages = document["stages"]
    assert [stage["devices"] for stage in stages] == ["0-3", "4-7"]
    (row,) = made.analysis.collectives if made.analysis is not None else ()
    assert row.time_s is not None
    for stage in stages:
        assert stage["exposed_communication_s"] == pytest.approx(5 * row.time_s)
        assert stage["compute_s"] + stage["waited_s"] + 5 * row.time_s == pytest.approx(stage["step_time_s"])


def test_sides_that_do_not_exchange_go_their_own_way() -> None:
    line = walked(frozenset())
    assert [one.step_time_s for one in line.stages] == [sum(seconds_of(side)) + 5 for side in (0, 1)]


def test_a_straggler_on_one_stage_holds_up_the_other() -> None:
    line = walked(frozenset({(0, 1)}), slowdown=2.0, slow_kind=1)
    assert line.step_time_s == sum(map(max, seconds_of(0), seconds_of(1, 2.0))) + 5
    assert [one.compute_s for one in line.stages] == [sum(seconds_of(0)), sum(seconds_of(1, 2.0))]
