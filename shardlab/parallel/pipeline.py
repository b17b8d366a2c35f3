"""A pipeline on a mesh: stages in a `shard_map` over the stage axis, then one reduction of the gradients.

The map is manual over the stage axis and over the batch axes that split no parameter (data parallelism): so
gradients stay unreduced sums until the last tick and are reduced once per step. The other axes are left to
the partitioner: tensor parallelism, and FSDP, which gathers weights for every microbatch and reduces their
gradients as often.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardlab.model.runtime import Runtime
from shardlab.model.transformer import Params, Transformer
from shardlab.parallel.shardings import Shardings
from shardlab.parallel.stage import LAYERS, StageModel
from shardlab.parallel.ticks import Executor
from shardlab.spec.case import Case
from shardlab.spec.params import ParamSpec
from shardlab.spec.pipeline import layout_of, schedule_of, stage_axis
from shardlab.spec.tick_table import tick_table

RuntimeOn = Callable[[Shardings], Runtime]
BATCH_AXES = (None, "batch", "seq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """What a case's pipeline is on a mesh. data: the batch axes that split no parameter."""

    case: Case
    model: Transformer
    shardings: Shardings
    runtime_on: RuntimeOn
    z_loss: float

    def loss_and_gradients(
        self, params: Params, tokens_BxL: jax.Array, targets_BxL: jax.Array
    ) -> tuple[jax.Array, Params]:
        """Mean loss over the batch, and its gradients, f32, where the optimizer state is."""
        count = schedule_of(self.case.plan).microbatches
        micro = [microbatches(a, count, self.shardings) for a in (tokens_BxL, targets_BxL)]
        losses, partial = self._mapped()(params, *micro)
        return losses.sum() / self._data_ways, self._reduced(partial)

    @property
    def axis(self) -> str:
        """The mesh axis of the stages."""
        axis = stage_axis(self.case.plan)
        assert axis is not None
        return axis

    @property
    def data(self) -> tuple[str, ...]:
        """The batch axes that split no parameter."""
        plan = self.case.plan
        used = {name for names in plan.params.values() for name in names}
        return tuple(name for name in plan.activations.get("batch", ()) if name not in used)

    @property
    def _mesh(self) -> Mesh:
        return self.shardings.mesh

    @property
    def _data_ways(self) -> int:
        return prod(self._mesh.shape[name] for name in self.data)

    def _mapped(self) -> Callable[..., tuple[jax.Array, Params]]:
        """(params, tokens, targets) -> losses and unreduced gradients, with a leading dimension of parts."""
        manual = (self.axis, *self.data)

        def run(params: Params, tokens: jax.Array, targets: jax.Array) -> tuple[jax.Array, Params]:
            loss, gradients = self._executor(params, tokens, targets).run()
            stacked = {
                path: array[None, None] if path.startswith(LAYERS) else array[None]
                for path, array in gradients.items()
            }
            return loss[None], stacked

        table = self.case.parameters()
        layer = {p.path: p.path.startswith(LAYERS) for p in table}
        P = PartitionSpec
        tokens = P(None, self.data or None)
        return jax.shard_map(
            run,
            mesh=self._mesh,
            in_specs=({path: P(self.axis) if yes else P() for path, yes in layer.items()}, tokens, tokens),
            out_specs=(
                P(manual),
                {path: P(self.data or None, self.axis) if yes else P(manual) for path, yes in layer.items()},
            ),
            axis_names=set(manual),
            check_vma=False,
        )

    def _executor(self, params: Params, tokens: jax.Array, targets: jax.Array) -> Executor:
        """Inside the map: one stage's program."""
        case, inside = self.case, self._inside()
        layout = layout_of(case.plan, case.model.layers)
        assert layout is not None
        specs = {p.path: p for p in case.parameters()}
        stream = ("batch", "norm_seq", "embed")

        def place(name: str, array: jax.Array) -> jax.Array:
            if name in specs:
                spec = replace_shape(specs[name], array.shape)
                return jax.lax.with_sharding_constraint(array, inside.optimizer_state(spec))
            return inside.constrain(array, (*(None,) * (array.ndim - len(stream)), *stream))

        run = replace_remat(self.runtime_on(inside))
        return Executor(
            stage=StageModel(model=self.model, run=run, z_loss=self.z_loss),
            table=tick_table(schedule_of(case.plan), layout),
            axis=self.axis,
            chunk_slots=layout.chunk_slots,
            layers={path: a.squeeze(0) for path, a in params.items() if path.startswith(LAYERS)},
            outer={path: a for path, a in params.items() if not path.startswith(LAYERS)},
            tokens=tokens,
            targets=targets,
            place=place,
        )

    def _inside(self) -> Shardings:
        """The plan's shardings over the axes that the map leaves to the partitioner."""
        manual = {self.axis, *self.data}

        def rest(rules: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
            return {axis: tuple(n for n in names if n not in manual) for axis, names in rules.items()}

        outer = self.shardings
        return Shardings(
            mesh=jax.sharding.get_abstract_mesh(),  # type: ignore[arg-type]
            params=rest(outer.params),
            optimizer=rest(outer.optimizer),
            compute=rest(outer.compute),
            activations=rest(outer.activations),
        )

    def _reduced(self, partial: Params) -> Params:
        """The gradients summed over data parts, and over stages where a parameter belongs to no layer."""
        specs = {p.path: p for p in self.case.parameters()}
        return {path: self._reduce(array, specs[path]) for path, array in partial.items()}

    def _reduce(self, parts: jax.Array, spec: ParamSpec) -> jax.Array:
        """parts: [parts, *shape]. Reduce-scattered to where the optimizer state is, all-reduced otherwise."""
        over = self.data if spec.path.startswith(LAYERS) else (self.axis, *self.data)
        if not over:
            return parts.squeeze(0)
        wanted = tuple(self.shardings.optimizer_state(spec).spec)
        wanted += (None,) * (len(spec.shape) - len(wanted))
        names = [(split,) if isinstance(split, str) else tuple(split or ()) for split in wanted]
        held = [tuple(n for n in split if n not in over) for split in names]
        scattered = {
            dim: split[len(kept) :]
            for dim, (split, kept) in enumerate(zip(names, held, strict=True))
            if len(split) > len(kept) and split[: len(kept)] == kept
        }
        final = [names[dim] if dim in scattered else held[dim] for dim in range(len(names))]

        def reduce(part: jax.Array) -> jax.Array:
            total, left = part.squeeze(0), over
            for dim, axes in scattered.items():
                total = jax.lax.psum_scatter(total, axes, scatter_dimension=dim, tiled=True)
                left = tuple(n for n in left if n not in axes)
            return (jax.lax.psum(total, left) if left else total) / self._data_ways

        P = PartitionSpec
        mapped = jax.shard_map(
            reduce,
            mesh=self._mesh,
            in_specs=P(over, *(split or None for split in held)),
            out_specs=P(*(split or None for split in final)),
            check_vma=False,
        )
        with jax.named_scope("pipeline"):
            return mapped(parts)


def replace_shape(spec: ParamSpec, shape: tuple[int, ...]) -> ParamSpec:
    """The parameter as a stage holds it: without the dimension of stages."""
    return ParamSpec(spec.path, shape, spec.axes[len(spec.axes) - len(shape) :])


def replace_remat(run: Runtime) -> Runtime:
    """Between F and B only the inputs of layers are kept, so a layer's own policy does not matter."""
    return replace(run, remat="full")


def microbatches(tokens_BxL: jax.Array, count: int, shardings: Shardings) -> jax.Array:
    """[B, L] -> [count, B / count, L]; each device's sequences stay where they are."""
    B, L = tokens_BxL.shape
    micro = tokens_BxL.reshape(B // count, count, L).swapaxes(0, 1)
    return shardings.constrain(micro, BATCH_AXES)


def to_stages(params: Params, case: Case) -> Params:
    """Layer parameters [layers, …] as a pipeline holds them, [stages, slots, …]; unused slots are zero."""
    layout = layout_of(case.plan, case.model.layers)
    if layout is None:
        return params
    index = jax.numpy.array([[-1 if i is None else i for i in row] for row in layout.layers()])

    def stack(array: jax.Array) -> jax.Array:
        held = (index >= 0).reshape(*index.shape, *(1,) * (array.ndim - 1))
        return jax.numpy.where(held, array[index], 0)

    return {path: stack(a) if path.startswith(LAYERS) else a for path, a in params.items()}


def from_stages(params: Params, case: Case) -> Params:
    """The inverse of `to_stages`: [stages, slots, …] as [layers, …]."""
    layout = layout_of(case.plan, case.model.layers)
    if layout is None:
        return params
    where = {
        layer: (stage, slot)
        for stage, row in enumerate(layout.layers())
        for slot, layer in enumerate(row)
        if layer is not None
    }
    stages, slots = zip(*(where[layer] for layer in sorted(where)), strict=True)
    index = jax.numpy.array(stages), jax.numpy.array(slots)
    return {path: a[index] if path.startswith(LAYERS) else a for path, a in params.items()}


def named(mesh: Mesh, spec: PartitionSpec) -> NamedSharding:
    """A sharding on the mesh."""
    return NamedSharding(mesh, spec)
