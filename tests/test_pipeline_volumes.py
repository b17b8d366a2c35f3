"""What a pipeline sends over each mesh axis, against closed forms: on CPU, and compiled for GPU and TPU."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache

import published_schedules as published
import pytest
from compiled_plans import scheduled_case
from compilers import otherwise_in_jax_0_10
from second_counter.literature import (
    REMAT_ALL_REDUCES,
    REMAT_SEQUENCE_GATHERS,
    REMAT_SEQUENCE_SCATTERS,
    activation_all_reduce,
)
from strategy_volumes import SummedWhole

from shardlab.analysis import Analysis, analyze
from shardlab.program import Program
from shardlab.spec.case import make_case
from shardlab.spec.models import find_model
from shardlab.spec.params import parameter_table
from shardlab.spec.plan import plan_from_text

pytestmark = pytest.mark.matrix

F32_BYTES = 4
MODEL = replace(find_model("tiny"), name="tiny-8", layers=8)
BATCH, SEQ, MICROBATCHES = 16, 128, 8
SMALL = 2_048  # bytes per step: the loss, and the norm of the gradients
PERMUTE = "collective-permute"
STAGES, DATA, VIRTUAL = 4, 2, 2
TPU = pytest.param("v5e:2x4", marks=[pytest.mark.tpu, pytest.mark.full])
RARELY = ["cpu:8", pytest.param("h100:1x8", marks=[pytest.mark.gpu, pytest.mark.full]), TPU]
BESIDE_DATA = """\
[axes]
data = 2
stage = 4
[params]
stage = ["stage"]
[activations]
batch = ["data"]
[optimizer]
embed = [{zero1}]
[method]
pipeline = "{schedule}"
microbatches = 8
"""
BESIDE_TENSOR = """\
[axes]
stage = 4
tensor = 2
[params]
stage = ["stage"]
heads = ["tensor"]
kv_heads = ["tensor"]
mlp = ["tensor"]
vocab = ["tensor"]
[activations]
norm_seq = [{sequence}]
[method]
pipeline = "1f1b"
microbatches = 8
"""


@dataclass(frozen=True)
class Closed:
    """Bytes that the busiest device sends per step.

    Stages pass one activation or one cotangent per tick: a stage in the middle one of the two at each of the
    2 (m + p - 1) ticks of GPipe and 1F1B (Narayanan et al. 2021, arXiv:2104.04473, section 2.2.1; what it
    sends while idle is not needed, but a permute without it would be another program). Data parallel groups
    all-reduce the gradients of a stage's layers once per step, 2 (d - 1) / d of their bytes (section 3.3.1);
    ZeRO-1 reduce-scatters and gathers instead, (d - 1) / d each (arXiv:1910.02054, section 7.2.1). What
    belongs to no layer is on every stage, and its gradient is summed over the stages too.
    """

    stages: int
    data: int
    activation_bytes: int

    @property
    def one(self) -> Fraction:
        """One activation, or one cotangent."""
        return Fraction(BATCH * SEQ * MODEL.embed, MICROBATCHES * self.data) * self.activation_bytes

    @property
    def activations(self) -> Fraction:
        """Over the stages."""
        return 2 * (MICROBATCHES + self.stages - 1) * self.one

    @property
    def layers(self) -> int:
        """Parameters of one stage's layers."""
        return sum(p.size for p in parameter_table(MODEL) if p.path.startswith("layers/")) // self.stages

    @property
    def others(self) -> int:
        """Parameters that belong to no layer."""
        return sum(p.size for p in parameter_table(MODEL) if not p.path.startswith("layers/"))


def all_reduce(params: int, ways: int) -> Fraction:
    """Of so many f32 gradients; a reduce-scatter and an all-gather together send as much."""
    return Fraction(2 * (ways - 1), ways) * params * F32_BYTES


def activation_bytes(on: str) -> int:
    """Of one element: bf16, which XLA:CPU widens to f32."""
    return 4 if on.startswith("cpu") else 2


@cache
def program(on: str, schedule: str, zero1: bool) -> Program:
    text = BESIDE_DATA.format(schedule=schedule, zero1='"data"' if zero1 else "")
    if schedule == "interleaved":
        text += f"virtual_stages = {VIRTUAL}\n"
    return scheduled_case(make_case(plan_from_text(text), MODEL, on, BATCH, SEQ))


@cache
def compiled(on: str, schedule: str, zero1: bool) -> Analysis:
    return analyze(program(on, schedule, zero1))


def sent(analysis: Analysis) -> dict[str, Fraction]:
    """Exact bytes by axes; what is small is left out."""
    found = {}
    for axes, figures in analysis.totals.by_axes.items():
        low, high = figures["wire_bytes"]
        assert low == high, axes
        if low > SMALL:
            found[axes] = low
    return found


def near(actual: Fraction, expected: Fraction, small: int = SMALL) -> bool:
    """Equal but for the loss and the norms."""
    return 0 <= actual - expected <= small


