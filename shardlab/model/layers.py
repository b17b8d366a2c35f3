"""The parts of a layer: projections, norms, rotary positions, attention and MLP, as Flax NNX modules.

Every parameter carries `logical_axes`, one per dimension without the leading `layers` of a scanned stack,
and is read
through `Runtime.place_weight`. `stack` is that leading dimension: () or (layers,). Tensors carry their shape:
B batch, L tokens, S tokens seen, E embed, H heads, K KV heads, D head_dim, M mlp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple
from math import prod

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from shardlab.model.cache import Caches, KeysValues
from shardlab.model.experts import Kernels, Load, moved_against_load
from shardlab.model.runtime import Runtime
from shardlab.spec.models import ModelConfig, Rope
from shardlab.spec.params import LogicalAxes

Shape = tuple[int, ...]
# Logical axis -> size, in order; None is an axis that no rule splits.
Sizes = Mapping[str, int] | Mapping[str | None, int]


def parameter(value: jax.Array, axes: LogicalAxes, *, in_f32: bool = False) -> nnx.Param[jax.Array]:
    """A parameter with its logical axes. in_f32: used as a `full_weight`; others in the compute type."""
    return nnx.Param(value, logical_axes=axes, in_f32=in_f32)


class Projection(nnx.Module):
    """A linear map from the `inputs` dimensions to the `outputs` dimensions, with or without bias."""

    def __init__(
        self,
        inputs: Sizes,
        outputs: Sizes,
        *,
        bias: bool,
        rngs: nnx.Rngs,
        stack: Shape = (),
        scale: float = 1.0,
    ) -> None:
        """inputs, outputs: logical axis -> size, in order. The kernel is normal with std scale / √fan-in."""
        shape = (*stack, *inputs.values(), *outputs.values())
        std = scale * prod(inputs.values()) ** -0.5
        self.num_inputs = len(inputs)
        self.kernel = parameter(jax.random.normal(rngs.params(), shape) * std, (*inputs, *outputs))
        if bias:
            self.bias = parameter(jnp.zeros((*stack, *outputs.values())), tuple(outputs))

    def __call__(self, x: jax.Array, run: Runtime) -> jax.Array:
        """x[..., *inputs] -> y[..., *outputs] in the compute type."""
        y = run.project(self.kernel.get_value(), self.kernel.logical_axes, x, self.num_inputs, run)
        return y + along(weight(self.bias, run), y) if hasattr(self, "bias") else y


def weight(param: nnx.Param[jax.Array], run: Runtime) -> jax.Array:
    """The parameter in the compute type, placed for use: cast first, so that a gather moves the small
    type."""
    return run.place_weight(param.get_value().astype(run.compute_dtype), param.logical_axes)


def full_weight(param: nnx.Param[jax.Array], run: Runtime) -> jax.Array:
    """A norm's parameter, placed for use in f32: norms are computed in f32."""
    return run.place_weight(param.get_value().astype(jnp.float32), param.logical_axes)


def along(x: jax.Array, y: jax.Array) -> jax.Array:
    """x as y's last dimensions, with leading dimensions of one: says the broadcast instead of implying it."""
    return x.reshape((1,) * (y.ndim - x.ndim) + x.shape)


class Kernel(nnx.Module):
    """A kernel alone, for products that are no projection of a token; leading: axes before the inputs."""

    def __init__(
        self,
        inputs: dict[str | None, int],
        outputs: dict[str | None, int],
        *,
        rngs: nnx.Rngs,
        stack: Shape = (),
        leading: LogicalAxes = (),
        scale: float = 1.0,
    ) -> None:
        """As for `Projection`; the sizes of `leading` are the last of `stack`."""
        shape = (*stack, *inputs.values(), *outputs.values())
        std = scale * prod(inputs.values()) ** -0.5
        self.kernel = parameter(jax.random.normal(rngs.params(), shape) * std, (*leading, *inputs, *outputs))


class Norm(nnx.Module):
    """RMSNorm, or LayerNorm with bias, over the embed dimension, computed in f32."""

    def __init__(self, config: ModelConfig, *, stack: Shape = (), width: int = 0) -> None:
        """width: of another vector to normalise instead, by RMSNorm: a latent one, or a head's."""
        self.epsilon = config.norm_epsilon
        self.centre = 1.0 if config.zero_centered_norms else 0.0
        scale = jnp.full((*stack, width or config.embed), 1.0 - self.centre)
        self.scale = parameter(scale, (None if width else "embed",), in_f32=True)
        if config.norm == "layernorm" and not width:
            self.bias = parameter(jnp.zeros((*stack, config.embed)), ("embed",), in_f32=True)

    def __call__(self, x_BxLxE: jax.Array, run: Runtime) -> jax.Array:
        """Returns the normalised array, same shape and type."""
        x = x_BxLxE.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True) if hasattr(self, "bias") else x
        variance = jnp.mean(jnp.square(centred), -1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.epsilon)
        scale = full_weight(self.scale, run)
        y = y * along(scale + self.centre if self.centre else scale, y)
        if hasattr(self, "bias"):
            y = y + along(full_weight(self.bias, run), y)
        return y.astype(x_BxLxE.dtype)


