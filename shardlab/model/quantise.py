"""Training products in fp8 or int8: both operands are quantised as they come, the result is scaled back.

- fp8: torchtitan's float8 recipe with tensorwise dynamic scaling (pytorch/ao torchao/float8, config
  `Float8LinearConfig`): inputs and weights e4m3, gradients e5m2, one scale per tensor, maximum / absmax
  (arXiv:2209.05433, section 3). All three products of a linear layer run in fp8.
- fp8-rowwise: torchao's recipe `rowwise`: all operands e4m3, one scale per row and per column, over what is
  summed, so that a weight and tokens are quantised anew for each product, after they were gathered in bf16.
- int8: AQT as MaxText sets it (`_get_int8_quant_config` in AI-Hypercomputer/maxtext): one scale per row and
  per column, 127 / absmax over what is summed. The forward product and the input's gradient run in int8; the
  weight's gradient stays in the compute type (there: `quantization_local_shard_count = 0`). Rounding is to
  nearest, where AQT rounds gradients stochastically.

The head stays in the compute type, as in all of them; so do norms, embeddings, attention's own products,
routers and experts' kernels. Weights are quantised where they are stored, so that a gather (FSDP) moves the
small type, as torchtitan's `enable_fsdp_float8_all_gather` does; they are gathered again for the backward
pass. So are tokens in fp8, and gradients, where sequence parallelism gathers them (`quantised_tokens`;
torchao's `PrepareFloat8ModuleInput`). A scale over a split dimension costs an all-reduce of its maxima, and
so any mesh has the numbers of one device. (torchao takes the absmax of activations per rank.) Products of
shards are scaled before devices add them up (`_dot`), so that those of several kernels add up first, as those
of plain products do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from shardlab.model.runtime import GATHERED_WEIGHT, Project, Runtime, gathered_tokens, project
from shardlab.spec.params import LogicalAxes

Format = Literal["fp8", "fp8-rowwise", "int8"]

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """values, gradients: the types of what is multiplied. per_row: a scale for each row and column, over what
    is summed, not one per array. gathers: weights are quantised before they are gathered. all_three: the
    weight's gradient too is such a product."""

    values: DTypeLike
    gradients: DTypeLike
    per_row: bool
    gathers: bool
    all_three: bool

    def quantised(self, x: jax.Array, summed: Sequence[int]) -> Quantised:
        """An input or a weight, to be summed over these dimensions."""
        return quantised(x, self.values, summed if self.per_row else None)

    def gradient(self, dy: jax.Array, summed: Sequence[int]) -> Quantised:
        """A gradient, likewise."""
        return quantised(dy, self.gradients, summed if self.per_row else None)


RECIPES: Mapping[Format, Recipe] = {
    "fp8": Recipe(values=E4M3, gradients=E5M2, per_row=False, gathers=True, all_three=True),
    "fp8-rowwise": Recipe(values=E4M3, gradients=E4M3, per_row=True, gathers=False, all_three=True),
    "int8": Recipe(values=jnp.int8, gradients=jnp.int8, per_row=True, gathers=True, all_three=False),
}


class Quantised(NamedTuple):
    """values · scale is the array; scale is f32 and has dimensions of one where it is shared."""

    values: jax.Array
    scale: jax.Array


class Tokens(NamedTuple):
    """What products take of x_BxLxE where they are in fp8: x itself, and quantised and gathered."""

    x: jax.Array
    small: Quantised


# The kernel, the input or what it was quantised to, and the weight for the input's gradient, placed for use.
_Saved = tuple[jax.Array, jax.Array | Quantised, Quantised]


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
        kernel: jax.Array, axes: LogicalAxes, x: jax.Array | Tokens, num_inputs: int, run: Runtime
    ) -> jax.Array:
        if "vocab" in axes:
            assert isinstance(x, jax.Array)
            return project(kernel, axes, x, num_inputs, run)
        return _product(RECIPES[format], kernel, axes, x, num_inputs, run)

    return product


def quantised_tokens(x_BxLxE: jax.Array, run: Runtime) -> Tokens:
    """Quantised where a norm leaves them, then gathered once for all products that take them."""
    small = quantised(jax.lax.stop_gradient(x_BxLxE), E4M3)
    return Tokens(x_BxLxE, small._replace(values=gathered_tokens(small.values, run)))


