"""Causal attention kernels, per device: the reference, Megatron's of 2022 (unfused), cuDNN's (GPU) and Pallas
splash attention (TPU).

Shapes: q_BxLxHxD, k_BxSxKxD, v_BxSxKxD with H a multiple of K (grouped queries: query head h reads KV head h
// (H/K)). Values may have a head size of their own (latent attention), which the result then has.
`parallel/kernels.py` chooses one for a target and maps it over a mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp

CausalAttention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

# Finite, so that a fully masked row yields a uniform row and not NaN.
MASKED = -1e30

# Splash attention works on tiles of this many positions; sequences must be whole tiles.
SPLASH_TILE = 128

# cuDNN 9.11, as its version function counts: what a program compiled without cuDNN is assumed to run on.
ASSUMED_CUDNN_VERSION = 91100

# Compute capability (Hopper) from which cuDNN's attention takes heads of more than CUDNN_HEAD and values of
# another head size; so JAX itself says (jax/_src/cudnn/fused_attention_stablehlo.py).
MLA_CAPABILITY = "9.0"
CUDNN_HEAD = 128


def masked_attention(
    q_BxLxHxD: jax.Array, k_BxSxKxD: jax.Array, v_BxSxKxD: jax.Array, mask_LxS: jax.Array
) -> jax.Array:
    """softmax(q·kᵀ / √D) v where the mask is true, softmax in f32. Returns out_BxLxHxD in q's type."""
    B, L, H, D = q_BxLxHxD.shape
    K = k_BxSxKxD.shape[2]
    q_BxLxKxGxD = q_BxLxHxD.reshape(B, L, K, H // K, D)
    scores_BxKxGxLxS = jnp.einsum(
        "blkgd,bskd->bkgls", q_BxLxKxGxD, k_BxSxKxD, preferred_element_type=jnp.float32
    )
    scores_BxKxGxLxS = jnp.where(mask_LxS[None, None, None], scores_BxKxGxLxS * D**-0.5, MASKED)
    weights_BxKxGxLxS = jax.nn.softmax(scores_BxKxGxLxS, axis=-1).astype(q_BxLxHxD.dtype)
    out_BxLxKxGxD = jnp.einsum("bkgls,bskd->blkgd", weights_BxKxGxLxS, v_BxSxKxD)
    return out_BxLxKxGxD.reshape(B, L, H, -1)


def reference_attention(
    q_BxLxHxD: jax.Array, k_BxLxKxD: jax.Array, v_BxLxKxD: jax.Array, *, window: int = 0, chunk: int = 0
) -> jax.Array:
    """Causal attention in plain XLA: any backend, memory quadratic in L. window, chunk: as in
    `spec.locality.Locality`."""
    visible_LxL = _visible(q_BxLxHxD.shape[1], window, chunk)
    return masked_attention(q_BxLxHxD, k_BxLxKxD, v_BxLxKxD, visible_LxL)


def _visible(length: int, window: int, chunk: int) -> jax.Array:
    """Which keys a query sees: bool [L, L]."""
    position_L = jnp.arange(length)
    behind_LxL = position_L[:, None] - position_L[None, :]
    visible_LxL = behind_LxL >= 0
    if window:
        visible_LxL = visible_LxL & (behind_LxL < window)
    if chunk:
        chunk_L = position_L // chunk
        visible_LxL = visible_LxL & (chunk_L[:, None] == chunk_L[None, :])
    return visible_LxL


def unfused_attention(
    q_BxLxHxD: jax.Array, k_BxLxKxD: jax.Array, v_BxLxKxD: jax.Array, *, window: int = 0, chunk: int = 0
) -> jax.Array:
    """The reference with scores and probabilities of the inputs' type in memory, and a softmax that reads and
    writes these: as Megatron-LM ran it before fused attention (arXiv:2205.05198, figure 3; its
    `masked_softmax_fusion`), without dropout, and TransformerEngine's `UnfusedDotProductAttention`.

    In 16 bits scores are rounded before the softmax; in f32 it is the reference but for the order of sums.
    """
    B, L, H, D = q_BxLxHxD.shape
    K = k_BxLxKxD.shape[2]
    q_BxLxKxGxD = q_BxLxHxD.reshape(B, L, K, H // K, D)
    scores_BxKxGxLxS = jnp.einsum("blkgd,bskd->bkgls", q_BxLxKxGxD, k_BxLxKxD)
    weights_BxKxGxLxS = _masked_softmax(scores_BxKxGxLxS, _visible(L, window, chunk), D**-0.5)
    out_BxLxKxGxD = jnp.einsum("bkgls,bskd->blkgd", weights_BxKxGxLxS, v_BxLxKxD)
    return out_BxLxKxGxD.reshape(B, L, H, -1)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _masked_softmax(scores: jax.Array, mask_LxS: jax.Array, scale: float) -> jax.Array:
    """Over the last dimension, computed in f32, of the scores' type. Its gradient is found from its result,
    which is all that is kept."""
    visible = mask_LxS.reshape((1,) * (scores.ndim - 2) + mask_LxS.shape)
    scaled = jnp.where(visible, scores.astype(jnp.float32) * scale, MASKED)
    return jax.nn.softmax(scaled, axis=-1).astype(scores.dtype)


def _softmax_forward(scores: jax.Array, mask_LxS: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
    weights = _masked_softmax(scores, mask_LxS, scale)
    return weights, weights


def _softmax_backward(scale: float, weights: jax.Array, d_weights: jax.Array) -> tuple[jax.Array, None]:
    p, dp = weights.astype(jnp.float32), d_weights.astype(jnp.float32)
    d_scores = scale * p * (dp - jnp.sum(p * dp, axis=-1, keepdims=True))
    return d_scores.astype(weights.dtype), None


_masked_softmax.defvjp(_softmax_forward, _softmax_backward)


def cudnn_attention(
    q_BxLxHxD: jax.Array, k_BxLxKxD: jax.Array, v_BxLxKxD: jax.Array, *, window: int = 0
) -> jax.Array:
    """cuDNN's fused causal attention (`__cudnn$fmha…` custom calls); half-precision inputs only. window: as
    the reference's, where values have the head size of keys."""
    D = q_BxLxHxD.shape[-1]
    if D > CUDNN_HEAD or v_BxLxKxD.shape[-1] != D:
        return _cudnn_on_hopper(window, q_BxLxHxD, k_BxLxKxD, v_BxLxKxD)
    with _cudnn_for_tracing():
        return jax.nn.dot_product_attention(
            q_BxLxHxD,
            k_BxLxKxD,
            v_BxLxKxD,
            is_causal=True,
            local_window_size=(window - 1, 0) if window else None,
            implementation="cudnn",
        )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cudnn_on_hopper(
    window: int, q_BxLxHxD: jax.Array, k_BxLxKxD: jax.Array, v_BxLxKxV: jax.Array
) -> jax.Array:
    """The same with large heads, or values of another size, which JAX's public function refuses and what it
    calls does not. Differentiated here, because that asks for the chip once more, after this has returned."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    with _cudnn_for_tracing():
        out: jax.Array = fused.dot_product_attention(
            q_BxLxHxD,
            k_BxLxKxD,
            v_BxLxKxV,
            scale=q_BxLxHxD.shape[-1] ** -0.5,
            mask_type=fused.MaskType.CAUSAL,
            sliding_window_length=window or None,
        )
        return out


_Pullback = Callable[[jax.Array], tuple[jax.Array, ...]]


def _cudnn_forward(window: int, *qkv: jax.Array) -> tuple[jax.Array, _Pullback]:
    with _cudnn_for_tracing():
        return jax.vjp(partial(_cudnn_on_hopper.fun, window), *qkv)


def _cudnn_backward(window: int, pull: _Pullback, d_out_BxLxHxV: jax.Array) -> tuple[jax.Array, ...]:
    del window
    return pull(d_out_BxLxHxV)


_cudnn_on_hopper.defvjp(_cudnn_forward, _cudnn_backward)


@contextmanager
def _cudnn_for_tracing() -> Iterator[None]:
    """Let JAX trace the call where cuDNN and its GPU are not there: it only asks for the version and for
    Hopper to refuse what they do not have.

    There is no public way; the patched functions have these names and arguments in jax 0.10 to 0.12. The
    program is the same: cuDNN itself is needed when it runs, not when it is compiled ahead of time. Who asks
    for large heads or values of another size has seen to it that the chip is a Hopper or later.
    """
    from jax._src.cudnn import fused_attention_stablehlo as fused

    installed, has = fused.check_cudnn_version, fused.check_compute_capability

    def version() -> int:
        try:
            return int(installed())
        except RuntimeError:
            return ASSUMED_CUDNN_VERSION

    def capability(wanted: str) -> bool:
        return wanted == MLA_CAPABILITY or bool(has(wanted))

    with (
        mock.patch.object(fused, "check_cudnn_version", version),
        mock.patch.object(fused, "check_compute_capability", capability),
    ):
        yield


def in_chunks(attention: CausalAttention, chunk: int) -> CausalAttention:
    """Causal attention within chunks of so many tokens: each is a sequence of its own for `attention`, and so
    is what is left over."""

    def local(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        B, L = q.shape[:2]
        whole = L - L % chunk

        def apart(a: jax.Array) -> jax.Array:
            return a[:, :whole].reshape(B * (whole // chunk), chunk, *a.shape[2:])

        if not whole:
            return attention(q, k, v)
        out = attention(*(apart(a) for a in (q, k, v)))
        out = out.reshape(B, whole, *out.shape[2:])
        if whole == L:
            return out
        return jnp.concatenate([out, attention(*(a[:, whole:] for a in (q, k, v)))], axis=1)

    return local


def splash_attention(
    q_BxLxHxD: jax.Array,
    k_BxLxKxD: jax.Array,
    v_BxLxKxD: jax.Array,
    *,
    window: int = 0,
    interpret: bool = False,
) -> jax.Array:
    """Pallas splash attention for TPU (`tpu_custom_call`). L must be a multiple of SPLASH_TILE.

    window: as the reference's; the operation's name says it (`splash_window4096`), since the compiled program
    shows no values of masks. interpret: run it on any backend, slowly, for tests.
    """
    if not window:
        return _splash_attention(q_BxLxHxD, k_BxLxKxD, v_BxLxKxD, 0, interpret)
    with jax.named_scope(f"splash_window{window}"):
        return _splash_attention(q_BxLxHxD, k_BxLxKxD, v_BxLxKxD, window, interpret)


def _splash_attention(
    q_BxLxHxD: jax.Array, k_BxLxKxD: jax.Array, v_BxLxKxD: jax.Array, window: int, interpret: bool
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    L, H, D = q_BxLxHxD.shape[1:]
    square = (L, L)
    one = masks.LocalMask(square, (window - 1, 0), offset=0) if window else masks.CausalMask(square)
    mask = masks.MultiHeadMask([one] * H)
    tile = splash_tile(L)
    attend = kernel.make_splash_mha(
        mask,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
        residual_checkpoint_name="attention",
        block_sizes=kernel.BlockSizes(
            block_q=tile,
            block_kv=tile,
            block_kv_compute=tile,
            block_q_dkv=tile,
            block_kv_dkv=tile,
            block_kv_dkv_compute=tile,
            block_q_dq=tile,
            block_kv_dq=tile,
        ),
    )
    heads_first = (0, 2, 1, 3)
    q_BxHxLxD = q_BxLxHxD.transpose(heads_first) * D**-0.5
    out_BxHxLxD = jax.vmap(attend)(
        q_BxHxLxD, k_BxLxKxD.transpose(heads_first), v_BxLxKxD.transpose(heads_first)
    )
    return out_BxHxLxD.transpose(heads_first)


def splash_tile(length: int) -> int:
    """The largest tile of 512, 256 or 128 positions that divides the sequence; 512 is what MaxText uses on
    TPU."""
    return next(tile for tile in (512, 256, SPLASH_TILE) if length % tile == 0)
