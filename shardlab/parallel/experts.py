"""Experts on a mesh: each device routes its own tokens, and all-to-alls bring them to the experts' devices.

One shard_map from the router's logits to the sum over experts. Over the axes that `expert` maps to, a device
owns some of the experts, whole or, where `mlp` is split (tensor parallelism), a part of each; the other axes
that split their kernels (FSDP) are gathered for use and their gradients reduce-scattered. Per layer, forward:
one all-to-all brings the rows, one brings the answers back; backward as many again. Each device sends (n-1)/n
of its T·K rows of E, as in GShard (arXiv:2006.16668, section 3.1): with a capacity factor that factor times
as much; dropless where the backend has no ragged all-to-all, padded to the worst case, n · min(K, O) / K
times as much (n devices, O experts on each).

Partial sums of tensor parallelism travel back as they are and are reduced once per token, not per expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from shardlab.model.experts import (
    Dispatch,
    Exchange,
    Experts,
    Kernels,
    Load,
    Trip,
    dropless,
    load_of,
    route,
    with_capacity,
)
from shardlab.model.runtime import GATHERED_WEIGHT
from shardlab.parallel.shardings import Shardings
from shardlab.spec.case import Case
from shardlab.spec.experts import capacity_factor, expert_axes
from shardlab.spec.models import Router
from shardlab.spec.params import LogicalAxes, ParamSpec

Names = tuple[str, ...]

RAGGED_TARGETS = ("tpu", "gpu")
KERNEL_AXES: tuple[LogicalAxes, ...] = (
    ("expert", "embed", "mlp"),
    ("expert", "embed", "mlp"),
    ("expert", "mlp", "embed"),
)


def experts_notes(case: Case, target: str) -> tuple[str, ...]:
    """What the report says of a dropless dispatch whose all-to-alls are padded, and of the batch that the
    load-balance loss judges."""
    return (*_balance_notes(case), *_padding_notes(case, target))


def _balance_notes(case: Case) -> tuple[str, ...]:
    count, model = case.plan.method.accumulate, case.model
    if case.workload != "train" or count == 1 or not model.num_experts or model.balance == "sequence":
        return ()
    return (f"experts: the load-balance loss is the mean of {count} microbatches', each of its own load",)


def _padding_notes(case: Case, target: str) -> tuple[str, ...]:
    axes = expert_axes(case.plan.params_in("moe"), case.plan.activations)
    padded = capacity_factor(case.plan.method.experts) is None and target not in RAGGED_TARGETS
    if not case.model.num_experts or not axes or not padded:
        return ()
    return (
        f"experts: {target} has no ragged all-to-all, so dropless rows are padded to the worst case, in "
        "which all tokens of a device go to one other",
    )


def mesh_experts(case: Case, shardings: Shardings, target: str) -> Experts:
    """The experts of a case on its mesh, for target cpu, gpu or tpu."""
    factor = capacity_factor(case.plan.method.experts)
    dispatch = dropless if factor is None else with_capacity(factor)

    def experts(
        x_BxLxE: jax.Array,
        logits_BxLxX: jax.Array,
        bias_X: jax.Array | None,
        kernels: Kernels,
        router: Router,
    ) -> tuple[jax.Array, Load]:
        places = _places(shardings, x_BxLxE, kernels)
        each = case.model.balance == "sequence"
        local = _Local(dispatch, router, each, places, _exchange(shardings, places, target))
        stream = places.stream
        return jax.shard_map(
            local,
            mesh=shardings.mesh,
            axis_names=shardings.free_axes,
            in_specs=(stream, stream, PartitionSpec(), places.entering),
            out_specs=(stream, PartitionSpec(stream[0], stream[1])),
        )(x_BxLxE, logits_BxLxX, bias_X, kernels)

    return experts


@dataclass(frozen=True, slots=True, kw_only=True)
class _Places:
    """Where the arrays of one layer's experts are.

    stream: of x_BxLxE. entering, used: of the kernels as they enter the map, and after their gathers.
    """

    stream: PartitionSpec
    entering: Kernels
    used: Kernels

    @property
    def tokens(self) -> Names:
        """The mesh axes that split tokens: the groups, in order."""
        return _names(self.stream[0]) + _names(self.stream[1])

    @property
    def experts(self) -> Names:
        """The mesh axes that split the experts in use."""
        return _names(self.used.gate[0])

    @property
    def tensor(self) -> Names:
        """The mesh axes that split each expert."""
        return _names(self.used.gate[2])

    @property
    def gathered(self) -> Names:
        """The axes of sequence parallelism: they split an expert, and the tokens only around it."""
        return tuple(name for name in _names(self.stream[1]) if name in self.tensor)

    @property
    def partial(self) -> Names:
        """The other axes that split an expert: all devices along them have the same tokens."""
        return tuple(name for name in self.tensor if name not in self.gathered)


def _places(shardings: Shardings, x_BxLxE: jax.Array, kernels: Kernels) -> _Places:
    stream = shardings.activation(x_BxLxE.shape, ("batch", "norm_seq", None)).spec
    tokens = _names(stream[0]) + _names(stream[1])
    used = [
        shardings.weight_in_use(kernel.shape, axes).spec
        for kernel, axes in zip(kernels, KERNEL_AXES, strict=True)
    ]
    stored = [
        shardings.param(ParamSpec("experts", kernel.shape, axes)).spec
        for kernel, axes in zip(kernels, KERNEL_AXES, strict=True)
    ]
    entering = [s if _can_gather(s, u, tokens) else u for s, u in zip(stored, used, strict=True)]
    return _Places(stream=stream, entering=Kernels(*entering), used=Kernels(*used))


def _can_gather(stored: PartitionSpec, used: PartitionSpec, tokens: Names) -> bool:
    """Whether a gather inside the map leads from one to the other: of minor axes, that split tokens too."""
    for have, want in zip(map(_names, stored), map(_names, used), strict=True):
        if have[: len(want)] != want or not set(have[len(want) :]) <= set(tokens):
            return False
    return True


def _names(entry: str | Names | None) -> Names:
    """One dimension of a PartitionSpec as a tuple of mesh axes."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


