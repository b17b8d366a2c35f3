"""What `[method]` says of the products and the memory of a training step."""

from __future__ import annotations

import jax

from shardlab.model.attention import CausalAttention
from shardlab.model.quantise import quantised_project
from shardlab.model.runtime import Project, project
from shardlab.spec.case import Case


def training_project(case: Case) -> Project:
    """The products with projections' kernels: quantised where the plan says so and the step trains."""
    format = case.plan.method.products
    if format == "bf16" or case.workload != "train":
        return project
    return quantised_project(format)


def training_attention(case: Case, attention: CausalAttention) -> CausalAttention:
    """The kernel, which `selective` remat runs again in the backward pass: scores are not kept."""
    return jax.checkpoint(attention) if case.plan.method.remat == "selective" else attention


def method_notes(case: Case, family: str) -> tuple[str, ...]:
    """What the report says about them. family: cpu, gpu or tpu."""
    return tuple(note for note in (_products_note(case), _offload_note(case, family)) if note)


def _products_note(case: Case) -> str:
    format = case.plan.method.products
    if format == "bf16":
        return ""
    if case.workload != "train":
        return f"products = {format!r} is for training: {case.workload} has bf16 products"
    experts = ", experts" if case.model.num_experts else ""
    return f"products: {format} in projections; head{experts}, attention, norms and embedding are not"


def _offload_note(case: Case, family: str) -> str:
    if case.plan.method.remat != "offload" or case.workload != "train" or family != "cpu":
        return ""
    return "remat = 'offload': emulated devices have no host memory of their own, so nothing moves"
