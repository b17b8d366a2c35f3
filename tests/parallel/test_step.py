"""Steps on eight emulated devices: every plan trains alike, and what it is built of stays where the plan
says."""

import math
import re
from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
from emulated import (
    GROUPED,
    OPTIMIZER,
    PLANS,
    SMALL,
    asked,
    batch_for,
    case_of,
    curve,
    inference,
    mesh_of,
    plan,
    state_of,
    step_of,
)

from shardlab.errors import Infeasible
from shardlab.parallel.step import TrainState, build_step, init_state
from shardlab.spec.models import ModelConfig

ALWAYS = {"fsdp", "data-fsdp-tensor"}
MANY = [
    pytest.param(name, marks=[] if name in ALWAYS else pytest.mark.matrix)
    for name in PLANS
    if name != "one-device"
]


@cache
def truth(model: ModelConfig = SMALL) -> np.ndarray:
    """(loss, gradient norm) per step on one device."""
    return np.array(curve(case_of(PLANS["one-device"], model)))


@pytest.mark.parametrize("name", MANY)
def test_every_plan_trains_alike(name: str) -> None:
    """f32 sums in another order: five steps of a model of depth 2 stay within 1e-5 of each other."""
    np.testing.assert_allclose(curve(case_of(PLANS[name])), truth(), rtol=1e-5)


def test_the_loss_falls_and_depends_on_the_seed() -> None:
    assert truth()[-1, 0] < truth()[0, 0] - 0.2
    other = curve(case_of(PLANS["one-device"]), steps=1, seed=1)
    assert abs(other[0][0] - truth()[0, 0]) > 1e-3


@pytest.mark.parametrize(
    "ways", [pytest.param(4, marks=pytest.mark.matrix), 8], ids=lambda ways: f"2-kv-heads-over-{ways}"
)
def test_replicated_kv_heads_train_alike(ways: int) -> None:
    rules = {axis: ("tensor",) for axis in ("heads", "kv_heads", "mlp", "vocab")}
    grouped = plan({"data": 8 // ways, "tensor": ways}, rules, {"batch": ("data",)})
    np.testing.assert_allclose(curve(case_of(grouped, GROUPED)), truth(GROUPED), rtol=1e-5)


def test_accumulation_equals_one_big_batch() -> None:
    """On one device; `test_equal.py` holds accumulating meshes against that."""
    method = PLANS["one-device"].method.model_copy(update={"accumulate": 2})
    accumulating = PLANS["one-device"].model_copy(update={"method": method})
    np.testing.assert_allclose(curve(case_of(accumulating)), truth(), rtol=1e-5)


@pytest.mark.matrix
def test_tied_embeddings_and_biases_train_alike() -> None:
    model = replace(
        SMALL,
        name="gpt2",
        norm="layernorm",
        activation="gelu",
        positions="learned",
        tied_embeddings=True,
        bias=True,
    )
    np.testing.assert_allclose(curve(case_of(PLANS["data-fsdp-tensor"], model)), truth(model), rtol=1e-5)


def test_the_state_is_donated_and_stays_in_place() -> None:
    case = case_of(PLANS["zero1"])
    step, state = step_of(case), state_of(case)
    after, _ = step.function(state, batch_for(step, case))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    for old, new, abstract in zip(*map(jax.tree.leaves, (state, after, step.arguments[0])), strict=True):
        assert old.sharding.is_equivalent_to(new.sharding, new.ndim)
        assert new.sharding.is_equivalent_to(abstract.sharding, new.ndim)


def shard_elements(tree: object) -> int:
    """Elements that the first device holds."""
    return sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(tree))


@cache
def fresh_state(name: str) -> TrainState:
    """What `init_state` gives on the mesh of a plan."""
    plan = PLANS[name]
    return init_state(case_of(plan), mesh_of(plan), 0, optimizer=OPTIMIZER)


@pytest.mark.parametrize("name", ["fsdp", "data-fsdp-tensor"])
def test_a_fresh_state_has_the_same_numbers_on_every_mesh(name: str) -> None:
    expected = fresh_state("one-device")
    for found, alone, there in zip(
        *map(jax.tree.leaves, (fresh_state(name), expected, step_of(case_of(PLANS[name])).arguments[0])),
        strict=True,
    ):
        np.testing.assert_array_equal(found, alone)
        assert found.sharding.is_equivalent_to(there.sharding, found.ndim)


@pytest.mark.parametrize(
    ("name", "params_split", "moments_split"),
    [("data", 1, 1), ("zero1", 1, 8), ("fsdp", 8, 8), ("hybrid", 4, 4)],
)
def test_each_device_holds_its_share(name: str, params_split: int, moments_split: int) -> None:
    """Every array has an embed dimension that 8 divides, so shares are exact. Counters are the rest of the
    state."""
    state = fresh_state(name)
    total = sum(leaf.size for leaf in state.params.values())
    counters = sum(leaf.ndim == 0 for leaf in jax.tree.leaves(state.optimizer))
    assert shard_elements(state.params) == total // params_split
    assert shard_elements(state.optimizer) - counters == 2 * total // moments_split


def test_llama_405b_is_described_without_allocating() -> None:
    model = ModelConfig(
        name="llama3-405b",
        layers=126,
        embed=16_384,
        heads=128,
        kv_heads=8,
        head_dim=128,
        mlp=53_248,
        vocab=128_256,
        context=8_192,
    )
    before = sum(array.nbytes for array in jax.live_arrays())
    step = step_of(case_of(PLANS["data-fsdp-tensor"], model))
    params = step.arguments[0].params
    assert sum(leaf.size for leaf in params.values()) == 405_853_388_800  # 405 B, as published
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(step.arguments))
    assert sum(array.nbytes for array in jax.live_arrays()) == before


