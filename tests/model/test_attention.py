"""The attention kernels: the reference against jax's own, splash in interpret mode, and what is lowered for
each target."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardlab.model.attention import (
    CausalAttention,
    cudnn_attention,
    masked_attention,
    reference_attention,
    splash_attention,
    splash_tile,
    unfused_attention,
)


def random_qkv(L: int, H: int, K: int, D: int, dtype: jnp.dtype = jnp.float32) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(key, (2, L, n, D), dtype) for key, n in zip(keys, (H, K, K), strict=True))


def gradients(attention: CausalAttention) -> Callable[..., tuple[jax.Array, ...]]:
    """Of a sum that weighs every output differently."""

    def weighed(*qkv: jax.Array) -> jax.Array:
        out = attention(*qkv)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))

    return jax.grad(weighed, argnums=(0, 1, 2))


@pytest.mark.parametrize(("H", "K"), [(4, 4), (4, 2), (4, 1)], ids=["multi-head", "grouped", "multi-query"])
def test_reference_agrees_with_jax(H: int, K: int) -> None:
    qkv = random_qkv(16, H, K, 8)
    theirs = jax.nn.dot_product_attention(*qkv, is_causal=True, implementation="xla")
    np.testing.assert_allclose(reference_attention(*qkv), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [1, 5, 16, 99])
def test_a_window_is_as_jax_has_it(window: int) -> None:
    qkv = random_qkv(16, 4, 2, 8)
    theirs = jax.nn.dot_product_attention(
        *qkv, is_causal=True, local_window_size=(window - 1, 0), implementation="xla"
    )
    np.testing.assert_allclose(reference_attention(*qkv, window=window), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("local", [{}, {"window": 5}, {"chunk": 6}], ids=str)
def test_unfused_is_the_reference_but_for_rounded_scores(
    local: dict[str, int], dtype: jnp.dtype, tolerance: float
) -> None:
    """Of the largest output and gradient, against the reference in f32."""
    qkv = random_qkv(16, 4, 2, 8, dtype)

    def of(kernel: Callable[..., jax.Array], *qkv: jax.Array) -> list[jax.Array]:
        attention = partial(kernel, **local)
        return [attention(*qkv), *gradients(attention)(*qkv)]

    truth = of(reference_attention, *(a.astype(jnp.float32) for a in qkv))
    for ours, exact in zip(of(unfused_attention, *qkv), truth, strict=True):
        assert ours.dtype == dtype
        assert jnp.abs(ours.astype(jnp.float32) - exact).max() <= tolerance * jnp.abs(exact).max()


def test_unfused_keeps_no_f32_scores() -> None:
    """From forward to backward: probabilities in 16 bits, and what went in."""
    qkv = random_qkv(16, 4, 2, 8, jnp.bfloat16)
    kept = jax.tree.leaves(jax.vjp(unfused_attention, *qkv)[1])
    scores = [leaf for leaf in kept if leaf.shape[-2:] == (16, 16)]
    assert [leaf.dtype for leaf in scores] == [jnp.bfloat16]


@pytest.mark.parametrize(("H", "K"), [(4, 4), (4, 2)], ids=["multi-head", "grouped"])
def test_splash_agrees_with_the_reference(H: int, K: int) -> None:
    qkv = random_qkv(256, H, K, 64)

    def splash(*qkv: jax.Array) -> jax.Array:
        return splash_attention(*qkv, interpret=True)

    np.testing.assert_allclose(splash(*qkv), reference_attention(*qkv), rtol=1e-4, atol=1e-5)
    for ours, truth in zip(gradients(splash)(*qkv), gradients(reference_attention)(*qkv), strict=True):
        np.testing.assert_allclose(ours, truth, rtol=1e-3, atol=1e-4)


def test_a_mask_hides_what_it_says() -> None:
    q, k, v = random_qkv(4, 1, 1, 8)
    mask = jnp.eye(4, dtype=bool)  # each position sees itself alone: the output is v
    np.testing.assert_allclose(masked_attention(q, k, v, mask), v, rtol=1e-6)


@pytest.mark.parametrize(
    ("attention", "head_dim", "platform", "call", "calls"),
    [
        pytest.param(cudnn_attention, 64, "cuda", "__cudnn$fmhaSoftmax", 2, id="cudnn"),
        pytest.param(cudnn_attention, 256, "cuda", "__cudnn$fmhaSoftmax", 2, id="cudnn-large-heads"),
        pytest.param(splash_attention, 64, "tpu", "tpu_custom_call", 3, id="splash"),
    ],
)
def test_fused_kernels_lower_without_their_hardware(
    attention: CausalAttention, head_dim: int, platform: str, call: str, calls: int
) -> None:
    """Forward and backward; splash has two backward kernels. No GPU, TPU, cuDNN or libtpu takes part in
    lowering."""
    qkv = random_qkv(256, 4, 2, head_dim, jnp.bfloat16)

    def loss(*qkv: jax.Array) -> jax.Array:
        return attention(*qkv).astype(jnp.float32).sum()

    lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*qkv).lower(lowering_platforms=(platform,))
    assert lowered.as_text().count(f"@{call}") == calls


@pytest.mark.parametrize(("length", "tile"), [(4096, 512), (1024, 512), (768, 256), (384, 128)])
def test_splash_tile_divides_the_sequence(length: int, tile: int) -> None:
    assert splash_tile(length) == tile
