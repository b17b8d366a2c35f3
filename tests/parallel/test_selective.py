"""Selective rematerialization keeps what goes into attention and what comes out, and no scores."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from emulated import plan

from shardlab.model.attention import CausalAttention, reference_attention
from shardlab.model.runtime import Remat, checkpointed
from shardlab.parallel.training import training_attention
from shardlab.spec.case import Case
from shardlab.spec.models import MODELS

B, L, E, H, D = 2, 128, 64, 4, 16
LAYERS = 3


def attention(remat: Remat) -> CausalAttention:
    """The reference, as a case with this rematerialization has it."""
    one = plan({"data": 8}, {}, {"batch": ("data",)}, remat=remat)
    case = Case(plan=one, model=MODELS["tiny"], machine="cpu:8", batch=8, seq=L)
    return training_attention(case, "reference", reference_attention)


def kept(remat: Remat) -> list[tuple[int, ...]]:
    """Shapes that a scan over layers keeps from forward to backward."""
    attend = attention(remat)

    def layer(w_ExHxD: jax.Array, x_BxLxE: jax.Array) -> jax.Array:
        q_BxLxHxD = jnp.einsum("ble,ehd->blhd", x_BxLxE, w_ExHxD)
        out_BxLxHxD = attend(q_BxLxHxD, 2 * q_BxLxHxD, q_BxLxHxD + 1)
        return x_BxLxE + jnp.einsum("blhd,ehd->ble", out_BxLxHxD, w_ExHxD)

    def loss(w_NxExHxD: jax.Array, x_BxLxE: jax.Array) -> jax.Array:
        body = checkpointed(layer, remat, in_scan=True)
        out_BxLxE, _ = jax.lax.scan(lambda x, w: (body(w, x), None), x_BxLxE, w_NxExHxD)
        return out_BxLxE.sum()

    traced = jax.make_jaxpr(jax.grad(loss))(jnp.ones((LAYERS, E, H, D)), jnp.ones((B, L, E)))
    forward = next(equation for equation in traced.eqns if equation.primitive.name == "scan")
    return [tuple(out.aval.shape) for out in forward.outvars]


@pytest.mark.parametrize(("remat", "keeps"), [("none", True), ("selective", False)])
def test_selective_keeps_no_scores(remat: Remat, keeps: bool) -> None:
    scores = [shape for shape in kept(remat) if shape.count(L) > 1]
    assert bool(scores) == keeps


def test_what_is_run_again_has_the_same_gradients() -> None:
    q, k, v = (jax.random.normal(jax.random.key(seed), (B, L, H, D)) for seed in range(3))

    def gradients(remat: Remat) -> tuple[jax.Array, ...]:
        return jax.grad(lambda *qkv: (attention(remat)(*qkv) ** 2).sum(), argnums=(0, 1, 2))(q, k, v)

    for ours, theirs in zip(gradients("selective"), gradients("none"), strict=True):
        assert jnp.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
