"""Conditionals decided by constants, a counter and the device's number, in HLO written by hand.

Eight partitions unless a case says otherwise. Every expected count is worked out in the case's comment, or by
the table in plain Python.
"""

from __future__ import annotations

import time
from fractions import Fraction

import pytest

from shardlab.analysis import analyze
from shardlab.attribute.calls import CallGraph, call_graph, step_totals
from shardlab.attribute.choices import OUTER_COUNTER
from shardlab.attribute.schedule import NO_SCHEDULE
from shardlab.hlo.reader import parse

Runs = list[tuple[int, int | None]]
TABLE = ((0, 1), (1, 2), (2, 0), (1, 1), (1, 0))  # tick x side, where side = partition-id / 4
TICKS = len(TABLE)
LITERAL = "{ " + ", ".join("{ " + ", ".join(map(str, row)) + " }" for row in TABLE) + " }"
FLAT = "{" + ", ".join(str(entry) for row in TABLE for entry in row) + "}"
DRAWN = 'custom-call(), custom_call_target="draw"'
SIDE = """  %pid = u32[] partition-id()
  %four = u32[] constant(4)
  %half = u32[] divide(%pid, %four)
  %side = s32[] convert(%half)
"""


def counts(branch: int) -> Runs:
    """Ticks that each of the eight partitions spends in a branch, from the table."""
    return [(n, n) for device in range(8) for n in [sum(row[device // 4] == branch for row in TABLE)]]


def leaf(name: str) -> str:
    return f"%{name} (p.{name}: f32[]) -> f32[] {{\n  ROOT %p.{name} = f32[] parameter(0)\n}}\n\n"


def looped(
    index: str, *, extra: str = "", arms: str = "%a, %b, %c", trips: object = TICKS, first: object = 0
) -> str:
    """A loop whose body makes `%index` and switches on it; the state is (tick, side, table, x)."""
    state = "(s32[], s32[], s32[5,2], f32[])"
    uses = ", ".join(["%x"] * (arms.count(",") + 1))
    read = "\n".join(
        f"  %{name} = {shape} get-tuple-element(%s), index={place}"
        for place, (name, shape) in enumerate(
            (("i", "s32[]"), ("side", "s32[]"), ("table", "s32[5,2]"), ("x", "f32[]"))
        )
    )
    return f"""HloModule m, num_partitions=8

{leaf("a")}{leaf("b")}{leaf("c")}{extra}
%body (s: {state}) -> {state} {{
  %s = {state} parameter(0)
{read}
  %zero = s32[] constant(0)
  %one = s32[] constant(1)
{index}
  %y = f32[] conditional(%index, {uses}), branch_computations={{{arms}}}
  %next = s32[] add(%i, %one)
  ROOT %t = {state} tuple(%next, %side, %table, %y)
}}

%cond (s: {state}) -> pred[] {{
  %s = {state} parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] constant({trips})
  ROOT %go = pred[] compare(%i, %n), direction=LT
}}

ENTRY %main {{
  %x = f32[] parameter(0)
  %i0 = s32[] constant({first})
  %table = s32[5,2]{{1,0}} constant({LITERAL})
{SIDE}  %t = {state} tuple(%i0, %side, %table, %x)
  ROOT %w = {state} while(%t), condition=%cond, body=%body
}}
"""


def graph_of(text: str) -> CallGraph:
    (module,) = parse(text)
    return call_graph(module)


def runs(text: str, name: str, devices: int = 8) -> Runs:
    """Runs per step of a computation on each device."""
    graph = graph_of(text)
    return list(graph.schedule.by_device(name)) or [graph.times[name]] * devices


SLICED = """  %row = s32[1,2] dynamic-slice(%table, %i, %zero), dynamic_slice_sizes={1,2}
  %flat = s32[2] bitcast(%row)
  %cell = s32[1] dynamic-slice(%flat, %side), dynamic_slice_sizes={1}
  %index = s32[] bitcast(%cell)"""
READS = {
    "both_at_once": """  %cell = s32[1,1] dynamic-slice(%table, %i, %side), dynamic_slice_sizes={1,1}
  %index = s32[] reshape(%cell)""",
    "a_row_as_of_a_scan": SLICED,
    "clamped_arrays_of_one": """  %cell = s32[1,1] dynamic-slice(%table, %i, %side), dynamic_slice_sizes={1,1}
  %low = s32[1,1] constant({ {0} })
  %high = s32[1,1] constant({ {2} })
  %clamped = s32[1,1] clamp(%low, %cell, %high)
  %index = s32[] bitcast(%clamped)""",
    "bytes": """  %bytes = s8[5,2] convert(%table)
  %cell = s8[1,1] dynamic-slice(%bytes, %i, %side), dynamic_slice_sizes={1,1}
  %byte = s8[] reshape(%cell)
  %index = s32[] convert(%byte)""",
    "flattened": f"""  %long = s32[10] constant({FLAT})
  %two = s32[] constant(2)
  %at = s32[] multiply(%i, %two)
  %place = s32[] add(%at, %side)
  %cell = s32[1] dynamic-slice(%long, %place), dynamic_slice_sizes={{1}}
  %index = s32[] reshape(%cell)""",
    "reshaped": """  %long = s32[10] reshape(%table)
  %two = s32[] constant(2)
  %at = s32[] multiply(%i, %two)
  %place = s32[] add(%at, %side)
  %cell = s32[1] dynamic-slice(%long, %place), dynamic_slice_sizes={1}
  %index = s32[] reshape(%cell)""",
    "transposed": """  %turned = s32[2,5] transpose(%table), dimensions={1,0}
  %cell = s32[1,1] dynamic-slice(%turned, %side, %i), dynamic_slice_sizes={1,1}
  %index = s32[] reshape(%cell)""",
    "gathered": """  %i1 = s32[1] reshape(%i)
  %s1 = s32[1] reshape(%side)
  %at = s32[2] concatenate(%i1, %s1), dimensions={0}
  %index = s32[] gather(%table, %at), offset_dims={}, collapsed_slice_dims={0,1}, start_index_map={0,1},"""
    + """ index_vector_dim=0, slice_sizes={1,1}""",
    "sliced_from_the_middle": f"""  %pad = s32[7,2] constant({{ {{9,9}}, {LITERAL[2:-2]}, {{9,9}} }})
  %middle = s32[5,2] slice(%pad), slice={{[1:6], [0:2]}}
  %cell = s32[1,1] dynamic-slice(%middle, %i, %side), dynamic_slice_sizes={{1,1}}
  %index = s32[] reshape(%cell)""",
    "in_a_fusion": """  %index = s32[] fusion(%table, %i, %side), kind=kLoop, calls=%fused""",
}
FUSED = """%fused (ft: s32[5,2], fi: s32[], fs: s32[]) -> s32[] {
  %ft = s32[5,2] parameter(0)
  %fi = s32[] parameter(1)
  %fs = s32[] parameter(2)
  %fc = s32[1,1] dynamic-slice(%ft, %fi, %fs), dynamic_slice_sizes={1,1}
  ROOT %fr = s32[] bitcast(%fc)
}

"""


@pytest.mark.parametrize("index", READS.values(), ids=READS)
def test_ways_to_read_a_table(index: str) -> None:
    text = looped(index, extra=FUSED)
    assert [runs(text, name) for name in "abc"] == [counts(branch) for branch in range(3)]


def every(n: int) -> Runs:
    return [(n, n)] * 8


CHOICES: dict[str, tuple[str, dict[str, Runs]]] = {
    # ticks 0 1 2 3 4; a number outside the branches takes the last: 3 and 4 are c too
    "the_counter_itself": (
        looped("  %index = s32[] copy(%i)"),
        {"a": every(1), "b": every(1), "c": every(3)},
    ),
    # -1 is outside as well: tick 0
    "a_negative_number": (
        looped("  %index = s32[] subtract(%i, %one)"),
        {"a": every(1), "b": every(1), "c": every(3)},
    ),
    # a predicate takes the first branch when it holds: ticks 0 and 1
    "a_predicate": (
        looped(
            "  %two = s32[] constant(2)\n  %index = pred[] compare(%i, %two), direction=LT", arms="%a, %b"
        ),
        {"a": every(2), "b": every(3)},
    ),
    # i0 = 3: only ticks 3 and 4, whose rows are (1, 1) and (1, 0)
    "a_loop_from_three": (
        looped(SLICED, first=3),
        {"a": [(0, 0)] * 4 + [(1, 1)] * 4, "b": [(2, 2)] * 4 + [(1, 1)] * 4, "c": every(0)},
    ),
    # seven ticks: the index of the row is clamped to 4, whose row is (1, 0), twice more
    "past_the_end": (
        looped(SLICED, trips=7),
        {"a": [(1, 1)] * 4 + [(4, 4)] * 4, "b": [(5, 5)] * 4 + [(2, 2)] * 4, "c": every(1)},
    ),
    "no_trips": (looped(SLICED, trips=0), {"a": every(0), "b": every(0), "c": every(0)}),
    # side 0 takes branch 0 at all ticks
    "the_device_alone": (
        looped("  %index = s32[] copy(%side)", arms="%a, %b"),
        {"a": [(5, 5)] * 4 + [(0, 0)] * 4, "b": [(0, 0)] * 4 + [(5, 5)] * 4},
    ),
    "the_data": (looped(f"  %index = s32[] {DRAWN}"), {name: [(0, 5)] * 8 for name in "abc"}),
    "data_in_the_index": (
        looped(f"  %drawn = s32[] {DRAWN}\n  %index = s32[] add(%drawn, %i)"),
        {name: [(0, 5)] * 8 for name in "abc"},
    ),
    # a bitcast of several extents may turn the array: layouts are not read
    "a_bitcast_of_a_matrix": (
        looped("  %turned = s32[2,5] bitcast(%table)\n" + READS["transposed"].split("\n", 1)[1]),
        {name: [(0, 5)] * 8 for name in "abc"},
    ),
    "a_table_that_the_loop_changes": (
        looped(READS["both_at_once"] + "\n  %other = s32[5,2] negate(%table)").replace(
            "tuple(%next, %side, %table, %y)", "tuple(%next, %side, %other, %y)"
        ),
        {name: [(0, 5)] * 8 for name in "abc"},
    ),
    # a twice among the branches: it runs at ticks 0 and 2 (and 3, 4, which are outside)
    "one_computation_in_two_branches": (
        looped("  %index = s32[] copy(%i)", arms="%a, %b, %a"),
        {"a": every(4), "b": every(1)},
    ),
}


@pytest.mark.parametrize(("text", "expected"), CHOICES.values(), ids=CHOICES)
def test_choices(text: str, expected: dict[str, Runs]) -> None:
    assert {name: runs(text, name) for name in expected} == expected


OTHER = LITERAL.replace("0, 1", "1, 0")  # of tick 0 alone


def second_table(first: str, after: str, table_after: str = "%table") -> str:
    """The state has one table more, of which the body reads; what each of the two is, first and next."""
    text = looped(
        f"""  %fast = s32[5,2] get-tuple-element(%s), index=4
  %begun = (s32[5,2], s32[5,2], u32[]) copy-start(%table)
  %copied = s32[5,2] copy-done(%begun)
  %drawn = s32[5,2] {DRAWN}
{READS["both_at_once"].replace("%table", "%fast")}"""
    )
    text = text.replace("s32[5,2], f32[])", "s32[5,2], f32[], s32[5,2])")
    text = text.replace("tuple(%next, %side, %table, %y)", f"tuple(%next, %side, {table_after}, %y, {after})")
    text = text.replace("  %i0 =", f"  %second = s32[5,2] {first}\n  %i0 =")
    return text.replace("tuple(%i0, %side, %table, %x)", "tuple(%i0, %side, %table, %x, %second)")


SAME, DIFFERENT = "copy(%table)", f"constant({OTHER})"


@pytest.mark.parametrize(
    ("text", "a"),
    [
        # XLA:TPU does this: the table stays in HBM, and is copied to fast memory for every trip.
        (second_table(SAME, "%copied"), counts(0)),
        (second_table(SAME, "%table", "%fast"), counts(0)),
        (second_table(DIFFERENT, "%copied"), [(0, TICKS)] * 8),
        (second_table(DIFFERENT, "%table", "%fast"), [(0, TICKS)] * 8),
        # At tick 0 the rows differ: (1, 0) instead of (0, 1).
        (second_table(DIFFERENT, "%fast"), [(0, 0)] * 4 + [(3, 3)] * 4),
        (second_table(SAME, "%drawn"), [(0, TICKS)] * 8),
        (second_table(DRAWN, "%copied", "%table"), [(0, TICKS)] * 8),
    ],
    ids=["copied_anew", "in_turn", "another_at_first", "another_in_turn", "another", "drawn", "drawn_first"],
)
def test_a_table_that_the_state_holds_twice(text: str, a: Runs) -> None:
    assert runs(text, "a") == a


def test_totals_are_those_of_the_busiest_and_the_idlest_device() -> None:
    graph = graph_of(looped(READS["both_at_once"]))
    amounts = {"body": {"k": Fraction(100)}, "b": {"k": Fraction(7)}, "c": {"k": Fraction(1000)}}
    sides = [
        500 + sum({0: 0, 1: 7, 2: 1000}[row[side]] for row in TABLE) for side in range(2)
    ]  # 3 x 7 + 1000; 2 x 7 + 1000
    assert sorted(sides) == [1514, 1521]
    assert step_totals(graph, amounts) == {"k": (1514, 1521)}


NESTED = """%inner (pi: (s32[], s32[])) -> f32[] {
  %pi = (s32[], s32[]) parameter(0)
  %ti = s32[] get-tuple-element(%pi), index=0
  %si = s32[] get-tuple-element(%pi), index=1
  %ci = s32[] INDEX
  %xi = f32[] constant(0)
  ROOT %ri = f32[] conditional(%ci, %xi, %xi), branch_computations={%a, %b}
}

"""


@pytest.mark.parametrize(
    ("index", "a"),
    [
        # inner runs where the table says 1. Side 0: ticks 1, 3, 4; side 1: ticks 0, 3.
        ("and(%ti, %one.i)", [(1, 1)] * 8),  # even ticks: 4; 0
        ("copy(%si)", [(3, 3)] * 4 + [(0, 0)] * 4),
        (DRAWN, [(0, 3)] * 4 + [(0, 2)] * 4),
    ],
    ids=["by_tick", "by_device", "by_data"],
)
def test_a_branch_in_a_branch(index: str, a: Runs) -> None:
    inner = NESTED.replace("INDEX", index).replace("  %ci", "  %one.i = s32[] constant(1)\n  %ci")
    text = looped(READS["both_at_once"], extra=inner, arms="%idle, %inner, %c").replace(
        "conditional(%index, %x, %x, %x)",
        "conditional(%index, %x, %pair, %x)",
    )
    text = text.replace("  %y =", "  %pair = (s32[], s32[]) tuple(%i, %side)\n  %y =")
    text = text.replace("%body (s", leaf("idle") + "%body (s")
    assert runs(text, "a") == a
    assert runs(text, "inner") == counts(1)


def test_an_inner_loop_in_a_branch_multiplies() -> None:
    """Three trips for each tick at which the table says 1."""
    inner = """%ib (s.i: (s32[])) -> (s32[]) {
  %s.i = (s32[]) parameter(0)
  %n.i = s32[] get-tuple-element(%s.i), index=0
  %one.i = s32[] constant(1)
  %m.i = s32[] add(%n.i, %one.i)
  ROOT %r.i = (s32[]) tuple(%m.i)
}

%ic (s.c: (s32[])) -> pred[] {
  %s.c = (s32[]) parameter(0)
  %n.c = s32[] get-tuple-element(%s.c), index=0
  %l.c = s32[] constant(3)
  ROOT %g.c = pred[] compare(%n.c, %l.c), direction=LT
}

%inner (p.n: f32[]) -> f32[] {
  %z.n = s32[] constant(0)
  %t.n = (s32[]) tuple(%z.n)
  %w.n = (s32[]) while(%t.n), condition=%ic, body=%ib
  ROOT %p.n = f32[] parameter(0)
}

"""
    text = looped(READS["both_at_once"], extra=inner, arms="%a, %inner, %c")
    assert runs(text, "ib") == [(3 * low, 3 * low) for low, _ in counts(1)]


def entry(index: str, header: str = "num_partitions=8") -> str:
    return f"""HloModule m, {header}

{leaf("a")}{leaf("b")}
ENTRY %main {{
  %x = f32[] parameter(0)
{index}
  ROOT %y = f32[] conditional(%index, %x, %x), branch_computations={{%a, %b}}
}}
"""


COORDINATES = """  %pid = u32[] partition-id()
  %of = s32[8] constant({1, 0, 0, 1, 0, 1, 1, 1})
  %cell = s32[1] dynamic-slice(%of, %pid), dynamic_slice_sizes={1}
  %index = s32[] reshape(%cell)"""
REPLICA = """  %rid = u32[] replica-id()
  %index = s32[] convert(%rid)"""
OUTSIDE: dict[str, tuple[str, Runs]] = {
    "divided": (entry(f"{SIDE}  %index = s32[] copy(%side)"), [(1, 1)] * 4 + [(0, 0)] * 4),
    "looked_up_by_device": (
        entry(COORDINATES),
        [(int(on == 0), int(on == 0)) for on in (1, 0, 0, 1, 0, 1, 1, 1)],
    ),
    # id = replica * partitions + partition
    "by_replica": (entry(REPLICA, "replica_count=2, num_partitions=2"), [(1, 1)] * 2 + [(0, 0)] * 2),
    "by_a_constant": (entry("  %index = s32[] constant(0)"), [(1, 1)] * 8),
    "by_an_input": (entry("  %index = s32[] parameter(1)"), [(0, 1)] * 8),
    "devices_unknown": (entry(COORDINATES, "is_scheduled=true"), [(0, 1)] * 8),
}


@pytest.mark.parametrize(("text", "a"), OUTSIDE.values(), ids=OUTSIDE)
def test_outside_loops(text: str, a: Runs) -> None:
    assert runs(text, "a", len(a)) == a


UNKNOWN = {
    "elided": (looped(READS["both_at_once"]).replace(LITERAL, "{...}"), "left out of the text"),
    "too_large": (
        looped(READS["both_at_once"]).replace("s32[5,2]", "s32[500001,2]"),
        "more than 1000000 entries",
    ),
    "too_many_ticks": (looped("  %index = s32[] and(%i, %one)", trips=50_000_000), "operations"),
}


@pytest.mark.parametrize(("text", "why"), UNKNOWN.values(), ids=UNKNOWN)
def test_a_table_that_is_not_known_is_said(text: str, why: str) -> None:
    graph = graph_of(text)
    (reason,) = graph.schedule.reasons.values()
    assert why in reason
    assert graph.times["a"] == (0, graph.loops["main", "w"].high)


def test_an_outer_counter_leaves_a_range() -> None:
    """The index of the inner conditional is the counter of the loop around its loop."""
    text = looped("  %index = s32[] constant(0)").replace("%x, %x, %x)", "%n9, %x, %x)", 1)
    inner = """%ib (s.i: (s32[], s32[])) -> (s32[], s32[]) {
  %s.i = (s32[], s32[]) parameter(0)
  %n.i = s32[] get-tuple-element(%s.i), index=0
  %o.i = s32[] get-tuple-element(%s.i), index=1
  %one.i = s32[] constant(1)
  %x.i = f32[] constant(0)
  %y.i = f32[] conditional(%o.i, %x.i, %x.i), branch_computations={%b, %c}
  %m.i = s32[] add(%n.i, %one.i)
  ROOT %r.i = (s32[], s32[]) tuple(%m.i, %o.i)
}

%ic (s.c: (s32[], s32[])) -> pred[] {
  %s.c = (s32[], s32[]) parameter(0)
  %n.c = s32[] get-tuple-element(%s.c), index=0
  %l.c = s32[] constant(3)
  ROOT %g.c = pred[] compare(%n.c, %l.c), direction=LT
}

%inner (o.n: s32[]) -> f32[] {
  %o.n = s32[] parameter(0)
  %z.n = s32[] constant(0)
  %t.n = (s32[], s32[]) tuple(%z.n, %o.n)
  %w.n = (s32[], s32[]) while(%t.n), condition=%ic, body=%ib
  ROOT %f.n = f32[] constant(0)
}

"""
    text = text.replace("%body (s", inner + "%body (s").replace("{%a, %b, %c}", "{%inner, %a, %a}")
    text = text.replace("%n9", "%i")
    assert runs(text, "ib") == [(15, 15)] * 8
    assert runs(text, "b") == [(0, 15)] * 8
    assert set(graph_of(text).schedule.reasons.values()) == {OUTER_COUNTER}


SUM = """%add (l: f32[], r: f32[]) -> f32[] {
  %l = f32[] parameter(0)
  %r = f32[] parameter(1)
  ROOT %sum = f32[] add(%l, %r)
}

"""


@pytest.mark.parametrize(("groups", "said"), [("{{0,1,2,3},{4,5,6,7}}", 0), ("{{0,4},{1,5},{2,6},{3,7}}", 1)])
def test_members_that_do_not_run_together_are_said(groups: str, said: int) -> None:
    """Devices 0 to 3 take %a, which sums over groups of one side, or of both: the latter would wait for
    ever.
    """
    text = entry(f"{SIDE}  %index = s32[] copy(%side)").replace(
        "  ROOT %p.a = f32[] parameter(0)",
        "  %p.a = f32[] parameter(0)\n  ROOT %r.a = f32[] all-reduce(%p.a), channel_id=1, "
        f"replica_groups={groups}, use_global_device_ids=true, to_apply=%add",
    )
    found = analyze(text.replace("%a (p", SUM + "%a (p", 1), axes={"side": 2, "rest": 4})
    assert [(entry.what, entry.name) for entry in found.ledger] == [("conditional", "r.a")] * said
    (row,) = found.collectives
    assert row.executions == (0, 1)
    assert row.by_device is not None
    assert [(part.executions, part.devices) for part in row.by_device] == [((1, 1), "0-3"), ((0, 0), "4-7")]


def test_without_conditionals_there_is_no_schedule() -> None:
    text = looped("  %index = s32[] copy(%i)").replace(
        "%y = f32[] conditional(%index, %x, %x, %x)", "%y = f32[] copy(%x)"
    )
    assert graph_of(text).schedule == NO_SCHEDULE


def test_many_devices_and_ticks_are_fast() -> None:
    """16,384 partitions on two sides, 20,000 ticks: two sides are run, not 16,384."""
    text = looped(READS["both_at_once"], trips=20_000).replace("num_partitions=8", "num_partitions=16384")
    text = text.replace("u32[] constant(4)", "u32[] constant(8192)")
    started = time.process_time()
    found = runs(text, "b")
    assert time.process_time() - started < 5
    # rows after the last are the last: (1, 0)
    assert found[0] == (3 + 20_000 - 5, 3 + 20_000 - 5)
    assert found[16383] == (2, 2)
