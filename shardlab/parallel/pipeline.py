"""A pipeline on a mesh: stages in a `shard_map` over the stage axis, then one reduction of the gradients.

The map is manual over the stage axis and over the batch axes that split no parameter (data parallelism): so
gradients stay unreduced sums until the last tick and are reduced once per step. The other axes are left to
the partitioner: tensor parallelism, and FSDP, which gathers weights for every microbatch and reduces their
gradients as often.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from shardlab.model.runtime import Runtime
from shardlab.model.transformer import Params, Transformer, as_used
from shardlab.parallel.reduction import reduced, shardings_inside
from shardlab.parallel.shardings import Shardings, microbatches
from shardlab.parallel.stage import BALANCE, HOP, LAYERS, STREAM, StageModel, Stream
from shardlab.parallel.ticks import Executor
from shardlab.spec.case import Case
from shardlab.spec.names import reduced_once
from shardlab.spec.params import LogicalAxes, ParamSpec
from shardlab.spec.pipeline import layout_of, schedule_of, stage_axis
from shardlab.spec.stages import StageLayout
from shardlab.spec.tick_table import tick_table


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """A case's pipeline on the mesh of `shardings`. runtime_on: how the model runs under given shardings.
    sum_dtype: of gradients' sums over the microbatches."""

    case: Case
    model: Transformer
    shardings: Shardings
    runtime_on: Callable[[Shardings], Runtime]
    z_loss: float
    sum_dtype: DTypeLike

    @property
    def axis(self) -> str:
        """The mesh axis of the stages."""
        axis = stage_axis(self.case.plan)
        assert axis is not None
        return axis

    @property
    def layout(self) -> StageLayout:
        """How the layers lie on the stages."""
        layout = layout_of(self.case.plan, self.case.model.layers)
        assert layout is not None
        return layout

    @property
    def data(self) -> tuple[str, ...]:
        """The axes of batch and context over which gradients are reduced once per step."""
        return reduced_once(self.case.plan)

    @property
    def data_ways(self) -> int:
        """Over how many parts of the batch gradients are reduced at the end."""
        return prod(self.shardings.mesh.shape[name] for name in self.data)

    def loss_and_gradients(
        self, params: Params, tokens_BxL: jax.Array, targets_BxL: jax.Array
    ) -> tuple[jax.Array, Params]:
        """Mean loss over the batch, and its gradients, in the type of their sums, where the optimizer is."""
        count = schedule_of(self.case.plan).microbatches
        micro = [microbatches(a, count, self.shardings) for a in (tokens_BxL, targets_BxL)]
        losses, partial = self._mapped()(params, *micro)
        specs = {p.path: p for p in self.case.parameters()}
        with jax.named_scope("pipeline"):
            gradients = {
                path: reduced(parts, specs[path], self._over(path), self.data_ways, self.shardings)
                for path, parts in partial.items()
            }
            return losses.sum() / self.data_ways, gradients

    def _over(self, path: str) -> tuple[str, ...]:
        """The axes over which a parameter's gradient has parts: what is in no layer has one on each stage."""
        return self.data if path.startswith(LAYERS) else (self.axis, *self.data)

    def _mapped(self) -> Callable[..., tuple[jax.Array, Params]]:
        """(params, tokens, targets) -> losses [parts] and unreduced gradients [parts, …].

        Parts are the devices along `data`, and along the stages too for what belongs to no layer.
        """
        P = PartitionSpec
        manual, tokens = (self.axis, *self.data), self.shardings.manual_tokens(self.data)
        in_layer = {p.path: p.path.startswith(LAYERS) for p in self.case.parameters()}

        def run(params: Params, tokens: jax.Array, targets: jax.Array) -> tuple[jax.Array, Params]:
            loss, gradients = self._executor(params, tokens, targets).run()
            parts = {path: a[None, None] if in_layer[path] else a[None] for path, a in gradients.items()}
            return loss[None], parts

        return jax.shard_map(
            run,
            mesh=self.shardings.mesh,
            axis_names=set(manual),
            in_specs=({path: P(self.axis) if yes else P() for path, yes in in_layer.items()}, tokens, tokens),
            out_specs=(
                P(manual),
                {
                    path: P(self.data or None, self.axis) if yes else P(manual)
                    for path, yes in in_layer.items()
                },
            ),
            check_vma=False,
        )

    def _executor(self, params: Params, tokens: jax.Array, targets: jax.Array) -> Executor:
        """Inside the map: one stage's program."""
        inside = shardings_inside(self.shardings, {self.axis, *self.data})
        run = self.runtime_on(inside)
        layers, outer = self._of_stage(params)
        layers, outer = as_used(self.model, layers, run), as_used(self.model, outer, run)
        axes = {p.path: p.axes for p in self.case.parameters()}

        def place(name: str, array: jax.Array) -> jax.Array:
            if name not in axes:
                stream = HOP if name == "x" else BALANCE
                return inside.constrain(array, (*(None,) * (array.ndim - len(stream)), *stream))
            spec = ParamSpec(name, array.shape, axes[name][-array.ndim :])
            return jax.lax.with_sharding_constraint(array, inside.optimizer_state(spec))

        table = tick_table(schedule_of(self.case.plan), self.layout, apart=not self.case.scan_layers)
        stage = StageModel(
            model=self.model,
            run=run,
            z_loss=self.z_loss,
            split=table.pair_slots > 0,
            wide=self._wide,
            data=self.data,
            groups=_groups(inside),
        )
        return Executor(
            stage=stage,
            table=table,
            axis=self.axis,
            chunk_slots=self.layout.chunk_slots,
            layers=layers,
            outer=outer,
            tokens=tokens,
            targets=targets,
            place=place,
            sum_dtype=self.sum_dtype,
            arriving=_moved_to(STREAM, inside),
            leaving=_moved_to(HOP, inside),
        )

    @property
    def _wide(self) -> bool:
        """Whether gradients of kernels are found in f32: where they are no part of a stack, and are not
        reduced for every microbatch, in 16 bits."""
        plan, used = self.case.plan, self.shardings.compute
        whole = all(used[axis] == names for axis, names in self.shardings.params.items() if axis != "stage")
        method = plan.method
        plain = method.products == "bf16" and method.gradient_sums == "f32" and method.lora is None
        return not self.case.scan_layers and whole and plain and not plan.blocks

    def _of_stage(self, params: Params) -> tuple[Any, Params]:
        """This stage's layers, a stack of each parameter or one array per slot, and what is in no layer."""
        scanned, slots = self.case.scan_layers, range(self.layout.slots)
        layers = {
            path: a.squeeze(0) if scanned else tuple(a[0, slot] for slot in slots)
            for path, a in params.items()
            if path.startswith(LAYERS)
        }
        return layers, {path: a for path, a in params.items() if not path.startswith(LAYERS)}