def test_operations_carry_the_path_of_their_layer() -> None:
    step = step_of(case_of(PLANS["data"]))
    text = step.function.lower(*step.arguments).compile().as_text()
    names = "\n".join(re.findall(r'op_name="([^"]*)"', text))
    for part in (
        "attention/query",
        "attention/key",
        "attention/kernel",
        "attention/output",
        "mlp/gate",
        "mlp/down",
    ):
        assert re.search(rf"layers\)*/.*{part}", names), part
    for part in ("embedding", "final_norm", "head", "loss", "optimizer"):
        assert re.search(rf"[/(]{part}[/)]", names), part


@pytest.mark.parametrize("name", ["tensor-sequence", "data-fsdp-tensor"])
def test_inference_on_a_mesh_equals_one_device(name: str) -> None:
    """Logits of prefill, then of one decoded token, whose cache is prefill's."""
    np.testing.assert_allclose(inference(PLANS[name], GROUPED)[0], on_one_device(), rtol=1e-4, atol=1e-5)


@cache
def on_one_device() -> np.ndarray:
    return inference(PLANS["one-device"], GROUPED)[0]


@pytest.mark.parametrize(
    ("method", "model", "reason"),
    [
        pytest.param({"pipeline": "1f1b", "microbatches": 2}, SMALL, "without stages", id="pipeline"),
        pytest.param({"context": "ring"}, SMALL, "context", id="context"),
        pytest.param({"attention": "cudnn"}, SMALL, "cudnn does not run on cpu", id="attention"),
        pytest.param(
            {}, replace(SMALL, positions="learned", context=8), "8 learned positions", id="positions"
        ),
        pytest.param({"accumulate": 3}, SMALL, "3 microbatches", id="microbatches"),
        pytest.param({"loss_parts": 3}, SMALL, "loss_parts = 3 of 16 tokens", id="loss-parts"),
    ],
)
def test_what_the_model_lacks(method: dict[str, object], model: ModelConfig, reason: str) -> None:
    asked = plan({"data": 8}, {}, {"batch": ("data",)}, **method)
    with pytest.raises(Infeasible, match=reason):
        build_step(case_of(asked, model), mesh_of(asked), target="cpu")


