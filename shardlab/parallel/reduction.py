"""Gradients that are reduced once per step: sums stay each device's own until the last microbatch.

On Auto mesh axes, which ours are, the partitioner keeps no unreduced sum across loop iterations (JAX's
`unreduced` shardings do on Explicit axes, in 0.10.2 and 0.12.0 alike). So the loop runs in a `shard_map` that
is manual over the data axes, where nothing is reduced unless it is said, and its sums are reduced after it.
The other axes stay with the partitioner: tensor parallelism, and FSDP and ZeRO-2, which scatter every
microbatch's gradients. (To reduce those once, each device would need the whole model's gradients in f32, the
memory that sharding saves; who has it asks for ZeRO-1.)
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from shardlab.model.transformer import Params
from shardlab.parallel.shardings import Shardings, microbatches
from shardlab.spec.params import ParamSpec
from shardlab.spec.plan import Rules

# (params, tokens_BxL, targets_BxL) -> mean loss and its gradients.
Sums = tuple[jax.Array, Params]
LossAndGradients = Callable[[Params, jax.Array, jax.Array], Sums]


def accumulated(
    on: Callable[[Shardings], LossAndGradients],
    count: int,
    once: tuple[str, ...],
    table: tuple[ParamSpec, ...],
    shardings: Shardings,
    dtype: DTypeLike,
) -> LossAndGradients:
    """The mean over `count` microbatches, taken in turn; each is a slice of every device's own sequences.

    on: the loss and its gradients under given shardings. once: the data axes over which gradients are summed
    after the last microbatch alone (see `spec.names.reduced_once`); empty leaves all to the partitioner. The
    sums are `dtype`, where the optimizer state is but for `once`. table: the parameters that have gradients.
    """

    def loop(params: Params, tokens: jax.Array, targets: jax.Array) -> Sums:
        inside = shardings_inside(shardings, set(once)) if once else shardings
        where = {spec.path: inside.optimizer_state(spec) for spec in table}

        def add(total: Sums, micro: tuple[jax.Array, jax.Array]) -> tuple[Sums, None]:
            found = on(inside)(params, *micro)
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, found), None

        zero = {spec.path: jnp.zeros(params[spec.path].shape, dtype) for spec in table}
        start = (jnp.zeros(()), jax.lax.with_sharding_constraint(zero, where))
        total, _ = jax.lax.scan(add, start, (tokens, targets))
        return jax.tree.map(lambda x: x / count, total)

    def whole(params: Params, tokens_BxL: jax.Array, targets_BxL: jax.Array) -> Sums:
        micro = [microbatches(a, count, shardings) for a in (tokens_BxL, targets_BxL)]
        if not once:
            return loop(params, *micro)
        losses, parts = _on_each(loop, once, shardings)(params, *micro)
        with jax.named_scope("accumulate"):
            ways = prod(shardings.mesh.shape[name] for name in once)
            gradients = {spec.path: reduced(parts[spec.path], spec, once, ways, shardings) for spec in table}
            return losses.mean(), gradients

    return whole


def _on_each(loop: LossAndGradients, once: tuple[str, ...], shardings: Shardings) -> LossAndGradients:
    """`loop` on each device along `once`: losses [parts], unreduced gradients [parts, …]."""

    def run(params: Params, tokens: jax.Array, targets: jax.Array) -> Sums:
        return jax.tree.map(lambda a: a[None], loop(params, tokens, targets))

    tokens = shardings.manual_tokens(once)
    return jax.shard_map(
        run,
        mesh=shardings.mesh,
        axis_names=set(once),
        in_specs=(PartitionSpec(), tokens, tokens),
        out_specs=PartitionSpec(once),
        check_vma=False,
    )


def reduced(
    parts: jax.Array, spec: ParamSpec, over: tuple[str, ...], ways: int, shardings: Shardings
) -> jax.Array:
    """parts [parts, *shape], one per device along `over` -> their sum / `ways`, where the optimizer state is.

    Reduce-scattered over the axes that split the optimizer state, where they are the minor ones of their
    dimension; all-reduced over the others.
    """
    if not over:
        return parts.squeeze(0)
    wanted = _names(shardings.optimizer_state(spec).spec, len(spec.shape))
    held = [tuple(n for n in names if n not in over) for names in wanted]
    scattered = {
        dim: names[len(kept) :]
        for dim, (names, kept) in enumerate(zip(wanted, held, strict=True))
        if len(names) > len(kept) and names[: len(kept)] == kept
    }
    left = tuple(n for n in over if not any(n in names for names in scattered.values()))

    def reduce(part: jax.Array) -> jax.Array:
        total = part.squeeze(0)
        for dim, names in scattered.items():
            total = jax.lax.psum_scatter(total, names, scatter_dimension=dim, tiled=True)
        return (jax.lax.psum(total, left) if left else total) / ways

    return jax.shard_map(
        reduce,
        mesh=shardings.mesh,
        in_specs=PartitionSpec(over, *(names or None for names in held)),
        out_specs=PartitionSpec(
            *((wanted[dim] if dim in scattered else names) or None for dim, names in enumerate(held))
        ),
        check_vma=False,
    )(parts)


def _names(spec: PartitionSpec, ndim: int) -> list[tuple[str, ...]]:
    """The mesh axes of each dimension."""
    named = [(names,) if isinstance(names, str) else tuple(names or ()) for names in spec]
    return named + [()] * (ndim - len(named))


def shardings_inside(shardings: Shardings, taken: set[str]) -> Shardings:
    """Called inside a map that is manual over `taken`: the shardings there, over the other axes alone."""

    def rest(rules: Rules) -> Rules:
        return {axis: tuple(n for n in names if n not in taken) for axis, names in rules.items()}

    return Shardings(
        mesh=jax.sharding.get_abstract_mesh(),
        params=rest(shardings.params),
        optimizer=rest(shardings.optimizer),
        compute=rest(shardings.compute),
        activations=rest(shardings.activations),
        blocks={name: shardings_inside(block, taken) for name, block in shardings.blocks.items()},
    )
