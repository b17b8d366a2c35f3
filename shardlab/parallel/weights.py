"""Weights of a serving step in int8 or fp8: stored and gathered in the small type, scaled after the product.

One f32 scale per output channel (vector-wise quantisation as in LLM.int8(), arXiv:2208.07339, section 2.1, of
weights alone): it does not depend on what is summed, so that x·(q s) = (x·q) s exactly, and no weight has the
large type but inside its product. Kernels of projections and of the head; embedding, norms and biases stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from shardlab.model.quantise import E4M3, Quantised, quantised
from shardlab.model.runtime import Runtime, project
from shardlab.spec.case import Case
from shardlab.spec.params import LogicalAxes, ParamSpec
from shardlab.spec.serving import shared_dimensions

TYPES: Mapping[str, DTypeLike] = {"int8": jnp.int8, "fp8": E4M3}


def as_served(run: Runtime, case: Case) -> Runtime:
    """The runtime with the products of a step that does not train."""
    return run if case.plan.method.weights == "bf16" else replace(run, project=_project)


def _project(
    kernel: jax.Array | Quantised, axes: LogicalAxes, x: jax.Array, num_inputs: int, run: Runtime
) -> jax.Array:
    if not isinstance(kernel, Quantised):
        return project(kernel, axes, x, num_inputs, run)
    values = run.place_weight(kernel.values, axes)
    outputs = axes[num_inputs:]
    scale = run.place_weight(kernel.scale.reshape(kernel.scale.shape[num_inputs:]), outputs)
    contracted = tuple(range(x.ndim - num_inputs, x.ndim)), tuple(range(num_inputs))
    y = jax.lax.dot_general(x, values.astype(run.compute_dtype), (contracted, ((), ())))
    return (y.astype(jnp.float32) * scale.reshape((1,) * (y.ndim - scale.ndim) + scale.shape)).astype(y.dtype)


def small_weights(
    case: Case, of: Callable[[ParamSpec, DTypeLike], jax.ShapeDtypeStruct], dtype: DTypeLike
) -> dict[str, jax.ShapeDtypeStruct | Quantised]:
    """Every parameter of the step as the plan stores it. of: the struct of a parameter in a type; dtype: of
    those that stay as they are."""
    small = TYPES.get(case.plan.method.weights)

    def stored(spec: ParamSpec) -> jax.ShapeDtypeStruct | Quantised:
        shared = shared_dimensions(spec)
        if small is None or not shared:
            return of(spec, dtype)
        shape = tuple(1 if i in shared else size for i, size in enumerate(spec.shape))
        axes = tuple(None if i in shared else axis for i, axis in enumerate(spec.axes))
        return Quantised(of(spec, small), of(replace(spec, shape=shape, axes=axes), jnp.float32))

    return {spec.path: stored(spec) for spec in case.parameters()}


def quantise_weights(case: Case, params: Mapping[str, jax.Array]) -> dict[str, jax.Array | Quantised]:
    """Parameters as `small_weights` describes them: round to nearest, each channel's largest magnitude to the
    largest number of the type."""
    small = TYPES.get(case.plan.method.weights)
    shared = {spec.path: shared_dimensions(spec) for spec in case.parameters()}
    return {
        path: quantised(a, small, shared[path]) if small is not None and shared[path] else a
        for path, a in params.items()
    }
