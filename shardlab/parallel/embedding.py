"""Token embedding on a mesh: each device looks up the rows that it holds, and the vocabulary's parts are
summed.

Left to the partitioner, a lookup in a table split by vocabulary gathers the whole table, and its gradient
moves the activations of the whole batch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from shardlab.model.runtime import Lookup
from shardlab.parallel.shardings import Shardings


def mesh_lookup(shardings: Shardings, *, one_hot: bool = False) -> Lookup:
    """table_VxE, tokens_BxL -> x_BxLxE, placed as the residual stream is. one_hot: by a product of one-hot
    tokens with the table, as MaxText does (`use_iota_embed`), whose gradient is a product too.

    Where norm_seq is split by the same mesh axes as the vocabulary (sequence parallelism) the parts
    reduce-scatter.
    """

    def lookup(table_VxE: jax.Array, tokens_BxL: jax.Array) -> jax.Array:
        B, L = tokens_BxL.shape
        E = table_VxE.shape[1]
        table_spec = shardings.weight_in_use(table_VxE.shape, ("vocab", "embed")).spec
        tokens_spec = shardings.activation((B, L), ("batch", "seq")).spec
        stream_spec = shardings.activation((B, L, E), ("batch", "norm_seq", "embed")).spec
        vocab_axes = table_spec[0] or ()
        scatter = bool(vocab_axes) and stream_spec[1] == vocab_axes and tokens_spec[1] is None

        def local(table_VxE: jax.Array, tokens_BxL: jax.Array) -> jax.Array:
            x_BxLxE = (_product if one_hot else _rows)(table_VxE, tokens_BxL, vocab_axes)
            if scatter:
                return jax.lax.psum_scatter(x_BxLxE, vocab_axes, scatter_dimension=1, tiled=True)
            return jax.lax.psum(x_BxLxE, vocab_axes) if vocab_axes else x_BxLxE

        out_spec = jax.sharding.PartitionSpec(
            tokens_spec[0], stream_spec[1] if scatter else tokens_spec[1], table_spec[1]
        )
        mapped = jax.shard_map(
            local,
            mesh=shardings.mesh,
            axis_names=shardings.free_axes,
            in_specs=(table_spec, tokens_spec),
            out_specs=out_spec,
        )
        return mapped(table_VxE, tokens_BxL)

    return lookup


def _rows(table_VxE: jax.Array, tokens_BxL: jax.Array, vocab_axes: tuple[str, ...]) -> jax.Array:
    """This device's share of the rows: zero where another device holds the token's row."""
    rows = table_VxE.shape[0]
    if not vocab_axes:
        return table_VxE.at[tokens_BxL].get(mode="clip")
    local_BxL = tokens_BxL - jax.lax.axis_index(vocab_axes) * rows
    held_BxL = (local_BxL >= 0) & (local_BxL < rows)
    x_BxLxE = table_VxE.at[jnp.clip(local_BxL, 0, rows - 1)].get(mode="clip")
    return jnp.where(held_BxL[..., None], x_BxLxE, 0)


def _product(table_VxE: jax.Array, tokens_BxL: jax.Array, vocab_axes: tuple[str, ...]) -> jax.Array:
    """The same: the one-hot vector of a token that another device holds is zero."""
    first = jax.lax.axis_index(vocab_axes) * table_VxE.shape[0] if vocab_axes else 0
    return jax.nn.one_hot(tokens_BxL - first, table_VxE.shape[0], dtype=table_VxE.dtype) @ table_VxE
