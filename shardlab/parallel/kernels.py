"""Which attention kernel a target gets, and how it runs on a mesh: per device under shard_map, over batch
and heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import jax
from jax.sharding import PartitionSpec

from shardlab.errors import Infeasible
from shardlab.hardware.data_files import load_gpu_target
from shardlab.model.attention import (
    CUDNN_HEAD,
    SPLASH_TILE,
    CausalAttention,
    cudnn_attention,
    in_chunks,
    reference_attention,
    splash_attention,
    unfused_attention,
)
from shardlab.parallel.context import context_attention
from shardlab.parallel.shardings import Shardings
from shardlab.parallel.tiles import blockwise_attention
from shardlab.spec.case import Case
from shardlab.spec.context import ulysses_ways
from shardlab.spec.locality import Locality
from shardlab.spec.plan import Plan
from shardlab.spec.sharding import num_ways

Kernel = Literal["reference", "unfused", "blockwise", "cudnn", "splash"]

PLAIN = ("reference", "unfused")  # plain XLA on whole arrays, on every target

HOPPER = 9  # major compute capability
CUDNN_HOPPER_HEAD = 256

EVERYWHERE = Locality()

FUSED_FOR = {"gpu": "cudnn", "tpu": "splash", "cpu": "reference"}
PER_DEVICE: Mapping[str, Callable[..., jax.Array]] = {
    "reference": reference_attention,
    "unfused": unfused_attention,
    "blockwise": blockwise_attention,
    "cudnn": cudnn_attention,
    "splash": splash_attention,
}


def choose_kernel(case: Case, target: str) -> tuple[Kernel, tuple[str, ...]]:
    """The attention kernel for this case on `target` (cpu, gpu, tpu), and notes for the report.

    `auto` is the target's fused kernel; where that does not suit the shapes it is the reference, with a note.
    Raises Infeasible when the plan asks by name for a kernel that the target or the shapes cannot have.
    """
    asked, context = case.plan.method.attention, case.plan.method.context
    kernel = FUSED_FOR[target] if asked == "auto" else asked
    reason = _unsuited(kernel, case, target)
    if reason is None:
        unfused = "blockwise" if context != "none" and asked == "auto" and kernel == "reference" else kernel
        return unfused, ()  # type: ignore[return-value]
    if asked != "auto":
        raise Infeasible(f"attention = {asked!r}: {reason}", "use attention = 'auto'")
    instead: Kernel = "reference" if context == "none" else "blockwise"
    return instead, (f"attention: {instead} instead of {kernel}, because {reason}",)


def _unsuited(kernel: str, case: Case, target: str) -> str | None:
    """Why this kernel cannot run this case, None when it can."""
    if kernel == "blockwise" and case.plan.method.context != "none":
        return None
    if case.plan.method.context not in ("none", "ulysses"):
        return f"context = {case.plan.method.context!r} merges blocks of keys by itself"
    if kernel in PLAIN:
        return None
    if kernel not in ("blockwise", FUSED_FOR[target]):
        return f"{kernel} does not run on {target}"
    if case.plan.activations.get("seq") and case.plan.method.context == "none":
        return (
            f"{kernel} needs whole sequences and seq is split over {', '.join(case.plan.activations['seq'])}"
        )
    if kernel == "splash" and case.seq % SPLASH_TILE:
        return f"splash works on tiles of {SPLASH_TILE} tokens and seq is {case.seq}"
    if kernel == "splash" and locality_of(case).chunk % SPLASH_TILE:
        return f"splash works on tiles of {SPLASH_TILE} tokens and a chunk is {case.model.attention_chunk}"
    return _unsuited_heads(case) if kernel == "cudnn" else None


def _unsuited_heads(case: Case) -> str | None:
    """Why cuDNN cannot have heads of this size: large ones and latent attention's need a Hopper or a later
    chip."""
    D, value_dim = case.model.head_dim, case.model.value_dim
    sizes = f"{D}" if value_dim == D else f"{D} and {value_dim}"
    if D % 8 or value_dim % 8 or max(D, value_dim) > CUDNN_HOPPER_HEAD:
        return f"cudnn needs head sizes that are multiples of 8 up to {CUDNN_HOPPER_HEAD}, not {sizes}"
    if D == value_dim <= CUDNN_HEAD:
        return None
    if locality_of(case).window and value_dim != D:
        return f"cudnn has no window for values of another head size ({sizes})"
    chip = case.load_machine().chip.compile_as
    if chip is None or load_gpu_target(chip).compute_major < HOPPER:
        return f"cudnn takes heads of {sizes} on Hopper and later chips only"
    return None


def kv_repeats(case: Case) -> int:
    """How often each KV head is repeated so that every device has the KV heads of its own query heads.

    1 when the devices divide the KV heads; devices / KV heads when it is the other way round; else all query
    heads.
    """
    ways = num_ways(case.plan.activations.get("heads", ()), case.plan.axes) * ulysses_ways(case.plan)
    kv_heads = case.model.kv_heads
    if kv_heads % ways == 0:
        return 1
    return ways // kv_heads if ways % kv_heads == 0 else case.model.heads // kv_heads


def locality_of(case: Case) -> Locality:
    """How far the layers see that do not see all; false where the sequence is too short to tell."""
    return case.model.locality.within(case.seq)


def mesh_attention(kernel: Kernel, shardings: Shardings, local: Locality = EVERYWHERE) -> CausalAttention:
    """The kernel over the whole mesh: global arrays in and out, each device does its own sequences and heads.

    KV heads are placed as the query heads are, so that no device needs another's.
    """
    queries = ("batch", "seq", "heads", None)
    whole = ("batch", None, "heads", None)

    def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        k, v = (shardings.constrain(a, whole) for a in (k, v))
        q = shardings.constrain(q, queries)
        return PER_DEVICE[kernel](q, k, v, window=local.window, chunk=local.chunk)

    def fused(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q_spec: PartitionSpec = shardings.activation(q.shape, whole).spec
        kv_spec: PartitionSpec = shardings.activation(k.shape, whole).spec
        return jax.shard_map(
            per_device(kernel, local),
            mesh=shardings.mesh,
            axis_names=shardings.free_axes,
            in_specs=(q_spec, kv_spec, kv_spec),
            out_specs=q_spec,
            check_vma=False,
        )(q, k, v)

    return plain if kernel in PLAIN else fused


def per_device(kernel: Kernel, local: Locality) -> CausalAttention:
    """The kernel of one device."""
    attention: CausalAttention = PER_DEVICE[kernel]
    if local.window:
        attention = partial(PER_DEVICE[kernel], window=local.window)
    return in_chunks(attention, local.chunk) if local.chunk else attention


def attention_on(
    plan: Plan, kernel: Kernel, shardings: Shardings, local: Locality = EVERYWHERE
) -> CausalAttention:
    """The plan's attention over the whole mesh: context parallel where it asks for that."""
    if plan.method.context == "none":
        return mesh_attention(kernel, shardings, local)
    return context_attention(plan, per_device(kernel, local), shardings)
