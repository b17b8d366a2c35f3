"""One layer of the transformer: norm and attention, norm and MLP or experts, each added to the residual
stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from shardlab.model.cache import Cached, Caches
from shardlab.model.experts import Load
from shardlab.model.latent import MultiHeadLatentAttention
from shardlab.model.layers import Attention, Mlp, Moe, Norm, Shape
from shardlab.model.runtime import Runtime, gathered_tokens
from shardlab.spec.models import ModelConfig


class Layer(nnx.Module):
    """One pre-norm transformer layer. The residual stream is (batch, norm_seq, embed), products (batch, seq,
    embed)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, stack: Shape = ()) -> None:
        self.attention_norm = Norm(config, stack=stack)
        kind = MultiHeadLatentAttention if config.latent else Attention
        self.attention = kind(config, rngs=rngs, stack=stack)
        if config.post_norms:
            self.attention_post_norm = Norm(config, stack=stack)
        self.mlp_norm = Norm(config, stack=stack)
        if config.num_experts:
            if config.shared_experts:
                width = config.shared_experts * config.mlp
                self.shared = Mlp(config, rngs=rngs, stack=stack, width=width)
            self.moe = Moe(config, rngs=rngs, stack=stack)
        else:
            self.mlp = Mlp(config, rngs=rngs, stack=stack)
            if config.post_norms:
                self.mlp_post_norm = Norm(config, stack=stack)

    def __call__(
        self, x_BxLxE: jax.Array, position: jax.Array, run: Runtime, caches: Caches[Any] | None = None
    ) -> tuple[jax.Array, Cached, Load | None]:
        """Returns the residual stream x_BxLxE, what this layer caches (or the caches of all, written), and
        the load of its experts."""
        x_BxLxE = checkpoint_name(x_BxLxE, "input")
        with jax.named_scope("attention_norm"):
            normed = for_products(self.attention_norm(x_BxLxE, run), run)
        attention: Callable[..., tuple[jax.Array, Cached]] = self.attention
        with jax.named_scope("attention"):
            out_BxLxE, keys_values = attention(normed, position, run.within("attention"), caches)
        x_BxLxE = self._added(x_BxLxE, out_BxLxE, "attention_post_norm", run)
        if hasattr(self, "moe"):
            return self._through_experts(x_BxLxE, keys_values, run)
        with jax.named_scope("mlp_norm"):
            normed = for_products(self.mlp_norm(x_BxLxE, run), run)
        with jax.named_scope("mlp"):
            out_BxLxE = self.mlp(normed, run.within("mlp"))
        return self._added(x_BxLxE, out_BxLxE, "mlp_post_norm", run), keys_values, None

    def _added(self, x_BxLxE: jax.Array, out_BxLxE: jax.Array, name: str, run: Runtime) -> jax.Array:
        """The residual stream with what a branch gave, after the norm of that name where there is one."""
        norm: Norm | None = getattr(self, name, None)
        if norm is None:
            return residual(x_BxLxE, out_BxLxE, run)
        with jax.named_scope(name):
            normed = norm(from_products(out_BxLxE, run), run)
        return run.constrain(x_BxLxE + normed, ("batch", "norm_seq", "embed"))

    def _through_experts(
        self, x_BxLxE: jax.Array, cached: Cached, run: Runtime
    ) -> tuple[jax.Array, Cached, Load]:
        """Experts take tokens where the norm leaves them, and gather them for tensor parallelism
        themselves; shared experts are an MLP."""
        with jax.named_scope("mlp_norm"):
            normed = run.constrain(self.mlp_norm(x_BxLxE, run), ("batch", "norm_seq", "embed"))
        if hasattr(self, "shared"):
            with jax.named_scope("shared"):
                out_BxLxE = self.shared(for_products(normed, run), run.within("shared"))
                x_BxLxE = residual(x_BxLxE, out_BxLxE, run)
        with jax.named_scope("moe"):
            out_BxLxE, load = self.moe(normed, run.within("moe"))
        return residual(x_BxLxE, out_BxLxE, run), cached, load


def for_products(x_BxLxE: jax.Array, run: Runtime) -> Any:
    """A norm's output as products take it: gathered in the compute type, not the norm's f32; or in a smaller
    one (`Runtime.small_tokens`)."""
    if run.small_tokens is None:
        return gathered_tokens(x_BxLxE, run)
    return run.small_tokens(run.constrain(x_BxLxE, ("batch", "norm_seq", "embed")), run)


def residual(x_BxLxE: jax.Array, out_BxLxE: jax.Array, run: Runtime) -> jax.Array:
    """x + out in the residual stream; the branch is placed before it is added, so its partial sums
    reduce-scatter."""
    return run.constrain(x_BxLxE + from_products(out_BxLxE, run), ("batch", "norm_seq", "embed"))


def from_products(out_BxLxE: jax.Array, run: Runtime) -> jax.Array:
    """The counterpart of `for_products`. Its cotangent is placed for products once: left to the partitioner,
    the two products that use it gather it twice where a device has one sequence."""

    @jax.custom_vjp
    def place(out: jax.Array) -> jax.Array:
        return run.constrain(out, ("batch", "norm_seq", "embed"))

    def backward(_: None, cotangent: jax.Array) -> tuple[jax.Array]:
        if run.small_tokens is None:
            return (gathered_tokens(cotangent, run),)
        return (run.constrain(cotangent, ("batch", "norm_seq", "embed")),)

    place.defvjp(lambda out: (run.constrain(out, ("batch", "norm_seq", "embed")), None), backward)
    return place(out_BxLxE)
