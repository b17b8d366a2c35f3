"""LoRA's adapters in a training step: what a kernel becomes, and who has a gradient (see `spec/lora.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from shardlab.model.quantise import Tokens
from shardlab.model.runtime import Project, Runtime, project
from shardlab.model.transformer import Params
from shardlab.spec.lora import INWARD, OUTWARD, is_adapter, is_trained
from shardlab.spec.params import LogicalAxes, ParamSpec
from shardlab.spec.plan_schema import Method


class Adapted(NamedTuple):
    """A frozen kernel [*inputs, *outputs] and its adapter: [*inputs, rank], [rank, *outputs]."""

    kernel: jax.Array
    inward: jax.Array
    outward: jax.Array


def split_trained(params: Params, method: Method) -> tuple[Params, Params]:
    """What is trained, and what is frozen."""
    trained = {path: a for path, a in params.items() if is_trained(path, method)}
    return trained, {path: a for path, a in params.items() if path not in trained}


def adapted(params: Params) -> Mapping[str, jax.Array | Adapted]:
    """Parameters as the model takes them: kernels with their adapters."""
    found: dict[str, jax.Array | Adapted] = {path: a for path, a in params.items() if not is_adapter(path)}
    for path, inward in params.items():
        if path.endswith(INWARD):
            owner = path.removesuffix(INWARD)
            kernel = params[f"{owner}kernel"]
            found[f"{owner}kernel"] = Adapted(kernel, inward, params[f"{owner}{OUTWARD}"])
    return found


def adapted_project(base: Project, method: Method) -> Project:
    """`base`, plus what the adapter adds where the kernel has one; adapters are in the compute type."""
    scale = (method.lora_alpha or method.lora or 1) / (method.lora or 1)

    def product(
        kernel: jax.Array | Adapted, axes: LogicalAxes, x: Any, num_inputs: int, run: Runtime
    ) -> jax.Array:
        if not isinstance(kernel, Adapted):
            return base(kernel, axes, x, num_inputs, run)
        y = base(kernel.kernel, axes, x, num_inputs, run)
        x = x.x if isinstance(x, Tokens) else x
        with jax.named_scope("lora"):
            low = project(kernel.inward, (*axes[:num_inputs], None), x, num_inputs, run)
            return y + scale * project(kernel.outward, (None, *axes[num_inputs:]), low, 1, run)

    return product


def frozen_and_adapters(base: Params, table: tuple[ParamSpec, ...], key: jax.Array) -> Params:
    """The state that LoRA starts from: frozen weights in bf16, inward adapters normal with std 1 / √fan-in,
    outward ones zero, in f32. table: of the adapters."""
    found = {path: a.astype(jnp.bfloat16) for path, a in base.items()} if table else dict(base)
    for index, spec in enumerate(table):
        found[spec.path] = jnp.zeros(spec.shape, jnp.float32)
        if spec.path.endswith(INWARD):
            fan_in = prod(
                n for n, axis in zip(spec.shape, spec.axes, strict=True) if axis not in (None, "layers")
            )
            normal = jax.random.normal(jax.random.fold_in(key, index), spec.shape)
            found[spec.path] = normal * fan_in**-0.5
    return found
