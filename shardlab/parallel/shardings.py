"""Rules to shardings, the one place: a plan's rule tables become jax shardings of parameters, gradients,
optimizer state and activations on a mesh. What a rule means is decided in `spec/sharding.py`, not here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardlab.model.runtime import GATHERED_WEIGHT
from shardlab.spec.params import LogicalAxes, ParamSpec
from shardlab.spec.plan import Plan, Rules
from shardlab.spec.sharding import array_sharding


@dataclass(frozen=True, slots=True, kw_only=True)
class Shardings:
    """Where a plan puts each kind of array on `mesh`. Every method raises Infeasible when a dimension does not divide.

    params, gradients (those of the optimizer: ZeRO-1 reduce-scatters to where the state is), weights in use, activations:
    one rule table each.
    """

    mesh: Mesh
    params: Rules
    optimizer: Rules
    compute: Rules
    activations: Rules

    def param(self, spec: ParamSpec) -> NamedSharding:
        """Of a stored parameter."""
        return self._named(spec.shape, spec.axes, self.params, spec.path)

    def optimizer_state(self, spec: ParamSpec) -> NamedSharding:
        """Of an optimizer moment of this parameter, and of its gradient."""
        return self._named(spec.shape, spec.axes, self.optimizer, f"optimizer state of {spec.path}")

    def activation(self, shape: tuple[int, ...], axes: LogicalAxes) -> NamedSharding:
        """Of an activation with one logical axis per dimension."""
        return self._named(shape, axes, self.activations, f"activation ({', '.join(map(str, axes))})")

    def replicated(self) -> NamedSharding:
        """Of a value that every device holds."""
        return NamedSharding(self.mesh, PartitionSpec())

    def constrain(self, x: jax.Array, axes: LogicalAxes) -> jax.Array:
        """Pin an activation to where the plan wants it."""
        return jax.lax.with_sharding_constraint(x, self.activation(x.shape, axes))

    def place_weight(self, weight: jax.Array, axes: LogicalAxes) -> jax.Array:
        """Gather a parameter for use; its gradient goes to where the optimizer state is.

        A transposed sharding constraint would gather the gradient too (all-reduce); this one lets it reduce-scatter.
        """
        used = self._named(weight.shape, axes, self.compute, f"weight ({', '.join(map(str, axes))})")
        gradient = self._named(weight.shape, axes, self.optimizer, f"gradient ({', '.join(map(str, axes))})")
        return checkpoint_name(_gather(used, gradient)(weight), GATHERED_WEIGHT)

    def _named(
        self, shape: tuple[int, ...], axes: LogicalAxes, rules: Mapping[str, tuple[str, ...]], what: str
    ) -> NamedSharding:
        split = array_sharding(shape, axes, rules, dict(self.mesh.shape), what=what)
        return NamedSharding(self.mesh, PartitionSpec(*(names or None for names in split)))


def shardings_of(plan: Plan, mesh: Mesh) -> Shardings:
    """The shardings of `plan` on `mesh`, whose axes must be the plan's.

    A weight in use keeps the mesh axes that its activations of the same logical axis have (tensor parallelism) and is
    gathered over the others (FSDP). norm_seq follows seq unless the plan says otherwise.
    """
    activations = {"norm_seq": plan.activations.get("seq", ()), **plan.activations}
    compute = {
        axis: tuple(name for name in names if name in activations.get(axis, ()))
        for axis, names in plan.params.items()
    }
    optimizer = plan.optimizer or plan.params
    return Shardings(
        mesh=mesh, params=plan.params, optimizer=optimizer, compute=compute, activations=activations
    )


def _gather(used: NamedSharding, gradient: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    """Identity that is placed at `used` going forward, and whose cotangent is placed at `gradient`."""

    @jax.custom_vjp
    def gather(x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, used)

    def forward(x: jax.Array) -> tuple[jax.Array, None]:
        return gather(x), None

    def backward(_: None, cotangent: jax.Array) -> tuple[jax.Array]:
        return (jax.lax.with_sharding_constraint(cotangent, gradient),)

    gather.defvjp(forward, backward)
    return gather