def rotate(x_BxLxHxD: jax.Array, position: jax.Array, theta: float | jax.Array) -> jax.Array:
    """Rotary positions, Hugging Face Llama's convention: dimension d pairs with d + D/2. position: [L], or
    [B, L] where sequences differ.

    Angle of pair i at position p: p · theta^(-2i/D) (Su et al. 2021, eq. 15; HF `rotate_half`).
    """
    half = x_BxLxHxD.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    position_BxL = jnp.atleast_2d(position).astype(jnp.float32)
    angle_BxLx1xF = position_BxL[:, :, None, None] * frequency[None, None, None, :]
    cos, sin = jnp.cos(angle_BxLx1xF), jnp.sin(angle_BxLx1xF)
    first, second = jnp.split(x_BxLxHxD.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BxLxHxD.dtype)


class Attention(nnx.Module):
    """Grouped-query causal self-attention."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, stack: Shape = ()) -> None:
        embed = {"embed": config.embed}
        heads = {"heads": config.heads, "head_dim": config.head_dim}
        kv_heads = {"kv_heads": config.kv_heads, "head_dim": config.head_dim}
        self.rope = Rope(config.rope_theta) if config.positions == "rope" else None
        self.global_rope = config.global_rope or self.rope
        # The kernels divide scores by √head_dim.
        self.query_scale = (config.head_dim / (config.query_scalar or config.head_dim)) ** 0.5
        self.query = Projection(embed, heads, bias=config.bias, rngs=rngs, stack=stack)
        self.key = Projection(embed, kv_heads, bias=config.bias, rngs=rngs, stack=stack)
        self.value = Projection(embed, kv_heads, bias=config.bias, rngs=rngs, stack=stack)
        if config.query_key_norms:
            self.query_norm = Norm(config, stack=stack, width=config.head_dim)
            self.key_norm = Norm(config, stack=stack, width=config.head_dim)
        # GPT-2 scales what enters the residual stream by 1/√(its number of additions).
        scale = (2 * config.layers) ** -0.5
        self.output = Projection(heads, embed, bias=config.bias, rngs=rngs, stack=stack, scale=scale)

    def __call__(
        self, x_BxLxE: jax.Array, position: jax.Array, run: Runtime, caches: Caches[KeysValues] | None = None
    ) -> tuple[jax.Array, KeysValues]:
        """Attend within the sequence, or to a cache. Returns out_BxLxE and keys and values.

        position: [L], or [B, L] with caches; what is returned then is those with the tokens' entries
        written.
        """
        q_BxLxHxD, new = self._project(x_BxLxE, position, run)
        if caches is None:
            out_BxLxHxD = self._attend(q_BxLxHxD, new, run)
        else:
            with jax.named_scope("kernel"):
                out_BxLxHxD, new = run.cached_attention(q_BxLxHxD, new, caches, position)
        out_BxLxHxD = run.constrain(out_BxLxHxD, ("batch", "seq", "heads", None))
        with jax.named_scope("output"):
            return checkpoint_name(self.output(out_BxLxHxD, run), "output"), new

    def _project(self, x_BxLxE: jax.Array, position: jax.Array, run: Runtime) -> tuple[jax.Array, KeysValues]:
        """Queries [B, L, H, D], and keys and values [B, L, K, D]; queries and keys normed and rotated."""
        with jax.named_scope("query"):
            q_BxLxHxD = run.constrain(self.query(x_BxLxE, run), ("batch", "seq", "heads", None))
        with jax.named_scope("key"):
            k_BxLxKxD = run.constrain(self.key(x_BxLxE, run), ("batch", "kv_seq", "kv_heads", None))
        with jax.named_scope("value"):
            v_BxLxKxD = run.constrain(self.value(x_BxLxE, run), ("batch", "kv_seq", "kv_heads", None))
        if hasattr(self, "query_norm"):
            with jax.named_scope("query_key_norm"):
                q_BxLxHxD, k_BxLxKxD = self.query_norm(q_BxLxHxD, run), self.key_norm(k_BxLxKxD, run)
        if self.rope is not None:
            with jax.named_scope("rope"):
                theta, turns = self._turns(position, run.sees_all)
                q_BxLxHxD, k_BxLxKxD = (rotate(a, turns, theta) for a in (q_BxLxHxD, k_BxLxKxD))
        if self.query_scale != 1:
            q_BxLxHxD = q_BxLxHxD * self.query_scale
        q, k, v = map(checkpoint_name, (q_BxLxHxD, k_BxLxKxD, v_BxLxKxD), ("query", "key", "value"))
        return q, KeysValues(k, v)

    def _turns(self, position: jax.Array, sees_all: bool | jax.Array) -> tuple[float | jax.Array, jax.Array]:
        """theta and scaled positions, of a layer that sees all or of one that does not; which of them it is a
        loop over layers may know at run time only."""
        assert self.rope is not None and self.global_rope is not None
        if self.rope == self.global_rope or isinstance(sees_all, bool):
            rope = self.global_rope if sees_all is True else self.rope
            return rope.theta, position if rope.scaling == 1 else position / rope.scaling
        pairs = zip(astuple(self.global_rope), astuple(self.rope), strict=True)
        theta, scaling = (jnp.where(sees_all, far, near) for far, near in pairs)
        return theta, position / scaling

    def _attend(self, q_BxLxHxD: jax.Array, new: KeysValues, run: Runtime) -> jax.Array:
        """The kernel, on KV heads repeated until they divide as the query heads do."""
        k, v = new
        with jax.named_scope("kernel"):
            if run.kv_repeats > 1:
                k, v = (jnp.repeat(a, run.kv_repeats, axis=2) for a in (k, v))
            return run.attention(q_BxLxHxD, k, v)


class Mlp(nnx.Module):
    """SwiGLU or GeGLU (gate, up, down), or GELU (up, down); GELU in its tanh form, as GPT-2 has it."""

    def __init__(
        self, config: ModelConfig, *, rngs: nnx.Rngs, stack: Shape = (), width: int | None = None
    ) -> None:
        """width: instead of the model's own."""
        embed, mlp = {"embed": config.embed}, {"mlp": width or config.mlp}
        self.swish = config.activation == "swiglu"
        if config.gated:
            self.gate = Projection(embed, mlp, bias=config.bias, rngs=rngs, stack=stack)
        self.up = Projection(embed, mlp, bias=config.bias, rngs=rngs, stack=stack)
        scale = (2 * config.layers) ** -0.5
        self.down = Projection(mlp, embed, bias=config.bias, rngs=rngs, stack=stack, scale=scale)

    def __call__(self, x_BxLxE: jax.Array, run: Runtime) -> jax.Array:
        """Returns out_BxLxE."""
        axes = ("batch", "seq", "mlp")
        with jax.named_scope("up"):
            up_BxLxM = checkpoint_name(run.constrain(self.up(x_BxLxE, run), axes), "up")
        if hasattr(self, "gate"):
            with jax.named_scope("gate"):
                gate_BxLxM = checkpoint_name(run.constrain(self.gate(x_BxLxE, run), axes), "gate")
            hidden_BxLxM = (jax.nn.silu if self.swish else gelu)(gate_BxLxM) * up_BxLxM
        else:
            hidden_BxLxM = gelu(up_BxLxM)
        with jax.named_scope("down"):
            return checkpoint_name(self.down(hidden_BxLxM, run), "down")


