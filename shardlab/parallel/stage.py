"""What a stage of a pipeline computes: embedding, one layer forward and backward, head and loss.

The backward of a layer is written out: `jax.vjp` of the layer alone, from the layer's input. Where a schedule
splits it, `input_gradient` finds the gradient of the input and, for every product, its two factors; the
weights' gradients are products of these, which `kernel_gradients` does later.

Where there are experts, the sums that their load-balance loss needs travel with the activation from layer to
layer, and their gradient comes back with its gradient: the loss of a microbatch is a product of means over
all layers and data parallel groups, which no stage has alone. An expert's kernels are used in no plain
product: a split backward finds their gradients with the input's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from shardlab.model.experts import Load, balance_term
from shardlab.model.loss import cross_entropy
from shardlab.model.runtime import Runtime, checkpointed
from shardlab.model.transformer import Params, Transformer, to_params, with_params
from shardlab.spec.params import LogicalAxes

LAYERS = "layers/"
STREAM: LogicalAxes = ("batch", "norm_seq", "embed")
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
    output: jax.ShapeDtypeStruct


@dataclass(frozen=True, slots=True, kw_only=True)
class StageModel:
    """The parts of a model, as functions of their parameters. outer: those that belong to no layer.

    data: mesh axes along which devices run this on tokens of their own. groups: over how many devices the
    rest splits the batch and the sequence of a microbatch.
    """

    model: Transformer
    run: Runtime
    z_loss: float
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
        loss = cross_entropy(logits_BxLxV, targets_BxL, z_loss=self.z_loss)
        if stream.balance is None:
            return loss
        config = self.model.config
        with jax.named_scope("balance"):
            assigned, probability = stream.balance[:, None] / config.layers
            return loss + balance_term(Load(assigned, probability, assigned), config, self.data)

    def layer(self, params: Params, stream: Stream) -> Stream:
        """One layer; params by path relative to the layer."""
        return self._layer(self.run, params, stream)

    def forward(self, params: Params, stream: Stream) -> Stream:
        """`layer`, traced as the forward half of a differentiation, which is how its operations are named."""
        return jax.vjp(self._recomputing(self.layer), params, stream)[0]

    def backward(self, params: Params, stream: Stream, cotangent: Stream) -> tuple[Params, Stream]:
        """Gradients of the layer's parameters and of its input, from the input and the output's gradient."""
        return jax.vjp(self._recomputing(self.layer), params, stream)[1](cotangent)

    def products(self, params: Params, x: Stream) -> tuple[_Product, ...]:
        """The products of a layer, in order; shapes only."""
        recorder = _Recorder(params)
        jax.eval_shape(lambda: self._layer(replace(self.run, project=recorder.look), params, x))
        return tuple(recorder.products)

    def input_gradient(self, params: Params, x: Stream, cotangent: Stream) -> tuple[Params, Stream, Factors]:
        """Gradients of norms, biases and experts, of the input, and the factors of the kernels' gradients."""
        products = self.products(params, x)
        kernels = {product.path: params[product.path] for product in products}
        rest = {path: array for path, array in params.items() if path not in kernels}
        taps = [jnp.zeros(p.output.shape, p.output.dtype) for p in products]

        def tapped(rest: Params, taps: list[jax.Array], x: Stream) -> tuple[Stream, Any]:
            recorder = _Recorder(kernels, taps)
            y = self._layer(replace(self.run, project=recorder.add_tap), {**kernels, **rest}, x)
            return y, tuple(recorder.inputs)

        _, pull, inputs = jax.vjp(self._recomputing(tapped), rest, taps, x, has_aux=True)
        small, cotangents, dx = pull(cotangent)
        return small, dx, Factors(inputs, tuple(cotangents))

    def kernel_gradients(self, params: Params, x: Stream, factors: Factors) -> Params:
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

    def _layer(self, run: Runtime, params: Params, stream: Stream) -> Stream:
        layer = with_params(self.model.layers, params)
        x_BxLxE, _, load = layer(stream.x, run.positions_of(stream.x.shape[1]), run)
        if stream.balance is None:
            return Stream(x_BxLxE)
        assert load is not None
        spread = jnp.stack([load.assigned, load.probability])
        return Stream(x_BxLxE, stream.balance + run.constrain(spread, BALANCE))

    def _recomputing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Under the plan's remat policy; between a forward and its backward only the input is kept anyway."""
        return checkpointed(function, self.run.remat, in_scan=True)


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
