"""Serving: what a plan says of prefill and decode that training does not know. Pure values."""

from __future__ import annotations

from shardlab.spec.models import ModelConfig
from shardlab.spec.params import ParamSpec
from shardlab.spec.plan_schema import Method

# What a projection's kernel sums over comes first; all others of its dimensions are output channels.
_SUMMED = {"output": ("heads", "head_dim"), "down": ("mlp",)}


def shared_dimensions(spec: ParamSpec) -> tuple[int, ...]:
    """The dimensions of a projection's kernel that share a scale, those that its product sums over; () for
    other parameters, which are not quantised."""
    *_, module, name = ("", *spec.path.split("/"))
    if name != "kernel":
        return ()
    return tuple(i for i, axis in enumerate(spec.axes) if axis in _SUMMED.get(module, ("embed",)))


def serving_obstacles(method: Method, model: ModelConfig, seq: int, workload: str) -> dict[str, str]:
    """Why the plan's serving methods cannot be with this model and workload: reason -> what can."""
    found = {}
    if method.weights != "bf16" and workload == "train":
        fix = f"use products = {method.weights!r} for training products, or weights = 'bf16'"
        found[f"weights = {method.weights!r} for train, which updates its weights"] = fix
    elif method.weights != "bf16" and (model.num_experts or model.latent is not None):
        what = "experts" if model.num_experts else "latent attention"
        found[f"weights = {method.weights!r} for a model with {what}"] = "use weights = 'bf16'"
    if method.chunk > 1 and workload != "decode":
        found[f"chunk = {method.chunk} for {workload}"] = "leave chunk out: only a decode step takes chunks"
    elif method.chunk > seq:
        found[f"chunk = {method.chunk} with a cache of {seq} tokens"] = f"chunk at most {seq}"
    return found
