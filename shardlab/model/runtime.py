"""How a model is run: what the plan decides and the model's dimensions do not. One frozen value, passed down.

The defaults run on one device without any mesh; `parallel/step.py` builds the one that a plan asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.typing import DTypeLike

from shardlab.model.attention import CausalAttention, reference_attention
from shardlab.model.cache import CachedAttention, cached_attention
from shardlab.model.experts import Experts, dropless, grouped_experts
from shardlab.model.loss import Loss, cross_entropy
from shardlab.spec.params import LogicalAxes
from shardlab.spec.plan_schema import NamedRemat, RematWord

# Pins an activation to where the plan wants it: (array, one logical axis per dimension) -> array.
Constrain = Callable[[jax.Array, LogicalAxes], jax.Array]

# Rows of a table by index: (table_VxE, tokens_BxL) -> x_BxLxE.
Lookup = Callable[[jax.Array, jax.Array], jax.Array]

# A product with a projection's kernel: (kernel, its logical axes, x, number of dimensions summed, run) -> y.
Project = Callable[[jax.Array, LogicalAxes, jax.Array, int, "Runtime"], jax.Array]

Function = TypeVar("Function", bound=Callable[..., Any])
State = TypeVar("State")
Result = TypeVar("Result")

DROPLESS_ALONE = grouped_experts(dropless)

Remat = RematWord | NamedRemat

# What `Shardings.place_weight` returns carries this name, so that no remat policy keeps gathered weights for
# the backward pass.
GATHERED_WEIGHT = "gathered_weight"

# What attention gives under `selective` remat carries this name: it is kept.
ATTENDED = "attended"

# What cuDNN's attention is in a forward pass: its result and its row sums.
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"

# What `selective` remat does not do again: products, and finding and sending experts' tokens.
COSTLY = {
    "dot_general",
    "ragged_dot",
    "ragged_dot_general",
    "top_k",
    "sort",
    "all_to_all",
    "ragged_all_to_all",
}


def keep(x: jax.Array, axes: LogicalAxes) -> jax.Array:
    """Leave the array where it is: what `constrain` and `place_weight` do without a mesh."""
    del axes
    return x


def whole(axis: str | None) -> int:
    """The shards of an axis without a mesh: one."""
    del axis
    return 1


def take_rows(table_VxE: jax.Array, tokens_BxL: jax.Array) -> jax.Array:
    """The rows on one device. Tokens are in bounds by construction."""
    return table_VxE.at[tokens_BxL].get(mode="clip")


def last_token(x_BxLxE: jax.Array) -> jax.Array:
    """Of tokens in their natural order, the last: [B, 1, E]."""
    return x_BxLxE[:, -1:]


def project(kernel: jax.Array, axes: LogicalAxes, x: jax.Array, num_inputs: int, run: Runtime) -> jax.Array:
    """x times a kernel over its first `num_inputs` dimensions, both in the compute type.

    Cast first, so that a gather moves the small type.
    """
    placed = run.place_weight(kernel.astype(run.compute_dtype), axes)
    contracted = tuple(range(x.ndim - num_inputs, x.ndim)), tuple(range(num_inputs))
    return jax.lax.dot_general(x, placed, (contracted, ((), ())))


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """Compute type, rematerialisation, attention kernel and placement.

    compute_dtype: of activations and matrix products; parameters stay in their own type (f32 in training).
    attention: causal attention over a whole sequence. global_attention: that of layers which see all where
    others do not; sees_all: whether the layer at hand does. kv_repeats: how often each KV head is repeated
    before it.
    positions: length -> the position of each token, where tokens do not lie in their natural order.
    cached_attention: of new tokens to a KV cache, which it writes. last_token: that of a prompt.
    constrain: places activations. place_weight: gathers a parameter for use, and places its gradient.
    gathers: whether it moves any weight.
    lookup: the token embedding. experts: what a layer's experts do.
    project: every product with a projection's kernel. small_tokens: what it takes of a norm's output instead
    of the array, where it gathers in a smaller type; the gradients that it gets are then not gathered either.
    ways: in how many devices' shards an activation's logical axis lies.
    loss: of a training step.
    block: what differs for the parameters of a block family (`spec.sharding.BLOCK_ARRAYS`), where some does.
    """

    compute_dtype: DTypeLike = jnp.bfloat16
    remat: Remat = "full"
    attention: CausalAttention = reference_attention
    global_attention: CausalAttention = reference_attention
    sees_all: bool | jax.Array = False
    kv_repeats: int = 1
    cached_attention: CachedAttention = cached_attention
    last_token: Callable[[jax.Array], jax.Array] = last_token
    positions: Callable[[int], jax.Array] | None = None
    constrain: Constrain = keep
    place_weight: Constrain = keep
    gathers: bool = False
    lookup: Lookup = take_rows
    experts: Experts = DROPLESS_ALONE
    project: Project = project
    small_tokens: Callable[[jax.Array, Runtime], Any] | None = None
    ways: Callable[[str | None], int] = whole
    loss: Loss = cross_entropy

    block: Callable[[str], Runtime] | None = None

    def within(self, name: str) -> Runtime:
        """How a block family runs: as the rest, but for where its parameters are."""
        if self.block is None:
            return self
        other = self.block(name)
        return replace(self, place_weight=other.place_weight, experts=other.experts, block=None)

    def positions_of(self, length: int) -> jax.Array:
        """The position of each of a sequence's tokens, int32 [L]."""
        return jnp.arange(length) if self.positions is None else self.positions(length)


