"""Counters near the ends of their types, against running them: wrap-around, jumps over the limit."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlab.attribute.calls import call_graph
from shardlab.attribute.trips import Trips
from shardlab.hlo.reader import parse

COMPARE: dict[str, Callable[[int, int], bool]] = {
    name: getattr(operator, name.lower()) for name in ("LT", "LE", "GT", "GE", "NE", "EQ")
}
MIRRORED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE", "EQ": "EQ"}
DTYPES = [f"{sign}{bits}" for bits in (8, 16, 32, 64) for sign in "su"]
MOST = 1_000


def limits(dtype: str) -> tuple[int, int]:
    bits = int(dtype[1:])
    return (0, 2**bits - 1) if dtype[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def near(dtype: str) -> st.SearchStrategy[int]:
    """Values at either end of a type, and around its middle."""
    low, high = limits(dtype)
    middle = 0 if low else high // 2
    return st.one_of(
        st.integers(low, low + 30), st.integers(high - 30, high), st.integers(middle, middle + 30)
    )


def loop(
    dtype: str, init: int, op: str, by: int, direction: str, limit: int, carried: bool, swapped: bool
) -> str:
    """`carried`: limit and step are elements of the state; `swapped`: operands stand the other way round."""
    state = f"({', '.join([f'{dtype}[]'] * 3)})"
    read = "".join(
        f"  %{name} = {dtype}[] get-tuple-element(%s), index={index}\n" for index, name in enumerate("inc")
    )
    fixed = f"  %limit = {dtype}[] constant({limit})\n  %by = {dtype}[] constant({by})\n"
    n, c = ("%n", "%c") if carried else ("%limit", "%by")
    step = f"{c}, %i" if swapped and op == "add" else f"%i, {c}"
    test, way = (f"{n}, %i", MIRRORED[direction]) if swapped else (f"%i, {n}", direction)
    return (
        f"HloModule m\n\n%body (s: {state}) -> {state} {{\n  %s = {state} parameter(0)\n{read}{fixed}"
        f"  %next = {dtype}[] {op}({step})\n  ROOT %t = {state} tuple(%next, %n, %c)\n}}\n\n"
        f"%cond (s: {state}) -> pred[] {{\n  %s = {state} parameter(0)\n{read}{fixed}"
        f"  ROOT %go = pred[] compare({test}), direction={way}\n}}\n\n"
        f"ENTRY %main {{\n  %i0 = {dtype}[] constant({init})\n{fixed}"
        f"  %t = {state} tuple(%i0, %limit, %by)\n"
        f"  ROOT %w = {state} while(%t), condition=%cond, body=%body\n}}\n"
    )


def trips(text: str) -> Trips:
    (module,) = parse(text)
    (found,) = call_graph(module).loops.values()
    return found


def wrapped(value: int, dtype: str) -> int:
    low, high = limits(dtype)
    return (value - low) % (high - low + 1) + low


def run(dtype: str, init: int, step: int, direction: str, limit: int) -> int | None:
    """The loop, run; None when it goes on for more than MOST trips."""
    value = init
    for trip in range(MOST + 1):
        if not COMPARE[direction](value, limit):
            return trip
        value = wrapped(value + step, dtype)
    return None


@given(st.data())
@settings(max_examples=120, deadline=None)
def test_counters_that_may_wrap_around(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    init, limit = data.draw(near(dtype)), data.draw(near(dtype))
    op, by = data.draw(st.sampled_from(["add", "subtract"])), data.draw(st.integers(0, 7))
    by = -by if dtype[0] == "s" and data.draw(st.booleans()) else by
    direction = data.draw(st.sampled_from(list(COMPARE)))
    text = loop(dtype, init, op, by, direction, limit, data.draw(st.booleans()), data.draw(st.booleans()))
    found = trips(text)
    step = by if op == "add" else -by
    truth = run(dtype, init, step, direction, limit)
    if truth is not None:
        assert found == Trips(truth, truth)
    elif found.high is None:
        assert found.low == 0
        assert found.reason
    else:  # longer than was run here: then at least it ends there, and is said exactly
        assert found.low == found.high > MOST
        assert not COMPARE[direction](wrapped(init + found.high * step, dtype), limit)
        assert COMPARE[direction](wrapped(init + (found.high - 1) * step, dtype), limit)


@pytest.mark.parametrize("carried", [False, True], ids=["constant", "carried"])
@pytest.mark.parametrize(
    ("dtype", "init", "op", "by", "direction", "limit", "count"),
    [
        # 4294967290 … 4294967295, then 0: 6 trips are not below 4294967290
        ("u32", 4294967290, "add", 1, "GE", 4294967290, 6),
        ("u32", 3, "subtract", 1, "LT", 5, 4),  # 3, 2, 1, 0, then 4294967295
        ("u64", 2**64 - 2, "add", 3, "GT", 5, 1),
        ("u16", 65_535, "add", 2, "NE", 9, 5),  # 65535, 1, 3, 5, 7
        ("s8", 126, "add", 1, "GT", 0, 2),  # 126, 127, then -128
        ("s8", -127, "subtract", 5, "LT", 0, 1),  # -132 is 124
        ("s64", 2**63 - 1, "add", 1, "GE", 0, 1),
        # 0, 5, …, 250, 255, 4, 9, …: multiples of 5 reach 7 (mod 256) after 5 k = 7 + 256 j, j = 3: k = 155
        ("u8", 0, "add", 5, "NE", 7, 155),
    ],
)
def test_wrapped_counts_by_hand(
    dtype: str, init: int, op: str, by: int, direction: str, limit: int, count: int, carried: bool
) -> None:
    assert trips(loop(dtype, init, op, by, direction, limit, carried, False)) == Trips(count, count)


@pytest.mark.parametrize(
    ("dtype", "by", "direction", "limit"),
    [
        ("s32", 1, "LE", 2**31 - 1),  # every s32 is
        ("u32", 1, "GE", 0),
        ("u8", 2, "NE", 255),  # even for ever
        ("s8", 4, "NE", 2),
        ("u64", 2, "NE", 2**63 + 1),
    ],
)
def test_a_loop_without_end_has_no_count(dtype: str, by: int, direction: str, limit: int) -> None:
    found = trips(loop(dtype, 0, "add", by, direction, limit, False, False))
    assert (found.low, found.high) == (0, None)
    assert found.reason
