"""What a stage of a pipeline computes: embedding, one layer forward and backward, head and loss.

The backward of a layer is written out: `jax.vjp` of the layer alone, from what its forward kept, which the
plan's remat policy decides (`residuals.py`). Where a schedule splits it, it finds the gradient of the input
and, for every product, its two factors; the weights' gradients are products of these, which
`kernel_gradients` does later.

Where there are experts, the sums that their load-balance loss needs travel with the activation from layer to
layer, and their gradient comes back with its gradient: the loss of a microbatch is a product of means over
all layers and data parallel groups, which no stage has alone. An expert's kernels are used in no plain
product: a split backward finds their gradients with the input's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from shardlab.model.experts import Load, balance_term
from shardlab.model.runtime import Runtime, checkpointed
from shardlab.model.transformer import Params, Transformer, to_params, with_params
from shardlab.parallel import residuals
from shardlab.parallel.residuals import Residuals
from shardlab.spec.params import LogicalAxes

LAYERS = "layers/"
STREAM: LogicalAxes = ("batch", "norm_seq", "embed")
HOP: LogicalAxes = ("batch", "hop_seq", "embed")
BALANCE: LogicalAxes = (None, "batch", "norm_seq", None)


class Stream(NamedTuple):
    """What passes from layer to layer: x [B, L, E]; balance: the sums over the layers so far of the experts'
    load, f32 [2, b, s, X] for b x s groups of tokens (assigned, probability), None without experts."""

    x: jax.Array
    balance: jax.Array | None = None


class Factors(NamedTuple):
    """Of every product of a layer: the distinct inputs, and the gradient of each output."""

    inputs: tuple[jax.Array, ...]
    cotangents: tuple[jax.Array, ...]


class _Product(NamedTuple):
    """One product of a layer: which kernel, which of the distinct inputs, how many dimensions contract."""

    path: str
    axes: LogicalAxes
    source: int
    num_inputs: int
    input: jax.ShapeDtypeStruct
    output: jax.ShapeDtypeStruct


@dataclass(frozen=True, slots=True, kw_only=True)
class StageModel:
    """The parts of a model, as functions of their parameters. outer: those that belong to no layer.

    split: whether kernels' gradients are found later, by `kernel_gradients`. wide: whether products give them
    in f32, which the compiler adds to an f32 sum as part of the product (as Megatron's
    `wgrad_gemm_accum_fp32`); else in the compute type. data: mesh axes along which
    devices run this on tokens of their own. groups: over how many devices the rest splits the batch and the
    sequence of a microbatch.
    """

    model: Transformer
    run: Runtime
    z_loss: float
    split: bool = False
    wide: bool = False
    data: tuple[str, ...] = ()
    groups: tuple[int, int] = (1, 1)

    def embed(self, outer: Params, tokens_BxL: jax.Array) -> Stream:
        """What the first layer gets."""
        x_BxLxE = self._whole(outer).embed(tokens_BxL, self.run)
        if not self.model.config.num_experts:
            return Stream(x_BxLxE)
        return Stream(x_BxLxE, jnp.zeros((2, *self.groups, self.model.config.num_experts), jnp.float32))

    def loss(self, outer: Params, stream: Stream, targets_BxL: jax.Array) -> jax.Array:
        """Mean loss of what the last layer gives."""
        logits_BxLxV = self._whole(outer).logits(stream.x, self.run)
        loss = self.run.loss(logits_BxLxV, targets_BxL, z_loss=self.z_loss)
        if stream.balance is None:
            return loss
        config = self.model.config
        with jax.named_scope("balance"):
            assigned, probability = stream.balance[:, None] / config.layers
            return loss + balance_term(Load(assigned, probability, assigned), config, self.data)

    def forward(self, params: Params, stream: Stream) -> tuple[Stream, Residuals]:
        """One layer, and what its backward needs; params by path relative to the layer."""
        return residuals.forward(self._differentiation(params), stream)

    def backward(self, params: Params, kept: Residuals, cotangent: Stream) -> tuple[Params, Stream, Factors]:
        """From what `forward` kept and the output's gradient: gradients of the parameters, of the input, and
        no factors. Where it is split: gradients of norms, biases and experts, and the factors of kernels'."""
        pull = residuals.restored(self._differentiation(params), cotangent, kept)
        if self.wide and not self.split:
            gradients, of_kernels, dx = pull(cotangent)
            return {**gradients, **of_kernels}, dx, Factors((), ())
        if not self.split:
            return (*pull(cotangent), Factors((), ()))
        gradients, inputs, cotangents, dx = pull(cotangent)
        return gradients, dx, Factors(tuple(inputs), tuple(cotangents))

    def products(self, params: Params, x: Stream) -> tuple[_Product, ...]:
        """The products of a layer, in order; shapes only."""
        recorder = _Recorder(params)
        jax.eval_shape(lambda: self._layer(replace(self.run, project=recorder.look), params, x))
        return tuple(recorder.products)

    def kernel_gradients(self, params: Params, x: Stream, factors: Factors) -> Params:
        """Gradients of the kernels: one product each, nothing is computed again."""
        found = {}
        for product, cotangent in zip(self.products(params, x), factors.cotangents, strict=True):
            source = factors.inputs[product.source]

            def apply(kernel: jax.Array, p: _Product = product, a: jax.Array = source) -> jax.Array:
                return self.run.project(kernel, p.axes, a, p.num_inputs, self.run)

            with jax.named_scope(product.path.removesuffix("/kernel")):
                if self.wide:
                    found[product.path] = _in_f32(source, cotangent, product.num_inputs)
                else:
                    (found[product.path],) = jax.vjp(apply, params[product.path])[1](cotangent)
        return found

    def _differentiation(self, params: Params) -> Callable[[Stream], tuple[Stream, Any]]:
        """input -> (output, its pullback): to parameters and input; where it is wide, to all parameters but
        the kernels of products, to those, and to the input; where it is split, to all parameters but these,
        to their inputs and results, and to the input."""
        if self.wide and not self.split:
            return self._wide_differentiation(params)
        if not self.split:
            function = self._recomputing(partial(self._layer, self.run))
            return lambda stream: jax.vjp(function, params, stream)

        def differentiate(stream: Stream) -> tuple[Stream, Any]:
            products = self.products(params, stream)
            kernels = {product.path: params[product.path] for product in products}
            rest = {path: array for path, array in params.items() if path not in kernels}
            inputs = {product.source: product.input for product in products}
            blanks, taps = (
                [jnp.zeros(like.shape, like.dtype) for like in shapes]
                for shapes in (inputs.values(), (product.output for product in products))
            )

            def tapped(rest: Params, blanks: list[jax.Array], taps: list[jax.Array], x: Stream) -> Stream:
                recorder = _Recorder(kernels, blanks, taps)
                return self._layer(replace(self.run, project=recorder.tap), {**kernels, **rest}, x)

            return jax.vjp(self._recomputing(tapped), rest, blanks, taps, stream)

        return differentiate

    def _wide_differentiation(self, params: Params) -> Callable[[Stream], tuple[Stream, Any]]:
        def differentiate(stream: Stream) -> tuple[Stream, Any]:
            kernels = {product.path: params[product.path] for product in self.products(params, stream)}
            rest = {path: array for path, array in params.items() if path not in kernels}
            blanks = {path: jnp.zeros(a.shape, jnp.float32) for path, a in kernels.items()}

            def wide(rest: Params, blanks: Params, x: Stream) -> Stream:
                def product(
                    kernel: jax.Array, axes: LogicalAxes, a: jax.Array, num_inputs: int, run: Runtime
                ) -> jax.Array:
                    path = next(path for path, array in kernels.items() if array is kernel)
                    return _wide_product(axes, num_inputs, _plain(run))(kernel, blanks[path], a)

                return self._layer(replace(self.run, project=product), {**kernels, **rest}, x)

            return jax.vjp(self._recomputing(wide), rest, blanks, stream)

        return differentiate

    def _whole(self, outer: Params) -> Transformer:
        """The model with these arrays; its layers stay abstract."""
        return with_params(self.model, {**to_params(self.model), **outer})

    def _layer(self, run: Runtime, params: Params, stream: Stream) -> Stream:
        layer = with_params(self.model.layers, params)
        x_BxLxE, _, load = layer(stream.x, run.positions_of(stream.x.shape[1]), run)
        if stream.balance is None:
            return Stream(x_BxLxE)
        assert load is not None
        spread = jnp.stack([load.assigned, load.probability])
        return Stream(x_BxLxE, stream.balance + run.constrain(spread, BALANCE))

    def _recomputing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Under the plan's remat policy."""
        return checkpointed(function, self.run.remat, in_scan=True)


