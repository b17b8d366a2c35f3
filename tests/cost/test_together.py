"""Several programs of one step: sums by hand."""

from __future__ import annotations

from shardlab.cost.blocks import Block, PathEntry
from shardlab.cost.flops import Flops, NotCountedWork
from shardlab.cost.hbm import Traffic
from shardlab.cost.instructions import InstructionCost, StepCost
from shardlab.cost.timeline import Timeline
from shardlab.cost.together import CostPart, TimePart, costs_together, timelines_together


def cost(flops: int, read: int | None, dtype: str = "bf16") -> StepCost:
    row = InstructionCost(
        name="dot.1",
        computation="main",
        kind="dot",
        executions=(2, None),
        matmul_flops=flops,
        attention_flops=0,
        recompute=False,
        traffic=Traffic(1, 1),
        phase="forward",
        layer="",
        op_name="",
        source="",
    )
    unknown = NotCountedWork("call.1", "custom-call", "opaque")
    return StepCost(
        flops=Flops(
            matmul=flops, attention=1, by_dtype={dtype: flops}, unknown=(unknown,), notes=("a note",)
        ),
        recompute_flops=10,
        read_bytes=read,
        written_bytes=3,
        other_bytes=0,
        instructions=(row,),
        not_counted=(unknown,),
        unpriced=frozenset({("main", "call.1")}),
    )


def line(seconds: float, *unknown: str) -> Timeline:
    path = (PathEntry(name="dot.1", kind="dot", stream="compute", layer="", axes=None, time_s=seconds),)
    root = Block(
        events=(),
        duration_s=seconds,
        compute_s=seconds / 2,
        communication_s=seconds,
        exposed_s=seconds / 4,
        path=path,
    )
    known = not unknown
    return Timeline(
        step_time_s=seconds if known else None,
        compute_s=seconds / 2 if known else None,
        communication_s=seconds if known else None,
        exposed_communication_s=seconds / 4 if known else None,
        critical_path=path if known else (),
        root=root,
        unknown=unknown,
    )


def test_costs_count_as_often_as_their_program_runs() -> None:
    both = costs_together([CostPart("many", 16, cost(100, 5)), CostPart("one", 1, cost(7, 9, "f32"))])
    assert (both.flops.matmul, both.flops.attention, both.flops.total) == (1607, 17, 1624)
    assert both.flops.by_dtype == {"bf16": 1600, "f32": 7}
    assert (both.recompute_flops, both.read_bytes, both.written_bytes) == (170, 89, 51)
    assert [(row.computation, row.executions) for row in both.instructions] == [
        ("many/main", (32, None)),
        ("one/main", (2, None)),
    ]
    assert (len(both.flops.unknown), both.flops.notes, len(both.not_counted)) == (2, ("a note",), 2)


def test_what_one_does_not_know_the_step_does_not_know() -> None:
    both = costs_together([CostPart("many", 16, cost(100, None)), CostPart("one", 1, cost(7, 9))])
    assert both.read_bytes is None
    assert both.written_bytes == 51
    together = timelines_together([TimePart("many", 2, line(3.0)), TimePart("one", 1, line(1.0, "call.1"))])
    assert (together.step_time_s, together.compute_s, together.unknown) == (None, None, ("call.1",))
    assert together.critical_path == ()


def test_one_program_that_runs_once_is_itself() -> None:
    alone, its_line = cost(100, 5), line(2.0)
    assert costs_together([CostPart("one", 1, alone)]) is alone
    assert timelines_together([TimePart("one", 1, its_line)]) is its_line


def test_one_program_that_runs_often_keeps_its_names() -> None:
    often = costs_together([CostPart("one", 4, cost(100, 5))])
    assert [(row.computation, row.executions) for row in often.instructions] == [("main", (8, None))]
    assert often.flops.matmul == 400
    assert [entry.name for entry in timelines_together([TimePart("one", 4, line(2.0))]).critical_path] == [
        "dot.1"
    ]


def test_programs_run_one_after_another() -> None:
    step = timelines_together([TimePart("many", 16, line(2.0)), TimePart("one", 1, line(40.0))])
    assert (step.step_time_s, step.compute_s) == (72.0, 36.0)
    assert (step.communication_s, step.exposed_communication_s) == (72.0, 18.0)
    assert [(entry.name, entry.time_s) for entry in step.critical_path] == [
        ("one/dot.1", 40.0),
        ("many/dot.1", 32.0),
    ]
    assert [
        (event.name, event.start_s, event.duration_s, event.iterations) for event in step.root.events
    ] == [
        ("many", 0.0, 32.0, 16.0),
        ("one", 32.0, 40.0, 1.0),
    ]
    assert sum(entry.time_s for entry in step.root.path) == step.root.duration_s
