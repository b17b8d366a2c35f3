"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1; DeepSeek-V3, section 2.1.1).

Queries, and keys with values, pass through latent vectors. A token leaves in the cache its normalised latent
vector and one rotated key that all heads share: C = R + P numbers, not 2 · heads · head_dim. Training and
prefill make keys and values of all tokens (`Runtime.attention` on heads of D = N + P for queries and keys and
V for values); a decode step does not: what makes keys is applied to the query, and what makes values to the
result, so that attention takes place in the latent space.

Shapes as in layers.py; Q rank of queries, R rank of keys and values, N, P, V the parts of a head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from shardlab.model.cache import Caches, KeysValues, Latent
from shardlab.model.layers import Norm, Projection, Shape, rotate, weight
from shardlab.model.runtime import Runtime
from shardlab.spec.models import ModelConfig


class MultiHeadLatentAttention(nnx.Module):
    """Causal self-attention through latent vectors."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, stack: Shape = ()) -> None:
        assert config.latent is not None
        self.to, self.rope_theta, self.head_dim = config.latent, config.rope_theta, config.head_dim
        E, Q, R = {"embed": config.embed}, config.latent.query_rank, config.latent.kv_rank
        shared = R + self.to.rope_dim

        def heads(size: int) -> dict[str | None, int]:
            return {"heads": config.heads, "head_dim": size}

        def down(width: int) -> Projection:
            latent: dict[str | None, int] = {None: width}
            return Projection(E, latent, bias=False, rngs=rngs, stack=stack)

        self.query_down, self.kv_down = down(Q), down(shared)
        self.query_norm = Norm(config, stack=stack, width=Q)
        self.kv_norm = Norm(config, stack=stack, width=R)
        out = heads(self.head_dim)
        self.query_up = Projection({"latent": Q}, out, bias=False, rngs=rngs, stack=stack)
        out = heads(self.to.nope_dim + self.to.value_dim)
        self.kv_up = Projection({"latent": R}, out, bias=False, rngs=rngs, stack=stack)
        scale = (2 * config.layers) ** -0.5
        values = heads(self.to.value_dim)
        self.output = Projection(values, E, bias=False, rngs=rngs, stack=stack, scale=scale)

    def __call__(
        self, x_BxLxE: jax.Array, position: jax.Array, run: Runtime, caches: Caches[Latent] | None = None
    ) -> tuple[jax.Array, Latent]:
        """Attend within the sequence, or to a cache; returns out_BxLxE and the latents, with caches those of
        all layers with the tokens' own written. position: [L], or [B, L] with caches."""
        q_BxLxHxD = self._queries(x_BxLxE, position, run)
        latent_BxLxC = self._latents(x_BxLxE, position, run)
        if caches is None:
            out_BxLxHxV, held = self._attend(q_BxLxHxD, latent_BxLxC, run), Latent(latent_BxLxC)
        else:
            out_BxLxHxV, held = self._attend_to_latents(q_BxLxHxD, latent_BxLxC, caches, position, run)
        out_BxLxHxV = run.constrain(out_BxLxHxV, ("batch", "seq", "heads", None))
        with jax.named_scope("output"):
            return checkpoint_name(self.output(out_BxLxHxV, run), "output"), held

    def _queries(self, x_BxLxE: jax.Array, position: jax.Array, run: Runtime) -> jax.Array:
        """[B, L, H, N + P], the last P numbers of each head rotated."""
        with jax.named_scope("query_down"):
            latent_BxLxQ = run.constrain(self.query_down(x_BxLxE, run), ("batch", "seq", None))
        with jax.named_scope("query_norm"):
            latent_BxLxQ = self.query_norm(latent_BxLxQ, run)
        with jax.named_scope("query_up"):
            q_BxLxHxD = run.constrain(self.query_up(latent_BxLxQ, run), ("batch", "seq", "heads", None))
        with jax.named_scope("rope"):
            plain, turned = jnp.split(q_BxLxHxD, [self.to.nope_dim], axis=-1)
            return jnp.concatenate([plain, rotate(turned, position, self.rope_theta)], axis=-1)

    def _latents(self, x_BxLxE: jax.Array, position: jax.Array, run: Runtime) -> jax.Array:
        """What the cache keeps of each token: [B, L, R + P]."""
        with jax.named_scope("kv_down"):
            both_BxLxC = run.constrain(self.kv_down(x_BxLxE, run), ("batch", "seq", None))
        latent_BxLxR, key_BxLxP = jnp.split(both_BxLxC, [self.to.kv_rank], axis=-1)
        with jax.named_scope("kv_norm"):
            latent_BxLxR = self.kv_norm(latent_BxLxR, run)
        with jax.named_scope("rope"):
            key_BxLxP = rotate(key_BxLxP[:, :, None], position, self.rope_theta)[:, :, 0]
        return jnp.concatenate([latent_BxLxR, key_BxLxP], axis=-1)

    def _attend(self, q_BxLxHxD: jax.Array, latent_BxLxC: jax.Array, run: Runtime) -> jax.Array:
        """Within the sequence, on keys and values of every head: out_BxLxHxV."""
        latent_BxLxR, key_BxLxP = jnp.split(latent_BxLxC, [self.to.kv_rank], axis=-1)
        with jax.named_scope("kv_up"):
            kv_BxLxHxF = run.constrain(self.kv_up(latent_BxLxR, run), ("batch", "kv_seq", "heads", None))
        plain, v_BxLxHxV = jnp.split(kv_BxLxHxF, [self.to.nope_dim], axis=-1)
        shared = jnp.broadcast_to(key_BxLxP[:, :, None], (*plain.shape[:-1], self.to.rope_dim))
        k_BxLxHxD = jnp.concatenate([plain, shared], axis=-1)
        names = ("query", "key", "value")
        q, k, v = map(checkpoint_name, (q_BxLxHxD, k_BxLxHxD, v_BxLxHxV), names)
        with jax.named_scope("kernel"):
            return run.attention(q, k, v)

    def _attend_to_latents(
        self,
        q_BxLxHxD: jax.Array,
        latent_BxLxC: jax.Array,
        caches: Caches[Latent],
        position_BxL: jax.Array,
        run: Runtime,
    ) -> tuple[jax.Array, Latent]:
        """To the cache, in the latent space: out_BxLxHxV and the caches (arXiv:2405.04434, section 2.1.2).

        q·(W_k c) = (W_kᵀ q)·c, and Σ p (W_v c) = W_v Σ p c: all heads attend to one key, the latent vector
        with the rotated part, whose first R numbers are the value.
        """
        R, C = self.to.kv_rank, latent_BxLxC.shape[-1]
        with jax.named_scope("kv_up"):
            up_RxHxF = weight(self.kv_up.kernel, run)
            to_keys_RxHxN, to_values_RxHxV = jnp.split(up_RxHxF, [self.to.nope_dim], axis=-1)
            plain, turned = jnp.split(q_BxLxHxD, [self.to.nope_dim], axis=-1)
            q_BxLxHxR = jnp.einsum("blhn,rhn->blhr", plain, to_keys_RxHxN)
        # The scores' scale is that of heads of D, where the kernel sees heads of C.
        q_BxLxHxC = jnp.concatenate([q_BxLxHxR, turned], axis=-1) * (C / self.head_dim) ** 0.5
        one_head = Caches(KeysValues(caches.stack.latent[..., None, :], None), caches.layer)
        new = KeysValues(latent_BxLxC[:, :, None], None)
        with jax.named_scope("kernel"):
            out_BxLxHxR, held = run.cached_attention(q_BxLxHxC, new, one_head, position_BxL, R)
        with jax.named_scope("kv_up"):
            out_BxLxHxV = jnp.einsum("blhr,rhv->blhv", out_BxLxHxR, to_values_RxHxV)
        return out_BxLxHxV, Latent(held.keys[..., 0, :])
