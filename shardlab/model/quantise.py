"""Training products in fp8 or int8: both operands are quantised as they come, the result is scaled back.

- fp8: torchtitan's float8 recipe with tensorwise dynamic scaling (pytorch/ao torchao/float8, config
  `Float8LinearConfig`): inputs and weights e4m3, gradients e5m2, one scale per tensor, maximum / absmax
  (arXiv:2209.05433, section 3). All three products of a linear layer run in fp8.
- int8: AQT as MaxText sets it (`_get_int8_quant_config` in AI-Hypercomputer/maxtext): one scale per row and
  per column, 127 / absmax over what is summed. The forward product and the input's gradient run in int8; the
  weight's gradient stays in the compute type (there: `quantization_local_shard_count = 0`). Rounding is to
  nearest, where AQT rounds gradients stochastically.

The head stays in the compute type, as in both; so do norms, embeddings, attention's own products, routers
and experts' kernels. Weights are quantised where they are stored, so that a gather (FSDP) moves the small
type, as torchtitan's `enable_fsdp_float8_all_gather` does; they are gathered again for the backward pass. A
scale over a split dimension costs an all-reduce of its maxima, and so any mesh has the numbers of one device.
(torchao takes the absmax of activations per rank.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from shardlab.model.runtime import Project, Runtime, project
from shardlab.spec.params import LogicalAxes

Format = Literal["fp8", "int8"]

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2


class Quantised(NamedTuple):
    """values · scale is the array; scale is f32 and has dimensions of one where it is shared."""

    values: jax.Array
    scale: jax.Array


# The kernel, the input, and the weight for the input's gradient, placed for use.
_Saved = tuple[jax.Array, jax.Array, Quantised]


def quantised(x: jax.Array, dtype: DTypeLike, shared: Sequence[int] | None = None) -> Quantised:
    """x in `dtype` (int8 or a float8), symmetric around zero: its largest magnitude becomes dtype's largest.

    shared: the dimensions that share one scale, None for all. An array of zeros has scale 1.
    """
    integer = jnp.issubdtype(dtype, jnp.integer)
    largest = float(jnp.iinfo(dtype).max if integer else jnp.finfo(dtype).max)
    axes = tuple(range(x.ndim)) if shared is None else tuple(shared)
    absmax = jnp.max(jnp.abs(x), axis=axes, keepdims=True).astype(jnp.float32)
    scale = jnp.where(absmax > 0, absmax / largest, 1.0)
    steps = jnp.clip(x.astype(jnp.float32) / scale, -largest, largest)
    return Quantised((jnp.round(steps) if integer else steps).astype(dtype), scale)


def dequantised(q: Quantised, dtype: DTypeLike) -> jax.Array:
    """The array again."""
    return (q.values.astype(jnp.float32) * q.scale).astype(dtype)


def quantised_project(format: Format) -> Project:
    """Stands for `Runtime.project`; the head, which has the vocabulary, is not quantised."""

    def product(
        kernel: jax.Array, axes: LogicalAxes, x: jax.Array, num_inputs: int, run: Runtime
    ) -> jax.Array:
        if "vocab" in axes:
            return project(kernel, axes, x, num_inputs, run)
        return _product(format, kernel, axes, x, num_inputs, run)

    return product


def _product(
    format: Format, kernel: jax.Array, axes: LogicalAxes, x: jax.Array, num_inputs: int, run: Runtime
) -> jax.Array:
    """x[*tokens, *inputs] · kernel[*inputs, *outputs], and both gradients, in `format`."""
    tokens = tuple(range(x.ndim - num_inputs))
    features = tuple(range(len(tokens), x.ndim))
    inputs, outputs = tuple(range(num_inputs)), tuple(range(num_inputs, kernel.ndim))

    def weight_in_use(kernel: jax.Array, summed: Sequence[int]) -> Quantised:
        """Quantised before it is gathered."""
        q = _quantised_for(kernel.astype(run.compute_dtype), format, summed)
        return q._replace(values=run.place_weight(q.values, axes))

    @jax.custom_vjp
    def multiply(kernel: jax.Array, x: jax.Array) -> jax.Array:
        return forward(kernel, x)[0]

    def forward(kernel: jax.Array, x: jax.Array) -> tuple[jax.Array, _Saved]:
        weight = weight_in_use(kernel, inputs)
        y = _dot(_quantised_for(x, format, features), weight, features, inputs, run.compute_dtype)
        # No remat policy keeps a gathered weight: one gather serves a recomputed product and the gradient.
        return y, (kernel, x, weight if format == "fp8" else weight_in_use(kernel, outputs))

    def backward(saved: _Saved, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        kernel, x, weight = saved
        over = tuple(range(len(tokens), dy.ndim))
        q_dy = quantised(dy, E5M2) if format == "fp8" else _quantised_for(dy, format, over)
        dx = _dot(q_dy, weight, over, outputs, run.compute_dtype)
        if format == "fp8":
            dw = _dot(quantised(x, E4M3), q_dy, tokens, tokens, run.compute_dtype)
        else:
            dw = jax.lax.dot_general(x, dy, ((tokens, tokens), ((), ())))
        # To where the gradient of a gathered weight goes, in the kernel's own type.
        _, place = jax.vjp(lambda k: run.place_weight(k.astype(run.compute_dtype), axes), kernel)
        return place(dw)[0], dx

    multiply.defvjp(forward, backward)
    return multiply(kernel, x)


def _quantised_for(x: jax.Array, format: Format, summed: Sequence[int]) -> Quantised:
    """An operand of the forward product, or a weight: fp8 has one scale, int8 one for all that is summed."""
    return quantised(x, E4M3) if format == "fp8" else quantised(x, jnp.int8, summed)


def _dot(
    a: Quantised, b: Quantised, summed_a: Sequence[int], summed_b: Sequence[int], dtype: DTypeLike
) -> jax.Array:
    """The product of the values, scaled: a's other dimensions, then b's. Integers add up in int32."""
    integer = jnp.issubdtype(a.values.dtype, jnp.integer)
    y = jax.lax.dot_general(
        a.values,
        b.values,
        ((tuple(summed_a), tuple(summed_b)), ((), ())),
        preferred_element_type=jnp.int32 if integer else dtype,
    )
    scale_a, scale_b = jnp.squeeze(a.scale, tuple(summed_a)), jnp.squeeze(b.scale, tuple(summed_b))
    scale = scale_a.reshape(*scale_a.shape, *(1,) * scale_b.ndim) * scale_b.reshape(
        *(1,) * scale_a.ndim, *scale_b.shape
    )
    return (y.astype(jnp.float32) * scale).astype(dtype)
