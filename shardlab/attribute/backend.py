"""Which compiler wrote an HLO text, from the configuration that only it prints."""

from __future__ import annotations

from collections.abc import Iterable

from shardlab.hlo.lookup import active, may_mention
from shardlab.hlo.module import Module

# Quoted or not: a proto holds the configuration as a string.
_MARKS = {
    "tpu": ("flag_configs", "scoped_memory_configs"),
    "gpu": ("collective_backend_config", "operation_queue_id", "force_earliest_schedule", "scheduling_name="),
    "cpu": ("outer_dimension_partitions", "fusion_config"),
}
UNKNOWN = "unknown"


def backend_of(module: Module, computations: Iterable[str]) -> str:
    """`tpu`, `gpu`, `cpu`, or `unknown` when nothing in `computations` carries a mark of its backend."""
    for name in computations:
        instructions = module.computations[name].instructions
        if not any(may_mention(instructions, mark) for marks in _MARKS.values() for mark in marks):
            continue
        for instruction in active(instructions):
            attributes = instruction.attributes
            text = attributes.get("backend_config", "") + attributes.get("metadata", "")
            for backend, marks in _MARKS.items():
                if any(mark in text for mark in marks):
                    return backend
    return UNKNOWN
