"""Stages side by side: closed forms of pipelines, and a table in HLO walked tick by tick."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from case_reports import case
from hypothesis import given
from hypothesis import strategies as st

from shardlab.analysis import attribute
from shardlab.attribute.calls import call_graph
from shardlab.case_document import to_json
from shardlab.case_report import report_case
from shardlab.cost.blocks import Block, Event, PathEntry
from shardlab.cost.stages import WAIT, FreeStages, free_stages, staged
from shardlab.cost.timeline import Timeline, simulate
from shardlab.cost.walk import Kernel, Transfer
from shardlab.hardware.catalog import load_machine
from shardlab.hlo.reader import parse
from shardlab.prediction import crowds_of, free_stages_of
from shardlab.program import Program
from shardlab.report.step import step_facts
from shardlab.spec.plan import Method, Plan
from shardlab.spec.schedule import make_schedule

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


@pytest.mark.parametrize(
    ("lead_s", "ends"),
    [
        pytest.param(0.0, [24.0, 24.0], id="each waits for the other"),
        pytest.param(1.0, [23.0, 22.0], id="the first is done before"),
        pytest.param(9.0, [22.0, 20.0], id="no sooner than alone"),
    ],
)
def test_who_comes_first_to_a_turn_is_done_first(lead_s: float, ends: list[float]) -> None:
    """Ticks of 10 and 12, then of 12 and 8. Side 0 ends the first at 12 less its lead, but not before its own
    10, and is the last of the second, where side 1 (12 + 8) is first."""
    times, met = ((10.0, 12.0), (12.0, 8.0)), frozenset({(0, 1)})
    loops = staged(
        "loop", 2, range(2), lambda side, tick: replace(block(times[tick][side], met), lead_s=lead_s)
    )
    assert [loops[side].duration_s for side in range(2)] == ends
    for loop in loops.values():
        assert sum(entry.time_s for entry in loop.path) == pytest.approx(loop.duration_s)


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


@st.composite
def ticks_of_stages(draw: st.DrawFn) -> tuple[list[list[int]], list[Block]]:
    """Which of a few blocks each kind runs at each tick; blocks of one tick may join different kinds."""
    kinds = draw(st.integers(1, 5))
    pairs = st.tuples(st.integers(0, kinds), st.integers(0, kinds)).filter(lambda pair: pair[0] < pair[1])
    made = st.builds(block, st.integers(0, 9).map(float), st.frozensets(pairs, max_size=3))
    blocks = draw(st.lists(made, min_size=1, max_size=4))
    one = st.integers(0, len(blocks) - 1)
    rows = st.lists(st.lists(one, min_size=kinds, max_size=kinds), min_size=1, max_size=12)
    return draw(rows), blocks


@given(ticks_of_stages())
def test_ticks_that_share_a_block_are_those_that_have_one_each(
    asked: tuple[list[list[int]], list[Block]],
) -> None:
    """Walked one by one, each with a block of its own, and summed event by event."""
    table, blocks = asked
    kinds = range(len(table[0]))
    loops = staged("loop", len(table), kinds, lambda kind, tick: blocks[table[tick][kind]])
    ends, starts = dict.fromkeys(kinds, 0.0), {kind: dict[int, float]() for kind in kinds}
    for tick, row in enumerate(table):
        done = {kind: ends[kind] + blocks[row[kind]].duration_s for kind in kinds}
        pairs = {pair for at in row for pair in blocks[at].joins}
        for kind in kinds:
            starts[kind][tick] = ends[kind]
        ends = {
            kind: max(
                done[other] for other in kinds if other == kind or {(kind, other), (other, kind)} & pairs
            )
            for kind in kinds
        }
    for kind in kinds:
        loop, own = loops[kind], [blocks[row[kind]] for row in table]
        assert loop.duration_s == ends[kind]
        assert loop.compute_s == pytest.approx(sum(each.compute_s for each in own))
        assert loop.joins == {pair for each in own if each.duration_s for pair in each.joins}
        assert sum(entry.time_s for entry in loop.path) == pytest.approx(loop.duration_s)
        assert [(event.name, event.start_s, event.body) for event in loop.events] == [
            (f"loop tick {tick}", starts[kind][tick], each)
            for tick, each in enumerate(own)
            if each.duration_s
        ]


F, B = 2.0, 5.0  # seconds of a chunk's forward and backward


def free_makespan(name: str, stages: int, microbatches: int, virtual: int = 1) -> float:
    """The last end of stages that are programs of their own."""
    schedule = make_schedule(name, stages, microbatches, virtual)
    seconds = {"F": block(F), "B": block(B)}

    def run(kind: int, tick: int) -> Block:
        work = schedule.rows[tick][kind]
        assert work is not None
        return seconds[work.kind]

    found = free_stages("loop", FreeStages(schedule, tuple(range(stages))), run)
    for loop in found.values():
        assert loop.compute_s == microbatches * virtual * (F + B)
        assert loop.compute_s + loop.waited_s == pytest.approx(loop.duration_s)
    return max(loop.duration_s for loop in found.values())


@pytest.mark.parametrize(
    ("name", "stages", "microbatches", "virtual"),
    [
        ("gpipe", 4, 8, 1),
        ("1f1b", 2, 4, 1),
        ("1f1b", 8, 64, 1),
        ("interleaved", 4, 8, 2),
        ("interleaved", 8, 64, 3),
    ],
)
def test_free_stages_take_what_the_papers_have(
    name: str, stages: int, microbatches: int, virtual: int
) -> None:
    """m (t_f + t_b) of work and (p - 1) (t_f + t_b) of bubble, by v for v chunks a stage (arXiv:2104.04473,
    section 2.2); here times of a chunk."""
    work, bubble = microbatches * virtual, stages - 1
    assert free_makespan(name, stages, microbatches, virtual) == (work + bubble) * (F + B)


@given(st.data())
def test_free_stages_never_take_longer_than_one_program(data: st.DataObject) -> None:
    """Whatever items take; where stages meet only to pass what is needed, both start alike."""
    stages = data.draw(st.integers(2, 4))
    virtual = data.draw(st.integers(1, 3))
    name = "interleaved" if virtual > 1 else data.draw(st.sampled_from(["gpipe", "1f1b"]))
    schedule = make_schedule(name, stages, 2 * stages, virtual)
    ring = frozenset((one, other) for one in range(stages) for other in range(stages) if one < other)
    links = st.lists(st.integers(1, 9), min_size=schedule.links, max_size=schedule.links)
    seconds = {"F": data.draw(links), "B": data.draw(links)}

    def run(kind: int, tick: int) -> Block:
        work = schedule.rows[tick][kind]
        return block(float(seconds[work.kind][work.chunk * stages + kind]) if work else 0.0, ring)

    kinds = tuple(range(stages))
    apart = free_stages("loop", FreeStages(schedule, kinds), run)
    together = staged("loop", len(schedule.rows), kinds, run)
    for kind in kinds:
        assert apart[kind].duration_s <= together[kind].duration_s


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


def walked(
    joins: Joins, slowdown: float = 1.0, slow_kind: int = 0, crowds: Mapping[int, Sequence[int]] | None = None
) -> Timeline:
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
    return simulate(module, graph, kernels, moving, slowdown=slowdown, slow_kind=slow_kind, crowds=crowds)


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


@pytest.mark.parametrize("crowd", [(0, 1), (1, 0, 0, 1)])
def test_stages_on_one_core_have_it_to_themselves_while_the_others_wait(crowd: Sequence[int]) -> None:
    """A core that two share gives each the half of it; when the shorter has ended, all of it to the longer,
    which then takes the mean of both."""
    line = walked(frozenset({(0, 1)}), crowds={0: crowd, 1: crowd})
    pairs = list(zip(seconds_of(0), seconds_of(1), strict=True))
    assert line.step_time_s == sum((a + b) / 2 for a, b in pairs) + 5 == 24.5
    assert [one.compute_s for one in line.stages] == [
        sum(min(pair[side], sum(pair) / 2) for pair in pairs) for side in (0, 1)
    ]
    assert walked(frozenset({(0, 1)}), crowds={0: (0,), 1: (1,)}) == walked(frozenset({(0, 1)}))


@pytest.mark.parametrize(
    ("size", "crowds"),
    [
        pytest.param("8x1", {0: [0, 0, 1, 1], 1: [0, 0, 1, 1]}, id="sites 0, 2, 4, 6 on a core"),
        pytest.param("2x4", {0: [0] * 4, 1: [1] * 4}, id="a core for each stage"),
        pytest.param("4x2", {0: [0, 0, 1, 1], 1: [0, 0, 1, 1]}, id="sites 0 and 2 on a core"),
    ],
)
def test_sites_of_the_lab_take_cores_in_turn(size: str, crowds: Mapping[int, Sequence[int]]) -> None:
    """Two cores; devices 0 to 3 are of one stage."""
    lab = load_machine(f"{Path(__file__).parents[2]}/experiments/lab.toml:{size}")
    (part,) = attribute(Program(name="m", backend="cpu", hlo_text=HLO, num_devices=8, mesh={"stage": 8}))
    assert crowds_of(part, lab) == crowds
    assert crowds_of(part, load_machine("h100:1x8")) == {}


def test_stages_are_found_along_their_axis() -> None:
    """Four devices a stage, of which the program says which kind each is; other schedules have no tables."""
    (part,) = attribute(
        Program(name="m", backend="gpu", hlo_text=HLO, num_devices=8, mesh={"stage": 2, "x": 4})
    )
    schedule = make_schedule("gpipe", 2, 3)
    found = free_stages_of(part, schedule, "stage")
    assert found is not None
    assert found.kinds == (part.graph.schedule.kinds[0], part.graph.schedule.kinds[4])
    assert free_stages_of(part, schedule, "x") is None
    assert free_stages_of(part, make_schedule("gpipe", 4, 3), "x") is None


def test_a_report_says_what_stages_apart_would_take() -> None:
    """1F1B of equal items: m + p - 1 of each kind one after another (arXiv:2104.04473, section 2.2.1). In one
    program the last stage's forward and the first's backward wait for an exchange that they do not need."""
    schedule = make_schedule("1f1b", 2, 2)
    rows = [[{"F": 1, "B": 2}[work.kind] if work else 0 for work in row] for row in schedule.rows]
    literal = "{ " + ", ".join("{ " + ", ".join(map(str, row)) + " }" for row in rows) + " }"
    text = HLO.replace(LITERAL, literal).replace("s32[5,2]", "s32[6,2]").replace("constant(5)", "constant(6)")
    program = Program(name="m", backend="gpu", hlo_text=text, num_devices=8, mesh={"stage": 2, "x": 4})
    piped = Plan(
        name="piped",
        axes={"stage": 2, "x": 4},
        params={"stage": ("stage",)},
        optimizer={},
        activations={},
        method=Method(pipeline="1f1b", microbatches=2),
    )
    made = report_case(case().model_copy(update={"plan": piped}), program, load_machine("h100:1x8"))
    assert made.predicted is not None and made.predicted.timeline.step_time_s
    (loop,) = (event.body for event in made.predicted.timeline.root.events if event.body is not None)
    item_s = max(tick.duration_s for tick in loop.events)
    beside_s = made.predicted.timeline.step_time_s - loop.duration_s
    assert made.free_step_s == pytest.approx(6 * item_s + beside_s)
    prediction = to_json(made)["prediction"]
    assert isinstance(prediction, dict)
    assert prediction["free_stages_step_time_s"] == made.free_step_s
    assert dict(step_facts(made))["stages apart"].endswith(" as a program each, 0 % less")
