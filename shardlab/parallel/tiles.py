"""Blockwise attention in plain XLA: tiles of queries meet tiles of keys, by an exact online softmax in f32.

Memory is linear in the sequence: of the scores one tile pair exists at a time, forward and backward (Milakov
and Gimelshein, arXiv:1805.02867; FlashAttention-2, arXiv:2307.08691, algorithms 1 and 2). Which pairs meet
is data, so one loop serves a causal triangle, a hop of a ring, and a share of gathered keys, and of what the
mask hides only the upper halves of the diagonal's tiles are computed, and of a window those of its far edge.

Shapes: T tiles of t tokens; K KV heads, each with G query heads. Queries and what is like them
[T, B, K, G, t, D], keys and values [T, B, K, t, D], one number per query [T, B, K, G, t].
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from shardlab.model.attention import MASKED

MAX_TILE = 512


class Pairs(NamedTuple):
    """Which tile of queries meets which tile of keys, int32 [P]."""

    query: jax.Array
    key: jax.Array


class Edge(NamedTuple):
    """Pairs of which a part is visible, the same of each [t, t]: those at the far end of a window."""

    pairs: Pairs
    visible_txt: jax.Array


class Meetings(NamedTuple):
    """All pairs of an attention. diagonal: of the same positions, causal inside; full: each wholly visible.

    Apart, because a mask that depends on the pair is one that XLA computes for all pairs before the loop.
    """

    diagonal: Pairs
    full: Pairs
    edges: tuple[Edge, ...] = ()


class Partial(NamedTuple):
    """Online softmax over the keys seen so far, f32: row maximum, sum of weights, weighted values."""

    maximum: jax.Array
    total: jax.Array
    values: jax.Array


class Tiles(NamedTuple):
    """Queries, keys and values in tiles."""

    queries: jax.Array
    keys: jax.Array
    values: jax.Array


class Finished(NamedTuple):
    """Attention's result: out in f32, and the log of the sum of exponentials of each row."""

    out: jax.Array
    logsumexp: jax.Array


def tile_size(length: int) -> int:
    """The largest divisor of `length` up to MAX_TILE."""
    return next(t for t in range(min(length, MAX_TILE), 0, -1) if length % t == 0)


