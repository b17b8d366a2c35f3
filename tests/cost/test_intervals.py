"""Unions and differences against sets of unit cells."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from shardlab.cost.intervals import length, overlap, subtract, union

INTERVALS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=12)


def cells(intervals: list[tuple[int, int]]) -> set[int]:
    return {cell for start, end in intervals for cell in range(start, end)}


@given(INTERVALS)
def test_a_union_covers_each_point_once(found: list[tuple[int, int]]) -> None:
    merged = union(found)
    assert cells(merged) == cells(found)  # type: ignore[arg-type]
    assert length(found) == len(cells(found))
    assert all(before[1] < after[0] for before, after in pairwise(merged))


@given(INTERVALS, INTERVALS)
def test_what_is_subtracted_is_gone(found: list[tuple[int, int]], without: list[tuple[int, int]]) -> None:
    assert cells(subtract(found, without)) == cells(found) - cells(without)  # type: ignore[arg-type]


@given(INTERVALS, st.integers(0, 30), st.integers(0, 30))
def test_overlap_is_what_lies_inside(found: list[tuple[int, int]], start: int, end: int) -> None:
    assert overlap(found, (start, end)) == len(cells(found) & set(range(start, end)))