@pytest.mark.parametrize("on", RARELY)
@pytest.mark.parametrize("schedule", ["1f1b", pytest.param("gpipe", marks=pytest.mark.full)])
def test_data_parallel_stages(on: str, schedule: str) -> None:
    closed = Closed(stages=STAGES, data=DATA, activation_bytes=activation_bytes(on))
    found = sent(compiled(on, schedule, False))
    assert near(found.pop("stage"), closed.activations)
    assert near(found.pop("data"), all_reduce(closed.layers, closed.data))
    assert near(found.pop("data+stage"), all_reduce(closed.others, closed.data * closed.stages))
    assert found == {}


@pytest.mark.parametrize("on", RARELY)
@pytest.mark.parametrize("schedule", ["interleaved", pytest.param("zb-h1", marks=pytest.mark.full)])
def test_schedules_that_pass_more_or_wait(on: str, schedule: str) -> None:
    """Interleaved stages pass v times as much as 1F1B's (arXiv:2104.04473, section 2.2.2): m (p v - 1)
    activations and as many cotangents, in 2 m v + 2 (p - 1) ticks. ZB-H1 passes what 1F1B does, m (p - 1) of
    each, since W sends nothing (arXiv:2401.10241, section 2), in 3 m + p - 1.

    A device sends more: one program for all stages has permutes with fixed pairs, so that pairs are in them
    that pass nothing at that tick, and in some ticks two permutes instead of one (`published.permutes`).
    """
    if schedule == "interleaved":
        rows, links = published.interleaved(STAGES, MICROBATCHES, VIRTUAL), STAGES * VIRTUAL
        assert len(rows) == 2 * MICROBATCHES * VIRTUAL + 2 * (STAGES - 1)
    else:
        rows, links = published.zb_h1(STAGES, MICROBATCHES), STAGES
        assert len(rows) == 3 * MICROBATCHES + STAGES - 1
    ticks = published.sent(rows, STAGES, links)
    assert sum(len(tick.forward) + len(tick.backward) for tick in ticks) == 2 * MICROBATCHES * (links - 1)

    closed = Closed(stages=STAGES, data=DATA, activation_bytes=activation_bytes(on))
    permutes, analysis = published.permutes(ticks), compiled(on, schedule, False)
    assert fabric_bytes(analysis) == sum(map(len, permutes)) * DATA * closed.one
    found = sent(analysis)
    assert near(found.pop("stage"), len(permutes) * closed.one)
    assert near(found.pop("data"), all_reduce(closed.layers, closed.data))
    assert near(found.pop("data+stage"), all_reduce(closed.others, closed.data * closed.stages))
    assert found == {}


def fabric_bytes(analysis: Analysis) -> Fraction:
    """Of all permutes, over all pairs of devices."""
    return sum(
        (row.fabric_bytes * row.executions[0] for row in analysis.collectives if row.kind == PERMUTE),
        Fraction(0),
    )


# What XLA:TPU sums whole of what a stage has.
WHOLE = SummedWhole("data", DATA, ("norm", "attention/"), (("final_norm", 1),), once=True)


@pytest.mark.parametrize("on", RARELY)
def test_zero1_beside_stages(on: str) -> None:
    """Every array has an embed dimension that the data axis splits: its gradient is reduced there first."""
    closed = Closed(stages=STAGES, data=DATA, activation_bytes=activation_bytes(on))
    found = sent(compiled(on, "1f1b", True))
    shard = closed.others // closed.data
    assert near(found.pop("stage"), closed.activations + all_reduce(shard, closed.stages))
    sizes = {
        p.path: p.size // (STAGES if p.path.startswith("layers/") else 1) for p in parameter_table(MODEL)
    }
    more = sum(WHOLE.instead({}, sizes, F32_BYTES, 1).values(), Fraction(0)) if on.startswith("v5e") else 0
    assert near(found.pop("data"), all_reduce(closed.layers + closed.others, closed.data) + more)
    assert found == {}


@pytest.mark.gpu  # XLA:CPU reduces the gradients of each projection's input on their own
@pytest.mark.parametrize(
    "sequence", [pytest.param(False, marks=pytest.mark.full, id="whole"), pytest.param(True, id="sequence")]
)
def test_tensor_parallel_in_stages(sequence: bool) -> None:
    """Each stage moves its own layers' activations, once per microbatch: Megatron's all-reduces, or the
    reduce-scatters and gathers that sequence parallelism makes of them, with full remat.

    A stage in the middle is the least busy; the last adds the head's input gradient and three numbers per
    token for the loss (Shoeybi et al. 2019, arXiv:1909.08053, section 3).
    """
    plan = plan_from_text(BESIDE_TENSOR.format(sequence='"tensor"' if sequence else ""))
    case = make_case(plan, MODEL, "h100:1x8", MICROBATCHES, SEQ)
    low, high = analyze(scheduled_case(case)).totals.by_axes["tensor"]["wire_bytes"]
    one = activation_all_reduce(1, SEQ, MODEL.embed, 2)
    times = MICROBATCHES * MODEL.layers // 4
    halves = REMAT_SEQUENCE_GATHERS + REMAT_SEQUENCE_SCATTERS if sequence else 2 * REMAT_ALL_REDUCES
    assert high is not None
    # Norms see a part of the sequence each: the gradients of a layer's two scales are summed.
    scales = all_reduce(2 * MODEL.embed, 2) if sequence else 0
    assert near(low, times * (halves * one / 2 + scales))
    # With sequence parallelism the head's input was gathered and its gradient is scattered.
    final = all_reduce(MODEL.embed, 2) if sequence else 0
    assert near(high - low, MICROBATCHES * (one + 3 * SEQ * F32_BYTES + final))