def _moved_to(axes: LogicalAxes, inside: Shardings) -> Callable[[Stream], Stream]:
    """Places what passes between stages, where it lies otherwise on the way: Megatron's scatter and gather
    (arXiv:2104.04473, section 4.1), which send over slow links what each device of a stage has alone."""
    if inside.activations["hop_seq"] == inside.activations["norm_seq"]:
        return lambda stream: stream
    # Pinned where it comes from as well, or the partitioner splits the layers' stream too.
    return lambda stream: stream._replace(x=inside.constrain(inside.constrain(stream.x, STREAM), axes))


def _groups(inside: Shardings) -> tuple[int, int]:
    """Over how many devices the axes that the map has left split batch and sequence where experts route."""
    batch, seq = (
        prod(inside.mesh.shape[name] for name in inside.activations.get(axis, ()))
        for axis in ("batch", "norm_seq")
    )
    return batch, seq


def to_stages(params: Params, case: Case) -> Params:
    """Layer parameters [layers, …] as a pipeline holds them, [stages, slots, …]; unused slots are zero."""
    layout = layout_of(case.plan, case.model.layers)
    if layout is None:
        return params
    index = jnp.array([[-1 if layer is None else layer for layer in row] for row in layout.layers()])

    def stack(array: jax.Array) -> jax.Array:
        held = (index >= 0).reshape(*index.shape, *(1,) * (array.ndim - 1))
        return jnp.where(held, array[index], jnp.zeros((), array.dtype))

    return {path: stack(a) if path.startswith(LAYERS) else a for path, a in params.items()}


def from_stages(params: Params, case: Case) -> Params:
    """The inverse of `to_stages`: [stages, slots, …] as [layers, …]."""
    layout = layout_of(case.plan, case.model.layers)
    if layout is None:
        return params
    places = sorted(
        (layer, stage, slot)
        for stage, row in enumerate(layout.layers())
        for slot, layer in enumerate(row)
        if layer is not None
    )
    _, stages, slots = (jnp.array(column) for column in zip(*places, strict=True))
    return {path: a[stages, slots] if path.startswith(LAYERS) else a for path, a in params.items()}
