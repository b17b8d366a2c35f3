"""Context parallelism: which mesh axis does what, in which order tokens lie, and what cannot be. Pure values.

The sequence stays split over one axis while attention runs, and keys and values come to the queries (`ring`,
`all-gather`); or it is made whole for a share of the heads (`ulysses`). `ring+ulysses` does both: of the two
mesh axes of `seq`, the first (major) is the ring's, the second (minor) is Ulysses'.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, lcm

from shardlab.spec.models import ModelConfig
from shardlab.spec.plan import Plan
from shardlab.spec.plan_checks import CONTEXT_AXES
from shardlab.spec.sharding import nearest_divisor, num_ways


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextAxes:
    """tokens: over which the sequence stays split during attention. heads: over which heads are, instead."""

    tokens: str | None = None
    heads: str | None = None


def context_axes(plan: Plan) -> ContextAxes:
    """What the mesh axes of `seq` do. Call where `context_obstacles` found nothing."""
    kind, split = plan.method.context, plan.activations.get("seq", ())
    if kind == "none":
        return ContextAxes()
    if kind == "ring+ulysses":
        return ContextAxes(tokens=split[0], heads=split[1])
    return ContextAxes(heads=split[0]) if kind == "ulysses" else ContextAxes(tokens=split[0])


def ulysses_ways(plan: Plan) -> int:
    """Over how many devices Ulysses splits heads, beside tensor parallelism."""
    if plan.method.context not in ("ulysses", "ring+ulysses"):
        return 1
    return plan.axes[plan.activations["seq"][-1]]


def zigzag_ways(plan: Plan) -> int:
    """Into how many zig-zag shares tokens are dealt: 1 is their natural order."""
    axis = context_axes(plan).tokens
    return plan.axes[axis] if axis is not None else 1


def zigzag_order(length: int, ways: int) -> tuple[int, ...]:
    """For each place in a step's arrays, the position of the token that lies there.

    The sequence is cut in 2 · ways chunks; share i holds chunks i and 2 · ways - 1 - i, so that under a
    causal mask all shares have the same work (Llama 3, arXiv:2407.21783, section 3.3.2).
    """
    half = length // (2 * ways)
    chunks = [c for share in range(ways) for c in (share, 2 * ways - 1 - share)] if ways > 1 else [0, 1]
    whole = range(length)
    return tuple(whole) if ways == 1 else tuple(p for c in chunks for p in whole[c * half : (c + 1) * half])


def context_obstacles(plan: Plan, model: ModelConfig, seq: int, workload: str) -> dict[str, str]:
    """Why the plan's context parallelism cannot be: reason -> the nearest that can. Empty when it can."""
    kind, split = plan.method.context, plan.activations.get("seq", ())
    if kind == "none":
        return {}
    if len(split) != CONTEXT_AXES[kind]:
        return {f"context = {kind!r} with seq over {len(split)} mesh axes": f"use {CONTEXT_AXES[kind]}"}
    if workload == "decode":
        axis = ", ".join(f'"{name}"' for name in split)
        what = f"context = {kind!r} for decode, whose new tokens are not split: their cache is"
        return {what: f"use context = 'none', and cache = [{axis}] in place of seq in [activations]"}
    if plan.method.pipeline != "none" and kind.startswith("ring"):
        return {
            f"context = {kind!r} in a pipeline, whose stages reach no hop together": "all-gather, or ulysses"
        }
    return _head_obstacles(plan, model, seq) | _length_obstacles(plan, seq, workload)


def _head_obstacles(plan: Plan, model: ModelConfig, seq: int) -> dict[str, str]:
    """Ulysses splits heads over its axis, beside tensor parallelism; as nearest, what divides seq too."""
    ulysses = ulysses_ways(plan)
    tensor = num_ways(plan.activations.get("heads", ()), plan.axes)
    if ulysses == 1 or model.heads % tensor or model.heads % (tensor * ulysses) == 0:
        return {}
    held = f"{model.heads // tensor} heads" + (f" (of {model.heads}, tensor {tensor})" if tensor > 1 else "")
    axis = plan.activations["seq"][-1]
    nearest = nearest_divisor(gcd(model.heads // tensor, max(seq // zigzag_ways(plan), 1)), ulysses)
    return {f"{held} over {ulysses} devices ({axis}) by Ulysses": f"nearest size that divides: {nearest}"}


def _length_obstacles(plan: Plan, seq: int, workload: str) -> dict[str, str]:
    """Zig-zag needs two equal chunks per device of the ring; to put a cache in order, per device."""
    ways = zigzag_ways(plan)
    step = lcm(2 * ways, ways * ulysses_ways(plan))
    if workload == "prefill":
        step = 2 * ways * ulysses_ways(plan)
    if ways == 1 or seq % step == 0:
        return {}
    below, above = seq // step * step, -(-seq // step) * step
    near = f"{below} or {above}" if below else str(above)
    return {f"{seq} tokens in {2 * ways} zig-zag chunks": f"nearest seq that divides: {near}"}


def ulysses_kv_note(plan: Plan, model: ModelConfig) -> str | None:
    """The sentence for reports when KV heads are repeated because Ulysses and tensor do not divide them."""
    ulysses = ulysses_ways(plan)
    ways = ulysses * num_ways(plan.activations.get("heads", ()), plan.axes)
    if ulysses == 1 or model.kv_heads % ways == 0:
        return None
    return f"{model.kv_heads} KV heads over {ways} devices (Ulysses {ulysses}): the KV heads are repeated"