def gathered_tokens(x_BxLxE: jax.Array, run: Runtime) -> jax.Array:
    """From where a norm leaves them to where products want them.

    Pinned at both ends the gather of sequence parallelism moves x's own type.
    """
    return run.constrain(run.constrain(x_BxLxE, ("batch", "norm_seq", "embed")), ("batch", "seq", "embed"))


def checkpointed(function: Function, remat: Remat, *, in_scan: bool) -> Function:
    """`function` under the remat policy. in_scan: the loop already keeps XLA from undoing the recomputation.

    full: keeps the input of each layer. selective: runs attention's kernel again (Korthikanti,
    arXiv:2205.05198, section 5; `parallel/training.py` sees to that) and what is elementwise; keeps what
    products, attention, and the routing of experts give. matmuls: keeps the
    results of products with weights. offload: keeps those in the host's memory (MaxText's
    `minimal_offloaded`). Names: keeps what `checkpoint_name` gave them (`spec/remat.py`). Even `none`
    re-gathers sharded weights in the backward pass, as FSDP does: saved, they would be the whole model.
    """
    policies = jax.checkpoint_policies
    if isinstance(remat, NamedRemat):
        return jax.checkpoint(function, policy=_saving(remat), prevent_cse=not in_scan)
    policy = {
        "none": _save_all_but_gathers,
        "selective": _save_what_is_costly,
        "full": policies.nothing_saveable,
        "matmuls": policies.dots_with_no_batch_dims_saveable,
        "offload": policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
    }[remat]
    return jax.checkpoint(function, policy=policy, prevent_cse=not in_scan)


def unrolled(
    function: Callable[[jax.Array, State], Result], run: Runtime
) -> Callable[[jax.Array, State], Result]:
    """`function` under the run's remat policy, as one of layers that follow each other without a loop.

    Where nothing is recomputed it is no checkpoint: XLA's CPU compiler fuses nothing across what that keeps.
    What enters a layer is an array in memory all the same, as in a loop: its gradient is else added up anew,
    of all later layers, in each fusion that reads it.
    """
    if run.remat != "none" or run.gathers:
        return checkpointed(function, run.remat, in_scan=False)

    def body(x: jax.Array, state: State) -> Result:
        return function(jax.lax.optimization_barrier(x), state)

    return body


def _saving(remat: NamedRemat) -> Callable[..., Any]:
    """By name; of cuDNN's attention that is kept, its row sums too."""
    by_name = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=remat.keep,
        names_which_can_be_offloaded=remat.offload,
        offload_src="device",
        offload_dst="pinned_host",
    )

    def policy(primitive: jax.extend.core.Primitive, *inputs: Any, **params: Any) -> Any:
        if primitive.name == CUDNN_FORWARD and "attention" in remat.keep:
            return True
        return by_name(primitive, *inputs, **params)

    return policy


def _save_what_is_costly(primitive: jax.extend.core.Primitive, *_: Any, **params: Any) -> bool:
    return primitive.name in COSTLY or params.get("name") == ATTENDED


def _save_all_but_gathers(primitive: jax.extend.core.Primitive, *_: Any, **params: Any) -> bool:
    """Neither the named weight nor the call that gathers it: to save either is to save the whole model.

    The name alone would not do, since what it names could be saved instead. Of custom_vjp functions only that
    of `place_weight` calls itself in its forward rule, and is a call here.
    """
    is_gather = primitive.name.startswith("custom_vjp_call")
    return not is_gather and params.get("name") != GATHERED_WEIGHT