@dataclass(frozen=True, slots=True)
class _Local:
    """One device's program."""

    dispatch: Dispatch
    router: Router
    each: bool
    places: _Places
    exchange: Exchange

    def __call__(
        self, x_BxLxE: jax.Array, logits_BxLxX: jax.Array, bias_X: jax.Array | None, kernels: Kernels
    ) -> tuple[jax.Array, Load]:
        """This device's part of x -> its part of the result, and the load of its tokens [1, 1, X], or of each
        of its sequences [B, 1, X]."""
        routing = route(logits_BxLxX, self.router, bias_X)
        load = load_of(routing, each=self.each)
        whole_BxLxE = self._whole(x_BxLxE)
        chosen = routing._replace(
            experts=self._whole(routing.experts).reshape(-1, self.router.experts_per_token),
            weights=self._whole(routing.weights).reshape(-1, self.router.experts_per_token),
        )
        tokens_TxE = whole_BxLxE.reshape(-1, whole_BxLxE.shape[-1])
        out_TxE = self.dispatch(tokens_TxE, chosen, self._in_use(kernels), self.exchange)
        out_BxLxE = out_TxE.reshape(whole_BxLxE.shape)
        return self._reduced(out_BxLxE), load

    def _whole(self, x_BxLxF: jax.Array) -> jax.Array:
        """Gathered over the axes of sequence parallelism, and marked as different on the others that split
        an expert: so its gradient is summed over them here, once per token, and not per expert."""
        return _vary(_gather(x_BxLxF, self.places.gathered, 1), self.places.partial)

    def _in_use(self, kernels: Kernels) -> Kernels:
        """The kernels gathered; marked as different per token group first, so that gradients scatter before
        they are summed over the other groups."""
        found = []
        for kernel, stored, used in zip(kernels, self.places.entering, self.places.used, strict=True):
            split = [name for entry in stored for name in _names(entry)]
            placed = _vary(kernel, [name for name in self.places.tokens if name not in split])
            for dimension, (have, want) in enumerate(
                zip(map(_names, stored), map(_names, used), strict=True)
            ):
                placed = _gather_weight(placed, have[len(want) :], dimension)
            found.append(placed)
        return Kernels(*found)

    def _reduced(self, out_BxLxE: jax.Array) -> jax.Array:
        """The sum over the parts of each expert; where the stream is split by them, each keeps its share."""
        gathered, partial = self.places.gathered, self.places.partial
        out_BxLxE = jax.lax.psum(out_BxLxE, partial) if partial else out_BxLxE
        if not gathered:
            return out_BxLxE
        return jax.lax.psum_scatter(out_BxLxE, gathered, scatter_dimension=1, tiled=True)


