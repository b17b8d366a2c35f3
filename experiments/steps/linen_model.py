"""A Flax linen model whose parameters carry their mesh axes: batch over `data`, hidden units over
`tensor`.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

WIDTH, HIDDEN = 128, 512


class Block(nn.Module):
    """A residual multilayer perceptron, Megatron's way: one all-reduce forward, one backward."""

    @nn.compact
    def __call__(self, x_BxD: jax.Array) -> jax.Array:
        """x_BxD: of the residual stream."""
        split = nn.with_partitioning
        init = nn.initializers.lecun_normal()
        up = nn.Dense(HIDDEN, use_bias=False, kernel_init=split(init, (None, "tensor")), name="up")
        down = nn.Dense(WIDTH, use_bias=False, kernel_init=split(init, ("tensor", None)), name="down")
        return x_BxD + down(nn.gelu(up(x_BxD)))


class Model(nn.Module):
    """Two blocks."""

    @nn.compact
    def __call__(self, x_BxD: jax.Array) -> jax.Array:
        """x_BxD: of the residual stream."""
        return Block(name="second")(Block(name="first")(x_BxD))


def make_step(mesh: Mesh, batch: int = 32):
    """(jitted step, abstract arguments)"""
    model, optimizer = Model(), optax.sgd(0.1)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    x_BxD = jax.ShapeDtypeStruct((batch, WIDTH), jnp.float32, sharding=rows)

    def step(params, x_BxD: jax.Array):
        gradients = jax.grad(lambda params: jnp.sum(model.apply(params, x_BxD) ** 2))(params)
        with jax.named_scope("optimizer"):
            updates, _ = optimizer.update(gradients, optimizer.init(params), params)
            return optax.apply_updates(params, updates)

    boxed = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), x_BxD)
    shardings = nn.get_sharding(boxed, mesh)
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.unbox(boxed),
        shardings,
    )
    return jax.jit(step, out_shardings=shardings), (params, x_BxD)
