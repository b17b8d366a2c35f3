"""Trip counts of loops written as text, against running the loop."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlab.attribute.calls import call_graph
from shardlab.attribute.trips import MAX_ITERATIONS, Trips
from shardlab.hlo.reader import parse

COMPARE: dict[str, Callable[[int, int], bool]] = {
    name: getattr(operator, name.lower()) for name in ("LT", "LE", "GT", "GE", "NE", "EQ")
}
STEP: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
}
BITS = {"s8": 8, "u8": 8, "s32": 32, "u32": 32, "s64": 64}


def loop_text(
    *, dtype: str = "s32", init: object = 0, step: str = "", test: str = "", extra: str = "", state: str = ""
) -> str:
    """A module with one loop over `(counter, …)`; `step` and `test` end with a root."""
    shape = f"({dtype}[]{state})"
    return f"""HloModule m, num_partitions=2

{extra}
%body (s: {shape}) -> {shape} {{
  %s = {shape} parameter(0)
  %i = {dtype}[] get-tuple-element(%s), index=0
{step}
}}

%cond (s: {shape}) -> pred[] {{
  %s = {shape} parameter(0)
  %i = {dtype}[] get-tuple-element(%s), index=0
{test}
}}

ENTRY %main {{
  %i0 = {dtype}[] constant({init})
  %input = {dtype}[] parameter(0)
  %t = {shape} tuple(%i0{", %input" if state else ""})
  ROOT %w = {shape} while(%t), condition=%cond, body=%body
}}
"""


def counted(
    dtype: str, init: int, op: str, by: int, direction: str, limit: int, *, swapped: bool = False
) -> str:
    args = "%n, %i" if swapped else "%i, %n"
    return loop_text(
        dtype=dtype,
        init=init,
        step=f"  %c = {dtype}[] constant({by})\n  %next = {dtype}[] {op}(%i, %c)\n"
        f"  ROOT %t = ({dtype}[]) tuple(%next)",
        test=f"  %n = {dtype}[] constant({limit})\n"
        f"  ROOT %go = pred[] compare({args}), direction={direction}",
    )


def trips(text: str) -> Trips:
    (module,) = parse(text)
    (found,) = call_graph(module).loops.values()
    return found


def wrapped(value: int, dtype: str) -> int:
    size = 1 << BITS[dtype]
    value %= size
    return value - size if dtype.startswith("s") and value >= size // 2 else value


def run(
    dtype: str, init: int, op: str, by: int, direction: str, limit: int, swapped: bool, most: int
) -> int | None:
    """The loop, run; None when it goes on for more than `most` trips."""
    value = init
    for trip in range(most + 1):
        left, right = (limit, value) if swapped else (value, limit)
        if not COMPARE[direction](left, right):
            return trip
        value = wrapped(STEP[op](value, by), dtype)
    return None


@given(st.data())
@settings(max_examples=120, deadline=None)
def test_counters_against_running_them(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(list(BITS)))
    low = -100 if dtype.startswith("s") else 0
    init = data.draw(st.integers(low, 100))
    limit = data.draw(st.integers(low, 100))
    op = data.draw(st.sampled_from(list(STEP)))
    by = data.draw(st.integers(low // 10, 10))
    direction = data.draw(st.sampled_from(list(COMPARE)))
    swapped = data.draw(st.booleans())
    found = trips(counted(dtype, init, op, by, direction, limit, swapped=swapped))
    # 8-bit counters come back after 256 trips; wider ones are compared as far as is practical.
    truth = run(dtype, init, op, by, direction, limit, swapped, 2_000)
    if truth is not None:
        assert found == Trips(truth, truth)
    elif BITS[dtype] == 8:
        assert (found.low, found.high) == (0, None)
        assert found.reason
    else:
        assert found.high is None or found.high > 2_000


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (counted("s64", 0, "add", 1, "LT", 1 << 40), 1 << 40),  # far beyond any simulation
        (counted("u32", 0, "add", 2, "LT", 16), 8),
        (counted("u32", 250, "subtract", 1, "NE", 0), 250),
        # 250, 253, then 256 wraps to 0
        (counted("u8", 250, "add", 3, "GT", 5), 2),
        (counted("s8", 120, "add", 1, "GT", 0), 8),
        # multiples of 4 below 256, of which only 252 = 23 * 100 (mod 256) is not less than 250
        (counted("u8", 0, "add", 100, "LT", 250), 23),
        (counted("s32", 3, "add", 1, "EQ", 3), 1),
        (counted("s32", 0, "add", 0, "LT", 0), 0),
    ],
)
def test_counts_by_hand(text: str, count: int) -> None:
    assert trips(text) == Trips(count, count)


FUSED = """%up (p: s32[]) -> s32[] {
  %p = s32[] parameter(0)
  %one = s32[] constant(1)
  ROOT %r = s32[] add(%p, %one)
}

