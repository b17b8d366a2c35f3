"""A small model, eight emulated devices, and plans on them, for the tests of this folder."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from shardlab.parallel.context import in_step_order
from shardlab.parallel.optimizer import OptimizerConfig
from shardlab.parallel.step import Batch, Step, TrainState, build_step, init_state
from shardlab.spec.case import Case
from shardlab.spec.models import ModelConfig
from shardlab.spec.plan import Method, Plan

SMALL = ModelConfig(
    name="small",
    layers=2,
    embed=32,
    heads=8,
    kv_heads=8,
    head_dim=8,
    mlp=64,
    vocab=100,
    context=32,
)
GROUPED = replace(SMALL, name="small-grouped", kv_heads=2)
BATCH, SEQ = 16, 16
OPTIMIZER = OptimizerConfig(peak_learning_rate=3e-3, warmup_steps=2, total_steps=20)

TENSOR = {axis: ("tensor",) for axis in ("heads", "kv_heads", "mlp", "vocab")}
Rules = dict[str, tuple[str, ...]]


def plan(
    axes: dict[str, int], params: Rules, activations: Rules, optimizer: Rules | None = None, **method: Any
) -> Plan:
    """A plan; heads, KV heads, mlp and vocabulary of activations follow the parameters, as in a mesh file."""
    follow = {axis: params[axis] for axis in TENSOR if axis in params}
    return Plan(
        name="-".join(f"{axis}{size}" for axis, size in axes.items()),
        axes=axes,
        params=params,
        activations={**follow, **activations},
        optimizer={**params, **(optimizer or {})},
        method=Method(**method),
    )


FSDP: Rules = {"embed": ("fsdp",)}
PLANS = {
    "one-device": plan({"data": 1}, {}, {"batch": ("data",)}),
    "data": plan({"data": 8}, {}, {"batch": ("data",)}),
    "zero1": plan({"data": 8}, {}, {"batch": ("data",)}, {"embed": ("data",)}),
    "fsdp": plan({"fsdp": 8}, FSDP, {"batch": ("fsdp",)}),
    "tensor": plan({"tensor": 8}, TENSOR, {}),
    "tensor-sequence": plan({"data": 2, "tensor": 4}, TENSOR, {"batch": ("data",), "norm_seq": ("tensor",)}),
    "data-fsdp-tensor": plan(
        {"data": 2, "fsdp": 2, "tensor": 2},
        FSDP | TENSOR,
        {"batch": ("data", "fsdp"), "norm_seq": ("tensor",)},
    ),
    "hybrid": plan({"data": 2, "fsdp": 4}, FSDP, {"batch": ("data", "fsdp")}),
}


def case_of(plan: Plan, model: ModelConfig = SMALL, **changes: Any) -> Case:
    return Case(**{"plan": plan, "model": model, "machine": "cpu:8", "batch": BATCH, "seq": SEQ, **changes})


def mesh_of(plan: Plan) -> Mesh:
    """The plan's grid of emulated devices, row-major."""
    devices = np.array(jax.devices()[: plan.num_devices])
    return Mesh(devices.reshape(tuple(plan.axes.values())), tuple(plan.axes))


def step_of(case: Case) -> Step:
    """The case's step in f32, so that plans differ by rounding only."""
    return build_step(case, mesh_of(case.plan), target="cpu", compute_dtype=jnp.float32, optimizer=OPTIMIZER)


def state_of(case: Case, seed: int = 0) -> TrainState:
    return init_state(case, mesh_of(case.plan), seed, optimizer=OPTIMIZER)


def batch_for(step: Step, case: Case) -> Batch:
    """A batch that a model can learn: each sequence counts up from a random start."""
    starts = np.random.default_rng(0).integers(case.model.vocab, size=(case.batch, 1))
    text = ((starts + np.arange(case.seq + 1)[None]) % case.model.vocab).astype(np.int32)
    return jax.tree.map(
        lambda array, leaf: jax.device_put(in_step_order(array, case.plan), leaf.sharding),
        Batch(text[:, :-1], text[:, 1:]),
        step.arguments[1],
    )


def curve(case: Case, steps: int = 5, seed: int = 0) -> Sequence[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    step, state = step_of(case), state_of(case, seed)
    batch, points = batch_for(step, case), []
    for _ in range(steps):
        state, metrics = step.function(state, batch)
        points.append((float(metrics.loss), float(metrics.gradient_norm)))
    return points


def inference(plan: Plan, model: ModelConfig) -> np.ndarray:
    """Logits of prefill, then of one decoded token, whose cache is prefill's: [2, B, V], padding left out."""
    prefill = step_of(case_of(plan, model, workload="prefill"))
    decode = step_of(case_of(plan, model, workload="decode"))
    params = {
        path: jax.device_put(array, prefill.arguments[0][path].sharding)
        for path, array in state_of(case_of(PLANS["one-device"], model)).params.items()
    }
    text = np.random.default_rng(0).integers(100, size=prefill.arguments[1].shape, dtype=np.int32)
    first, cache = prefill.function(params, jax.device_put(text, prefill.arguments[1].sharding))
    cache = jax.tree.map(lambda a, leaf: jax.device_put(a, leaf.sharding), cache, decode.arguments[1])
    token = jax.device_put(text[:, -1], decode.arguments[2].sharding)
    position = jax.device_put(jnp.int32(15), decode.arguments[3].sharding)
    second, _ = decode.function(params, cache, token, position)
    return np.stack([first, second])[..., : model.vocab]