@pytest.mark.gpu
@pytest.mark.full
def test_hops_that_are_split_and_gathered() -> None:
    """Megatron's scatter and gather (arXiv:2104.04473, section 4.1): of t devices each sends a part of its
    own, and the t-th part of the bytes; what arrives, an activation and a cotangent per microbatch, is
    gathered within the stage."""
    found = {}
    for hops in ("", '"tensor"'):
        text = BESIDE_TENSOR.format(sequence="").replace("[method]", f"hop_seq = [{hops}]\n[method]")
        case = make_case(plan_from_text(text), MODEL, "h100:1x8", MICROBATCHES, SEQ)
        analysis = analyze(scheduled_case(case))
        permutes = [row for row in analysis.collectives if row.kind == PERMUTE]
        assert all(row.executions[0] == row.executions[1] for row in permutes)
        passed = sum(row.executions[0] * row.wire_bytes for row in permutes)
        low, _ = analysis.totals.by_axes["tensor"]["wire_bytes"]
        found[hops] = passed, low
    one = Fraction(SEQ * MODEL.embed * 2)
    whole, split = found.values()
    assert whole[0] == 2 * (MICROBATCHES + STAGES - 1) * one
    assert split[0] == whole[0] / 2
    assert split[1] - whole[1] == MICROBATCHES * 2 * one / 2


def test_stages_need_nothing_else_of_each_other() -> None:
    """No weight, gradient of a layer or optimizer state passes between stages: permutes of activations, and
    once per step the gradients of what belongs to no layer, and scalars."""
    rows = [row for row in compiled("cpu:8", "1f1b", False).collectives if "stage" in (row.axes or ())]
    assert {row.kind for row in rows} == {PERMUTE, "all-reduce"}
    assert all(row.executions == (1, 1) for row in rows if row.kind == "all-reduce")


@pytest.mark.gpu
@otherwise_in_jax_0_10("casts a layer's weights at every tick")
def test_weights_are_cast_once_and_gradients_added_in_place() -> None:
    """Of a stage's two layers, the MLP's kernels: no layer's f32 weight is cast to bf16 in the loops, and no
    layer's f32 sum is taken out of its stack; both were, and were a quarter of Megatron 175B's HBM
    traffic."""
    text = program("h100:1x8", "1f1b", False).hlo_text
    layer = f"{MODEL.embed},{MODEL.mlp}"
    assert re.search(rf"bf16\[1,2,{layer}\]\S* convert\(", text)  # of both, on this stage
    assert not re.search(rf"bf16\[1,{layer}\]\S* convert\(", text)
    computations = text.split("\n\n")
    sums = [body for body in computations if re.search(rf"f32\[2,{layer}\]\S* dynamic-update-slice\(", body)]
    assert sums
    assert all(re.search(rf"f32\[1,{layer}\]\S* dynamic-slice\(", body) for body in sums)


@pytest.mark.gpu
@pytest.mark.full
def test_layers_that_are_written_out_are_multiplied_where_they_are() -> None:
    """No kernel is taken out of a stack, and a gradient's sum is part of its product: the f32 sum goes in,
    and comes out with the product added. Of the MLP's last kernel: XLA joins the first two."""
    text = BESIDE_DATA.format(schedule="1f1b", zero1="") + "scan_layers = false\n"
    model = replace(MODEL, layers=STAGES, embed=1_024, head_dim=128, mlp=4_096)
    case = make_case(plan_from_text(text), model, "h100:1x8", BATCH, SEQ)
    computations = scheduled_case(case).hlo_text.split("\n\n")
    layer = f"{model.mlp},{model.embed}"
    assert not any(re.search(rf"bf16\[(1,)?{layer}\]\S* dynamic-slice\(", body) for body in computations)
    products = [body for body in computations if re.search(rf"f32\[{layer}\]\S* dot\(", body)]
    sums = [body for body in products if re.search(rf"ROOT \S+ = f32\[{layer}\]\S* add\(", body)]
    assert len(sums) == len(products) == 2  # backward of the first stage, and of others
