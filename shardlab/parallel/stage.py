"""What a stage of a pipeline computes: embedding, one layer forward and backward, head and loss.

The backward of a layer is written out: `jax.vjp` of the layer alone, from the layer's input. Where a schedule
splits it, `input_gradient` finds the gradient of the input and, for every product, its two factors; the
weights' gradients are products of these, which `kernel_gradients` does later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from shardlab.model.loss import cross_entropy
from shardlab.model.runtime import Runtime, checkpointed
from shardlab.model.transformer import Params, Transformer, to_params, with_params
from shardlab.spec.params import LogicalAxes

LAYERS = "layers/"


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
    output: jax.ShapeDtypeStruct


@dataclass(frozen=True, slots=True, kw_only=True)
class StageModel:
    """The parts of a model, as functions of their parameters. outer: those that belong to no layer."""

    model: Transformer
    run: Runtime
    z_loss: float

    def embed(self, outer: Params, tokens_BxL: jax.Array) -> jax.Array:
        """What the first layer gets."""
        return self._whole(outer).embed(tokens_BxL, self.run)

    def loss(self, outer: Params, x_BxLxE: jax.Array, targets_BxL: jax.Array) -> jax.Array:
        """Mean loss of what the last layer gives."""
        logits_BxLxV = self._whole(outer).logits(x_BxLxE, self.run)
        return cross_entropy(logits_BxLxV, targets_BxL, z_loss=self.z_loss)

    def layer(self, params: Params, x_BxLxE: jax.Array) -> jax.Array:
        """One layer; params by path relative to the layer."""
        return self._layer(self.run, params, x_BxLxE)

    def forward(self, params: Params, x_BxLxE: jax.Array) -> jax.Array:
        """`layer`, traced as the forward half of a differentiation, which is how its operations are named."""
        return jax.vjp(self._recomputing(self.layer), params, x_BxLxE)[0]

    def backward(self, params: Params, x_BxLxE: jax.Array, cotangent: jax.Array) -> tuple[Params, jax.Array]:
        """Gradients of the layer's parameters and of its input, from the input and the output's gradient."""
        return jax.vjp(self._recomputing(self.layer), params, x_BxLxE)[1](cotangent)

    def products(self, params: Params, x: jax.Array) -> tuple[_Product, ...]:
        """The products of a layer, in order; shapes only."""
        recorder = _Recorder(params)
        jax.eval_shape(lambda: self._layer(replace(self.run, project=recorder.look), params, x))
        return tuple(recorder.products)

    def input_gradient(
        self, params: Params, x: jax.Array, cotangent: jax.Array
    ) -> tuple[Params, jax.Array, Factors]:
        """Gradients of norms and biases, of the input, and the factors of the kernels' gradients."""
        kernels, rest = _split(params)
        products = self.products(params, x)
        taps = [jnp.zeros(p.output.shape, p.output.dtype) for p in products]

        def tapped(rest: Params, taps: list[jax.Array], x: jax.Array) -> tuple[jax.Array, Any]:
            recorder = _Recorder(kernels, taps)
            y = self._layer(replace(self.run, project=recorder.add_tap), {**kernels, **rest}, x)
            return y, tuple(recorder.inputs)

        _, pull, inputs = jax.vjp(self._recomputing(tapped), rest, taps, x, has_aux=True)
        small, cotangents, dx = pull(cotangent)
        return small, dx, Factors(inputs, tuple(cotangents))

    def kernel_gradients(self, params: Params, x: jax.Array, factors: Factors) -> Params:
        """Gradients of the kernels: one product each, nothing is computed again."""
        found = {}
        for product, cotangent in zip(self.products(params, x), factors.cotangents, strict=True):
            source = factors.inputs[product.source]

            def apply(kernel: jax.Array, p: _Product = product, a: jax.Array = source) -> jax.Array:
                return self.run.project(kernel, p.axes, a, p.num_inputs, self.run)

            with jax.named_scope(product.path.removesuffix("/kernel")):
                (found[product.path],) = jax.vjp(apply, params[product.path])[1](cotangent)
        return found

    def _whole(self, outer: Params) -> Transformer:
        """The model with these arrays; its layers stay abstract."""
        return with_params(self.model, {**to_params(self.model), **outer})

    def _layer(self, run: Runtime, params: Params, x_BxLxE: jax.Array) -> jax.Array:
        layer = with_params(self.model.layers, params)
        return layer(x_BxLxE, run.positions_of(x_BxLxE.shape[1]), run)[0]

    def _recomputing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Under the plan's remat policy; between a forward and its backward only the input is kept anyway."""
        return checkpointed(function, self.run.remat, in_scan=True)


def _split(params: Params) -> tuple[Params, Params]:
    """Kernels, and the rest."""
    kernels = {path: array for path, array in params.items() if path.endswith("/kernel")}
    return kernels, {path: array for path, array in params.items() if path not in kernels}


@dataclass(slots=True)
class _Recorder:
    """Stands for `Runtime.project` and notes what is multiplied; kernels are known by identity."""

    params: Params
    taps: list[jax.Array] = field(default_factory=list)
    inputs: list[jax.Array] = field(default_factory=list)
    products: list[_Product] = field(default_factory=list)

    def look(
        self, kernel: jax.Array, axes: LogicalAxes, x: jax.Array, num_inputs: int, run: Runtime
    ) -> jax.Array:
        """The product, noted."""
        y = _plain(run).project(kernel, axes, x, num_inputs, run)
        path = next(path for path, array in self.params.items() if array is kernel)
        output = jax.ShapeDtypeStruct(y.shape, y.dtype)
        self.products.append(_Product(path, axes, self._source(x), num_inputs, output))
        return y

    def add_tap(
        self, kernel: jax.Array, axes: LogicalAxes, x: jax.Array, num_inputs: int, run: Runtime
    ) -> jax.Array:
        """The product plus a zero, whose gradient is the product's."""
        y = self.look(kernel, axes, x, num_inputs, run)
        return y + self.taps[len(self.products) - 1]

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
