"""A small model, eight emulated devices, and plans on them, for the tests of this folder."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, lru_cache, partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from shardlab.model.cache import KeysValues, Slots
from shardlab.model.experts import balance_term, dropless, grouped_experts, with_capacity
from shardlab.model.loss import cross_entropy
from shardlab.model.quantise import Quantised
from shardlab.model.runtime import Runtime
from shardlab.model.transformer import abstract_model, with_params
from shardlab.parallel.context import in_step_order
from shardlab.parallel.optimizer import OptimizerConfig, make_optimizer
from shardlab.parallel.pipeline import from_stages
from shardlab.parallel.step import Batch, Step, TrainState, build_step, init_state
from shardlab.parallel.weights import TYPES, quantise_weights
from shardlab.spec.case import Case
from shardlab.spec.experts import capacity_factor
from shardlab.spec.models import ModelConfig
from shardlab.spec.pipeline import num_microbatches
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
MIXTURE = replace(
    SMALL, name="mixture", kv_heads=4, num_experts=8, experts_per_token=2, balance_coefficient=0.02
)
BATCH, SEQ = 16, 16
OPTIMIZER = OptimizerConfig(peak_learning_rate=3e-3, warmup_steps=2, total_steps=20)

TENSOR = {axis: ("tensor",) for axis in ("heads", "kv_heads", "mlp", "vocab")}
Rules = dict[str, tuple[str, ...]]


def plan(
    axes: dict[str, int],
    params: Rules,
    activations: Rules,
    optimizer: Rules | None = None,
    *,
    gradients: Rules | None = None,
    **method: Any,
) -> Plan:
    """A plan; heads, KV heads, mlp and vocabulary of activations follow the parameters, as in a mesh file."""
    follow = {axis: params[axis] for axis in TENSOR if axis in params}
    return Plan(
        name="-".join(f"{axis}{size}" for axis, size in axes.items()),
        axes=axes,
        params=params,
        activations={**follow, **activations},
        gradients=gradients or {},
        optimizer={**params, **(optimizer or {})},
        method=Method(**method),
    )


def asked(axes: dict[str, int], features: str = "", **method: Any) -> Plan:
    """A plan in which the mesh axes mean what they are called, and features what they are called.

    data: the batch. fsdp: the batch and the parameters. tensor: heads, mlp, vocabulary. y: the second axis of
    2-D tensor parallelism. stage: a pipeline's. context, or ring and ulysses: the sequence. expert: the batch
    and the experts. Features: zero1, zero2 (over data), seq, vocab (that alone).
    """
    embed = tuple(name for name in ("y", "fsdp") if name in axes)
    params: Rules = {"embed": embed} if embed else {}
    if "tensor" in axes:
        params |= {"vocab": ("tensor",)} if "vocab" in features else TENSOR
    params |= {name: (name,) for name in ("stage", "expert") if name in axes}
    activations: Rules = {"batch": tuple(name for name in ("data", "fsdp", "expert") if name in axes)}
    context = tuple(name for name in ("context", "ring", "ulysses") if name in axes)
    if context:
        activations |= {"seq": context}
    if "expert" in axes:
        activations |= {"expert": ("expert",)}
    if "seq" in features:
        activations |= {"norm_seq": (*context, "tensor")}
    if "y" in axes:
        activations |= {"embed": ("y",)}
    states: Rules = {"embed": (*embed, "data")} if "zero" in features else {}
    return plan(
        axes, params, activations, states, gradients=states if "zero2" in features else None, **method
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
    """The case's step in f32, so that plans differ by rounding only; the last ones are compiled once."""
    return _step_of(case.model_dump_json())


@lru_cache(maxsize=16)
def _step_of(text: str) -> Step:
    case = Case.model_validate_json(text)
    return build_step(case, mesh_of(case.plan), target="cpu", compute_dtype=jnp.float32, optimizer=OPTIMIZER)


