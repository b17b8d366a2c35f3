"""Small programs of which a pull request changes one line: the base, and the same with the change."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardlab.compile import compile_step
from shardlab.program import Program

P = PartitionSpec
BATCH, WIDTH, HIDDEN = 32, 64, 128
F32_BYTES = 4
WEIGHT_BYTES = WIDTH * HIDDEN * F32_BYTES


def mesh_of(**axes: int) -> Mesh:
    """A row-major mesh over the first emulated devices."""
    devices = np.array(jax.devices()[: math.prod(axes.values())])
    return Mesh(devices.reshape(tuple(axes.values())), tuple(axes))


def compiled(function: Callable[..., Any], mesh: Mesh, *arguments: tuple[tuple[int, ...], P]) -> Program:
    """The program of a function of f32 arrays: (shape, how it is split) each."""
    abstract = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in arguments
    ]
    return compile_step(jax.jit(function), *abstract, mesh=mesh, name="step")


def placed(array: jax.Array, mesh: Mesh, *spec: Any) -> jax.Array:
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, P(*spec)))


def gradient_step(*, split_batch: bool) -> Program:
    """Data parallel over 8: the gradient of one weight. The batch comes whole; the constraint splits it."""
    mesh = mesh_of(data=8)

    def step(x_BxD: jax.Array, weight_DxF: jax.Array) -> jax.Array:
        if split_batch:
            x_BxD = placed(x_BxD, mesh, "data")
        return jax.grad(lambda w_DxF: jnp.square(x_BxD @ w_DxF).mean())(weight_DxF)

    return compiled(step, mesh, ((BATCH, WIDTH), P()), ((WIDTH, HIDDEN), P()))


def optimizer_step(*, split_state: bool) -> Program:
    """ZeRO-1 over 8: the momentum is split, so that each device updates a part and parts are gathered."""
    mesh = mesh_of(data=8)
    state = P("data") if split_state else P()

    def step(x_BxD: jax.Array, weight_DxF: jax.Array, momentum_DxF: jax.Array) -> tuple[jax.Array, jax.Array]:
        gradient_DxF = jax.grad(lambda w_DxF: jnp.square(x_BxD @ w_DxF).mean())(weight_DxF)
        momentum_DxF = 0.9 * momentum_DxF + gradient_DxF
        updated_DxF = weight_DxF - 0.1 * momentum_DxF
        return placed(updated_DxF, mesh), placed(momentum_DxF, mesh, *state)

    weight = (WIDTH, HIDDEN)
    return compiled(step, mesh, ((BATCH, WIDTH), P("data")), (weight, P()), (weight, state))


def layers(count: int, axis: str = "fsdp", mesh: Mesh | None = None) -> Program:
    """FSDP: each layer gathers its weight."""
    mesh = mesh or mesh_of(**{axis: 8})

    def step(x_BxD: jax.Array, *weights_DxD: jax.Array) -> jax.Array:
        for number, weight_DxD in enumerate(weights_DxD):
            with jax.named_scope(f"layer{number}"):
                x_BxD = jnp.tanh(x_BxD @ placed(weight_DxD, mesh))
        return x_BxD

    weight = ((WIDTH, WIDTH), P(axis))
    return compiled(step, mesh, ((BATCH, WIDTH), P(axis)), *[weight] * count)


def rematerialized_layers(*, remat: bool) -> Program:
    """The gradients of two FSDP layers, each split as its weight; with remat nothing of a layer is kept."""
    mesh = mesh_of(fsdp=8)

    def layer(x_BxD: jax.Array, weight_DxD: jax.Array) -> jax.Array:
        return jnp.tanh(x_BxD @ placed(weight_DxD, mesh))

    def step(x_BxD: jax.Array, *weights_DxD: jax.Array) -> Any:
        def loss(weights_DxD: tuple[jax.Array, ...]) -> jax.Array:
            y_BxD = x_BxD
            for weight_DxD in weights_DxD:
                y_BxD = (jax.checkpoint(layer) if remat else layer)(y_BxD, weight_DxD)
            return jnp.square(y_BxD).mean()

        return [placed(gradient_DxD, mesh, "fsdp") for gradient_DxD in jax.grad(loss)(weights_DxD)]

    weight = ((WIDTH, WIDTH), P("fsdp"))
    return compiled(step, mesh, ((BATCH, WIDTH), P("fsdp")), weight, weight)


def refactored_layers(count: int) -> Program:
    """`layers`, tidied: a function per block, other scopes, weights in a dictionary and gathered ahead."""
    mesh = mesh_of(fsdp=8)

    def block(x_BxD: jax.Array, weight_DxD: jax.Array) -> jax.Array:
        with jax.named_scope("block"):
            gathered_DxD = placed(weight_DxD, mesh)
            return jnp.tanh(jnp.einsum("bd,de->be", x_BxD, gathered_DxD))

    def train_step(x_BxD: jax.Array, *weights_DxD: jax.Array) -> jax.Array:
        named = dict(zip("abcdefgh", weights_DxD, strict=False))
        for name in sorted(named):
            with jax.named_scope("transformer"):
                x_BxD = block(x_BxD, named[name])
        return x_BxD

    weight = ((WIDTH, WIDTH), P("fsdp"))
    return compiled(train_step, mesh, ((BATCH, WIDTH), P("fsdp")), *[weight] * count)


def tensor_parallel(*, data: int, tensor: int) -> Program:
    """Megatron's MLP, forward: one sum of partial products over `tensor`."""
    mesh = mesh_of(data=data, tensor=tensor)

    def step(x_BxD: jax.Array, up_DxF: jax.Array, down_FxD: jax.Array) -> jax.Array:
        return placed(jnp.tanh(x_BxD @ up_DxF) @ down_FxD, mesh, "data")

    up, down = ((WIDTH, HIDDEN), P(None, "tensor")), ((HIDDEN, WIDTH), P("tensor"))
    return compiled(step, mesh, ((BATCH, WIDTH), P("data")), up, down)