def gelu(x: jax.Array) -> jax.Array:
    """In its tanh form."""
    return jax.nn.gelu(x, approximate=True)


class ExpertRouter(nnx.Module):
    """What gives each expert its score, and the bias of the choice, where there is one."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, stack: Shape = ()) -> None:
        shape = (*stack, config.embed, config.num_experts)
        kernel_ExX = jax.random.normal(rngs.params(), shape) * config.embed**-0.5
        self.kernel = parameter(kernel_ExX, ("embed", None), in_f32=True)
        if config.router_bias:
            self.bias = parameter(jnp.zeros((*stack, config.num_experts)), (None,), in_f32=True)

    def __call__(self, x_BxLxE: jax.Array, run: Runtime) -> jax.Array:
        """The product alone, in f32 (Switch, section 2.4): logits_BxLxX."""
        kernel_ExX = full_weight(self.kernel, run)
        return jax.lax.dot_general(x_BxLxE.astype(jnp.float32), kernel_ExX, (((2,), (0,)), ((), ())))


class Moe(nnx.Module):
    """A mixture of experts: a router, and the kernels of all experts in one array each (SwiGLU)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, stack: Shape = ()) -> None:
        self.choice = config.router
        stack_X = (*stack, config.num_experts)
        E: dict[str | None, int] = {"embed": config.embed}
        M: dict[str | None, int] = {"mlp": config.mlp}
        scale = (2 * config.layers) ** -0.5
        self.router = ExpertRouter(config, rngs=rngs, stack=stack)
        self.gate = Kernel(E, M, rngs=rngs, stack=stack_X, leading=("expert",))
        self.up = Kernel(E, M, rngs=rngs, stack=stack_X, leading=("expert",))
        self.down = Kernel(M, E, rngs=rngs, stack=stack_X, leading=("expert",), scale=scale)

    def __call__(self, x_BxLxE: jax.Array, run: Runtime) -> tuple[jax.Array, Load]:
        """Returns out_BxLxE and how tokens were spread."""
        with jax.named_scope("router"):
            logits_BxLxX = self.router(x_BxLxE, run)
            bias_X = full_weight(self.router.bias, run) if hasattr(self.router, "bias") else None
        kernels = (p.kernel.get_value().astype(run.compute_dtype) for p in (self.gate, self.up, self.down))
        with jax.named_scope("experts"):
            out_BxLxE, load = run.experts(x_BxLxE, logits_BxLxX, bias_X, Kernels(*kernels), self.choice)
        return out_BxLxE if bias_X is None else moved_against_load(out_BxLxE, bias_X, load), load
