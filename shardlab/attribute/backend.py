"""Which compiler wrote an HLO text, from the configuration that only it prints."""

from __future__ import annotations

from collections.abc import Iterable

from shardlab.hlo.module import Instruction

# Quoted or not: a proto holds the configuration as a string.
_MARKS = {
    "tpu": ("flag_configs", "scoped_memory_configs"),
    "gpu": ("collective_backend_config", "operation_queue_id", "force_earliest_schedule", "scheduling_name="),
    "cpu": ("outer_dimension_partitions", "fusion_config"),
}
UNKNOWN = "unknown"


def backend_of(instructions: Iterable[Instruction]) -> str:
    """`tpu`, `gpu`, `cpu`, or `unknown` when no instruction carries a mark of its backend."""
    for instruction in instructions:
        attributes = instruction.attributes
        text = attributes.get("backend_config", "") + attributes.get("metadata", "")
        for backend, marks in _MARKS.items():
            if any(mark in text for mark in marks):
                return backend
    return UNKNOWN
