"""A loop over stacked layers of which every few differ in how they run: a scan over groups of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp

from shardlab.model.runtime import Remat, checkpointed

State = TypeVar("State")
Kept = TypeVar("Kept")

# (x, the arrays of one layer) -> (x, what is kept of it)
Body = Callable[[jax.Array, State], tuple[jax.Array, Kept]]


def scan_in_groups(
    bodies: Sequence[Body[State, Kept]], x: jax.Array, state: State, remat: Remat
) -> tuple[jax.Array, Kept]:
    """All layers in turn: layer i of a stack [N, …] runs as body i modulo their number. Returns x and what is
    kept [N, …].

    Parameters stay one stack, so a plan needs no rules for it. A layer is cut out of its group inside what is
    recomputed: cut out before, its weights would be kept for the backward pass.
    """
    if len(bodies) == 1:
        return jax.lax.scan(checkpointed(bodies[0], remat, in_scan=True), x, state)
    num_layers, period = jax.tree.leaves(state)[0].shape[0], len(bodies)
    groups = num_layers // period
    grouped = groups * period

    def through(x: jax.Array, stack: State, places: range) -> tuple[jax.Array, Kept]:
        found = []
        for place in places:

            def body(x: jax.Array, stack: State, place: int = place) -> tuple[jax.Array, Kept]:
                one = jax.tree.map(lambda a: jax.lax.index_in_dim(a, place, keepdims=False), stack)
                return bodies[place % period](x, one)

            # A loop of one turn is taken apart, and with it goes what keeps XLA from undoing a recomputation.
            looped = places.start == 0 and groups > 1
            x, kept = checkpointed(body, remat, in_scan=looped)(x, stack)
            found.append(kept)
        return x, jax.tree.map(lambda *a: jnp.stack(a), *found)

    parts = []
    if groups:
        split = jax.tree.map(lambda a: a[:grouped].reshape(groups, period, *a.shape[1:]), state)
        x, kept = jax.lax.scan(lambda x, group: through(x, group, range(period)), x, split)
        parts.append(jax.tree.map(lambda a: a.reshape(grouped, *a.shape[2:]), kept))
    if grouped < num_layers:
        x, kept = through(x, state, range(grouped, num_layers))
        parts.append(kept)
    return x, jax.tree.map(lambda *a: jnp.concatenate(a), *parts)
