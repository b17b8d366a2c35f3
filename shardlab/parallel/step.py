"""One step of a case as a jitted function with abstract arguments: what `compile/` compiles and `train.py`
runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from shardlab.errors import Infeasible
from shardlab.model.attention import CausalAttention
from shardlab.model.cache import Cached, KeysValues, Latent, Slots, first_seen
from shardlab.model.experts import balance_term
from shardlab.model.runtime import Runtime
from shardlab.model.transformer import (
    Cache,
    Params,
    Transformer,
    abstract_model,
    init_params,
    with_params,
)
from shardlab.parallel.context import order_notes, positions_of
from shardlab.parallel.embedding import mesh_lookup
from shardlab.parallel.experts import experts_notes, mesh_experts
from shardlab.parallel.kernels import EVERYWHERE, attention_on, choose_kernel, kv_repeats, locality_of
from shardlab.parallel.lora import adapted, frozen_and_adapters, split_trained
from shardlab.parallel.optimizer import (
    OptimizerConfig,
    global_norm,
    make_optimizer,
    optimizer_shardings,
)
from shardlab.parallel.pipeline import Pipeline, to_stages
from shardlab.parallel.reduction import LossAndGradients, accumulated
from shardlab.parallel.serving import (
    CACHE_AXES,
    in_natural_order,
    mesh_cached_attention,
    mesh_last_token,
)
from shardlab.parallel.shardings import Shardings, shardings_of
from shardlab.parallel.training import as_trained, method_notes, training_attention
from shardlab.parallel.weights import as_served, small_weights
from shardlab.spec.case import Case
from shardlab.spec.locality import Locality
from shardlab.spec.lora import is_adapter, trained_specs
from shardlab.spec.names import accumulation_notes, context_split, reduced_once
from shardlab.spec.params import LogicalAxes, ParamSpec
from shardlab.spec.pipeline import num_microbatches, pipeline_notes

STATE_DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}


class TrainState(NamedTuple):
    """What a training step updates: parameters by path, and optax's state, in the type that the plan says."""

    params: Params
    optimizer: Any


class Batch(NamedTuple):
    """Tokens and the token that follows each, int32 [B, L]."""

    tokens: jax.Array
    targets: jax.Array


class Metrics(NamedTuple):
    """f32 scalars of one step: mean loss over the batch (nats per token), gradient norm before clipping."""

    loss: jax.Array
    gradient_norm: jax.Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A jitted step. `function.trace(*arguments)` compiles it without allocating anything.

    arguments: ShapeDtypeStructs with shardings. notes: what the report must say about how the plan was
    applied.
    train: (TrainState, Batch) -> (TrainState, Metrics), the state donated.
    prefill: (params, tokens_BxL) -> (logits_BxV, Cache). decode: (params, Cache, Slots) ->
    (logits_BxV, Cache), the cache donated.
    """

    function: Any
    arguments: tuple[Any, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Setup:
    """What all three workloads share."""

    case: Case
    table: tuple[ParamSpec, ...]
    model: Transformer
    shardings: Shardings
    runtime_on: Callable[[Shardings], Runtime]
    notes: tuple[str, ...]

    @property
    def runtime(self) -> Runtime:
        """How the model runs on the whole mesh."""
        return self.runtime_on(self.shardings)

    def abstract_params(self, dtype: DTypeLike) -> dict[str, jax.ShapeDtypeStruct]:
        """Every parameter's shape, type and sharding."""
        return {p.path: self._struct(p, dtype) for p in self.table}

    def abstract_weights(self) -> dict[str, Any]:
        """Of a step that does not train: no f32 master copy, and as small as the plan says."""
        return small_weights(self.case, self._struct, self.runtime.compute_dtype)

    def _struct(self, spec: ParamSpec, dtype: DTypeLike) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(spec.shape, dtype, sharding=self.shardings.param(spec))

    def abstract_tokens(self) -> jax.ShapeDtypeStruct:
        """int32 [B, L]."""
        shape = (self.case.batch, self.case.seq)
        return jax.ShapeDtypeStruct(
            shape, jnp.int32, sharding=self.shardings.activation(shape, ("batch", "seq"))
        )


def build_step(
    case: Case,
    mesh: Mesh,
    *,
    target: str,
    compute_dtype: DTypeLike = jnp.bfloat16,
    optimizer: OptimizerConfig | None = None,
    z_loss: float = 0.0,
) -> Step:
    """The step of `case` on `mesh` (axes of type Auto, named as the plan's) for `target`: cpu, gpu, tpu or
    attached.

    Raises Infeasible when the plan cannot be put on the model or asks for a method that the model does not
    have.
    """
    setup = _set_up(case, mesh, target, compute_dtype)
    if case.workload == "train":
        return _train_step(setup, optimizer or OptimizerConfig(), z_loss)
    return _prefill_step(setup) if case.workload == "prefill" else _decode_step(setup)


