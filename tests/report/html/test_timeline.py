"""What fills a step: every moment once, and nothing else."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from timelines import block, gather, kernel, line, loop

from shardlab.cost.blocks import Block, PathEntry
from shardlab.cost.timeline import Timeline
from shardlab.report.html import timeline
from shardlab.report.html.timeline import COMPUTE, EXPOSED, HIDDEN, UNFOLDED, WAITING, part_of, step_parts

# A turn of 4 s: a gather for 3 s, compute from 2 s on. Exposed 2 s, hidden 1 s, plain compute 1 s.
TURN = block(4.0, gather(0.0, 3.0), kernel(2.0, 2.0))


def lengths(line_: Timeline) -> dict[str, float]:
    return {name: sum(end - start for start, end in parts) for name, parts in step_parts(line_).items()}


def test_loops_count_turn_by_turn() -> None:
    """5 turns, then 1 s of compute and 2 s of nothing."""
    found = lengths(line(block(23.0, loop(0.0, TURN, 5), kernel(20.0, 1.0))))
    assert found == {COMPUTE: 6.0, HIDDEN: 5.0, EXPOSED: 10.0, WAITING: 2.0, UNFOLDED: 0.0}


def test_what_a_loop_hides_behind_is_not_its_whole_time() -> None:
    """A gather beside a loop of one turn: exposed while the loop does not compute, from 0 to 2 s."""
    assert lengths(line(block(4.0, gather(0.0, 4.0), loop(0.0, TURN, 1))))[EXPOSED] == 2.0


times = st.floats(0, 10, allow_nan=False).map(lambda value: round(value, 3))


@given(st.lists(st.tuples(st.booleans(), times, times), max_size=8), st.integers(1, 4))
def test_parts_are_disjoint_and_make_the_step(found: list[tuple[bool, float, float]], turns: int) -> None:
    events = [(gather if moves else kernel)(start, length) for moves, start, length in found]
    body = block(20.0, *events)
    whole: Block = block(20.0 * turns + 3, loop(1.0, body, turns))
    parts = step_parts(line(whole))
    ordered = sorted(one for part in parts.values() for one in part)
    assert sum(end - start for start, end in ordered) == pytest.approx(whole.duration_s)
    assert all(before[1] <= after[0] + 1e-9 for before, after in pairwise(ordered))


def test_stretches_end_where_loops_and_ticks_do() -> None:
    """A loop is one stretch; between 0 and its start the step is cut every hundredth."""
    cuts = timeline._cuts(line(block(100.0, kernel(0.0, 10.0), loop(10.0, TURN, 20), kernel(90.0, 10.0))))
    assert [cut for cut in cuts if 9 < cut < 92] == [10.0, 90.0, 91.0]


@pytest.mark.parametrize(
    ("kind", "axes", "said"),
    [("wait", None, WAITING), ("fusion", None, COMPUTE), ("all-gather", ("fsdp",), "all-gather over fsdp")],
    ids=["bubble", "kernel", "collective"],
)
def test_the_critical_path_is_told_apart(kind: str, axes: tuple[str, ...] | None, said: str) -> None:
    entry = PathEntry(name="x", kind=kind, stream="s", layer="", axes=axes, time_s=1.0)
    assert part_of(entry) == said


def test_what_is_too_short_to_draw_is_counted() -> None:
    """10 s, of which 1 ms of compute cannot be seen."""
    spans, left_out = timeline._spans(block(10.0, kernel(0.0, 0.001), gather(0.0, 9.0)))
    assert [span.lane for span in spans] == ["collectives", "exposed"]
    assert left_out == "; 1 event too short to draw, 1.00 ms together"
