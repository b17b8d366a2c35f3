"""Rules to shardings, the one place: a plan's rule tables become jax shardings of parameters, gradients,
optimizer state and activations on a mesh. What a rule means is decided in `spec/sharding.py`, not here.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from math import prod

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from shardlab.model.runtime import GATHERED_WEIGHT
from shardlab.spec.params import LogicalAxes, ParamSpec
from shardlab.spec.plan import Plan, Rules
from shardlab.spec.sharding import array_sharding, block_of

# Logical axes that count tokens of the step's own input; decode and the last logits of prefill have one.
SEQUENCE_AXES = ("seq", "norm_seq", "hop_seq", "kv_seq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shardings:
    """Where a plan puts each kind of array on `mesh`. Every method raises Infeasible when a dimension does
    not divide.

    params, gradients (those of the optimizer: ZeRO-1 reduce-scatters to where the state is), weights in use,
    activations:
    one rule table each. blocks: those of block families that have their own.
    """

    mesh: Mesh | AbstractMesh
    params: Rules
    optimizer: Rules
    compute: Rules
    activations: Rules
    blocks: Mapping[str, Shardings] = field(default_factory=dict)

    def within(self, block: str | None) -> Shardings:
        """The shardings of a block family's parameters."""
        return self.blocks.get(block, self) if block is not None else self

    @property
    def free_axes(self) -> set[str]:
        """The mesh axes that no enclosing shard_map has taken: those that a shard_map in here may take."""
        types = zip(self.mesh.axis_names, self.mesh.axis_types, strict=True)
        return {str(name) for name, kind in types if kind != AxisType.Manual}

    @property
    def gathers(self) -> bool:
        """Whether any weight is stored otherwise than it is used."""
        return self.params != self.compute or any(block.gathers for block in self.blocks.values())

    def param(self, spec: ParamSpec) -> NamedSharding:
        """Of a stored parameter."""
        rules = self.within(block_of(spec.path)).params
        return self._named(spec.shape, spec.axes, rules, spec.path)

    def optimizer_state(self, spec: ParamSpec) -> NamedSharding:
        """Of an optimizer moment of this parameter, and of its gradient."""
        rules = self.within(block_of(spec.path)).optimizer
        return self._named(spec.shape, spec.axes, rules, f"optimizer state of {spec.path}")

    def activation(self, shape: tuple[int, ...], axes: LogicalAxes) -> NamedSharding:
        """Of an activation with one logical axis per dimension. A sequence of one token is not split."""
        axes = tuple(
            None if axis in SEQUENCE_AXES and size == 1 else axis
            for size, axis in zip(shape, axes, strict=True)
        )
        return self._named(shape, axes, self.activations, f"activation ({', '.join(map(str, axes))})")

    def manual_tokens(self, taken: Container[str]) -> PartitionSpec:
        """Of microbatches of tokens [count, B, L] entering a map that is manual over these axes."""
        split = ([n for n in self.activations.get(axis, ()) if n in taken] for axis in ("batch", "seq"))
        return PartitionSpec(None, *(tuple(names) or None for names in split))

    def replicated(self) -> NamedSharding:
        """Of a value that every device holds."""
        return NamedSharding(self.mesh, PartitionSpec())

    def constrain(self, x: jax.Array, axes: LogicalAxes) -> jax.Array:
        """Pin an activation to where the plan wants it."""
        return jax.lax.with_sharding_constraint(x, self.activation(x.shape, axes))

    def ways(self, axis: str | None) -> int:
        """In how many shards an activation's axis lies, by mesh axes that no shard_map around has taken."""
        names = self.activations.get(axis, ()) if axis is not None else ()
        return prod(self.mesh.shape[name] for name in names if name in self.free_axes)

    def place_weight(self, weight: jax.Array, axes: LogicalAxes) -> jax.Array:
        """Gather a parameter for use; its gradient goes to where the optimizer state is.

        A transposed sharding constraint would leave the gradient gathered (all-reduce); this lets it
        reduce-scatter.
        """
        what = f"({', '.join(map(str, axes))})"
        stored, used, gradient = (
            self._named(weight.shape, axes, rules, f"{kind} {what}")
            for kind, rules in (
                ("parameter", self.params),
                ("weight", self.compute),
                ("gradient", self.optimizer),
            )
        )
        return checkpoint_name(_gather(stored, used, gradient)(weight), GATHERED_WEIGHT)

    def weight_in_use(self, shape: tuple[int, ...], axes: LogicalAxes) -> NamedSharding:
        """Of what `place_weight` returns."""
        return self._named(shape, axes, self.compute, f"weight ({', '.join(map(str, axes))})")

    def _named(
        self, shape: tuple[int, ...], axes: LogicalAxes, rules: Mapping[str, tuple[str, ...]], what: str
    ) -> NamedSharding:
        split = array_sharding(shape, axes, rules, dict(self.mesh.shape), what=what)
        return NamedSharding(self.mesh, PartitionSpec(*(names or None for names in split)))


def shardings_of(plan: Plan, mesh: Mesh) -> Shardings:
    """The shardings of `plan` on `mesh`, whose axes must be the plan's.

    A weight in use keeps the mesh axes that its activations of the same logical axis have (tensor
    parallelism) and is
    gathered over the others (FSDP). norm_seq follows seq unless the plan says otherwise, hop_seq follows
    norm_seq, and kv_seq does seq in context parallelism.
    """
    split = plan.activations.get("seq", ())
    keys = split if plan.method.context != "none" else ()
    activations = {"norm_seq": split, "kv_seq": keys, **plan.activations}
    activations = {"hop_seq": activations["norm_seq"], **activations}

    def of(params: Rules, optimizer: Rules, blocks: Mapping[str, Shardings]) -> Shardings:
        compute = {
            axis: tuple(name for name in names if name in activations.get(axis, ()))
            for axis, names in params.items()
        }
        return Shardings(
            mesh=mesh,
            params=params,
            optimizer=optimizer,
            compute=compute,
            activations=activations,
            blocks=blocks,
        )

    blocks = {name: of(rules["params"], rules["optimizer"], {}) for name, rules in plan.blocks.items()}
    return of(plan.params, plan.optimizer or plan.params, blocks)


def microbatches(tokens_BxL: jax.Array, count: int, shardings: Shardings) -> jax.Array:
    """[B, L] -> [count, B / count, L]; each device's sequences stay where they are."""
    B, L = tokens_BxL.shape
    micro = tokens_BxL.reshape(B // count, count, L).swapaxes(0, 1)
    return shardings.constrain(micro, (None, "batch", "seq"))


def _gather(
    stored: NamedSharding, used: NamedSharding, gradient: NamedSharding
) -> Callable[[jax.Array], jax.Array]:
    """Identity that goes from `stored` to `used`, and whose cotangent goes straight to `gradient`.

    Forward both ends are pinned, else the partitioner gathers before the cast (twice the bytes). Backward
    only the
    end is: it then reduce-scatters over what splits the gradient and all-reduces what is left over the other
    axes.
    """
    constrain = jax.lax.with_sharding_constraint

    @jax.custom_vjp
    def gather(x: jax.Array) -> jax.Array:
        return constrain(constrain(x, stored), used)

    def forward(x: jax.Array) -> tuple[jax.Array, None]:
        # By calling itself it is one call to remat policies, which must not save it (model/runtime.py).
        return gather(x), None

    def backward(_: None, cotangent: jax.Array) -> tuple[jax.Array]:
        return (constrain(cotangent, gradient),)

    gather.defvjp(forward, backward)
    return gather
