"""A KV cache with a slot per sequence, each at its own position: what a continuously batched server holds.

A step brings every slot the same number of new tokens, L: one in plain decoding, more where prompts are taken
in chunks beside it (Sarathi, arXiv:2308.16369). Tokens are written at their own positions, then see what
is at or before them. What a slot has beyond its tokens is padding: it is overwritten before it is seen.
Shapes: B slots, L new tokens, S positions of the cache, H heads, K KV heads, D head_dim, N layers.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp

from shardlab.model.attention import MASKED
from shardlab.spec.models import ModelConfig


class KeysValues(NamedTuple):
    """Keys and values of one layer [B, S, K, D], or of all layers of a kind, with a leading dimension
    [N, B, S, K, D]. values: None where they are the first numbers of the keys (latent attention)."""

    keys: jax.Array
    values: jax.Array | None


class Latent(NamedTuple):
    """Of latent attention, one layer's [B, S, C], or those of all layers of a kind [N, B, S, C]: the latent
    vector and the shared rotated key of each token."""

    latent: jax.Array


# What a layer keeps of a token for later ones.
Cached = KeysValues | Latent

Kind = TypeVar("Kind", bound=Cached)


class Caches(NamedTuple, Generic[Kind]):
    """The caches of all layers of a kind [N, B, S, …], and the layer whose turn it is (a scalar).

    All go through the loop over layers together and are written in place: a loop that took one layer's cache
    in and put a new one out would hold the cache twice.
    """

    stack: Kind
    layer: jax.Array


class Slots(NamedTuple):
    """What a step does to each slot, int32. tokens [B, L]: new ones, padded. position [B]: of the first of
    them, which is how many the cache holds. count [B]: how many are real; logits are those of the last real
    one.
    """

    tokens: jax.Array
    position: jax.Array
    count: jax.Array


class Part(NamedTuple):
    """Attention to a part of the positions, not yet divided: f32 sums of exp(score - greatest).

    out [B, L, H, D]: of values. total [B, L, H]: of ones. greatest [B, L, H]: the greatest score of the part.
    """

    out: jax.Array
    total: jax.Array
    greatest: jax.Array


class CachedAttention(Protocol):
    """Writes the new tokens' entries [B, L, K, D] into the caches, then attends to them."""

    def __call__(
        self,
        q_BxLxHxD: jax.Array,
        new: KeysValues,
        caches: Caches[KeysValues],
        position_BxL: jax.Array,
        value_dim: int | None = None,
    ) -> tuple[jax.Array, KeysValues]:
        """Returns out_BxLxHxD in q's type and the caches. value_dim: of values that are part of the keys."""


def cached_attention(
    q_BxLxHxD: jax.Array,
    new: KeysValues,
    caches: Caches[KeysValues],
    position_BxL: jax.Array,
    value_dim: int | None = None,
) -> tuple[jax.Array, KeysValues]:
    """`CachedAttention` on one device."""
    stack = written(caches, new, position_BxL)
    part = attend_part(q_BxLxHxD, of_layer(stack, caches.layer), position_BxL, value_dim)
    return divided(part).astype(q_BxLxHxD.dtype), stack


def written(caches: Caches[KeysValues], new: KeysValues, position_BxL: jax.Array) -> KeysValues:
    """The caches with the new entries at their positions; a position that the cache lacks is dropped."""
    B, L = position_BxL.shape
    S = caches.stack.keys.shape[2]
    lacking = (position_BxL < 0) | (position_BxL >= S)
    # Each beyond the end at a place of its own, so that no two are alike.
    place_BxL = jnp.where(lacking, S + jnp.arange(L)[None], position_BxL)
    where = (caches.layer, jnp.arange(B)[:, None], place_BxL)

    def put(old: jax.Array, entry_BxLxKxD: jax.Array) -> jax.Array:
        return old.at[where].set(entry_BxLxKxD.astype(old.dtype), mode="drop", unique_indices=True)

    return jax.tree.map(put, caches.stack, new)


def of_layer(stack: KeysValues, layer: jax.Array) -> KeysValues:
    """The cache of one layer [B, S, K, D]."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False), stack)


def attend_part(
    q_BxLxHxD: jax.Array,
    cache: KeysValues,
    position_BxL: jax.Array,
    value_dim: int | None = None,
    first_BxL: jax.Array | None = None,
) -> Part:
    """Attention to the positions of `cache` [B, S, K, D], which count from 0; those after a token are masked,
    and those before the first that it sees, if given.

    A part of which a token sees nothing has greatest = MASKED, and so no weight beside one that it sees.
    """
    B, L, H, D = q_BxLxHxD.shape
    S, K = cache.keys.shape[1:3]
    q_BxLxKxGxD = q_BxLxHxD.reshape(B, L, K, H // K, D)
    scores_BxLxKxGxS = D**-0.5 * jnp.einsum(
        "blkgd,bskd->blkgs", q_BxLxKxGxD, cache.keys, preferred_element_type=jnp.float32
    )
    seen_BxLxS = jnp.arange(S)[None, None] <= position_BxL[:, :, None]
    if first_BxL is not None:
        seen_BxLxS &= jnp.arange(S)[None, None] >= first_BxL[:, :, None]
    scores_BxLxKxGxS = jnp.where(seen_BxLxS[:, :, None, None], scores_BxLxKxGxS, MASKED)
    values = cache.keys[..., :value_dim] if cache.values is None else cache.values
    greatest_BxLxKxG = scores_BxLxKxGxS.max(-1)
    weights_BxLxKxGxS = jnp.exp(scores_BxLxKxGxS - greatest_BxLxKxG[..., None])
    out_BxLxKxGxD = jnp.einsum(
        "blkgs,bskd->blkgd",
        weights_BxLxKxGxS.astype(q_BxLxHxD.dtype),
        values,
        preferred_element_type=jnp.float32,
    )
    return Part(
        out_BxLxKxGxD.reshape(B, L, H, values.shape[-1]),
        weights_BxLxKxGxS.sum(-1).reshape(B, L, H),
        greatest_BxLxKxG.reshape(B, L, H),
    )


def first_seen(config: ModelConfig, position_BxL: jax.Array, layer: jax.Array) -> jax.Array | None:
    """The first position that a token at `position_BxL` sees in this layer, None where all see all."""
    local = config.locality
    if not local:
        return None
    first_BxL = jnp.zeros_like(position_BxL)
    if local.window:
        first_BxL = jnp.maximum(first_BxL, position_BxL - local.window + 1)
    if local.chunk:
        first_BxL = jnp.maximum(first_BxL, position_BxL // local.chunk * local.chunk)
    if config.global_every:
        first_BxL = jnp.where(sees_all(config, layer), 0, first_BxL)
    return first_BxL


def sees_all(config: ModelConfig, layer: jax.Array) -> bool | jax.Array:
    """`ModelConfig.sees_all` of a layer whose number only the loop knows."""
    return (layer + 1) % config.global_every == 0 if config.global_every else False


def divided(part: Part) -> jax.Array:
    """out_BxLxHxD in f32: the sum of values over the sum of weights."""
    return part.out / part.total[..., None]


def last_of(x_BxLxE: jax.Array, count_B: jax.Array) -> jax.Array:
    """Of each slot the last real token [B, 1, E], by a sum over a mask: it leaves every array in place."""
    if x_BxLxE.shape[1] == 1:
        return x_BxLxE
    last_BxL = jnp.arange(x_BxLxE.shape[1])[None] == count_B[:, None] - 1
    return jnp.where(last_BxL[..., None], x_BxLxE, 0).sum(1, keepdims=True)
