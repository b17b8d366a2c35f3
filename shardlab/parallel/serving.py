"""A KV cache on a mesh, and what a context parallel prefill leaves in order.

The cache may be split by KV heads, by slots (batch), and by positions (`cache`). Split by positions, every
device attends to its own and the parts are put together by their softmax sums (Flash-Decoding; Milakov and
Gimelshein, arXiv:1805.02867): three small all-reduces, and the cache stays where it is. It is written out and
not left to the partitioner, which does the same where only positions are split, and more elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from shardlab.model.cache import (
    CachedAttention,
    Caches,
    KeysValues,
    Part,
    attend_part,
    divided,
    of_layer,
    written,
)
from shardlab.model.transformer import Cache
from shardlab.parallel.shardings import Shardings
from shardlab.spec.context import zigzag_ways
from shardlab.spec.plan import Plan

CACHE_AXES = (None, "batch", "cache", "kv_heads", None)

Names = tuple[str, ...]


class _Layout(NamedTuple):
    """Mesh axes of each dimension. heads: of the queries during attention. scatter: the output goes to the
    devices that asked, by heads, as it is summed. spare: beyond those of KV heads."""

    batch: Names
    positions: Names
    kv_heads: Names
    heads: Names
    scatter: bool

    @property
    def spare(self) -> Names:
        return self.heads[len(self.kv_heads) :]


def sees_all(position_BxL: jax.Array, layer: jax.Array) -> None:
    """A `first_seen` without windows or chunks."""
    del position_BxL, layer


def mesh_cached_attention(
    shardings: Shardings, first_seen: Callable[[jax.Array, jax.Array], jax.Array | None] = sees_all
) -> CachedAttention:
    """Attention to a cache split as the plan says: global arrays in and out, and nothing of it is gathered.

    Query heads over the mesh axes of `cache` too (KV heads fewer than the tensor axis, say 8 over 16 devices:
    heads over both axes, KV heads over one, positions over the other) are gathered for it, a token's worth.
    first_seen: of tokens' positions and a layer, the first position that each sees; None where all see all.
    """

    def attention(
        q_BxLxHxD: jax.Array,
        new: KeysValues,
        caches: Caches[KeysValues],
        position_BxL: jax.Array,
        value_dim: int | None = None,
    ) -> tuple[jax.Array, KeysValues]:
        layout = _layout(shardings, q_BxLxHxD.shape, caches.stack.keys.shape)

        def local(
            q: jax.Array, new: KeysValues, caches: Caches[KeysValues], position_BxL: jax.Array
        ) -> tuple[jax.Array, KeysValues]:
            held = caches.stack.keys.shape[2]
            first = jax.lax.axis_index(layout.positions) * held if layout.positions else 0
            stack = written(caches, new, position_BxL - first)
            layer = _heads_of(of_layer(stack, caches.layer), q.shape[2], layout.spare)
            lowest_BxL = first_seen(position_BxL, caches.layer)
            lowest_BxL = None if lowest_BxL is None else lowest_BxL - first
            part = attend_part(q, layer, position_BxL - first, value_dim, lowest_BxL)
            return _whole(part, layout).astype(q.dtype), stack

        def spec(*names: Names) -> PartitionSpec:
            return PartitionSpec(*(one or None for one in names))

        cache = spec((), layout.batch, layout.positions, layout.kv_heads, ())
        held = jax.tree.map(lambda _: cache, caches.stack)
        entry = spec(layout.batch, (), layout.kv_heads, ())
        out = (*layout.heads, *layout.positions) if layout.scatter else layout.heads
        mapped = jax.shard_map(
            local,
            mesh=shardings.mesh,
            axis_names=shardings.free_axes,
            in_specs=(
                spec(layout.batch, (), layout.heads, ()),
                jax.tree.map(lambda _: entry, new),
                Caches(held, PartitionSpec()),
                spec(layout.batch, ()),
            ),
            out_specs=(spec(layout.batch, (), out, ()), held),
            check_vma=False,
        )
        return mapped(q_BxLxHxD, new, caches, position_BxL)

    return attention


def _layout(shardings: Shardings, queries: tuple[int, ...], cache: tuple[int, ...]) -> _Layout:
    """Queries lie with the KV heads that they read."""
    spec = shardings.activation(cache, CACHE_AXES).spec
    _, batch, positions, kv_heads, _ = (_names(entry) for entry in (*spec, *[None] * (5 - len(spec))))
    asked = _names(shardings.activation(queries, ("batch", "seq", "heads", None)).spec[2])
    heads = tuple(name for name in asked if name not in positions)
    if heads[: len(kv_heads)] != kv_heads:
        heads = kv_heads
    scatter = bool(positions) and asked == heads + positions
    return _Layout(batch, positions, kv_heads, heads, scatter)


def _names(entry: str | Names | None) -> Names:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _heads_of(cache: KeysValues, heads: int, spare: Names) -> KeysValues:
    """The KV heads that a device's query heads read, where `spare` axes split only the query heads."""
    if not spare:
        return cache
    ways, kv_heads = jax.lax.axis_size(spare), cache.keys.shape[2]
    rank, group = jax.lax.axis_index(spare), heads * ways // kv_heads
    if kv_heads % ways and ways % kv_heads:  # groups straddle devices: one KV head for each query head
        places = (rank * heads + jnp.arange(heads)) // group
        return jax.tree.map(lambda a: jnp.take(a, places, axis=2), cache)
    size = max(kv_heads // ways, 1)
    start = rank * heads // group
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, size, axis=2), cache)


