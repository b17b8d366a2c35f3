"""Next-token cross-entropy with the z-loss option, of all tokens at once or of a part of them at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

# (the head's weight, x_BxLxE, targets_BxL) -> mean loss.
HeadLoss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
# (f32 logits_BxLxV, targets_BxL, *, z_loss) -> mean over tokens.
Loss = Callable[..., jax.Array]


def cross_entropy(logits_BxLxV: jax.Array, targets_BxL: jax.Array, *, z_loss: float = 0.0) -> jax.Array:
    """Mean over tokens of log Σ exp(logits) - logits[target], plus z_loss · (log Σ exp(logits))².

    logits in f32. The target's logit is picked with a comparison, not a gather, so that a vocabulary split
    over
    devices reduces one number per token and moves no logits. z-loss: Chowdhery et al. 2022 (PaLM), section 5.
    """
    with jax.named_scope("loss"):
        logsumexp_BxL = jax.nn.logsumexp(logits_BxLxV, axis=-1)
        return _mean(logsumexp_BxL - _of_targets(logits_BxLxV, targets_BxL), logsumexp_BxL, z_loss)


def unfused_cross_entropy(
    logits_BxLxV: jax.Array, targets_BxL: jax.Array, *, z_loss: float = 0.0
) -> jax.Array:
    """The same, as frameworks compute it that run one kernel after another: logits, their log-probabilities,
    and the gradients of both are f32 arrays in memory (PyTorch: `cross_entropy(logits.float(), targets)`)."""
    with jax.named_scope("loss"):
        log_p_BxLxV = _log_softmax(logits_BxLxV)
        logsumexp_BxL = jax.nn.logsumexp(logits_BxLxV, axis=-1) if z_loss else None
        return _mean(-_of_targets(log_p_BxLxV, targets_BxL), logsumexp_BxL, z_loss)


def _of_targets(scores_BxLxV: jax.Array, targets_BxL: jax.Array) -> jax.Array:
    is_target_BxLxV = jnp.arange(scores_BxLxV.shape[-1])[None, None] == targets_BxL[..., None]
    return jnp.sum(jnp.where(is_target_BxLxV, scores_BxLxV, 0.0), axis=-1)


def _mean(loss_BxL: jax.Array, logsumexp_BxL: jax.Array | None, z_loss: float) -> jax.Array:
    if logsumexp_BxL is not None and z_loss:
        loss_BxL = loss_BxL + z_loss * jnp.square(logsumexp_BxL)
    return jnp.mean(loss_BxL)


_in_memory = jax.lax.optimization_barrier  # nothing is fused across it


@jax.custom_vjp
def _log_softmax(logits_BxLxV: jax.Array) -> jax.Array:
    return _keep_log_p(logits_BxLxV)[0]


def _keep_log_p(logits_BxLxV: jax.Array) -> tuple[jax.Array, jax.Array]:
    log_p_BxLxV = _in_memory(jax.nn.log_softmax(_in_memory(logits_BxLxV)))
    return log_p_BxLxV, log_p_BxLxV


def _from_log_p(log_p_BxLxV: jax.Array, cotangent_BxLxV: jax.Array) -> tuple[jax.Array]:
    d_BxLxV = _in_memory(cotangent_BxLxV)
    total_BxL = jnp.sum(d_BxLxV, axis=-1, keepdims=True)
    return (_in_memory(d_BxLxV - jnp.exp(log_p_BxLxV) * total_BxL),)


_log_softmax.defvjp(_keep_log_p, _from_log_p)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def in_parts(
    loss_of: HeadLoss, parts: int, weight: jax.Array, x_BxLxE: jax.Array, targets_BxL: jax.Array
) -> jax.Array:
    """The mean of `loss_of` over every `parts`-th token of each sequence, one part after the other, so that
    logits of one exist at a time; the backward pass makes them again, and sums the weight's gradient in f32.

    Tokens stay on their devices. MaxText's `num_vocab_tiling`; Liger's fused linear cross-entropy
    (arXiv:2410.10989, section 3.2).
    """

    def add(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return total + loss_of(weight, *part), None

    total, _ = jax.lax.scan(add, jnp.float32(0), (_split(x_BxLxE, parts), _split(targets_BxL, parts)))
    return total / parts


_Saved = tuple[jax.Array, jax.Array, jax.Array]


def _forward(loss_of: HeadLoss, parts: int, *arrays: jax.Array) -> tuple[jax.Array, _Saved]:
    weight, x_BxLxE, targets_BxL = arrays
    return in_parts(loss_of, parts, weight, x_BxLxE, targets_BxL), (weight, x_BxLxE, targets_BxL)


def _backward(
    loss_of: HeadLoss, parts: int, saved: _Saved, d_loss: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    weight, x_BxLxE, targets_BxL = saved

    def add(d_weight: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, targets = part
        # As a checkpoint, so that what is made again says so; the loss itself is not used.
        of_part = jax.checkpoint(lambda weight, x: loss_of(weight, x, targets), prevent_cse=False)
        more, dx = jax.vjp(of_part, weight, x)[1](d_loss / parts)
        return d_weight + more.astype(jnp.float32), dx

    xs = (_split(x_BxLxE, parts), _split(targets_BxL, parts))
    d_weight, dx = jax.lax.scan(add, jnp.zeros(weight.shape, jnp.float32), xs)
    return d_weight.astype(weight.dtype), dx.swapaxes(0, 1).swapaxes(1, 2).reshape(x_BxLxE.shape), None


in_parts.defvjp(_forward, _backward)


def _split(a: jax.Array, parts: int) -> jax.Array:
    """[B, L, …] -> [parts, B, L / parts, …]: token t is in part t modulo parts."""
    B, L = a.shape[:2]
    return a.reshape(B, L // parts, parts, *a.shape[2:]).swapaxes(1, 2).swapaxes(0, 1)
