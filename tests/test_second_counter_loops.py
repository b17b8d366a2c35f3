"""The second counter's loops and conditionals: small modules written by hand, trips counted by hand."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from second_counter import Count
from second_counter.hand_built import F32_1K, S32, SCALAR, U32, Builder, array, tuple_of
from second_counter_cases import DATA, MODEL, count_of


def counting_loop(
    start: int,
    step: tuple[str, int],
    test: tuple[str, int],
    *,
    known: int | None = None,
    element_type: int = S32,
    limit_in_state: bool = False,
    dynamic: bool = False,
) -> Count:
    """A loop over (counter, x, limit) with one all-reduce over model in its body."""
    scalar = array(element_type)
    state_shape = tuple_of(scalar, F32_1K, scalar)
    body, condition = Builder(2), Builder(3)
    state = body.parameter(state_shape)
    counter = body.add("copy", scalar, [body.element(scalar, state, 0)])
    following = body.add(step[0], scalar, [counter, body.constant(step[1], element_type)])
    reduced = body.add("all-reduce", operands=[body.element(F32_1K, state, 1)], extra=MODEL)
    body.add("tuple", state_shape, [following, reduced, body.element(scalar, state, 2)])
    state = condition.parameter(state_shape)
    limit = (
        condition.element(scalar, state, 2) if limit_in_state else condition.constant(test[1], element_type)
    )
    condition.compare(condition.element(scalar, state, 0), limit, test[0])

    def add(b: Builder, x: int) -> None:
        first = b.parameter(scalar, 1) if dynamic else b.constant(start, element_type)
        initial = b.add("tuple", state_shape, [first, x, b.constant(test[1], element_type)])
        config = {"known_trip_count": {"n": str(known)}} if known is not None else None
        b.add("while", state_shape, [initial], called=[2, 3], config=config)

    return count_of(add, body, condition)


LOOPS = {
    "up": (dict(start=0, step=("add", 1), test=("LT", 12)), 12),
    "step_3_from_2": (dict(start=2, step=("add", 3), test=("LT", 20)), 6),
    "up_to_and_with": (dict(start=0, step=("add", 1), test=("LE", 9)), 10),
    "down": (dict(start=9, step=("subtract", 1), test=("GE", 1)), 9),
    "down_by_adding": (dict(start=9, step=("add", -1), test=("GT", 0)), 9),
    "not_equal": (dict(start=0, step=("add", 3), test=("NE", 27)), 9),
    "geometric": (dict(start=1, step=("multiply", 2), test=("LT", 100)), 7),
    "unsigned_step_2": (dict(start=0, step=("add", 2), test=("LT", 16), element_type=U32), 8),
    "limit_in_the_state": (dict(start=0, step=("add", 1), test=("LT", 5), limit_in_state=True), 5),
    "zero": (dict(start=5, step=("add", 1), test=("LT", 5)), 0),
    "printed_count_wins": (dict(start=0, step=("add", 1), test=("LT", 4), known=1), 1),
}


@pytest.mark.parametrize(("loop", "trips"), LOOPS.values(), ids=LOOPS)
def test_trip_counts(loop: Mapping[str, object], trips: int) -> None:
    result = counting_loop(**loop)  # type: ignore[arg-type]
    assert result.total == (6144 * trips, 6144 * trips)


def test_unknown_trip_count_is_unbounded() -> None:
    result = counting_loop(start=0, step=("add", 1), test=("LT", 9), dynamic=True)
    assert result.by_axes == {"model": (0, None)}
    assert result.total == (0, None)


def test_inner_loop_bounded_by_the_outer_counter() -> None:
    """for i in range(5): for j in range(i): all-reduce — 0 + 1 + 2 + 3 + 4 = 10 executions."""
    inner_shape, outer_shape = tuple_of(SCALAR, SCALAR, F32_1K), tuple_of(SCALAR, F32_1K)
    inner, inner_test, outer, outer_test = (Builder(i) for i in (2, 3, 4, 5))
    state = inner.parameter(inner_shape)
    following = inner.add("add", SCALAR, [inner.element(SCALAR, state, 0), inner.constant(1)])
    reduced = inner.add("all-reduce", operands=[inner.element(F32_1K, state, 2)], extra=MODEL)
    inner.add("tuple", inner_shape, [following, inner.element(SCALAR, state, 1), reduced])
    state = inner_test.parameter(inner_shape)
    inner_test.compare(inner_test.element(SCALAR, state, 0), inner_test.element(SCALAR, state, 1), "LT")
    state = outer.parameter(outer_shape)
    counter = outer.element(SCALAR, state, 0)
    initial = outer.add("tuple", inner_shape, [outer.constant(0), counter, outer.element(F32_1K, state, 1)])
    ran = outer.add("while", inner_shape, [initial], called=[2, 3])
    following = outer.add("add", SCALAR, [counter, outer.constant(1)])
    outer.add("tuple", outer_shape, [following, outer.element(F32_1K, ran, 2)])
    state = outer_test.parameter(outer_shape)
    outer_test.compare(outer_test.element(SCALAR, state, 0), outer_test.constant(5), "LT")

    def add(b: Builder, x: int) -> None:
        b.add("while", outer_shape, [b.add("tuple", outer_shape, [b.constant(0), x])], called=[4, 5])

    assert count_of(add, inner, inner_test, outer, outer_test).total == (61440, 61440)


def test_conditional_runs_one_branch() -> None:
    one, other = Builder(2), Builder(3)
    one.add("all-reduce", operands=[one.parameter()], extra=MODEL)
    other.add("all-reduce", operands=[other.parameter()], extra=DATA)
    result = count_of(
        lambda b, x: b.add("conditional", operands=[b.parameter(SCALAR, 1), x, x], called=[2, 3]), one, other
    )
    assert result.by_axes == {"model": (0, 6144), "data": (0, 4096)}
    assert result.by_kind == {"all-reduce": (4096, 6144)}
    assert result.total == (4096, 6144)
