"""One program for many rows: what is put into its text is what a compile for the row's own counts has."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from validation.data_ways import with_data_ways
from validation.row import plan_text
from validation.substitution import SHARED_LAYERS, SHARED_MICROBATCHES, Counts, with_counts

from shardlab.analysis import attribute
from shardlab.case_report import report_case
from shardlab.compile import compile_case
from shardlab.hardware.catalog import load_machine
from shardlab.program import Program
from shardlab.spec.case import Case, make_case
from shardlab.spec.models import MODELS
from shardlab.spec.plan import plan_from_text
from shardlab.spec.schedule import make_schedule
from shardlab.spec.stages import StageLayout, split_layers
from shardlab.spec.tick_table import TickTable, tick_table

MACHINE = "a100:1x4"
STACK = """\
HloModule step, is_scheduled=true, num_partitions=8

body {
  p = (s32[], bf16[23,1024,1024]{2,1,0}) parameter(0)
  i = s32[] get-tuple-element(p), index=0
  x = bf16[23,1024,1024]{2,1,0} get-tuple-element(p), index=1
  zero = s32[] constant(0)
  layer = bf16[1,1024,1024]{2,1,0} dynamic-slice(x, i, zero, zero), dynamic_slice_sizes={1,1024,1024}
  one = s32[] constant(1)
  next = s32[] add(i, one)
  ROOT out = (s32[], bf16[23,1024,1024]{2,1,0}) tuple(next, x)
}

condition {
  p = (s32[], bf16[23,1024,1024]{2,1,0}) parameter(0)
  i = s32[] get-tuple-element(p), index=0
  n = s32[] constant(23)
  ROOT less = pred[] compare(i, n), direction=LT
}

outer {
  p = (s32[], bf16[23,1024,1024]{2,1,0}) parameter(0)
  loop = (s32[], bf16[23,1024,1024]{2,1,0}) while(p), condition=condition, body=body, \
backend_config={"known_trip_count":{"n":"23"}}
  ROOT again = (s32[], bf16[23,1024,1024]{2,1,0}) copy(loop)
}

ENTRY main {
  x = bf16[23,1024,1024]{2,1,0} parameter(0)
  zero = s32[] constant(0)
  init = (s32[], bf16[23,1024,1024]{2,1,0}) tuple(zero, x)
  steps = (s32[], bf16[23,1024,1024]{2,1,0}) while(init), condition=condition, body=outer, \
backend_config={"known_trip_count":{"n":"13"}}
  y = bf16[23,1024,1024]{2,1,0} get-tuple-element(steps), index=1
  flat = bf16[23552,1024]{1,0} bitcast(y)
  ROOT z = bf16[23552,1024]{1,0} negate(flat)
}
"""


def program(text: str) -> Program:
    return Program(name="step", backend="gpu", hlo_text=text, num_devices=8, mesh={"data": 8})


def test_layers_are_trips_and_extents_of_stacks() -> None:
    found = with_counts(STACK, Counts(layers=6, microbatches=4))
    assert re.findall(r'"n":"(\d+)"', found) == ["6", "4"]
    assert "bf16[6,1024,1024]" in found
    assert "bf16[6144,1024]" in found
    assert not re.search(r"\[23|13\"", found)
    (part,) = attribute(program(found))
    assert sorted(trips.high for trips in part.graph.loops.values() if trips.high) == [4, 6]


def test_what_is_no_shared_program_is_an_error() -> None:
    for text, missing in (
        (STACK.replace('"n":"23"', '"n":"24"'), "23 times"),
        (STACK.replace('"n":"13"', '"n":"12"'), "13 times"),
    ):
        with pytest.raises(ValueError, match=missing):
            with_counts(text, Counts(layers=6, microbatches=4))
    with pytest.raises(ValueError, match="no table of ticks"):
        with_counts(STACK, Counts(layers=6, microbatches=4, stages=2))


SUM = "add {\n  a = f32[] parameter(0)\n  b = f32[] parameter(1)\n  ROOT s = f32[] add(a, b)\n}\n"


def reduced(ways: int, *, gathers: bool = False) -> Program:
    """One collective along data, of `ways`, and one along tensor, of two: 4 MiB each."""
    over_data = [[t + 2 * d for d in range(ways)] for t in (0, 1)]
    over_tensor = [[2 * d, 2 * d + 1] for d in range(ways)]
    data, tensor = (
        str(groups).replace(" ", "").replace("[", "{").replace("]", "}")
        for groups in (over_data, over_tensor)
    )
    first = (
        f"all-gather(g), channel_id=1, replica_groups={data}, dimensions={{0}}, use_global_device_ids=true"
        if gathers
        else f"all-reduce(g), channel_id=1, replica_groups={data}, use_global_device_ids=true, to_apply=add"
    )
    lines = [
        f"HloModule step, is_scheduled=true, num_partitions={2 * ways}\n\n{SUM}\nENTRY main {{",
        "  g = f32[1048576]{0} parameter(0)",
        "  x = f32[1048576]{0} parameter(1)",
        f"  d = f32[{1048576 * (ways if gathers else 1)}]{{0}} {first}",
        f"  ROOT t = f32[1048576]{{0}} all-reduce(x), channel_id=2, replica_groups={tensor}, "
        "use_global_device_ids=true, to_apply=add",
        "}",
    ]
    return Program(
        name="step",
        backend="gpu",
        hlo_text="\n".join(lines) + "\n",
        num_devices=2 * ways,
        mesh={"data": ways, "tensor": 2},
    )


@pytest.mark.parametrize(("ways", "wire"), [(1, 0), (2, 4 << 20), (4, 6 << 20)])
def test_gradients_are_reduced_over_the_rows_own_devices(ways: int, wire: int) -> None:
    """2 (n - 1) / n of 4 MiB, in the time that a program of its own would take; nothing for one device."""
    machine = load_machine(f"a100:1x{2 * ways}")
    (part,) = attribute(reduced(2), machine=load_machine("a100:1x4"))
    data, tensor = with_data_ways(part, ways, machine).analysis.collectives
    assert data.wire_bytes == wire
    assert tensor == part.analysis.collectives[1]
    (own,) = attribute(reduced(ways), machine=machine)
    assert data.time_s == (own.analysis.collectives[0].time_s if ways > 1 else 0.0)


def test_what_cannot_be_priced_for_other_ways_is_an_error() -> None:
    (part,) = attribute(reduced(2, gathers=True), machine=load_machine("a100:1x4"))
    with pytest.raises(ValueError, match="all-gather along data"):
        with_data_ways(part, 4, load_machine("a100:1x8"))
    with pytest.raises(ValueError, match="8 devices on a100:1x4"):
        with_data_ways(part, 4, load_machine("a100:1x4"))


def table_of(stages: int, microbatches: int) -> TickTable:
    layout = StageLayout(stages=stages, virtual=1, counts=split_layers(SHARED_LAYERS * stages, stages))
    return tick_table(make_schedule("1f1b", stages, microbatches), layout)


def ticks_text(table: TickTable, stages: int, trips: int) -> str:
    """The constants of a pipeline as XLA prints them: [tick][stage] branches, microbatches; transfers."""
    count = len(table.transfer)
    rows = [
        "{ " + ", ".join("{ " + ", ".join(map(str, row)) + " }" for row in column) + " }"
        for column in (table.branch, table.microbatch)
    ]
    lines = [
        f"  b = s32[{count},{stages}]{{1,0}} constant({rows[0]})",
        f"  m = s32[{count},{stages}]{{1,0}} constant({rows[1]})",
        f"  t = s32[{count}]{{0}} constant({{{', '.join(map(str, table.transfer))}}})",
        f'  known_trip_count {{"known_trip_count":{{"n":"{trips}"}}}} {{"known_trip_count":{{"n":"23"}}}}',
    ]
    return "\n".join(lines)


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("microbatches", [2, 4, 16])
def test_ticks_are_those_of_the_rows_own_schedule(stages: int, microbatches: int) -> None:
    """Branches keep the program's numbers, which are the row's own here; of its transfers each tick gets one
    that does what the row's own does."""
    shared, own = table_of(stages, SHARED_MICROBATCHES), table_of(stages, microbatches)
    assert own.branches == shared.branches[: len(own.branches)]
    text = ticks_text(shared, stages, len(shared.transfer))
    found = with_counts(text, Counts(layers=23, microbatches=microbatches, stages=stages))
    lines, expected = found.splitlines(), ticks_text(own, stages, len(own.transfer)).splitlines()
    assert [lines[at] for at in (0, 1, 3)] == [expected[at] for at in (0, 1, 3)]
    put_in = [int(value) for value in re.findall(r"\d+", lines[2].partition("constant")[2])]
    for tick, at in enumerate(own.transfer):
        assert set(own.transfers[at].forward) <= set(shared.transfers[put_in[tick]].forward)
        assert set(own.transfers[at].backward) <= set(shared.transfers[put_in[tick]].backward)