def _whole(part: Part, layout: _Layout) -> jax.Array:
    """The parts of all devices that split the positions put together, on each or each its own heads."""
    if not layout.positions:
        return divided(part)
    greatest = jax.lax.pmax(part.greatest, layout.positions)
    scale_BxLxH = jnp.exp(part.greatest - greatest)
    out, total = part.out * scale_BxLxH[..., None], part.total * scale_BxLxH
    if layout.scatter:
        out, total = (
            jax.lax.psum_scatter(a, layout.positions, scatter_dimension=2, tiled=True) for a in (out, total)
        )
    else:
        out, total = jax.lax.psum((out, total), layout.positions)
    return divided(Part(out, total, greatest))


def mesh_last_token(plan: Plan, shardings: Shardings) -> Callable[[jax.Array], jax.Array]:
    """x_BxLxE -> its last token [B, 1, E], wherever context parallelism put it, on every device of `seq`."""
    ways = zigzag_ways(plan)

    def last(x_BxLxE: jax.Array) -> jax.Array:
        L = x_BxLxE.shape[1]
        spec = shardings.activation(x_BxLxE.shape, ("batch", "seq", "embed")).spec
        split = _names(spec[1])
        # In zig-zag order share 0 holds the first chunk and the last.
        place = L // ways - 1
        if not split:
            return x_BxLxE[:, place : place + 1]

        def local(x_BxLxE: jax.Array) -> jax.Array:
            owner, row = divmod(place, x_BxLxE.shape[1])
            mine = jax.lax.axis_index(split) == owner
            return jax.lax.psum(jnp.where(mine, x_BxLxE[:, row : row + 1], 0), split)

        return jax.shard_map(
            local,
            mesh=shardings.mesh,
            axis_names=shardings.free_axes,
            in_specs=spec,
            out_specs=PartitionSpec(spec[0], None, spec[2]),
            check_vma=False,
        )(x_BxLxE)

    return last


def in_natural_order(plan: Plan, shardings: Shardings, cache: Cache) -> Cache:
    """The cache of a prompt [N, B, L, …], whose tokens lay in zig-zag order, in their natural order.

    A device holds two chunks, one that is even and one that is odd: two permutes, of half of what it holds.
    """
    ways = zigzag_ways(plan)
    if ways == 1:
        return cache
    split = plan.activations["seq"]
    total = math.prod(plan.axes[name] for name in split)
    chunks = _chunks_of(ways, total)
    to_places = [
        [(source, c // 2) for source, held in enumerate(chunks) for c in held if c % 2 == parity]
        for parity in (0, 1)
    ]
    early_is_odd = [first % 2 for first, _ in chunks]

    def local(a: jax.Array) -> jax.Array:
        halves = jnp.split(a, 2, axis=2)
        swap = jnp.asarray(early_is_odd)[jax.lax.axis_index(split)] == 1
        even, odd = jnp.where(swap, halves[1], halves[0]), jnp.where(swap, halves[0], halves[1])
        arrived = (
            jax.lax.ppermute(one, split, pairs) for one, pairs in zip((even, odd), to_places, strict=True)
        )
        return jnp.concatenate([*arrived], axis=2)

    def ordered(a: jax.Array) -> jax.Array:
        axes = (None, "batch", "seq", *(("kv_heads",) if a.ndim == 5 else ()), None)
        spec = shardings.activation(a.shape, axes).spec
        return jax.shard_map(
            local,
            mesh=shardings.mesh,
            axis_names=shardings.free_axes,
            in_specs=spec,
            out_specs=spec,
            check_vma=False,
        )(a)

    with jax.named_scope("cache"):
        return jax.tree.map(ordered, cache)


def _chunks_of(ways: int, devices: int) -> list[tuple[int, int]]:
    """Which two of 2 · devices chunks each device holds in zig-zag order over `ways` shares, each of which
    lies on devices / ways devices, one after the other."""
    within = devices // ways
    order = [
        chunk * within + part
        for share in range(ways)
        for chunk in (share, 2 * ways - 1 - share)
        for part in range(within)
    ]
    return [(order[2 * device], order[2 * device + 1]) for device in range(devices)]