def to_tiles(x_BxLxHxD: jax.Array, kv_heads: int, tile: int) -> jax.Array:
    """[T, B, K, G, t, D]."""
    B, L, H, D = x_BxLxHxD.shape
    x = x_BxLxHxD.reshape(B, L // tile, tile, kv_heads, H // kv_heads, D)
    return x.transpose(1, 0, 3, 4, 2, 5)


def from_tiles(x_TxBxKxGxtxD: jax.Array) -> jax.Array:
    """[B, L, H, D], the inverse of `to_tiles`."""
    T, B, K, G, t, D = x_TxBxKxGxtxD.shape
    return x_TxBxKxGxtxD.transpose(1, 0, 4, 2, 3, 5).reshape(B, T * t, K * G, D)


def tiles_of(q_BxLxHxD: jax.Array, k_BxSxKxD: jax.Array, v_BxSxKxD: jax.Array, tile: int) -> Tiles:
    """All three in tiles of `tile` tokens."""
    K = k_BxSxKxD.shape[2]
    keys, values = (to_tiles(a, K, tile).squeeze(3) for a in (k_BxSxKxD, v_BxSxKxD))
    return Tiles(to_tiles(q_BxLxHxD, K, tile), keys, values)


def triangle(tiles: int) -> Meetings:
    """What a causal mask shows of `tiles` x `tiles`."""
    query, key = (a.astype(jnp.int32) for a in jnp.tril_indices(tiles, -1))
    same = jnp.arange(tiles, dtype=jnp.int32)
    return Meetings(Pairs(same, same), Pairs(query, key))


def band(tiles: int, tile: int, window: int) -> Meetings:
    """What a causal mask and a window show of `tiles` x `tiles`. Tiles as far apart have the same mask."""
    place = np.arange(tile)
    diagonal = rectangle(0, 1)
    full: list[Pairs] = []
    edges: list[Edge] = []
    for apart in range(min(tiles, -(-(window - 1) // tile) + 1)):
        key = jnp.arange(tiles - apart, dtype=jnp.int32)
        pairs = Pairs(key + apart, key)
        behind_txt = apart * tile + place[:, None] - place[None, :]
        if apart == 0 and window >= tile:
            diagonal = pairs
        elif apart > 0 and apart * tile + tile - 1 < window:
            full.append(pairs)
        else:
            edges.append(Edge(pairs, jnp.asarray((behind_txt >= 0) & (behind_txt < window))))
    return Meetings(diagonal, joined(*full) if full else rectangle(0, 1), tuple(edges))


def rectangle(queries: int, keys: int) -> Pairs:
    """Every pair."""
    return Pairs(*jnp.divmod(jnp.arange(queries * keys, dtype=jnp.int32), keys))


def joined(*parts: Pairs) -> Pairs:
    """One after the other."""
    return Pairs(*(jnp.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def nothing_seen(tiles: Tiles) -> Partial:
    """Before the first key. Values may have a head size of their own."""
    rows = tiles.queries.shape[:-1]
    return Partial(
        jnp.full(rows, MASKED, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros((*rows, tiles.values.shape[-1]), jnp.float32),
    )


def attend(tiles: Tiles, meetings: Meetings, seen: Partial) -> Partial:
    """`seen` and the keys that are met; those near a query first, since of the far edges it may see none."""
    seen = _attend(tiles, meetings.diagonal, seen, _causal(tiles))
    for edge in meetings.edges:
        seen = _attend(tiles, edge.pairs, seen, edge.visible_txt)
    return _attend(tiles, meetings.full, seen, None)


def _attend(tiles: Tiles, pairs: Pairs, seen: Partial, visible_txt: jax.Array | None) -> Partial:

    def meet(seen: Partial, pair: Pairs) -> tuple[Partial, None]:
        q, k, v = _pick(tiles, pair)
        old = Partial(*(_at(a, pair.query) for a in seen))
        scores = _scores(q, k, visible_txt)
        maximum = jnp.maximum(old.maximum, scores.max(-1))
        weights = jnp.exp(scores - maximum[..., None])
        shrink = jnp.exp(old.maximum - maximum)
        values = jnp.einsum(
            "bkgts,bksd->bkgtd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        new = Partial(
            maximum,
            old.total * shrink + weights.sum(-1),
            old.values * shrink[..., None] + values,
        )
        return Partial(*(_put(a, b, pair.query) for a, b in zip(seen, new, strict=True))), None

    return jax.lax.scan(meet, seen, pairs)[0] if pairs.query.size else seen


def finish(seen: Partial) -> Finished:
    """Normalise once every key has been seen."""
    out = seen.values / seen.total[..., None]
    return Finished(out, seen.maximum + jnp.log(seen.total))


class Cotangent(NamedTuple):
    """What the backward pass of every pair needs: the gradient of out, and per row its product with out."""

    out: jax.Array
    product: jax.Array
    logsumexp: jax.Array


def cotangent_of(d_out: jax.Array, done: Finished) -> Cotangent:
    """From the gradient of out; products in f32."""
    product = jnp.einsum("nbkgtd,nbkgtd->nbkgt", d_out, done.out, preferred_element_type=jnp.float32)
    return Cotangent(d_out, product, done.logsumexp)


def gradients(
    tiles: Tiles, meetings: Meetings, cotangent: Cotangent, start_q: jax.Array | None = None
) -> Tiles:
    """The meetings' share of the gradients, f32; that of the queries is added to `start_q`."""
    zero = Tiles(*(jnp.zeros(a.shape, jnp.float32) for a in tiles))
    start = zero if start_q is None else zero._replace(queries=start_q)
    start = _gradients(tiles, meetings.diagonal, cotangent, start, _causal(tiles))
    for edge in meetings.edges:
        start = _gradients(tiles, edge.pairs, cotangent, start, edge.visible_txt)
    return _gradients(tiles, meetings.full, cotangent, start, None)


def _gradients(
    tiles: Tiles, pairs: Pairs, cotangent: Cotangent, start: Tiles, visible_txt: jax.Array | None
) -> Tiles:

    def meet(total: Tiles, pair: Pairs) -> tuple[Tiles, None]:
        q, k, v = _pick(tiles, pair)
        d_out, product, logsumexp = (_at(a, pair.query) for a in cotangent)
        weights = jnp.exp(_scores(q, k, visible_txt) - logsumexp[..., None])
        d_weights = _f32("bkgtd,bksd->bkgts", d_out, v)
        d_scores = (weights * (d_weights - product[..., None]) * q.shape[-1] ** -0.5).astype(q.dtype)
        d_q = _f32("bkgts,bksd->bkgtd", d_scores, k)
        d_k = _f32("bkgts,bkgtd->bksd", d_scores, q)
        d_v = _f32("bkgts,bkgtd->bksd", weights.astype(d_out.dtype), d_out)
        places = (pair.query, pair.key, pair.key)
        new = (_put(a, _at(a, i) + b, i) for a, b, i in zip(total, (d_q, d_k, d_v), places, strict=True))
        return Tiles(*new), None

    return jax.lax.scan(meet, start, pairs)[0] if pairs.query.size else start


@jax.custom_vjp
def tiled_attention(tiles: Tiles, meetings: Meetings) -> jax.Array:
    """Attention: out [T, B, K, G, t, D] in the queries' type."""
    return _forward(tiles, meetings)[0]


def _forward(tiles: Tiles, meetings: Meetings) -> tuple[jax.Array, tuple[Tiles, Meetings, Finished]]:
    done = finish(attend(tiles, meetings, nothing_seen(tiles)))
    return done.out.astype(tiles.queries.dtype), (tiles, meetings, done)


def _backward(saved: tuple[Tiles, Meetings, Finished], d_out_TxBxKxGxtxD: jax.Array) -> tuple[Tiles, None]:
    tiles, meetings, done = saved
    total = gradients(tiles, meetings, cotangent_of(d_out_TxBxKxGxtxD, done))
    return as_type(total, tiles), None


tiled_attention.defvjp(_forward, _backward)


def blockwise_attention(
    q_BxLxHxD: jax.Array, k_BxLxKxD: jax.Array, v_BxLxKxD: jax.Array, *, window: int = 0
) -> jax.Array:
    """Causal attention of whole sequences on one device, memory linear in L. window: as the reference's."""
    tile = tile_size(q_BxLxHxD.shape[1])
    tiles = tiles_of(q_BxLxHxD, k_BxLxKxD, v_BxLxKxD, tile)
    count = tiles.keys.shape[0]
    return from_tiles(tiled_attention(tiles, band(count, tile, window) if window else triangle(count)))


def as_type(total: Tiles, like: Tiles) -> Tiles:
    """Gradients in the types of what they are gradients of."""
    return Tiles(*(a.astype(b.dtype) for a, b in zip(total, like, strict=True)))


def _causal(tiles: Tiles) -> jax.Array:
    """What a tile shows of itself [t, t]."""
    place = jnp.arange(tiles.keys.shape[-2])
    return place[:, None] >= place[None, :]


def _scores(q_BxKxGxtxD: jax.Array, k_BxKxsxD: jax.Array, visible_txt: jax.Array | None) -> jax.Array:
    """q·kᵀ / √D in f32, masked where not visible; None: all is."""
    scores = _f32("bkgtd,bksd->bkgts", q_BxKxGxtxD, k_BxKxsxD) * q_BxKxGxtxD.shape[-1] ** -0.5
    return scores if visible_txt is None else jnp.where(visible_txt[None, None, None], scores, MASKED)


def _f32(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _pick(tiles: Tiles, pair: Pairs) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v = tiles
    return _at(q, pair.query), _at(k, pair.key), _at(v, pair.key)


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)


def _put(x: jax.Array, part: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, part, index, 0)