def init_state(case: Case, mesh: Mesh, seed: int, *, optimizer: OptimizerConfig | None = None) -> TrainState:
    """A fresh training state, created where it lives. The same seed gives the same numbers on every mesh."""
    table = case.parameters()
    shardings = shardings_of(case.plan, mesh)
    tx = make_optimizer(optimizer or OptimizerConfig(), trained_specs(table, case.plan.method))
    adapters = tuple(spec for spec in table if is_adapter(spec.path))

    def create(key: jax.Array) -> TrainState:
        fresh = init_params(case.model, key, scan_layers=case.stacked)
        dtype = STATE_DTYPES[case.plan.method.state]
        base = to_stages({path: array.astype(dtype) for path, array in fresh.items()}, case)
        params = frozen_and_adapters(base, adapters, key)
        return TrainState(params, tx.init(split_trained(params, case.plan.method)[0]))

    abstract = jax.eval_shape(create, jax.random.key(0))
    placed = TrainState(
        {p.path: shardings.param(p) for p in table},
        optimizer_shardings(tx, split_trained(abstract.params, case.plan.method)[0], table, shardings)[1],
    )
    return jax.jit(create, out_shardings=placed)(jax.random.key(seed))


def _set_up(case: Case, mesh: Mesh, target: str, compute_dtype: DTypeLike) -> _Setup:
    _refuse_methods(case)
    family = mesh.devices.flat[0].platform if target == "attached" else target
    family = "gpu" if family in ("cuda", "rocm") else family
    shardings = shardings_of(case.plan, mesh)
    kernel, notes = choose_kernel(case, family)
    if compute_dtype != jnp.bfloat16 and kernel == "cudnn":
        kernel, notes = "reference", ("attention: reference instead of cudnn, because it needs bf16",)

    def attending(shardings: Shardings, local: Locality) -> CausalAttention:
        return training_attention(case, kernel, attention_on(case.plan, kernel, shardings, local))

    def runtime_on(shardings: Shardings) -> Runtime:
        run = Runtime(
            compute_dtype=compute_dtype,
            remat=case.plan.method.remat,
            attention=attending(shardings, locality_of(case)),
            global_attention=attending(shardings, EVERYWHERE),
            positions=positions_of(case.plan, shardings),
            kv_repeats=kv_repeats(case),
            cached_attention=mesh_cached_attention(shardings, partial(first_seen, case.model)),
            last_token=mesh_last_token(case.plan, shardings),
            constrain=shardings.constrain,
            place_weight=shardings.place_weight,
            gathers=shardings.gathers,
            lookup=mesh_lookup(shardings, one_hot=case.plan.method.lookup == "one-hot"),
            experts=mesh_experts(case, shardings, family),
            block=(lambda name: runtime_on(shardings.within(name))) if shardings.blocks else None,
            ways=shardings.ways,
        )
        return as_trained(run, case) if case.workload == "train" else as_served(run, case)

    return _Setup(
        case=case,
        table=case.parameters(),
        model=abstract_model(case.model, scan_layers=case.stacked),
        shardings=shardings,
        runtime_on=runtime_on,
        notes=notes + experts_notes(case, family) + order_notes(case.plan) + method_notes(case, family),
    )


def _refuse_methods(case: Case) -> None:
    """Raise Infeasible for a method that this model does not have."""
    for reason, nearest in case.obstacles().items():
        raise Infeasible(reason, nearest)
    count = num_microbatches(case.plan)
    if case.workload == "train" and case.batch % count:
        raise Infeasible(f"batch {case.batch} over {count} microbatches", f"use a multiple of {count}")
    if case.model.positions == "learned" and case.seq > case.model.context:
        raise Infeasible(
            f"seq {case.seq} is longer than {case.model.name}'s {case.model.context} learned positions",
            f"largest seq: {case.model.context}",
        )


def _train_step(setup: _Setup, config: OptimizerConfig, z_loss: float) -> Step:
    case, shardings, method = setup.case, setup.shardings, setup.case.plan.method
    table = trained_specs(setup.table, method)
    tx = make_optimizer(config, table)
    gradient_shardings = {p.path: shardings.optimizer_state(p) for p in table}

    loss_and_gradients = _loss_and_gradients(setup, z_loss)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        loss, gradients = loss_and_gradients(state.params, *batch)
        with jax.named_scope("optimizer"):
            gradients = jax.lax.with_sharding_constraint(gradients, gradient_shardings)
            norm = global_norm(gradients)
            trained, frozen = split_trained(state.params, method)
            gradients = {path: g.astype(trained[path].dtype) for path, g in gradients.items()}
            updates, optimizer = tx.update(gradients, state.optimizer, trained)
            params = {**frozen, **optax.apply_updates(trained, updates)}
        return TrainState(params, optimizer), Metrics(loss, norm)

    trained, _ = split_trained(setup.abstract_params(STATE_DTYPES[method.state]), method)
    params = {**setup.abstract_params(jnp.bfloat16), **trained}  # what LoRA freezes has no f32 copy
    abstract, placed = optimizer_shardings(tx, trained, table, shardings)
    optimizer = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        placed,
    )
    state = TrainState(params, optimizer)
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    function = jax.jit(train_step, donate_argnums=0, out_shardings=(state_shardings, shardings.replicated()))
    tokens = setup.abstract_tokens()
    notes = setup.notes + accumulation_notes(case.plan) + pipeline_notes(case.plan)
    return Step(function=function, arguments=(state, Batch(tokens, tokens)), notes=notes)