def _vary(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """x, marked as different along these axes: at this point its gradient is summed over them."""
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x


def _gather(x: jax.Array, axes: Names, dimension: int) -> jax.Array:
    return jax.lax.all_gather(x, axes, axis=dimension, tiled=True) if axes else x


def _gather_weight(kernel: jax.Array, axes: Names, dimension: int) -> jax.Array:
    """`_gather` of a kernel, in the form that no remat policy saves (model/runtime.py)."""
    if not axes:
        return kernel

    @jax.custom_vjp
    def gather(kernel: jax.Array) -> jax.Array:
        return _gather(kernel, axes, dimension)

    def forward(kernel: jax.Array) -> tuple[jax.Array, None]:
        return gather(kernel), None

    def backward(_: None, cotangent: jax.Array) -> tuple[jax.Array]:
        return (jax.lax.psum_scatter(cotangent, axes, scatter_dimension=dimension, tiled=True),)

    gather.defvjp(forward, backward)
    return checkpoint_name(gather(kernel), GATHERED_WEIGHT)


def _exchange(shardings: Shardings, places: _Places, target: str) -> Exchange:
    """Between the devices along the expert axes."""
    axes = places.experts
    devices = 1
    for name in axes:
        devices *= shardings.mesh.shape[name]
    if devices == 1:
        return Exchange()
    swap: Callable[[jax.Array], jax.Array] = partial(
        jax.lax.all_to_all, axis_name=axes, split_axis=0, concat_axis=0, tiled=True
    )
    if target not in RAGGED_TARGETS:
        return Exchange(devices, swap)
    return RaggedExchange(devices, swap, axes, places.tokens + places.partial)


@dataclass(frozen=True, slots=True)
class RaggedExchange(Exchange):
    """Rows travel in ragged all-to-alls: only those that there are.

    axes: over which mesh axes. varying: the mesh axes along which rows differ.
    """

    axes: Names = ()
    varying: Names = ()

    def send(self, rows_AxE: jax.Array, trip: Trip) -> jax.Array:
        """As `Exchange.send`; each sender has its slot of `width` rows at the owner."""
        room = jnp.zeros((self.devices * trip.width, rows_AxE.shape[1]), rows_AxE.dtype)
        mine = jnp.zeros_like(trip.starts) + jax.lax.axis_index(self.axes) * trip.width
        arrived = self._ragged(rows_AxE, room, (trip.starts, trip.sent, mine, trip.arrived))
        return arrived.reshape(self.devices, trip.width, -1)

    def give_back(self, rows_NxRxE: jax.Array, trip: Trip) -> jax.Array:
        """As `Exchange.give_back`."""
        rows_RxE = rows_NxRxE.reshape(self.devices * trip.width, -1)
        slots = jnp.zeros_like(trip.starts) + jnp.arange(self.devices, dtype=jnp.int32) * trip.width
        room = jnp.zeros((len(trip.owner), rows_RxE.shape[1]), rows_RxE.dtype)
        return self._ragged(rows_RxE, room, (slots, trip.arrived, self.swap(trip.starts), trip.sent))

    def _ragged(self, rows: jax.Array, room: jax.Array, offsets: tuple[jax.Array, ...]) -> jax.Array:
        """offsets: input offsets, send sizes, output offsets at the receiver, receive sizes."""
        room = _vary(room, self.varying)
        return jax.lax.ragged_all_to_all(rows, room, *offsets, axis_name=self.axes)