%less (p: s32[]) -> pred[] {
  %p = s32[] parameter(0)
  %n = s32[] constant(6)
  ROOT %r = pred[] compare(%p, %n), direction=LT
}
"""
PLAIN_STEP = "  %one = s32[] constant(1)\n  %next = s32[] add(%i, %one)\n  ROOT %t = (s32[]) tuple(%next)"


def test_through_fusions_calls_and_async() -> None:
    text = loop_text(
        extra=FUSED,
        step="  %f = s32[] fusion(%i), kind=kLoop, calls=%up\n"
        "  %b = ((s32[]), s32[], u32[]) fusion-start(%f), kind=kLoop, calls=%up\n"
        "  %e = s32[] fusion-done(%b)\n"
        "  %c = s32[] call(%e), to_apply=%up\n  ROOT %t = (s32[]) tuple(%c)",
        test="  ROOT %go = pred[] fusion(%i), kind=kLoop, calls=%less",
    )
    assert trips(text) == Trips(2, 2)  # 0, 3


def test_a_second_unknown_test_leaves_an_upper_bound() -> None:
    text = loop_text(
        state=", s32[]",
        step="  %one = s32[] constant(1)\n  %next = s32[] add(%i, %one)\n"
        "  %j = s32[] get-tuple-element(%s), index=1\n  ROOT %t = (s32[], s32[]) tuple(%next, %j)",
        test="  %n = s32[] constant(6)\n  %lt = pred[] compare(%i, %n), direction=LT\n"
        "  %j = s32[] get-tuple-element(%s), index=1\n  %ne = pred[] compare(%j, %n), direction=NE\n"
        "  ROOT %go = pred[] and(%lt, %ne)",
    )
    found = trips(text)
    assert (found.low, found.high) == (0, 6)
    assert "input of the program" in found.reason


def test_two_known_tests_end_at_the_first_that_fails() -> None:
    text = loop_text(
        step=PLAIN_STEP,
        test="  %n = s32[] constant(6)\n  %m = s32[] constant(4)\n"
        "  %lt = pred[] compare(%i, %n), direction=LT\n"
        "  %ne = pred[] compare(%i, %m), direction=NE\n  ROOT %go = pred[] and(%lt, %ne)",
    )
    assert trips(text) == Trips(4, 4)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            loop_text(
                step=PLAIN_STEP,
                test="  %p = s32[] partition-id()\n  ROOT %go = pred[] compare(%i, %p), direction=LT",
            ),
            "partition-id",
        ),
        (
            loop_text(
                dtype="f32",
                step=PLAIN_STEP.replace("s32", "f32"),
                test="  ROOT %go = pred[] is-finite(%i)",
            ),
            "is-finite",
        ),
        (
            loop_text(step="  ROOT %t = (s32[]) tuple(%i)", test="  ROOT %go = pred[] constant(true)"),
            "stands still",
        ),
        (counted("s32", 0, "add", 2, "NE", 3), "does not end within"),
    ],
)
def test_unknown_says_why(text: str, reason: str) -> None:
    found = trips(text)
    assert (found.low, found.high) == (0, None)
    assert reason in found.reason


def test_simulation_is_capped() -> None:
    found = trips(counted("s64", 1, "multiply", -1, "NE", 0))
    assert found == Trips(0, None, f"the loop does not end within {MAX_ITERATIONS} trips")


def test_a_rotated_test_needs_no_simulation() -> None:
    text = loop_text(
        dtype="s64",
        init=5,
        step="  %c = s64[] constant(3)\n  %a = s64[] add(%c, %i)\n  %one = s64[] constant(1)\n"
        "  %b = s64[] subtract(%a, %one)\n  ROOT %t = (s64[]) tuple(%b)",
        test="  %c = s64[] constant(2)\n  %up = s64[] add(%i, %c)\n  %n = s64[] constant(10000001)\n"
        "  ROOT %go = pred[] compare(%n, %up), direction=GT",
    )
    assert trips(text) == Trips(4_999_997, 4_999_997)  # 7 + 2k < 10,000,001


def test_the_printed_count_wins() -> None:
    text = counted("s32", 0, "add", 1, "LT", 10).replace(
        "body=%body", 'body=%body, backend_config="{\\"known_trip_count\\":{\\"n\\":\\"3\\"}}"'
    )
    assert trips(text) == Trips(3, 3)


def test_a_limit_handed_through_an_outer_loop_and_a_call() -> None:
    text = """HloModule m

%inner (s: (s32[], s32[])) -> (s32[], s32[]) {
  %s = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] get-tuple-element(%s), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %t = (s32[], s32[]) tuple(%next, %n)
}

%less (s: (s32[], s32[])) -> pred[] {
  %s = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] get-tuple-element(%s), index=1
  ROOT %r = pred[] compare(%i, %n), direction=LT
}

%once (n: s32[]) -> s32[] {
  %n = s32[] parameter(0)
  %zero = s32[] constant(0)
  %t = (s32[], s32[]) tuple(%zero, %n)
  %w = (s32[], s32[]) while(%t), condition=%less, body=%inner
  ROOT %r = s32[] get-tuple-element(%w), index=1
}

%outer (s: (s32[], s32[])) -> (s32[], s32[]) {
  %s = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] get-tuple-element(%s), index=1
  %same = s32[] call(%n), to_apply=%once
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  ROOT %t = (s32[], s32[]) tuple(%next, %same)
}

%less.1 (s: (s32[], s32[])) -> pred[] {
  %s = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] get-tuple-element(%s), index=1
  ROOT %r = pred[] compare(%i, %n), direction=LT
}

ENTRY %main {
  %zero = s32[] constant(0)
  %six = s32[] constant(6)
  %t = (s32[], s32[]) tuple(%zero, %six)
  ROOT %w = (s32[], s32[]) while(%t), condition=%less.1, body=%outer
}
"""
    (module,) = parse(text)
    graph = call_graph(module)
    assert graph.loops == {("main", "w"): Trips(3, 3), ("once", "w"): Trips(6, 6)}
    assert {name: low for name, (low, high) in graph.times.items() if low == high} == {
        "main": 1, "outer": 3, "less.1": 4, "once": 3, "inner": 18, "less": 21,
    }  # fmt: skip
