"""32 layers of Llama 3 8B's MLP dimensions in plain JAX: scanned, rematerialized, fully sharded.

shardlab explain experiments/steps/scanned.toml
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

LAYERS, EMBED, MLP, SEQ = 32, 4096, 14336, 4096
LEARNING_RATE = 1e-3


def make_step(mesh: Mesh, batch: int):
    """(jitted step, abstract arguments): f32 weights and bf16 activations, both split over `fsdp`."""
    split, whole = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())
    stacked = NamedSharding(mesh, PartitionSpec(None, "fsdp"))

    def gathered(weight: jax.Array) -> jax.Array:
        weight = weight.astype(jnp.bfloat16)
        weight = jax.lax.with_sharding_constraint(weight, split)  # cast the shard, then gather
        return jax.lax.with_sharding_constraint(weight, whole)

    def layer(x_TxE: jax.Array, weights: tuple[jax.Array, jax.Array]):
        up_ExM, down_MxE = weights
        h_TxM = jax.nn.gelu(x_TxE @ gathered(up_ExM))
        return jax.lax.with_sharding_constraint(x_TxE + h_TxM @ gathered(down_MxE), split), None

    def loss_of(weights: tuple[jax.Array, jax.Array], x_TxE: jax.Array, y_TxE: jax.Array) -> jax.Array:
        with jax.named_scope("layers"):
            out_TxE, _ = jax.lax.scan(jax.checkpoint(layer), x_TxE, weights)
        return jnp.mean((out_TxE - y_TxE).astype(jnp.float32) ** 2)

    def step(weights: tuple[jax.Array, jax.Array], x_TxE: jax.Array, y_TxE: jax.Array):
        loss, gradients = jax.value_and_grad(loss_of)(weights, x_TxE, y_TxE)
        with jax.named_scope("optimizer"):
            return jax.tree.map(lambda w, g: w - LEARNING_RATE * g, weights, gradients), loss

    def weight(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((LAYERS, *shape), jnp.float32, sharding=stacked)

    x_TxE = jax.ShapeDtypeStruct((batch * SEQ, EMBED), jnp.bfloat16, sharding=split)
    return jax.jit(step, donate_argnums=0), ((weight(EMBED, MLP), weight(MLP, EMBED)), x_TxE, x_TxE)
