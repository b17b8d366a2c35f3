"""Context parallel attention: the sequence is split over devices, which exchange keys and values, or heads.

- all-gather: every device gathers K and V and attends with its own queries (Llama 3, arXiv:2407.21783).
- ring: K and V travel around the ring while each device attends to what it holds; backward, their gradients
  travel with them in f32 (Ring Attention, arXiv:2310.01889).
- ulysses: all-to-alls swap a split sequence for split heads and back (DeepSpeed-Ulysses, arXiv:2309.14509).
- ring+ulysses: a ring of groups that each do Ulysses inside (USP, arXiv:2405.07719).

With a ring or a gather tokens lie in zig-zag order: a device holds an early and a late chunk, and so every
device has the same number of tile pairs to compute, at every hop. Batches arrive in that order
(`in_step_order`), positions follow it (`positions_of`), and the loss is a mean, which no order changes:
nothing is resharded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
import numpy as np

from shardlab.model.attention import CausalAttention
from shardlab.parallel.shardings import Shardings
from shardlab.parallel.tiles import (
    Finished,
    Meetings,
    Pairs,
    Partial,
    Tiles,
    as_type,
    attend,
    cotangent_of,
    finish,
    from_tiles,
    gradients,
    joined,
    nothing_seen,
    rectangle,
    tile_size,
    tiled_attention,
    tiles_of,
    triangle,
)
from shardlab.spec.context import context_axes, zigzag_order, zigzag_ways
from shardlab.spec.names import context_split
from shardlab.spec.plan import Plan


def context_attention(plan: Plan, whole: CausalAttention, shardings: Shardings) -> CausalAttention:
    """The plan's attention over the whole mesh, global arrays in and out.

    whole: attention of whole sequences on one device, which Ulysses alone uses. KV heads are placed as query
    heads are.
    """
    roles = context_axes(plan)
    local = whole
    if roles.tokens is not None and plan.axes[roles.tokens] > 1:
        kind = gathered_attention if plan.method.context == "all-gather" else ring_attention
        local = kind(roles.tokens, plan.axes[roles.tokens])
    if roles.heads is not None:
        local = ulysses_attention(roles.heads, local)
    split = ("batch", "seq", "heads", None)

    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q_spec, kv_spec = (shardings.activation(a.shape, split).spec for a in (q, k))
        return jax.shard_map(
            local,
            mesh=shardings.mesh,
            axis_names=shardings.free_axes,
            in_specs=(q_spec, kv_spec, kv_spec),
            out_specs=q_spec,
            check_vma=False,
        )(q, k, v)

    return attention


def positions_of(plan: Plan, shardings: Shardings) -> Callable[[int], jax.Array] | None:
    """Length -> the position of each token in the order of the step's arrays; None where it is the natural.

    By arithmetic on an iota, so that every device makes its own. Inside a map that is manual over the axes of
    context parallelism the length is that of a device's part, and so are the positions.
    """
    ways = zigzag_ways(plan)
    taken = tuple(axis for axis in context_split(plan) if axis not in shardings.free_axes)
    parts = prod(plan.axes[axis] for axis in taken)

    def positions(length: int) -> jax.Array:
        place_L = jnp.arange(length)
        if taken:
            place_L = place_L + jax.lax.axis_index(taken) * length
        if ways == 1:
            return place_L
        half = length * parts // (2 * ways)
        chunk_L, within_L = jnp.divmod(place_L, half)
        share_L, late_L = jnp.divmod(chunk_L, 2)
        return jnp.where(late_L == 1, 2 * ways - 1 - share_L, share_L) * half + within_L

    return positions if ways > 1 or taken else None


def in_step_order(tokens_BxL: np.ndarray, plan: Plan) -> np.ndarray:
    """Tokens (or targets) of natural order in the order that the plan's training step takes them."""
    ways = zigzag_ways(plan)
    return tokens_BxL if ways == 1 else tokens_BxL[:, list(zigzag_order(tokens_BxL.shape[1], ways))]


def order_notes(plan: Plan) -> tuple[str, ...]:
    """What the report says about the order of tokens."""
    ways = zigzag_ways(plan)
    if ways == 1:
        return ()
    return (f"tokens arrive in zig-zag order: device i of {ways} holds chunks i and {2 * ways - 1} - i",)


def ulysses_attention(axis: str, inside: CausalAttention) -> CausalAttention:
    """Per device: all-to-alls before and after `inside`, which sees its share of heads and more tokens."""

    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        to_heads = partial(jax.lax.all_to_all, axis_name=axis, split_axis=2, concat_axis=1, tiled=True)
        out = inside(*(to_heads(a) for a in (q, k, v)))
        return jax.lax.all_to_all(out, axis, split_axis=1, concat_axis=2, tiled=True)

    return attention


