"""A mixture of experts: the router, how tokens go to experts and back, and the load-balance loss.

`dropless` and `with_capacity` are one device's program. Rows that belong to experts elsewhere travel through
an `Exchange`: on one device it is the identity, on a mesh an all-to-all (parallel/experts.py). Shapes: T
tokens of one device, K experts per token, X experts, O experts that one device owns, N devices that share the
experts, A = T·K assignments of a token to an expert, E embed, M mlp, R rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp

from shardlab.spec.experts import expert_capacity
from shardlab.spec.models import ModelConfig, Router


class Kernels(NamedTuple):
    """Of the experts that a device owns: gate and up [O, E, M], down [O, M, E]."""

    gate: jax.Array
    up: jax.Array
    down: jax.Array


class Routing(NamedTuple):
    """Of each token its experts [..., K], their weights [..., K], and all scores as probabilities [..., X],
    which sum to one. Weights and probabilities in f32. likeliest: the K experts by score alone [..., K]."""

    experts: jax.Array
    weights: jax.Array
    probabilities: jax.Array
    likeliest: jax.Array


class Load(NamedTuple):
    """Of groups of tokens, f32 [..., X]: assignments to each expert per token, and its mean probability.

    assigned: by probability alone, which the loss judges. chosen: what was assigned in truth, where groups of
    experts and biases have their say.
    """

    assigned: jax.Array
    probability: jax.Array
    chosen: jax.Array


class Trip(NamedTuple):
    """Rows that travel, sorted by owner. owner [A]: of each row; starts, sent [N]: first row and number of
    rows for each owner; arrived [N]: rows from each sender; width: the most rows one can send another."""

    owner: jax.Array
    starts: jax.Array
    sent: jax.Array
    arrived: jax.Array
    width: int


def stay(parts: jax.Array) -> jax.Array:
    """The swap of one device that has all experts."""
    return parts


@dataclass(frozen=True, slots=True)
class Exchange:
    """How the devices that share the experts swap rows, each padded to the worst case: all for one owner.

    devices: how many they are. swap: part i of the leading dimension goes to device i, and
    part i of the result is what device i sent.
    """

    devices: int = 1
    swap: Callable[[jax.Array], jax.Array] = stay

    def send(self, rows_AxE: jax.Array, trip: Trip) -> jax.Array:
        """Rows to their owners: [N, width, E], of each part as many rows as have arrived, then zeros."""
        slot_1xR = jnp.arange(trip.width)[None]
        index_NxR = jnp.where(slot_1xR < trip.sent[:, None], trip.starts[:, None] + slot_1xR, len(rows_AxE))
        return self.swap(rows_AxE.at[index_NxR].get(mode="fill", fill_value=0))

    def give_back(self, rows_NxRxE: jax.Array, trip: Trip) -> jax.Array:
        """The answers to what `send` brought, to who sent it: [A, E] in the order of before."""
        slot_A = jnp.arange(len(trip.owner)) - trip.starts[trip.owner]
        return self.swap(rows_NxRxE)[trip.owner, slot_A]


# tokens_TxE, routing, kernels, exchange -> out_TxE.
Dispatch = Callable[[jax.Array, Routing, Kernels, Exchange], jax.Array]

# x_BxLxE, the router's logits_BxLxX and bias_X (f32), kernels as stored, the choice -> out_BxLxE, the load of
# each group [b, s, X] (see `load_of`).
Experts = Callable[[jax.Array, jax.Array, jax.Array | None, Kernels, Router], tuple[jax.Array, Load]]


def route(logits: jax.Array, router: Router, bias_X: jax.Array | None = None) -> Routing:
    """The K experts of each token [..., X] with the highest scores, weighted by their share of the K scores
    (and `router.scaling`). In f32. Sources: see `Router`.
    """
    logits = logits.astype(jnp.float32)
    softmax = router.scoring == "softmax"
    scores = jax.nn.softmax(logits, axis=-1) if softmax else jax.nn.sigmoid(logits)
    weights, likeliest = jax.lax.top_k(scores, router.experts_per_token)
    experts = likeliest
    if router.groups > 1 or bias_X is not None:
        judged = scores if bias_X is None else scores + bias_X.reshape((1,) * (scores.ndim - 1) + (-1,))
        _, experts = jax.lax.top_k(_eligible(judged, router), router.experts_per_token)
        weights = jnp.take_along_axis(scores, experts, axis=-1)
    weights = router.scaling * weights / weights.sum(-1, keepdims=True)
    probabilities = scores if softmax else scores / scores.sum(-1, keepdims=True)
    return Routing(experts, weights, probabilities, likeliest)


def _eligible(judged: jax.Array, router: Router) -> jax.Array:
    """Scores [..., X], those of groups that are not among the best as -∞. A group's own is the sum of its two
    highest (DeepSeek-V3, section 2.1.2: K / groups_per_token highest, which is two there; its published code
    has two)."""
    if router.groups == 1:
        return judged
    in_groups = judged.reshape(*judged.shape[:-1], router.groups, -1)
    value = jax.lax.top_k(in_groups, 2)[0].sum(-1)
    _, best = jax.lax.top_k(value, router.groups_per_token)
    kept = jax.nn.one_hot(best, router.groups, dtype=jnp.bool_).any(-2)
    return jnp.where(kept[..., None], in_groups, -jnp.inf).reshape(judged.shape)


def load_of(routing: Routing, *, each: bool = False) -> Load:
    """What balancing needs of the tokens [B, L, …] of one device: [1, 1, X], or if each, of every sequence
    apart [B, 1, X]."""
    shape = routing.probabilities.shape
    groups = (shape[0], -1, shape[-1]) if each else (1, -1, shape[-1])
    probabilities_GxTxX = routing.probabilities.reshape(groups)
    assigned, chosen = (
        _per_token(experts.reshape(*groups[:2], experts.shape[-1]), shape[-1])
        for experts in (routing.likeliest, routing.experts)
    )
    return Load(assigned, probabilities_GxTxX.mean(1, keepdims=True), chosen)


def _per_token(experts_GxTxK: jax.Array, num_experts: int) -> jax.Array:
    """Assignments to each expert per token, f32 [G, 1, X]."""
    chosen_GxTxX = jax.nn.one_hot(experts_GxTxK, num_experts, dtype=jnp.float32).sum(2)
    return chosen_GxTxX.mean(1, keepdims=True)


def balance_loss(load: Load) -> jax.Array:
    """X · Σ_x f_x · P_x with the means over all groups and layers; K where the load is even.

    f: assignments per token, P: mean probability. Switch Transformer, arXiv:2101.03961, eq. 4 to 6, and for
    K > 1 and several layers as Hugging Face's `load_balancing_loss_func` for Mixtral. Groups are of one size.
    """
    num_experts = load.assigned.shape[-1]
    assigned_X, probability_X = (
        jnp.mean(a, axis=tuple(range(a.ndim - 1))) for a in (load.assigned, load.probability)
    )
    return num_experts * jnp.sum(assigned_X * probability_X)


def sequence_balance_loss(load: Load, experts_per_token: int) -> jax.Array:
    """Of every sequence X / K · Σ_x f_x · P_x, 1 where the load is even; their mean, summed over layers.

    load: [N, B, s, X], s the equal parts of each sequence. DeepSeek-V3, arXiv:2412.19437, eq. 17 to 20.
    """
    num_experts = load.assigned.shape[-1]
    assigned, probability = (a.mean(2) for a in (load.assigned, load.probability))
    return num_experts / experts_per_token * jnp.sum(assigned * probability, -1).mean(1).sum()


def balance_term(
    load: Load, config: ModelConfig, over: tuple[str, ...] = (), within: tuple[str, ...] = ()
) -> jax.Array:
    """What balance adds to the loss of `config`.

    over: the axes of an enclosing shard_map along which other devices have other tokens of the same batch;
    within: those of them that have other tokens of the same sequences. The loss is linear in the
    probabilities, so with the assignments averaged over these axes here, its mean over them is the loss of
    the batch.
    """
    if config.balance == "sequence":
        shared = jax.lax.pmean(load.assigned, within) if within else load.assigned
        loss = sequence_balance_loss(load._replace(assigned=shared), config.experts_per_token)
    else:
        shared = jax.lax.pmean(load.assigned.mean((1, 2)), over) if over else load.assigned
        loss = balance_loss(load._replace(assigned=shared))
    return config.balance_coefficient * loss


@jax.custom_vjp
def _with_violation(out: jax.Array, bias_X: jax.Array, violation_X: jax.Array) -> jax.Array:
    """out; the bias gets `violation_X` for its gradient."""
    del bias_X, violation_X
    return out


def _violation_forward(
    out: jax.Array, bias_X: jax.Array, violation_X: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _with_violation(out, bias_X, violation_X), violation_X


def _violation_backward(violation_X: jax.Array, d_out: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    return d_out, violation_X, None


_with_violation.defvjp(_violation_forward, _violation_backward)


def moved_against_load(out: jax.Array, bias_X: jax.Array, load: Load) -> jax.Array:
    """out, with what the choice's bias is to be moved against as its gradient: by how much more than the mean
    each expert was chosen, per token. A choice has no gradient of its own, and so this one is averaged over
    microbatches and devices as all are. Auxiliary-loss-free balancing: arXiv:2408.15664, algorithm 1."""
    chosen_X = load.chosen.mean(tuple(range(load.chosen.ndim - 1)))
    return _with_violation(out, bias_X, chosen_X - chosen_X.mean())


def dropless(tokens_TxE: jax.Array, routing: Routing, kernels: Kernels, exchange: Exchange) -> jax.Array:
    """Every token through all of its experts: assignments sorted by expert, products over ragged groups.

    MegaBlocks, arXiv:2211.15841.
    """
    T, K = routing.experts.shape
    owned = len(kernels.gate)
    devices = exchange.devices
    expert_A = routing.experts.reshape(-1)
    order_A = jnp.argsort(expert_A, stable=True)
    sorted_A = expert_A[order_A]
    counts_NxO = _counts(sorted_A, devices * owned).reshape(devices, owned)
    arrived_NxO = exchange.swap(counts_NxO)
    sent_N = counts_NxO.sum(1)
    trip = Trip(sorted_A // owned, jnp.cumsum(sent_N) - sent_N, sent_N, arrived_NxO.sum(1), T * min(K, owned))
    rows_NxRxE = exchange.send(tokens_TxE[order_A // K], trip)
    out_AxE = exchange.give_back(_grouped(rows_NxRxE, arrived_NxO, kernels), trip)
    out_TxKxE = out_AxE[_inverse(order_A)].reshape(T, K, -1)
    return _combined(out_TxKxE, routing.weights)


def with_capacity(factor: Fraction) -> Dispatch:
    """Each expert takes at most `expert_capacity` tokens of a group, first choices before second ones."""

    def dispatch(tokens_TxE: jax.Array, routing: Routing, kernels: Kernels, exchange: Exchange) -> jax.Array:
        T, K = routing.experts.shape
        owned = len(kernels.gate)
        X = exchange.devices * owned
        capacity = expert_capacity(factor, T, K, X)
        slot_KxT = _slots(routing.experts, X, capacity)
        token_KxT = jnp.broadcast_to(jnp.arange(T)[None], (K, T))
        token_S = jnp.full(X * capacity, T).at[slot_KxT].set(token_KxT, mode="drop")
        rows_SxE = tokens_TxE.at[token_S].get(mode="fill", fill_value=0)
        arrived_NxOxCxE = exchange.swap(rows_SxE.reshape(-1, owned, capacity, tokens_TxE.shape[1]))
        arrived_OxNxCxE = arrived_NxOxCxE.swapaxes(0, 1)
        out_OxRxE = _swiglu(arrived_OxNxCxE.reshape(owned, -1, tokens_TxE.shape[1]), kernels)
        out_NxOxCxE = exchange.swap(out_OxRxE.reshape(arrived_OxNxCxE.shape).swapaxes(0, 1))
        out_SxE = out_NxOxCxE.reshape(rows_SxE.shape)
        out_TxKxE = out_SxE.at[slot_KxT.T].get(mode="fill", fill_value=0)
        return _combined(out_TxKxE, routing.weights)

    return dispatch


def grouped_experts(dispatch: Dispatch, groups: tuple[int, int] = (1, 1)) -> Experts:
    """The experts on one device; groups: into how many parts the batch and the sequence are cut.

    Only capacity depends on them: a mesh has one group per device.
    """

    def experts(
        x_BxLxE: jax.Array,
        logits_BxLxX: jax.Array,
        bias_X: jax.Array | None,
        kernels: Kernels,
        router: Router,
    ) -> tuple[jax.Array, Load]:
        def group(part: tuple[jax.Array, jax.Array]) -> jax.Array:
            tokens_TxE, logits_TxX = part
            return dispatch(tokens_TxE, route(logits_TxX, router, bias_X), kernels, Exchange())

        out_GxTxE = jax.lax.map(group, (_cut(x_BxLxE, groups), _cut(logits_BxLxX, groups)))
        load = load_of(route(logits_BxLxX, router, bias_X), each=True)
        return _joined(out_GxTxE, groups, x_BxLxE.shape), load

    return experts


def _cut(x_BxLxF: jax.Array, groups: tuple[int, int]) -> jax.Array:
    """[B, L, F] -> [G, T, F]: blocks of sequences and of positions."""
    (B, L, F), (b, s) = x_BxLxF.shape, groups
    return x_BxLxF.reshape(b, B // b, s, L // s, F).swapaxes(1, 2).reshape(b * s, -1, F)


def _joined(x_GxTxF: jax.Array, groups: tuple[int, int], shape: tuple[int, ...]) -> jax.Array:
    """`_cut` undone."""
    (B, L, F), (b, s) = shape, groups
    return x_GxTxF.reshape(b, s, B // b, L // s, F).swapaxes(1, 2).reshape(shape)


def _counts(sorted_A: jax.Array, num_experts: int) -> jax.Array:
    """How often each expert appears in a sorted list, int32 [X]."""
    ends = jnp.searchsorted(sorted_A, jnp.arange(num_experts), side="right").astype(jnp.int32)
    return jnp.diff(ends, prepend=0)


def _inverse(order: jax.Array) -> jax.Array:
    """The permutation that undoes `order`."""
    return jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=order.dtype))


def _grouped(rows_NxRxE: jax.Array, arrived_NxO: jax.Array, kernels: Kernels) -> jax.Array:
    """Each part's rows, sorted by expert, through their experts; what is behind the rows becomes zero."""
    N, R, E = rows_NxRxE.shape
    owned = arrived_NxO.shape[1]
    ends_NxO = jnp.cumsum(arrived_NxO, axis=1)
    expert_NxR = (jnp.arange(R)[None, :, None] >= ends_NxO[:, None]).sum(-1)  # `owned` behind the last row
    order_R = jnp.argsort(expert_NxR.reshape(-1), stable=True)
    sizes_O = arrived_NxO.sum(0)
    rows_RxE = rows_NxRxE.reshape(N * R, E)[order_R]
    gate_RxM = jax.lax.ragged_dot(rows_RxE, kernels.gate, sizes_O)
    up_RxM = jax.lax.ragged_dot(rows_RxE, kernels.up, sizes_O)
    out_RxE = jax.lax.ragged_dot(jax.nn.silu(gate_RxM) * up_RxM, kernels.down, sizes_O)
    out_NxRxE = out_RxE[_inverse(order_R)].reshape(N, R, E)
    return jnp.where((expert_NxR < owned)[..., None], out_NxRxE, 0)


