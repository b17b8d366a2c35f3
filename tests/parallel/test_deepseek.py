"""DeepSeek's model on eight devices: it trains and decodes as one device does, and moves what it should."""

from dataclasses import replace
from fractions import Fraction
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_plans import compiled_plan, scheduled_case
from emulated import PLANS, TENSOR, Rules, case_of, check_equal, inference, plan, step_of

from shardlab.analysis import CollectiveRow, analyze
from shardlab.cost.flops import hardware_flops, model_flops
from shardlab.errors import Infeasible
from shardlab.hlo.reader import parse
from shardlab.model.experts import Load, moved_against_load
from shardlab.parallel.optimizer import OptimizerConfig, global_norm, make_optimizer
from shardlab.spec.case import make_case
from shardlab.spec.models import LatentAttention, find_model
from shardlab.spec.params import parameter_table
from shardlab.spec.plan import Plan, plan_from_text

DEEPSEEK = replace(
    find_model("tiny-deepseek"),
    name="small-deepseek",
    layers=2,
    embed=32,
    head_dim=12,
    mlp=16,
    dense_mlp=64,
    vocab=100,
    context=32,
    num_experts=8,
    experts_per_token=4,
    balance_coefficient=0.02,
    latent=LatentAttention(query_rank=16, kv_rank=8, nope_dim=8, rope_dim=4, value_dim=8),
)
FSDP: Rules = {"embed": ("fsdp",), "latent": ("fsdp",)}
EXPERT: Rules = {"expert": ("expert",)}
THREE: Rules = {"batch": ("fsdp", "expert"), "expert": ("expert",)}


def three_axes(**method: Any) -> Plan:
    axes = {"fsdp": 2, "expert": 2, "tensor": 2}
    return plan(axes, FSDP | EXPERT | TENSOR, {**THREE, "norm_seq": ("tensor",)}, **method)


@pytest.mark.matrix
def test_trains_as_one_device_with_microbatches() -> None:
    """Experts x FSDP x tensor x accumulation. The balance of sequences does not depend on microbatches, so
    one device takes the batch at once."""
    check_equal(case_of(three_axes(accumulate=2), DEEPSEEK))


def blocks() -> Plan:
    """Attention split over all devices, experts whole in `embed` and split over `expert`."""
    asked = plan_from_text(
        """
[axes]
fsdp = 2
expert = 4
[params]
embed = ["fsdp"]
vocab = []
[activations]
batch = ["fsdp", "expert"]
[blocks.moe.params]
embed = []
expert = ["expert"]
[blocks.moe.optimizer]
embed = ["fsdp"]
[blocks.attention.params]
embed = ["fsdp", "expert"]
latent = ["fsdp", "expert"]
"""
    )
    return asked.model_copy(update={"on": "cpu:8"})


def test_rules_of_blocks_place_their_parameters() -> None:
    asked = blocks()
    assert asked.activations["expert"] == ("expert",)
    step = step_of(case_of(asked, DEEPSEEK))
    state = step.arguments[0]

    def splits(arrays: dict[str, Any], path: str) -> list[object]:
        return [*arrays[path].sharding.spec]

    moments = state.optimizer[1][0].mu
    assert splits(state.params, "layers/moe/up/kernel") == [None, "expert", None, None]
    assert splits(moments, "layers/moe/up/kernel") == [None, "expert", "fsdp", None]
    query = [None, ("fsdp", "expert"), None, None]
    for stack in ("layers", "dense_layers"):
        assert splits(state.params, f"{stack}/attention/query_up/kernel") == query
        assert splits(moments, f"{stack}/attention/query_up/kernel") == query
    assert splits(state.params, "layers/shared/up/kernel") == [None, "fsdp", None]


@pytest.mark.full
def test_blocks_train_as_one_device() -> None:
    check_equal(case_of(blocks(), DEEPSEEK))


@pytest.mark.full
@pytest.mark.parametrize("accumulate", [1, 2])
def test_trains_as_one_device_with_data_parallel_groups(accumulate: int) -> None:
    asked = plan(
        {"data": 2, "expert": 4},
        EXPERT,
        {"batch": ("data", "expert"), "expert": ("expert",)},
        {"embed": ("data",), "latent": ("data",)},
        accumulate=accumulate,
    )
    check_equal(case_of(asked, DEEPSEEK))


