"""Hostile arithmetic ends soon, says what it did not do, and does not spoil what can be counted.

Seconds are of processor time, with a wide margin: without the bounds each case takes minutes, or for ever.
"""

from __future__ import annotations

import time

import pytest

from shardlab.analysis import analyze
from shardlab.attribute.calls import CallGraph, call_graph
from shardlab.attribute.effort import MAX_OPERATIONS, MAX_STEPS
from shardlab.attribute.trips import Trips
from shardlab.hlo.reader import parse

SECONDS = 20
MULTIPLIER, INCREMENT, WORD = 1_664_525, 1_013_904_223, 1 << 32

GROUPS = "channel_id=1, replica_groups={{0,1}}, use_global_device_ids=true"


def lcg(trips: int) -> int:
    """Where the counter of `simulated` stands after so many trips."""
    value = 0
    for _ in range(trips):
        value = (value * MULTIPLIER + INCREMENT) % WORD
    return value


def simulated(number: int, limit: int) -> str:
    """A loop without a closed form: a linear congruential generator, until it hits `limit`."""
    return f"""%body.{number} (s.{number}: (u32[])) -> (u32[]) {{
  %s.{number} = (u32[]) parameter(0)
  %i.{number} = u32[] get-tuple-element(%s.{number}), index=0
  %m.{number} = u32[] constant({MULTIPLIER})
  %c.{number} = u32[] constant({INCREMENT})
  %p.{number} = u32[] multiply(%i.{number}, %m.{number})
  %q.{number} = u32[] add(%p.{number}, %c.{number})
  %x.{number} = f32[4] constant({{1, 2, 3, 4}})
  %r.{number} = f32[4] all-reduce(%x.{number}), {GROUPS}, to_apply=%add
  ROOT %t.{number} = (u32[]) tuple(%q.{number})
}}

%cond.{number} (v.{number}: (u32[])) -> pred[] {{
  %v.{number} = (u32[]) parameter(0)
  %j.{number} = u32[] get-tuple-element(%v.{number}), index=0
  %n.{number} = u32[] constant({limit})
  ROOT %go.{number} = pred[] compare(%j.{number}, %n.{number}), direction=NE
}}

"""


def counted(number: int) -> str:
    """A loop of three trips, with a closed form."""
    text = simulated(number, 3).replace(f"multiply(%i.{number}, %m.{number})", f"copy(%i.{number})")
    return text.replace(f"constant({INCREMENT})", "constant(1)")


def module(loops: list[str]) -> str:
    states = "".join(
        f"  %w.{n} = (u32[]) while(%start), condition=%cond.{n}, body=%body.{n}\n" for n in range(len(loops))
    )
    add = "%add (a: f32[], b: f32[]) -> f32[] {\n  %a = f32[] parameter(0)\n  %b = f32[] parameter(1)\n"
    return (
        "HloModule m, num_partitions=2\n\n"
        + add
        + "  ROOT %sum = f32[] add(%a, %b)\n}\n\n"
        + "".join(loops)
        + "ENTRY %main {\n  %zero = u32[] constant(0)\n  %start = (u32[]) tuple(%zero)\n"
        + states
        + "  ROOT %r = f32[] constant(0)\n}\n"
    )


def graph_of(text: str) -> CallGraph:
    (read,) = parse(text)
    return call_graph(read)


def test_a_few_loops_are_simulated_exactly() -> None:
    lengths = [1, 7, 1_000, 50_000]
    found = graph_of(module([simulated(n, lcg(length)) for n, length in enumerate(lengths)])).loops
    assert list(found.values()) == [Trips(length, length) for length in lengths]


def test_thousands_of_loops_share_one_allowance() -> None:
    limit = lcg(40_000)
    loops = [simulated(n, limit) for n in range(2_000)] + [counted(2_000)]
    started = time.process_time()
    analysis = analyze(module(loops), axes={"x": 2})
    assert time.process_time() - started < SECONDS
    executions = [row.executions for row in analysis.collectives]
    exact = executions.count((40_000, 40_000))
    # Product, sum, comparison and the next counter: four operations a trip, the last test included.
    assert exact == MAX_OPERATIONS // (4 * 40_001)
    assert executions == [(40_000, 40_000)] * exact + [(0, None)] * (2_000 - exact) + [(3, 3)]
    said = {entry.name: entry.why for entry in analysis.ledger}
    assert list(said) == [f"w.{n}" for n in range(exact, 2_000)]
    assert all(f"more than {MAX_OPERATIONS} operations" in why for why in said.values())


def one_loop(condition: str, extra: str = "", step: str = "%one") -> str:
    """A loop of five trips whose condition is `condition` on `%i`."""
    return f"""HloModule m, num_partitions=2

{extra}
%body (s: (s32[])) -> (s32[]) {{
  %s = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, {step})
  ROOT %t = (s32[]) tuple(%next)
}}

%cond (v: (s32[])) -> pred[] {{
  %v = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%v), index=0
  %five = s32[] constant(5)
  %c0 = pred[] compare(%i, %five), direction=LT
{condition}
}}

ENTRY %main {{
  %zero = s32[] constant(0)
  %start = (s32[]) tuple(%zero)
  ROOT %w = (s32[]) while(%start), condition=%cond, body=%body
}}
"""


