"""How often computations run, sums over branches, and broken call graphs."""

from __future__ import annotations

from fractions import Fraction

import pytest

from shardlab.attribute.calls import call_graph, computation_executions, step_totals
from shardlab.errors import ParseError
from shardlab.hlo.module import Module
from shardlab.hlo.reader import parse


def module(text: str) -> Module:
    (found,) = parse(text)
    return found


def leaf(name: str) -> str:
    return f"%{name} (p: f32[]) -> f32[] {{\n  ROOT %p = f32[] parameter(0)\n}}\n\n"


def entry(*lines: str) -> str:
    body = "".join(f"  {line}\n" for line in ("%x = f32[] parameter(0)", "%i = s32[] parameter(1)", *lines))
    return f"ENTRY %main {{\n{body}}}\n"


def fractions(*pairs: tuple[int, int | None]) -> list[tuple[Fraction, Fraction | None]]:
    return [(Fraction(low), None if high is None else Fraction(high)) for low, high in pairs]


CONDITIONAL = "ROOT %c = f32[] conditional(%i, %x, %x, %x), branch_computations={%a, %b, %c0}"


def test_every_way_to_call() -> None:
    text = "".join(map(leaf, ("f", "g", "h", "k", "unused", "reducer"))) + entry(
        "%one = f32[] fusion(%x), kind=kLoop, calls=%f",
        "%two = f32[] call(%x), to_apply=%g",
        "%three = ((f32[]), f32[]) async-start(%x), calls=%h",
        "%four = f32[] async-done(%three), calls=%h",
        '%five = f32[] custom-call(%x), custom_call_target="t", called_computations={%k}',
        "%six = f32[] reduce(%x, %x), dimensions={}, to_apply=%reducer",
        "ROOT %seven = f32[] fusion(%x), kind=kLoop, calls=%f",
    )
    assert computation_executions(module(text)) == {
        "main": (1, 1), "f": (2, 2), "g": (1, 1), "h": (1, 1), "k": (1, 1),
        "unused": (0, 0), "reducer": (0, 0),
    }  # fmt: skip


def test_branches_run_at_most_once_each() -> None:
    text = "".join(map(leaf, "ab")) + leaf("c0") + entry(CONDITIONAL)
    assert computation_executions(module(text)) == {"main": (1, 1), "a": (0, 1), "b": (0, 1), "c0": (0, 1)}


def test_a_conditional_whose_branches_are_one_computation_is_a_call() -> None:
    text = leaf("a") + entry("ROOT %c = f32[] conditional(%i, %x, %x), branch_computations={%a, %a}")
    assert computation_executions(module(text))["a"] == (1, 1)


def test_a_computation_that_is_two_of_three_branches_still_runs_at_most_once() -> None:
    text = (
        leaf("a")
        + leaf("b")
        + entry("ROOT %c = f32[] conditional(%i, %x, %x, %x), branch_computations={%a, %b, %a}")
    )
    assert computation_executions(module(text))["a"] == (0, 1)


LOOP = """%body (s: (s32[], s32[])) -> (s32[], s32[]) {
  %s = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] get-tuple-element(%s), index=1
  %x = f32[] constant(0)
  %drawn = s32[] custom-call(), custom_call_target="draw"
  %c = f32[] conditional(%drawn, %x, %x), branch_computations={%a, %b}
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %t = (s32[], s32[]) tuple(%next, %n)
}

%cond (s: (s32[], s32[])) -> pred[] {
  %s = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] get-tuple-element(%s), index=1
  ROOT %r = pred[] compare(%i, %n), direction=LT
}

ENTRY %main {
  %zero = s32[] constant(0)
  %limit = s32[] LIMIT
  %t = (s32[], s32[]) tuple(%zero, %limit)
  ROOT %w = (s32[], s32[]) while(%t), condition=%cond, body=%body
}
"""


@pytest.mark.parametrize(
    ("limit", "executions", "total"),
    [
        ("constant(3)", {"body": (3, 3), "cond": (4, 4), "a": (0, 3)}, (3 * (100 + 5), 3 * (100 + 7))),
        ("parameter(0)", {"body": (0, None), "cond": (1, None), "a": (0, None)}, (0, None)),
        ("constant(0)", {"body": (0, 0), "cond": (1, 1), "a": (0, 0)}, (0, 0)),
    ],
    ids=["known", "unknown", "none"],
)
def test_a_branch_in_a_loop(
    limit: str, executions: dict[str, tuple[int, int | None]], total: tuple[int, int | None]
) -> None:
    text = leaf("a") + leaf("b") + LOOP.replace("LIMIT", limit)
    found = computation_executions(module(text))
    assert {name: found[name] for name in executions} == executions
    amounts = {"body": {"bytes": Fraction(100)}, "a": {"bytes": Fraction(5)}, "b": {"bytes": Fraction(7)}}
    assert [step_totals(call_graph(module(text)), amounts)["bytes"]] == fractions(total)