def _loss_and_gradients(setup: _Setup, z_loss: float) -> LossAndGradients:
    """Through the pipeline that the plan asks for, or by differentiating the whole model."""
    if setup.case.plan.method.pipeline != "none":
        pipeline = Pipeline(
            case=setup.case,
            model=setup.model,
            shardings=setup.shardings,
            runtime_on=setup.runtime_on,
            z_loss=z_loss,
            sum_dtype=STATE_DTYPES[setup.case.plan.method.gradient_sums],
        )
        return pipeline.loss_and_gradients

    plan = setup.case.plan

    def on(shardings: Shardings) -> LossAndGradients:
        run, model = setup.runtime_on(shardings), setup.case.model
        taken = tuple(name for name in plan.axes if name not in shardings.free_axes)
        within = tuple(name for name in context_split(plan) if name in taken)

        def loss_of(trained: Params, frozen: Params, tokens: jax.Array, targets: jax.Array) -> jax.Array:
            params = adapted({**frozen, **trained})
            loss, load = with_params(setup.model, params).loss_and_load(
                tokens, targets, run, z_loss=z_loss, parts=plan.method.loss_parts
            )
            return loss if load is None else loss + balance_term(load, model, taken, within)

        def of_trained(params: Params, tokens: jax.Array, targets: jax.Array) -> tuple[jax.Array, Params]:
            return jax.value_and_grad(loss_of)(*split_trained(params, plan.method), tokens, targets)

        return of_trained

    if plan.method.accumulate == 1:
        return on(setup.shardings)
    table = trained_specs(setup.table, plan.method)
    dtype, once = STATE_DTYPES[plan.method.gradient_sums], reduced_once(plan)
    return accumulated(on, plan.method.accumulate, once, table, setup.shardings, dtype)


def _prefill_step(setup: _Setup) -> Step:
    """Params in bf16: inference keeps no f32 master copy."""

    def prefill(params: Params, tokens_BxL: jax.Array) -> tuple[jax.Array, Cache]:
        logits_BxV, cache = with_params(setup.model, params).prefill(tokens_BxL, setup.runtime)
        return logits_BxV, in_natural_order(setup.case.plan, setup.shardings, cache)

    cache = jax.tree.map(lambda leaf: leaf.sharding, _abstract_cache(setup))
    function = jax.jit(prefill, out_shardings=(_logits_sharding(setup), cache))
    params = setup.abstract_weights()
    return Step(function=function, arguments=(params, setup.abstract_tokens()), notes=setup.notes)


def _decode_step(setup: _Setup) -> Step:
    """New tokens of every slot after a cache of `seq` positions, each slot at its own."""

    def decode(params: Params, cache: Cache, slots: Slots) -> tuple[jax.Array, Cache]:
        return with_params(setup.model, params).decode(slots, cache, setup.runtime)

    shardings, batch = setup.shardings, setup.case.batch
    cache = _abstract_cache(setup)
    out = (_logits_sharding(setup), jax.tree.map(lambda leaf: leaf.sharding, cache))

    def per_slot(*shape: int) -> jax.ShapeDtypeStruct:
        axes = ("batch", "seq")[: len(shape)]
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=shardings.activation(shape, axes))

    slots = Slots(per_slot(batch, setup.case.plan.method.chunk), per_slot(batch), per_slot(batch))
    arguments = (setup.abstract_weights(), cache, slots)
    return Step(
        function=jax.jit(decode, donate_argnums=1, out_shardings=out), arguments=arguments, notes=setup.notes
    )


def _abstract_cache(setup: _Setup) -> Cache:
    """Of all layers, in the compute type (see `Cache`)."""
    model, batch, seq = setup.case.model, setup.case.batch, setup.case.seq

    def struct(shape: tuple[int, ...], axes: LogicalAxes) -> jax.ShapeDtypeStruct:
        sharding = setup.shardings.activation(shape, axes)
        return jax.ShapeDtypeStruct(shape, setup.runtime.compute_dtype, sharding=sharding)

    def of(layers: int) -> Cached:
        if model.latent is not None:
            width = model.latent.kv_rank + model.latent.rope_dim
            return Latent(struct((layers, batch, seq, width), (None, "batch", "cache", None)))
        keys = struct((layers, batch, seq, model.kv_heads, model.head_dim), CACHE_AXES)
        return KeysValues(keys, keys)

    caches = {stack.name: of(stack.layers) for stack in model.stacks}
    return caches if len(caches) > 1 else caches["layers"]


def _logits_sharding(setup: _Setup) -> jax.sharding.NamedSharding:
    """Of logits_BxV."""
    shape = (setup.case.batch, setup.case.model.padded_vocab)
    return setup.shardings.activation(shape, ("batch", "vocab"))
