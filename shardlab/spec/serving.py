"""Serving: what a plan says of prefill and decode that training does not know. Pure values."""

from __future__ import annotations

from shardlab.spec.plan_schema import Method


def serving_obstacles(method: Method, seq: int, workload: str) -> dict[str, str]:
    """Why the plan's serving methods cannot be with this workload: reason -> what can."""
    found = {}
    if method.chunk > 1 and workload != "decode":
        found[f"chunk = {method.chunk} for {workload}"] = "leave chunk out: only a decode step takes chunks"
    elif method.chunk > seq:
        found[f"chunk = {method.chunk} with a cache of {seq} tokens"] = f"chunk at most {seq}"
    return found