def test_choices_are_moved_against_the_load() -> None:
    """arXiv:2408.15664, algorithm 1: every bias by 0.001, down where the expert has more than the mean."""
    bias = "layers/moe/router/bias"
    table = tuple(spec for spec in parameter_table(DEEPSEEK) if spec.path in (bias, "final_norm/scale"))
    params = {spec.path: jnp.zeros(spec.shape) for spec in table}
    optimizer = make_optimizer(OptimizerConfig(), table)
    chosen = jnp.array([[1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.0]])
    load = Load(chosen, chosen, chosen)
    scale = jax.grad(lambda b: (3 * moved_against_load(jnp.ones(2), b, load)).sum())(jnp.zeros(8))
    np.testing.assert_allclose(scale, [0.5, 0, 0, 0, 0, 0, 0, -0.5])
    gradients = {**params, bias: scale[None]}
    updates, state = optimizer.update(gradients, optimizer.init(params), params)
    np.testing.assert_allclose(updates[bias], [[-0.001, 0, 0, 0, 0, 0, 0, 0.001]])
    assert float(global_norm(gradients)) == 0
    assert bias not in state[1][0].mu


@pytest.mark.full
@pytest.mark.parametrize("cache", [(), ("tensor",)], ids=["whole", "split"])
def test_decodes_as_one_device(cache: tuple[str, ...]) -> None:
    """The cache has no heads: it is whole on every device of tensor parallelism, or split over positions."""
    heads = {axis: names for axis, names in TENSOR.items() if axis != "kv_heads"}
    axes = {"fsdp": 2, "expert": 2, "tensor": 2}
    asked = plan(axes, FSDP | EXPERT | heads, {**THREE, "cache": cache})
    expected, _ = inference(PLANS["one-device"], DEEPSEEK)
    np.testing.assert_allclose(inference(asked, DEEPSEEK)[0], expected, rtol=1e-4, atol=1e-5)


MOE = DEEPSEEK.layers - DEEPSEEK.dense_layers
# Two layers of experts: of a loop of one, XLA leaves no loop, and merges what remat computes again.
WIDE = replace(DEEPSEEK, name="wide-deepseek", layers=3, embed=128, mlp=128, dense_mlp=256, vocab=512)


def data_and_experts(**method: Any) -> Plan:
    axes, batch = {"data": 2, "expert": 4}, ("data", "expert")
    return plan(axes, EXPERT, {"batch": batch, "expert": ("expert",)}, **method)


def exchanged(layers: int, slots: int, embed: int, element_bytes: int) -> Fraction:
    """Bytes per device and pass over the batch, with full remat: in every layer of experts rows go out and
    answers back, forward, forward again, and backward (GShard, arXiv:2006.16668, section 3.1)."""
    return layers * 6 * Fraction(3, 4) * slots * embed * element_bytes


def sent(rows: list[CollectiveRow], dtype: str) -> Fraction:
    """Bytes per device and step of all-to-alls between experts."""
    found = [r for r in rows if (r.kind, r.axes, r.dtypes) == ("all-to-all", ("expert",), (dtype,))]
    assert all("layers/moe/experts" in row.layer for row in found)
    assert all(row.executions[0] == row.executions[1] for row in found)
    return sum((row.wire_bytes * row.executions[0] for row in found), Fraction(0))


def check_absent(rows: list[CollectiveRow]) -> None:
    """Over the experts' axis neither kernels nor tokens are gathered; the shared expert and the dense layers
    exchange nothing; and of what goes over data, only gradients are large."""
    for row in rows:
        axes = row.axes or ("unknown",)
        if "expert" in axes:
            assert row.kind in ("all-to-all", "ragged-all-to-all", "all-reduce"), row
            assert row.kind != "all-reduce" or "moe/experts" not in row.layer, row
        if row.kind == "all-to-all":
            assert "shared" not in row.layer and "dense_layers" not in row.layer, row


