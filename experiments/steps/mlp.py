"""Two layers in plain JAX, fully sharded over the mesh's first axis: the least that `--step` needs.

shardlab explain experiments/steps/fsdp8.toml --step experiments.steps.mlp:make_step
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

WIDTH, HIDDEN, BATCH = 256, 1024, 64
LEARNING_RATE = 0.1


def make_step(mesh: Mesh, batch: int = BATCH):
    """(jitted step, abstract arguments)"""
    split, whole = (
        NamedSharding(mesh, PartitionSpec(mesh.axis_names[0])),
        NamedSharding(mesh, PartitionSpec()),
    )

    def loss_of(weights: dict[str, jax.Array], x_BxD: jax.Array, y_BxD: jax.Array) -> jax.Array:
        up_DxF, down_FxD = jax.lax.with_sharding_constraint((weights["up_DxF"], weights["down_FxD"]), whole)
        return jnp.sum((jax.nn.relu(x_BxD @ up_DxF) @ down_FxD - y_BxD) ** 2)

    def step(weights: dict[str, jax.Array], x_BxD: jax.Array, y_BxD: jax.Array):
        loss, gradients = jax.value_and_grad(loss_of)(weights, x_BxD, y_BxD)
        with jax.named_scope("optimizer"):
            return jax.tree.map(lambda w, g: w - LEARNING_RATE * g, weights, gradients), loss

    def abstract(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=split)

    weights = {"up_DxF": abstract(WIDTH, HIDDEN), "down_FxD": abstract(HIDDEN, WIDTH)}
    x_BxD = abstract(batch, WIDTH)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(jax.tree.map(lambda _: split, weights), whole))
    return jitted, (weights, x_BxD, x_BxD)
