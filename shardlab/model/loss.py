"""Next-token cross-entropy with the z-loss option."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cross_entropy(logits_BxLxV: jax.Array, targets_BxL: jax.Array, *, z_loss: float = 0.0) -> jax.Array:
    """Mean over tokens of log Σ exp(logits) - logits[target], plus z_loss · (log Σ exp(logits))².

    logits in f32. The target's logit is picked with a comparison, not a gather, so that a vocabulary split
    over
    devices reduces one number per token and moves no logits. z-loss: Chowdhery et al. 2022 (PaLM), section 5.
    """
    with jax.named_scope("loss"):
        logsumexp_BxL = jax.nn.logsumexp(logits_BxLxV, axis=-1)
        is_target_BxLxV = jnp.arange(logits_BxLxV.shape[-1])[None, None] == targets_BxL[..., None]
        target_BxL = jnp.sum(jnp.where(is_target_BxLxV, logits_BxLxV, 0.0), axis=-1)
        loss_BxL = logsumexp_BxL - target_BxL
        if z_loss:
            loss_BxL = loss_BxL + z_loss * jnp.square(logsumexp_BxL)
        return jnp.mean(loss_BxL)