@pytest.mark.matrix
def test_what_experts_exchange_for_every_microbatch() -> None:
    """16 sequences of 16 over 8 devices in 2 microbatches: 16 tokens, so 4 · 1.25 · 16 / 8 = 10 slots each.
    Over data, gradients are reduced once per step."""
    asked = data_and_experts(experts="capacity 1.25", accumulate=2)
    step = step_of(case_of(asked, DEEPSEEK))
    rows = list(
        analyze(step.function.lower(*step.arguments).compile().as_text(), axes=asked.axes).collectives
    )
    assert sent(rows, "f32") == 2 * exchanged(MOE, 8 * 10, DEEPSEEK.embed, 4)
    check_absent(rows)
    over_data = [row for row in rows if row.axes == ("data",)]
    assert over_data and all(row.kind == "all-reduce" and row.executions == (1, 1) for row in over_data)
    owned = 3 * MOE * 2 * DEEPSEEK.embed * DEEPSEEK.mlp * 4  # kernels of two experts of eight
    assert sum(row.wire_bytes for row in over_data) >= owned  # 2 · 1/2 of them


@pytest.mark.full
@pytest.mark.parametrize(
    "machine",
    [pytest.param("h100:1x8", marks=pytest.mark.gpu), pytest.param("v5e:2x4", marks=pytest.mark.tpu)],
)
def test_what_experts_exchange_ahead_of_time(machine: str) -> None:
    """8 sequences of 256 over 8 devices: 256 tokens, 4 · 1.25 · 256 / 8 = 160 slots per expert, bf16."""
    asked = data_and_experts(experts="capacity 1.25")
    program = scheduled_case(make_case(asked, WIDE, machine, batch=8, seq=256))
    rows = list(analyze(program).collectives)
    assert sent(rows, "bf16") == exchanged(2, 8 * 160, WIDE.embed, 2)
    check_absent(rows)


@pytest.mark.full
@pytest.mark.gpu
def test_what_deepseek_v3_exchanges_on_2048_gpus() -> None:
    """58 layers; 4,096 tokens per GPU, 8 · 1.25 · 4,096 / 256 = 160 slots for each of 256 experts over 64."""
    case, program, _ = compiled_plan("h100x2048-fsdp32-expert64-deepseek-v3")
    rows = list(analyze(program, axes=case.plan.axes).collectives)
    assert sent(rows, "bf16") == 58 * 6 * Fraction(63, 64) * 160 * 256 * 7_168 * 2
    check_absent(rows)


def test_a_pipeline_has_layers_of_one_kind() -> None:
    asked = plan({"stage": 2}, {"stage": ("stage",)}, {}, pipeline="1f1b", microbatches=2)
    with pytest.raises(Infeasible, match="leading dense layers in a pipeline"):
        make_case(asked, DEEPSEEK, "cpu:2", batch=4, seq=16)


DENSE = replace(
    DEEPSEEK, name="latent", vocab=128, num_experts=0, shared_experts=0, dense_layers=0, router_bias=False,
)  # fmt: skip
# Of one layer: down to 16, up to 8 heads of 12; down to 8 + 4, up to 8 heads of 8 + 8; back to 32; an MLP.
WEIGHTS = 32 * 16 + 16 * 8 * 12 + 32 * (8 + 4) + 8 * 8 * (8 + 8) + 8 * 8 * 32 + 3 * 32 * 16
HEAD = 32 * 128


@pytest.mark.full
@pytest.mark.parametrize(
    ("workload", "flops"),
    [
        # 6·N·D, and of 8 heads and all 16² pairs forward q·k over 12 and p·v over 8, backward twice each.
        ("train", 16 * (6 * 16 * (2 * WEIGHTS + HEAD) + 2 * 2 * 8 * 16**2 * 3 * (12 + 8))),
        # One token: in the latent space q·k over 8 + 4 and p·v over 8, for 16 positions.
        ("decode", 16 * 2 * (2 * WEIGHTS + HEAD + 2 * 8 * 16 * (8 + 4 + 8))),
    ],
)
def test_flops_of_latent_attention_are_closed_forms(workload: Literal["train", "decode"], flops: int) -> None:
    asked = plan({"data": 1}, {}, {"batch": ("data",)}, remat="none")
    step = step_of(case_of(asked, DENSE, workload=workload))
    (module,) = parse(step.function.lower(*step.arguments).compile().as_text())
    assert hardware_flops(module).total == flops
    assert model_flops(DENSE, 16, 16, workload, "full") == flops
