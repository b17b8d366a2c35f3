"""A trainer as MaxText has it: scanned layers, logical axes and rules, gradients summed over microbatches.

A step is two programs: `accumulate` for each of sixteen microbatches, and one `update`. The rules are those
of the mesh file, since `make_step` asks for `plan`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardlab import StepProgram

LAYERS, EMBED, MLP = 4, 128, 512
MICROBATCHES = 16
# What each dimension of an array is called; the plan's rules say over which mesh axes it goes.
PARAMS = {"up_LxDxF": ("layers", "embed", "mlp"), "down_LxFxD": ("layers", "mlp", "embed")}
SHAPES = {"up_LxDxF": (LAYERS, EMBED, MLP), "down_LxFxD": (LAYERS, MLP, EMBED)}


def make_step(mesh: Mesh, plan, batch: int):
    """[16 x accumulate, 1 x update]"""

    def placed(rules, *names: str) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*(rules.get(name) for name in names)))

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    rows = placed(plan.activations, "batch")
    whole_layer = {name: placed({"mlp": plan.params.get("mlp")}, *axes[1:]) for name, axes in PARAMS.items()}

    def layer(x_BxD: jax.Array, weights: dict[str, jax.Array]):
        gathered = jax.lax.with_sharding_constraint(weights, whole_layer)
        with jax.named_scope("mlp"):
            y_BxD = jax.nn.relu(x_BxD @ gathered["up_LxDxF"]) @ gathered["down_LxFxD"]
        return jax.lax.with_sharding_constraint(x_BxD + y_BxD, rows), None

    def loss(params: dict[str, jax.Array], x_BxD: jax.Array) -> jax.Array:
        with jax.named_scope("layers"):
            x_BxD, _ = jax.lax.scan(jax.checkpoint(layer), x_BxD, params)
        return jnp.sum(x_BxD**2)

    def accumulate(params, sums, x_BxD: jax.Array):
        return jax.tree.map(jnp.add, sums, jax.grad(loss)(params, x_BxD))

    def update(params, state, sums):
        with jax.named_scope("optimizer"):
            updates, state = optimizer.update(sums, state, params)
            return optax.apply_updates(params, updates), state

    def struct(shape: tuple[int, ...], sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    shardings = {name: placed(plan.params, *axes) for name, axes in PARAMS.items()}
    params = {name: struct(shape, shardings[name]) for name, shape in SHAPES.items()}
    state = optax.tree.map_params(
        optimizer,
        lambda leaf, sharding: struct(leaf.shape, sharding),
        jax.eval_shape(optimizer.init, params),
        shardings,
        transform_non_params=lambda leaf: leaf,
    )
    placed_state = jax.tree.map(lambda leaf: leaf.sharding or NamedSharding(mesh, PartitionSpec()), state)
    x_BxD = struct((batch // MICROBATCHES, EMBED), rows)
    return [
        StepProgram(
            "accumulate",
            jax.jit(accumulate, donate_argnums=1, out_shardings=shardings),
            (params, params, x_BxD),
            runs_per_step=MICROBATCHES,
        ),
        StepProgram(
            "update",
            jax.jit(update, donate_argnums=(0, 1), out_shardings=(shardings, placed_state)),
            (params, state, params),
        ),
    ]