@pytest.mark.parametrize(
    "remat", ["none", *(pytest.param(r, marks=pytest.mark.matrix) for r in ("matmuls", "full"))]
)
def test_no_remat_policy_keeps_gathered_weights(remat: str) -> None:
    """The backward pass gathers every weight of a layer again: kept for it, they would be the whole model."""
    method = PLANS["fsdp"].method.model_copy(update={"remat": remat})
    step = step_of(case_of(PLANS["fsdp"].model_copy(update={"method": method})))
    text = step.function.lower(*step.arguments).compile().as_text()
    gathers = [line for line in text.splitlines() if re.search(r" all-gather(-start)?\(", line)]
    for weight in ("attention/query", "attention/value", "mlp/gate", "mlp/up", "mlp/down"):
        passes = {"rematted_computation" in line for line in gathers if f"{weight}/" in line}
        assert passes == {False, True}, weight


SMALL_STATE = [
    pytest.param({"data": 8}, {}, id="data"),
    pytest.param({"data": 8}, {"accumulate": 2}, id="accumulated"),
    pytest.param(
        {"stage": 2, "data": 4},
        {"pipeline": "1f1b", "microbatches": 2},
        marks=pytest.mark.full,
        id="pipeline",
    ),
]


@pytest.mark.parametrize(("axes", "method"), SMALL_STATE)
def test_a_state_keeps_its_type(axes: dict[str, int], method: dict[str, object]) -> None:
    """Parameters and moments in 16 bits, whatever gradients are added up in; the count of steps is whole."""
    for state, dtype in (("f32", np.float32), ("bf16", jax.numpy.bfloat16)):
        step = step_of(case_of(asked(axes, state=state, **method)))
        after, metrics = jax.eval_shape(step.function, *step.arguments)
        kept = [leaf.dtype for leaf in jax.tree.leaves(step.arguments[0])]
        assert [leaf.dtype for leaf in jax.tree.leaves(after)] == kept
        assert set(kept) == {np.dtype(dtype), np.dtype(np.int32)}
        assert {leaf.dtype for leaf in jax.tree.leaves(metrics)} == {np.dtype(np.float32)}


@pytest.mark.matrix
def test_a_small_state_trains_nearly_alike() -> None:
    """bf16 has 8 bits of mantissa: the first loss is of rounded parameters, and it falls."""
    found = np.array(curve(case_of(asked({"fsdp": 8}, state="bf16"))))
    np.testing.assert_allclose(found[0], truth()[0], rtol=2e-2)
    assert found[-1, 0] < found[0, 0] - 0.2


ALL_REDUCED = re.compile(r"stablehlo\.all_reduce[^\n]*\n(?:.*\n){3,5}?.*: \(tensor<([\dx]*)x(\w+)>\)")
SUMS = [
    pytest.param({"data": 8}, {"accumulate": 2}, id="accumulated"),
    pytest.param(
        {"stage": 2, "data": 4},
        {"pipeline": "1f1b", "microbatches": 2},
        id="pipeline",
        marks=pytest.mark.matrix,
    ),
]


@pytest.mark.parametrize(("axes", "method"), SUMS)
def test_sums_of_gradients_have_their_type(axes: dict[str, int], method: dict[str, object]) -> None:
    """What data parallelism reduces is every parameter once, in the type of the sums."""
    stages = axes.get("stage", 1)
    for sums in ("f32", "bf16"):
        step = step_of(case_of(asked(axes, gradient_sums=sums, **method)))
        text = step.function.lower(*step.arguments).as_text()
        reduced: dict[str, int] = {}
        for shape, kind in ALL_REDUCED.findall(text):
            reduced[kind] = reduced.get(kind, 0) + math.prod(map(int, shape.split("x")))
        shares = {True: stages, False: 1}  # of a layer's parameters a stage has its own
        params = step.arguments[0].params.items()
        held = sum(math.prod(leaf.shape) // shares[path.startswith("layers/")] for path, leaf in params)
        assert reduced == {sums: held}


@pytest.mark.matrix
@pytest.mark.parametrize("sums", ["f32", "bf16"])
def test_small_sums_of_gradients_train_nearly_alike(sums: str) -> None:
    """The loss comes before them; the norm of gradients is off by half a unit of bf16's last place at most,
    and by something."""
    found = np.array(curve(case_of(asked({"data": 8}, accumulate=2, gradient_sums=sums)), steps=1))[0]
    np.testing.assert_allclose(found[0], truth()[0, 0], rtol=1e-6)
    off = abs(found[1] / truth()[0, 1] - 1)
    assert 1e-6 < off < 2**-8 if sums == "bf16" else off < 1e-6