def _product(
    recipe: Recipe, kernel: jax.Array, axes: LogicalAxes, x: jax.Array | Tokens, num_inputs: int, run: Runtime
) -> jax.Array:
    """x[*tokens, *inputs] · kernel[*inputs, *outputs], and both gradients."""
    x, gathered = x if isinstance(x, Tokens) else (x, None)
    tokens = tuple(range(x.ndim - num_inputs))
    features = tuple(range(len(tokens), x.ndim))
    inputs, outputs = tuple(range(num_inputs)), tuple(range(num_inputs, kernel.ndim))
    in_parts, out_parts = (tuple(map(run.ways, names)) for names in (axes[:num_inputs], axes[num_inputs:]))

    def weight_in_use(kernel: jax.Array, summed: Sequence[int]) -> Quantised:
        weight = kernel.astype(run.compute_dtype)
        if recipe.gathers:
            q = recipe.quantised(weight, summed)
            return q._replace(values=run.place_weight(q.values, axes))
        q = recipe.quantised(run.place_weight(weight, axes), summed)
        return q._replace(values=checkpoint_name(q.values, GATHERED_WEIGHT))

    def gradients_in_use(dy: jax.Array, over: tuple[int, ...]) -> tuple[Quantised, Quantised]:
        """For the gradients of the input and of the weight; gathered from where the addition to the residual
        stream leaves them."""
        if recipe.per_row:
            return recipe.gradient(dy, over), recipe.gradient(dy, tokens)
        q = recipe.gradient(dy, over)
        if run.small_tokens is not None and tuple(axes[num_inputs:]) == ("embed",) and len(tokens) == 2:
            q = q._replace(values=gathered_tokens(q.values, run))
        return q, q

    @jax.custom_vjp
    def multiply(kernel: jax.Array, x: jax.Array, gathered: Quantised | None) -> jax.Array:
        return forward(kernel, x, gathered)[0]

    def forward(kernel: jax.Array, x: jax.Array, gathered: Quantised | None) -> tuple[jax.Array, _Saved]:
        weight = weight_in_use(kernel, inputs)
        q_x = recipe.quantised(x, features) if gathered is None else gathered
        y = _dot(q_x, weight, features, inputs, run.compute_dtype, in_parts)
        # No remat policy keeps a gathered weight: one gather serves a recomputed product and the gradient.
        weight = weight_in_use(kernel, outputs) if recipe.per_row else weight
        return y, (kernel, x if gathered is None else gathered, weight)

    def backward(saved: _Saved, dy: jax.Array) -> tuple[jax.Array, jax.Array, None]:
        kernel, x, weight = saved
        over = tuple(range(len(tokens), dy.ndim))
        for_x, for_weight = gradients_in_use(dy, over)
        dx = _dot(for_x, weight, over, outputs, run.compute_dtype, out_parts)
        if recipe.all_three:
            q_x = x if isinstance(x, Quantised) else recipe.quantised(x, tokens)
            dw = _dot(q_x, for_weight, tokens, tokens, run.compute_dtype)
        else:
            dw = jax.lax.dot_general(x, dy, ((tokens, tokens), ((), ())))
        # To where the gradient of a gathered weight goes, in the kernel's own type.
        _, place = jax.vjp(lambda k: run.place_weight(k.astype(run.compute_dtype), axes), kernel)
        return place(dw)[0], dx, None

    multiply.defvjp(forward, backward)
    return multiply(kernel, x, gathered)


def _dot(
    a: Quantised,
    b: Quantised,
    summed_a: Sequence[int],
    summed_b: Sequence[int],
    dtype: DTypeLike,
    parts: Sequence[int] = (),
) -> jax.Array:
    """The product of the values, scaled: a's other dimensions, then b's. Integers add up in int32.

    parts: in how many devices' shards each summed dimension lies, 1 if not said. Of those shards a product
    each, scaled, and then their sum: what a device has and others add to is in units of its own.
    """
    parts = tuple(parts) or (1,) * len(tuple(summed_a))
    integer = jnp.issubdtype(a.values.dtype, jnp.integer)
    values_a, cut_a, summed_in_a = _cut(a.values, summed_a, parts)
    values_b, cut_b, summed_in_b = _cut(b.values, summed_b, parts)
    y = jax.lax.dot_general(
        values_a,
        values_b,
        ((summed_in_a, summed_in_b), (cut_a, cut_b)),
        preferred_element_type=jnp.int32 if integer else dtype,
    )
    scale_a, scale_b = jnp.squeeze(a.scale, tuple(summed_a)), jnp.squeeze(b.scale, tuple(summed_b))
    scale = scale_a.reshape(*scale_a.shape, *(1,) * scale_b.ndim) * scale_b.reshape(
        *(1,) * scale_a.ndim, *scale_b.shape
    )
    y = (y.astype(jnp.float32) * scale.reshape((1,) * len(cut_a) + scale.shape)).astype(dtype)
    # In its own type, which is what devices send.
    return jax.lax.reduce(y, jnp.zeros((), dtype), jax.lax.add, range(len(cut_a))) if cut_a else y


def _cut(
    x: jax.Array, dims: Sequence[int], parts: Sequence[int]
) -> tuple[jax.Array, tuple[int, ...], tuple[int, ...]]:
    """x with each of `dims` as (parts, the rest) where there are several; where the parts are, and the rest,
    in the order of `dims`."""
    shape: list[int] = []
    cut: dict[int, int] = {}
    rest: dict[int, int] = {}
    count = dict(zip(dims, parts, strict=True))
    for dim, size in enumerate(x.shape):
        if (ways := count.get(dim, 1)) > 1:
            cut[dim] = len(shape)
            shape.append(ways)
        rest[dim] = len(shape)
        shape.append(size // ways)
    return (
        x.reshape(shape) if cut else x,
        tuple(cut[dim] for dim in dims if dim in cut),
        tuple(rest[dim] for dim in dims),
    )