def test_a_branch_that_the_counter_chooses_is_counted() -> None:
    """Trip 0 takes %a; trip 1 takes %b, and so does trip 2, which is outside the branches."""
    text = leaf("a") + leaf("b") + LOOP.replace("LIMIT", "constant(3)").replace("%drawn, %x", "%i, %x")
    found = computation_executions(module(text))
    assert (found["a"], found["b"]) == ((1, 1), (2, 2))
    amounts = {"body": {"bytes": Fraction(100)}, "a": {"bytes": Fraction(5)}, "b": {"bytes": Fraction(7)}}
    totals = step_totals(call_graph(module(text)), amounts)
    assert [totals["bytes"]] == fractions((3 * 100 + 5 + 2 * 7, 3 * 100 + 5 + 2 * 7))


def test_branches_are_compared_key_by_key_and_silence_counts_as_nothing() -> None:
    text = "".join(map(leaf, "ab")) + leaf("c0") + entry(CONDITIONAL)
    totals = step_totals(
        call_graph(module(text)),
        {
            "a": {"sum": Fraction(5), "x": Fraction(5)},
            "b": {"sum": Fraction(3), "y": Fraction(3)},
            "c0": {"sum": Fraction(4), "y": Fraction(4)},
            "main": {"sum": Fraction(1)},
        },
    )
    assert [totals["sum"], totals["x"], totals["y"]] == fractions((4, 6), (0, 5), (0, 4))


def test_a_branch_without_any_amount_makes_the_least_zero() -> None:
    text = "".join(map(leaf, "ab")) + leaf("c0") + entry(CONDITIONAL)
    totals = step_totals(call_graph(module(text)), {"a": {"k": Fraction(5)}, "b": {"k": Fraction(5)}})
    assert [totals["k"]] == fractions((0, 5))


def test_a_chain_of_five_thousand_calls() -> None:
    chain = "".join(
        f"%c{i} (p: f32[]) -> f32[] {{\n  %p = f32[] parameter(0)\n"
        f"  ROOT %r = f32[] call(%p), to_apply=%c{i + 1}\n}}\n\n"
        for i in range(5_000)
    )
    text = leaf("c5000") + chain + entry("ROOT %r = f32[] call(%x), to_apply=%c0")
    assert computation_executions(module(text))["c5000"] == (1, 1)


def test_doubling_calls_multiply_without_blowing_up() -> None:
    chain = "".join(
        f"%c{i} (p: f32[]) -> f32[] {{\n  %p = f32[] parameter(0)\n"
        f"  %q = f32[] call(%p), to_apply=%c{i + 1}\n"
        f"  ROOT %r = f32[] call(%q), to_apply=%c{i + 1}\n}}\n\n"
        for i in range(200)
    )
    text = leaf("c200") + chain + entry("ROOT %r = f32[] call(%x), to_apply=%c0")
    assert computation_executions(module(text))["c200"] == (2**200, 2**200)


def test_a_cycle_is_an_error() -> None:
    text = (
        "%a (p: f32[]) -> f32[] {\n  %p = f32[] parameter(0)\n  ROOT %r = f32[] call(%p), to_apply=%b\n}\n\n"
        "%b (p: f32[]) -> f32[] {\n  %p = f32[] parameter(0)\n  ROOT %r = f32[] call(%p), to_apply=%a\n}\n\n"
    ) + entry("ROOT %r = f32[] call(%x), to_apply=%a")
    with pytest.raises(ParseError, match="calls itself"):
        computation_executions(module(text))


def test_a_missing_computation_is_an_error_with_its_line() -> None:
    text = entry("ROOT %r = f32[] call(%x), to_apply=%gone")
    with pytest.raises(ParseError, match="gone is not defined") as raised:
        computation_executions(module(text))
    assert raised.value.line == 4


@pytest.mark.parametrize("plain", [True, False])
def test_a_fusion_that_calls_twice_is_refused_not_taken_for_plain(plain: bool) -> None:
    """As XLA refuses it. The first callee is plain, the second would be lost."""
    text = """HloModule m

%plain (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %b = f32[8]{0} negate(%a)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %f = f32[8]{0} fusion(%p), kind=kLoop, calls=%plain, calls=%gone
}
"""
    with pytest.raises(ParseError, match="calls is given twice"):
        call_graph(*parse(text), plain=plain)
