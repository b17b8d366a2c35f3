"""What `[method]` says of the products and the memory of a training step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import jax
from jax.ad_checkpoint import checkpoint_name

from shardlab.model.attention import CausalAttention
from shardlab.model.loss import Loss, cross_entropy, unfused_cross_entropy
from shardlab.model.quantise import quantised_project, quantised_tokens
from shardlab.model.runtime import ATTENDED, Runtime, project
from shardlab.parallel.lora import adapted_project
from shardlab.spec.case import Case
from shardlab.spec.plan_schema import NamedRemat
from shardlab.spec.remat import offloads

# By `[method] loss`.
LOSSES: Mapping[str, Loss] = {"auto": cross_entropy, "unfused": unfused_cross_entropy}


def as_trained(run: Runtime, case: Case) -> Runtime:
    """The runtime with the products and the loss that the plan trains with: products quantised, and with
    LoRA's adapters, where it says so."""
    method = case.plan.method
    base = project if method.products == "bf16" else quantised_project(method.products)
    return replace(
        run,
        project=base if method.lora is None else adapted_project(base, method),
        small_tokens=quantised_tokens if method.products == "fp8" else None,
        loss=LOSSES[method.loss],
    )


def training_attention(case: Case, kernel: str, attention: CausalAttention) -> CausalAttention:
    """The kernel, which `selective` remat runs again in the backward pass: scores are not kept. Its result
    has a name; splash names what it keeps itself, and cuDNN's is known without one."""
    if case.plan.method.remat == "selective":
        return run_again(attention)
    remat = case.plan.method.remat
    kept = remat.keep if isinstance(remat, NamedRemat) else ()
    if kernel == "splash" or (kernel == "cudnn" and "attention" in kept):
        return attention
    return lambda q, k, v: checkpoint_name(attention(q, k, v), "attention")


def run_again(attention: CausalAttention) -> CausalAttention:
    """Attention of which queries, keys, values and the result are kept, and nothing else.

    A `jax.checkpoint` would do nothing: inside another one, the layer's, its own policy is not asked.
    """

    @jax.custom_vjp
    def kernel(q_BxLxHxD: jax.Array, k_BxLxKxD: jax.Array, v_BxLxKxD: jax.Array) -> jax.Array:
        return attention(q_BxLxHxD, k_BxLxKxD, v_BxLxKxD)

    def forward(*qkv: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        return checkpoint_name(attention(*qkv), ATTENDED), qkv

    def backward(qkv: tuple[jax.Array, ...], d_out_BxLxHxD: jax.Array) -> tuple[jax.Array, ...]:
        # The barrier keeps XLA from taking the forward pass's scores where layers are unrolled.
        _, pull = jax.vjp(attention, *jax.lax.optimization_barrier(qkv))
        return pull(d_out_BxLxHxD)

    kernel.defvjp(forward, backward)
    return kernel


def method_notes(case: Case, family: str) -> tuple[str, ...]:
    """What the report says about them. family: cpu, gpu or tpu."""
    found = (_products_note(case), _weights_note(case), _offload_note(case, family), _lora_note(case))
    return tuple(note for note in found if note)


def _lora_note(case: Case) -> str:
    method = case.plan.method
    if method.lora is None:
        return ""
    if case.workload != "train":
        return f"lora = {method.lora}: its adapters are merged into the weights for {case.workload}"
    on = ", ".join(method.lora_targets)
    return f"lora = {method.lora}: adapters on {on} are trained, weights are frozen in bf16"


def _products_note(case: Case) -> str:
    format = case.plan.method.products
    if format == "bf16":
        return ""
    if case.workload != "train":
        return f"products = {format!r} is for training: {case.workload} has bf16 products"
    experts = ", experts" if case.model.num_experts else ""
    return f"products: {format} in projections; head{experts}, attention, norms and embedding are not"


def _weights_note(case: Case) -> str:
    format = case.plan.method.weights
    if format == "bf16":
        return ""
    return f"weights: {format} in projections and head, a scale per channel; embedding, norms, biases are not"


def _offload_note(case: Case, family: str) -> str:
    if not offloads(case.plan.method) or case.workload != "train" or family != "cpu":
        return ""
    remat = str(case.plan.method.remat)
    return f"remat = {remat!r}: emulated devices have no host memory of their own, so nothing moves"