def state_of(case: Case, seed: int = 0) -> TrainState:
    """A fresh state where the step wants it: the numbers of one device, since compiling `init_state` for each
    plan takes as long as its step. That `init_state` gives the same on a mesh, `test_step.py` tests."""
    if case.plan.method.pipeline != "none":
        return init_state(case, mesh_of(case.plan), seed, optimizer=OPTIMIZER)
    placed = step_of(case.model_copy(update={"workload": "train"})).arguments[0]
    return jax.tree.map(
        lambda array, leaf: jax.device_put(array.copy(), leaf.sharding),
        _state_alone(case.model, seed, case.scan_layers),
        placed,
    )


@cache
def _state_alone(model: ModelConfig, seed: int, scan_layers: bool) -> TrainState:
    case = case_of(PLANS["one-device"], model, scan_layers=scan_layers)
    return jax.tree.map(np.asarray, init_state(case, mesh_of(case.plan), seed, optimizer=OPTIMIZER))


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


def inference(plan: Plan, model: ModelConfig) -> tuple[np.ndarray, KeysValues]:
    """Logits of prefill, then of one decoded token, whose cache is prefill's: [2, B, V], padding left out.
    And the cache."""
    first, cache = prefilled(plan, model)
    decode = step_of(case_of(plan, model, workload="decode"))
    cache = jax.tree.map(lambda a, leaf: jax.device_put(a, leaf.sharding), cache, decode.arguments[1])
    slots = slots_of(decode, PROMPT_BxL[:, -1:], np.full(BATCH, SEQ - 1))
    second, cache = decode.function(served_params(decode, model), cache, slots)
    return np.stack([first, second])[..., : model.vocab], jax.tree.map(np.asarray, cache)


PROMPT_BxL = np.random.default_rng(0).integers(100, size=(BATCH, SEQ), dtype=np.int32)


def prefilled(plan: Plan, model: ModelConfig) -> tuple[np.ndarray, KeysValues]:
    """The last logits of a prompt [B, V], and its cache."""
    step = step_of(case_of(plan, model, workload="prefill"))
    tokens = jax.device_put(in_step_order(PROMPT_BxL, plan), step.arguments[1].sharding)
    logits, held = step.function(served_params(step, model), tokens)
    return np.asarray(logits), jax.tree.map(np.asarray, held)


def served_params(step: Step, model: ModelConfig) -> dict[str, Any]:
    """The parameters of seed 0 where the step wants them, quantised where it wants them so."""
    asked = step.arguments[0]
    formats = {str(leaf.dtype): name for name in TYPES for leaf in [jnp.zeros((), TYPES[name])]}
    weights = {formats[str(a.values.dtype)] for a in asked.values() if isinstance(a, Quantised)} or {"bf16"}
    case = case_of(plan({"data": 1}, {}, {}, weights=weights.pop()), model)
    params = quantise_weights(case, {path: jnp.asarray(a) for path, a in params_of(model).items()})
    return jax.tree.map(lambda a, leaf: jax.device_put(a, leaf.sharding), params, dict(asked))


@cache
def params_of(model: ModelConfig) -> dict[str, np.ndarray]:
    return {path: np.asarray(a) for path, a in state_of(case_of(PLANS["one-device"], model)).params.items()}


def slots_of(
    decode: Step, tokens_BxL: np.ndarray, position_B: np.ndarray, count_B: np.ndarray | None = None
) -> Slots:
    """Of a decode step, where it wants them; all tokens are real unless said."""
    count_B = np.full(len(tokens_BxL), tokens_BxL.shape[1]) if count_B is None else count_B
    given = Slots(*(np.asarray(a, np.int32) for a in (tokens_BxL, position_B, count_B)))
    return jax.tree.map(lambda a, leaf: jax.device_put(a, leaf.sharding), given, decode.arguments[2])