def doubling(depth: int, first: str, rest: str) -> str:
    """%c0 up to %c<depth>, each made from the one before and the one before that."""
    lines = [f"  %c{n + 1} = {rest.format(n, max(n - 1, 0))}" for n in range(depth)]
    lines[-1] = "  ROOT" + lines[-1][1:]
    return first + "\n".join(lines)


def chain(length: int) -> str:
    adds = "\n".join(f"  %k{n + 1} = s32[] add(%k{n}, %five)" for n in range(length))
    return (
        f"  %k0 = s32[] copy(%i)\n{adds}\n  %limit = s32[] constant({5 * length + 5})\n"
        f"  ROOT %go = pred[] compare(%k{length}, %limit), direction=LT"
    )


def many_tests(tests: int, length: int) -> str:
    """Tests that all hang on one long chain, and always hold."""
    adds = "\n".join(f"  %k{n + 1} = s32[] xor(%k{n}, %i)" for n in range(length))
    compares = "\n".join(f"  %t{n} = pred[] compare(%k{length}, %i), direction=EQ" for n in range(tests))
    ands = "\n".join(f"  %c{n + 1} = pred[] and(%c{n}, %t{n})" for n in range(tests))
    return f"  %k0 = s32[] copy(%i)\n{adds}\n{compares}\n{ands}\n  ROOT %go = pred[] copy(%c{tests})"


FAN_OUT = "".join(
    f"%f{n} (p{n}: s32[]) -> s32[] {{\n  %p{n} = s32[] parameter(0)\n"
    f"  %q{n} = s32[] call(%p{n}), to_apply=%f{n + 1}\n"
    f"  ROOT %r{n} = s32[] call(%q{n}), to_apply=%f{n + 1}\n}}\n\n"
    for n in range(60)
) + ("%f60 (p60: s32[]) -> s32[] {\n  ROOT %p60 = s32[] parameter(0)\n}\n\n")

TURNING = """HloModule m

%body (s: (s32[])) -> (s32[]) {
  %s = (s32[]) parameter(0)
  %g = s32[] get-tuple-element(%c), index=0
  %c = s32[] copy(%g)
  ROOT %next = (s32[]) tuple(%g)
}

%cond (t: (s32[])) -> pred[] {
  %t = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %five = s32[] constant(5)
  ROOT %go = pred[] compare(%i, %five), direction=LT
}

ENTRY %main (p: (s32[])) -> (s32[]) {
  %zero = s32[] constant(0)
  %start = (s32[]) tuple(%zero)
  ROOT %w = (s32[]) while(%start), condition=%cond, body=%body
}
"""  # every turn of the circle takes the element of one tuple more

STEPS = f"more than {MAX_STEPS} steps"
OPERATIONS = f"more than {MAX_OPERATIONS} operations"
HOSTILE: dict[str, tuple[str, Trips | str]] = {
    "ands_of_ands": (one_loop(doubling(200, "", "pred[] and(%c{0}, %c{1})")), Trips(5, 5)),
    "a_deep_tree_of_ands": (one_loop(doubling(5_000, "", "pred[] and(%c{0}, %c0)")), Trips(5, 5)),
    "a_long_chain": (one_loop(chain(5_000)), Trips(5, 5)),
    "a_chain_that_is_too_long": (one_loop(chain(MAX_STEPS)), STEPS),
    "an_element_deeper_at_every_turn": (TURNING, "tuples in each other"),
    "many_tests_on_a_long_chain": (one_loop(many_tests(1_000, 1_000)), OPERATIONS),
    "calls_that_fan_out": (
        one_loop(
            "  %k = s32[] call(%i), to_apply=%f0\n  ROOT %go = pred[] compare(%k, %five), direction=LT",
            FAN_OUT,
        ),
        STEPS,
    ),
}


@pytest.mark.parametrize(("text", "expected"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_arithmetic_is_bounded(text: str, expected: Trips | str) -> None:
    started = time.process_time()
    (found,) = graph_of(text).loops.values()
    assert time.process_time() - started < SECONDS
    if isinstance(expected, Trips):
        assert found == expected
    else:
        assert (found.low, found.reason != "") == (0, True)
        assert expected in found.reason


def test_many_conditionals_share_the_allowance() -> None:
    """Each is run at 40,000 ticks: the first are exact, the rest stay ranges, and the ledger says so."""
    body = "\n".join(
        f"  %b{n} = f32[] conditional(%low, %x, %x), branch_computations={{%yes.{n}, %no.{n}}}"
        for n in range(60)
    )
    leaves = "".join(
        f"%{name}.{n} (p.{name}.{n}: f32[]) -> f32[] {{\n  ROOT %p.{name}.{n} = f32[] parameter(0)\n}}\n\n"
        for n in range(60)
        for name in ("yes", "no")
    )
    text = one_loop("  ROOT %go = pred[] copy(%c0)", leaves).replace("constant(5)", "constant(40000)")
    text = text.replace("  %next", f"  %x = f32[] constant(0)\n  %low = s32[] and(%i, %one)\n{body}\n  %next")
    started = time.process_time()
    graph = graph_of(text)
    assert time.process_time() - started < SECONDS
    known = len(graph.schedule.branches)
    assert 1 <= known < 60
    assert len(graph.schedule.reasons) == 60 - known
    assert graph.times["yes.0"] == (20_000, 20_000)
    assert graph.times["yes.59"] == (0, 40_000)