def _slots(experts_TxK: jax.Array, num_experts: int, capacity: int) -> jax.Array:
    """The slot of every assignment, [K, T]: expert · capacity + place in its queue; a number behind the last
    slot where the queue was full. Queues are filled by rank of choice, then by token (GShard,
    algorithm 1)."""
    K = experts_TxK.shape[1]
    expert_A = experts_TxK.T.reshape(-1)
    chosen_AxX = jax.nn.one_hot(expert_A, num_experts, dtype=jnp.int32)
    place_A = (jnp.cumsum(chosen_AxX, axis=0) * chosen_AxX).sum(1) - 1
    slot_A = jnp.where(place_A < capacity, expert_A * capacity + place_A, num_experts * capacity)
    return slot_A.reshape(K, -1)


def _swiglu(rows_OxRxE: jax.Array, kernels: Kernels) -> jax.Array:
    """Rows of each expert through it: down(silu(gate) · up)."""
    gate_OxRxM = jnp.einsum("ore,oem->orm", rows_OxRxE, kernels.gate)
    up_OxRxM = jnp.einsum("ore,oem->orm", rows_OxRxE, kernels.up)
    return jnp.einsum("orm,ome->ore", jax.nn.silu(gate_OxRxM) * up_OxRxM, kernels.down)


def _combined(out_TxKxE: jax.Array, weights_TxK: jax.Array) -> jax.Array:
    """The weighted sum of each token's experts, in the type of their output."""
    return jnp.einsum("tke,tk->te", out_TxKxE, weights_TxK.astype(out_TxKxE.dtype))
