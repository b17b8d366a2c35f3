"""Small cases that several tests compile."""

from typing import Any

from shardlab.spec.case import Case
from shardlab.spec.models import MODELS
from shardlab.spec.plan import Plan

TENSOR_RULES = {axis: ("tensor",) for axis in ("heads", "kv_heads", "mlp", "vocab")}


def tiny_plan(data: int, tensor: int, **changes: Any) -> Plan:
    """FSDP over `data`, tensor parallel over `tensor`."""
    rules = {"embed": ("data",), **TENSOR_RULES}
    fields: dict[str, Any] = {
        "name": "tiny-plan",
        "axes": {"data": data, "tensor": tensor},
        "params": rules,
        "optimizer": rules,
        "activations": {"batch": ("data",), **TENSOR_RULES},
    }
    return Plan(**fields | changes)


def tiny_case(
    machine: str, data: int = 4, tensor: int = 2, *, plan: dict[str, Any] | None = None, **changes: Any
) -> Case:
    """The tiny model's prefill (quick to compile) on data x tensor devices, one sequence a batch shard."""
    fields: dict[str, Any] = {
        "plan": tiny_plan(data, tensor, **(plan or {})),
        "model": MODELS["tiny"],
        "machine": machine,
        "batch": data,
        "seq": 128,
        "workload": "prefill",
    }
    return Case(**fields | changes)