def trained(case: Case) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(loss, gradient norm) of five steps, and Adam's first moments after the first of them: the clipped
    gradients times 1 - b1."""
    step, state = step_of(case), state_of(case)
    batch, points, first = batch_for(step, case), [], {}
    for _ in range(5):
        state, metrics = step.function(state, batch)
        points.append((float(metrics.loss), float(metrics.gradient_norm)))
        first = first or {path: np.array(a) for path, a in state.optimizer[1][0].mu.items()}
    return np.array(points), {path: np.asarray(a) for path, a in from_stages(first, case).items()}


@cache
def alone(model: ModelConfig) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    return trained(case_of(PLANS["one-device"], model))


def mixture_alone(case: Case) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What `trained` gives, on one device that takes the case's microbatches in turn and in each of them the
    groups of tokens that the case's devices have; both count for experts: for their balance, and capacity."""
    plan = case.plan
    count, tensor = num_microbatches(plan), plan.params.get("mlp", ())
    split = [plan.activations.get(axis, ()) for axis in ("batch", "norm_seq")]
    split[1] = split[1] or plan.activations.get("seq", ())
    groups = [prod(plan.axes[name] for name in axes if name not in tensor) for axes in split]
    return _mixture_alone(case.model, count, (groups[0], groups[1]), plan.method.experts)


@cache
def _mixture_alone(
    model: ModelConfig, count: int, groups: tuple[int, int], experts: str
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    case, factor = case_of(PLANS["one-device"], model), capacity_factor(experts)
    dispatch = dropless if factor is None else with_capacity(factor)
    run = Runtime(compute_dtype=jnp.float32, experts=grouped_experts(dispatch, groups))
    gradients_of = jax.jit(jax.value_and_grad(partial(_mixture_loss, model=model, run=run)))

    @jax.jit
    def mean_of(found: Sequence[Any]) -> Any:
        return jax.tree.map(lambda *parts: sum(parts) / count, *found)

    def mean_of_microbatches(params: dict[str, jax.Array], batch: Batch) -> Any:
        micro = [jax.tree.map(lambda a, i=i: a[i::count], batch) for i in range(count)]
        return mean_of([gradients_of(params, one) for one in micro])

    return steps_alone(case, mean_of_microbatches)


def steps_alone(
    case: Case, gradients_of: Callable[[dict[str, jax.Array], Batch], tuple[jax.Array, dict[str, jax.Array]]]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What `trained` gives, of a loss and its gradients on one device."""
    optimizer = make_optimizer(OPTIMIZER, case.parameters())
    params, batch = dict(state_of(case).params), batch_for(step_of(case), case)
    state, points, first = optimizer.init(params), [], {}

    @jax.jit
    def updated(gradients: dict[str, jax.Array], state: Any, params: dict[str, jax.Array]) -> tuple[Any, Any]:
        updates, state = optimizer.update(gradients, state, params)
        return state, optax.apply_updates(params, updates)

    for _ in range(5):
        loss, gradients = gradients_of(params, batch)
        learned = [a for path, a in gradients.items() if not path.endswith("router/bias")]  # that has a rule
        points.append((float(loss), np.sqrt(sum(np.sum(np.square(np.asarray(a))) for a in learned))))
        state, params = updated(gradients, state, params)
        first = first or {path: np.array(a) for path, a in state[1][0].mu.items()}
    return np.array(points), first


def _mixture_loss(
    params: dict[str, jax.Array], batch: Batch, *, model: ModelConfig, run: Runtime
) -> jax.Array:
    logits, load = with_params(abstract_model(model), params).logits_and_load(batch.tokens, run)
    assert load is not None
    return cross_entropy(logits, batch.targets) + balance_term(load, model)


def check_equal(case: Case) -> None:
    """Loss and every gradient as on one device, and five optimizer steps stay together."""
    points, gradients = trained(case)
    expected_points, expected = mixture_alone(case) if case.model.num_experts else alone(case.model)
    np.testing.assert_allclose(points, expected_points, rtol=1e-5)
    assert gradients.keys() == expected.keys()
    for path, gradient in gradients.items():
        worst = np.abs(gradient - expected[path]).max()
        # Attention does not depend on a bias of all keys: its gradient is rounding, of the size of queries'.
        scale = expected[path.replace("key/bias", "query/bias")]
        assert worst <= 1e-5 * np.abs(scale).max(), path
