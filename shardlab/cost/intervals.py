"""Lengths of unions and differences of time intervals: what is hidden is not the sum of what overlaps."""

from __future__ import annotations

from collections.abc import Iterable

Interval = tuple[float, float]  # from, to; empty where to <= from


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same set of points as disjoint intervals in order."""
    merged: list[Interval] = []
    for start, end in sorted(one for one in intervals if one[0] < one[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def length(intervals: Iterable[Interval]) -> float:
    """How much of the line they cover."""
    return sum(end - start for start, end in union(intervals))


def subtract(intervals: Iterable[Interval], without: Iterable[Interval]) -> list[Interval]:
    """The part of `intervals` that no interval of `without` covers."""
    left: list[Interval] = []
    holes = union(without)
    first = 0
    for start, end in union(intervals):
        while first < len(holes) and holes[first][1] <= start:
            first += 1
        at = start
        for hole_start, hole_end in holes[first:]:
            if hole_start >= end:
                break
            if hole_start > at:
                left.append((at, hole_start))
            at = max(at, hole_end)
        if at < end:
            left.append((at, end))
    return left


def overlap(intervals: Iterable[Interval], window: Interval) -> float:
    """How much of a window they cover."""
    return length((max(start, window[0]), min(end, window[1])) for start, end in intervals)