@jax.custom_vjp
def _noted(x: jax.Array, blank: jax.Array) -> jax.Array:
    """x, of which the pullback gives x itself as the gradient of `blank`: found again as the remat policy
    finds it, where an auxiliary output would be kept."""
    del blank
    return x


_noted.defvjp(lambda x, _: (x, x), lambda x, cotangent: (cotangent, x))


def _in_f32(x: jax.Array, cotangent: jax.Array, num_inputs: int) -> jax.Array:
    """The gradient of a kernel, from what it was multiplied with and the gradient of the result."""
    rows = tuple(range(x.ndim - num_inputs))
    return jax.lax.dot_general(x, cotangent, ((rows, rows), ((), ())), preferred_element_type=jnp.float32)


def _wide_product(axes: LogicalAxes, num_inputs: int, run: Runtime) -> Callable[..., jax.Array]:
    """(kernel, blank, x) -> the product; the pullback gives the kernel's gradient, in f32, as that of
    `blank`."""

    def apply(kernel: jax.Array, x: jax.Array) -> jax.Array:
        return run.project(kernel, axes, x, num_inputs, run)

    @jax.custom_vjp
    def product(kernel: jax.Array, blank: jax.Array, x: jax.Array) -> jax.Array:
        del blank
        return apply(kernel, x)

    def backward(kept: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, ...]:
        kernel, x = kept
        (dx,) = jax.vjp(lambda x: apply(kernel, x), x)[1](cotangent)
        return jnp.zeros_like(kernel), _in_f32(x, cotangent, num_inputs), dx

    product.defvjp(lambda kernel, _, x: (apply(kernel, x), (kernel, x)), backward)
    return product