def small_case(layers: int, microbatches: int, *, stages: int, remat: str) -> Case:
    """Tensor parallel over what stages leave of four devices: a GPT of width 1,024.

    Without data parallelism: how XLA combines the reductions of gradients depends on their bytes, and so on
    the number of layers (vTrain's 12 layers, TP 2 DP 4: 0.1 %).
    """
    method: dict[str, str | int] = {"remat": remat, "gradient_sums": "bf16", "loss": "unfused"}
    method |= (
        {"pipeline": "1f1b", "microbatches": microbatches} if stages > 1 else {"accumulate": microbatches}
    )
    text = plan_text(MACHINE, {"stage": stages, "tensor": 4 // stages}, method=method)
    model = replace(
        MODELS["megatron-22b"], name="small", layers=layers * stages, embed=1_024, heads=16, kv_heads=16,
        head_dim=64, mlp=4_096, vocab=51_200, context=512,
    )  # fmt: skip
    return make_case(plan_from_text(text, "small"), model, batch=microbatches, seq=512)


@pytest.mark.full
@pytest.mark.parametrize(
    ("stages", "remat", "within"),
    [(1, "full", 1e-3), (2, "full", 1e-3), (1, "none", 1e-3), (2, "none", 3e-2)],
    ids=["one-full", "two-full", "one-none", "two-none"],
)
def test_the_step_is_that_of_a_program_compiled_for_the_counts(
    stages: int, remat: str, within: float
) -> None:
    """Predicted steps of one shared program and of two compiled for their own counts. Stages that keep
    everything are copied otherwise where there are fewer layers: 2.4 % (README)."""
    machine = load_machine(MACHINE)
    shared = compile_case(small_case(SHARED_LAYERS, SHARED_MICROBATCHES, stages=stages, remat=remat))
    for layers, microbatches in ((6, 4), (12, 8)):
        case = small_case(layers, microbatches, stages=stages, remat=remat)
        counts = Counts(layers=layers, microbatches=microbatches, stages=stages)
        own, put_in = (
            report_case(case, one, machine).step_time_s
            for one in (compile_case(case), replace(shared, hlo_text=with_counts(shared.hlo_text, counts)))
        )
        assert own is not None
        assert put_in == pytest.approx(own, rel=within)