def gathered_attention(axis: str, ways: int) -> CausalAttention:
    """Per device: K and V of all devices, own queries. The gradients of K and V are reduce-scattered."""

    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        tiles = tiles_of(q, k, v, tile_size(q.shape[1] // 2))
        half = tiles.keys.shape[0] // 2
        keys, values = (jax.lax.all_gather(a, axis, tiled=True) for a in tiles[1:])
        meetings = gathered_meetings(half, ways, jax.lax.axis_index(axis))
        return from_tiles(tiled_attention(Tiles(tiles[0], keys, values), meetings))

    return attention


def gathered_meetings(half: int, ways: int, rank: jax.Array) -> Meetings:
    """What the queries of device `rank` see of all keys, both in zig-zag order; half: tiles per chunk.

    rank + (2 · ways - 1 - rank) whole chunks and two diagonal ones: the same number on every device.
    """
    chunk, within = jnp.divmod(jnp.arange((2 * ways - 1) * half * half, dtype=jnp.int32), half * half)
    query, key = jnp.divmod(within, half)
    early = chunk < rank
    seen = jnp.where(early, chunk, chunk - rank)
    slot = jnp.where(seen < ways, 2 * seen, 2 * (2 * ways - 1 - seen) + 1)
    full = Pairs(jnp.where(early, query, half + query), slot * half + key)
    diagonal, below, _ = triangle(half)
    own = [
        [Pairs(side * half + one.query, (2 * rank + side) * half + one.key) for side in (0, 1)]
        for one in (diagonal, below)
    ]
    return Meetings(joined(*own[0]), joined(*own[1], full))


def hop_meetings(half: int, earlier: jax.Array) -> Meetings:
    """What zig-zag queries see of another device's keys. earlier: that device is before this one in the ring.

    Late queries always see early keys. Beyond that all queries see an earlier device's early keys, and late
    queries a later device's late keys: two chunk pairs, fully visible, either way.
    """
    always = rectangle(half, half)
    shift = jnp.where(earlier, 0, half)
    pairs = joined(
        always._replace(query=half + always.query),
        always._replace(query=shift + always.query, key=shift + always.key),
    )
    return Meetings(rectangle(0, 1), pairs)


KeysValues = tuple[jax.Array, jax.Array]


def ring_attention(axis: str, ways: int) -> CausalAttention:
    """Per device, ways >= 2: ways - 1 hops of K and V forward; backward as many, and of dK and dV in f32.

    A hop is asked for before the tile pairs that do not need it, so that it can travel meanwhile.
    """

    def send(arrays: KeysValues) -> KeysValues:
        pairs = [(i, (i + 1) % ways) for i in range(ways)]
        first, second = (jax.lax.ppermute(a, axis, pairs) for a in arrays)
        return first, second

    @jax.custom_vjp
    def ring(tiles: Tiles) -> jax.Array:
        return forward(tiles)[0]

    def forward(tiles: Tiles) -> tuple[jax.Array, tuple[Tiles, Finished]]:
        done = finish(_ring_forward(tiles, send, ways, jax.lax.axis_index(axis)))
        return done.out.astype(tiles.queries.dtype), (tiles, done)

    def backward(saved: tuple[Tiles, Finished], d_out: jax.Array) -> tuple[Tiles]:
        tiles, done = saved
        found = _ring_backward(tiles, done, d_out, send, ways, jax.lax.axis_index(axis))
        return (as_type(found, tiles),)

    ring.defvjp(forward, backward)
    return lambda q, k, v: from_tiles(ring(tiles_of(q, k, v, tile_size(q.shape[1] // 2))))


def _ring_forward(
    tiles: Tiles, send: Callable[[KeysValues], KeysValues], ways: int, rank: jax.Array
) -> Partial:
    """After hop h a device holds the keys of device rank - h."""
    queries, *own = tiles
    num_tiles = queries.shape[0]
    arriving = send((own[0], own[1]))
    # Early tokens come before late ones: among a device's own, places are in the order of positions.
    seen = attend(tiles, triangle(num_tiles), nothing_seen(tiles))

    def meet(hop: jax.Array | int, held: KeysValues, seen: Partial) -> Partial:
        return attend(Tiles(queries, *held), hop_meetings(num_tiles // 2, rank >= hop), seen)

    def one(hop: jax.Array, carry: tuple[KeysValues, Partial]) -> tuple[KeysValues, Partial]:
        held, seen = carry
        return send(held), meet(hop, held, seen)

    held, seen = jax.lax.fori_loop(1, ways - 1, one, (arriving, seen))
    return meet(ways - 1, held, seen)


def _ring_backward(
    tiles: Tiles,
    done: Finished,
    d_out: jax.Array,
    send: Callable[[KeysValues], KeysValues],
    ways: int,
    rank: jax.Array,
) -> Tiles:
    """The gradients of a device's keys start at its neighbour, gather a share at every hop, and come home."""
    queries, *own = tiles
    num_tiles = queries.shape[0]
    cotangent = cotangent_of(d_out, done)
    held = send((own[0], own[1]))
    at_home = gradients(tiles, triangle(num_tiles), cotangent)

    def meet(hop: jax.Array | int, held: KeysValues, d_q: jax.Array) -> tuple[jax.Array, KeysValues]:
        meetings = hop_meetings(num_tiles // 2, rank >= hop)
        found = gradients(Tiles(queries, *held), meetings, cotangent, d_q)
        return found[0], (found[1], found[2])

    def one(
        hop: jax.Array, carry: tuple[KeysValues, KeysValues, jax.Array]
    ) -> tuple[KeysValues, KeysValues, jax.Array]:
        held, gathered, d_q = carry
        arriving, moved = send(held), send(gathered)
        d_q, share = meet(hop, held, d_q)
        return arriving, _added(moved, share), d_q

    arriving = send(held) if ways > 2 else held
    d_q, gathered = meet(1, held, at_home[0])
    if ways > 2:
        held, gathered, d_q = jax.lax.fori_loop(2, ways - 1, one, (arriving, gathered, d_q))
        moved = send(gathered)
        d_q, share = meet(ways - 1, held, d_q)
        gathered = _added(moved, share)
    return Tiles(d_q, *_added((at_home[1], at_home[2]), send(gathered)))


def _added(a: KeysValues, b: KeysValues) -> KeysValues:
    return a[0] + b[0], a[1] + b[1]