@dataclass(slots=True)
class _Recorder:
    """Stands for `Runtime.project` and notes what is multiplied; kernels are known by identity.

    blanks: zeros like the distinct inputs, taps: zeros like the results.
    """

    params: Params
    blanks: list[jax.Array] = field(default_factory=list)
    taps: list[jax.Array] = field(default_factory=list)
    inputs: list[jax.Array] = field(default_factory=list)
    products: list[_Product] = field(default_factory=list)

    def look(
        self, kernel: jax.Array, axes: LogicalAxes, x: jax.Array, num_inputs: int, run: Runtime
    ) -> jax.Array:
        """The product, noted."""
        return self._product(self._source(x), kernel, axes, x, num_inputs, run)

    def tap(
        self, kernel: jax.Array, axes: LogicalAxes, x: jax.Array, num_inputs: int, run: Runtime
    ) -> jax.Array:
        """The product plus a zero, whose gradient is the product's; its input noted where it is new."""
        known, source = len(self.inputs), self._source(x)
        if source == known:
            x = _noted(x, self.blanks[source])
        y = self._product(source, kernel, axes, x, num_inputs, run)
        return y + self.taps[len(self.products) - 1]

    def _product(
        self, source: int, kernel: jax.Array, axes: LogicalAxes, x: jax.Array, num_inputs: int, run: Runtime
    ) -> jax.Array:
        y = _plain(run).project(kernel, axes, x, num_inputs, run)
        path = next(path for path, array in self.params.items() if array is kernel)
        input, output = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, y))
        self.products.append(_Product(path, axes, source, num_inputs, input, output))
        return y

    def _source(self, x: jax.Array) -> int:
        """Which of the distinct inputs this is."""
        for index, known in enumerate(self.inputs):
            if known is x:
                return index
        self.inputs.append(x)
        return len(self.inputs) - 1


def _plain(run: Runtime) -> Runtime:
    """The same with the product itself."""
    return replace(run, project=Runtime().project)
