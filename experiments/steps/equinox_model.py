"""An Equinox model, data parallel over every device: its arrays are arguments, the rest is closed over."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

WIDTH, DEPTH = 64, 2


def make_step(mesh: Mesh, batch: int = 64):
    """(jitted step, abstract arguments)"""
    whole = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec(tuple(mesh.axis_names)))
    key = jax.eval_shape(lambda: jax.random.key(0))
    model = eqx.filter_eval_shape(lambda key: eqx.nn.MLP(WIDTH, WIDTH, WIDTH, DEPTH, key=key), key)
    is_struct = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)  # noqa: E731
    arrays, static = eqx.partition(model, is_struct)

    def step(arrays, x_BxD: jax.Array):
        def loss(arrays) -> jax.Array:
            return jnp.sum(jax.vmap(eqx.combine(arrays, static))(x_BxD) ** 2)

        gradients = jax.grad(loss)(arrays)
        with jax.named_scope("optimizer"):
            return jax.tree.map(lambda w, g: w - 0.1 * g, arrays, gradients)

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole)

    x_BxD = jax.ShapeDtypeStruct((batch, WIDTH), jnp.float32, sharding=rows)
    return jax.jit(step, out_shardings=whole), (jax.tree.map(placed, arrays), x_BxD)
