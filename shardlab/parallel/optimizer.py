"""AdamW with global-norm clipping and a warmup-cosine schedule, and where its state lives.

The biases of a router's choice are none of AdamW's: a constant step against the sign of each expert's excess
load, which is their gradient, moves them (arXiv:2408.15664, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from shardlab.parallel.shardings import Shardings
from shardlab.spec.params import ParamSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW's numbers; the defaults are those of Llama 2 (Touvron et al. 2023, section 2.2). bias_speed: the
    step of a router's biases, DeepSeek-V3's (arXiv:2412.19437, section 4.2)."""

    peak_learning_rate: float = 3e-4
    warmup_steps: int = 2_000
    total_steps: int = 100_000
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    bias_speed: float = 0.001


def is_choice_bias(path: str) -> bool:
    """Whether a parameter is the bias of a router's choice."""
    return path.endswith("router/bias")


def global_norm(gradients: Mapping[str, jax.Array]) -> jax.Array:
    """Of all gradients but those of choices' biases, which are loads."""
    kept = (g.astype(jnp.float32) for path, g in gradients.items() if not is_choice_bias(path))
    return jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in kept))


def make_optimizer(config: OptimizerConfig, table: tuple[ParamSpec, ...]) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW. Norm scales and biases are not decayed."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=config.peak_learning_rate / max(config.warmup_steps, 1),
        peak_value=config.peak_learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=config.total_steps,
        end_value=config.peak_learning_rate * config.final_fraction,
    )
    decayed = {
        spec.path: spec.path.endswith(("/kernel", "/table"))
        for spec in table
        if not is_choice_bias(spec.path)
    }
    adamw = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )
    return adamw if len(decayed) == len(table) else _beside_biases(adamw, config.bias_speed)


def _beside_biases(rest: optax.GradientTransformation, speed: float) -> optax.GradientTransformation:
    """`rest` for all parameters but choices' biases, which have no state."""

    def others(arrays: optax.Params) -> dict[str, jax.Array]:
        return {path: array for path, array in dict(arrays).items() if not is_choice_bias(path)}

    def update(
        gradients: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, state = rest.update(others(gradients), state, None if params is None else others(params))
        moved = {path: -speed * jnp.sign(g) for path, g in dict(gradients).items() if is_choice_bias(path)}
        return {**updates, **moved}, state

    return optax.GradientTransformation(lambda params: rest.init(others(params)), update)


def optimizer_shardings(
    optimizer: optax.GradientTransformation,
    params: Mapping[str, jax.ShapeDtypeStruct],
    table: tuple[ParamSpec, ...],
    shardings: Shardings,
) -> tuple[object, object]:
    """The optimizer's abstract state and its shardings, two trees of one shape. Moments follow the optimizer
    rules."""
    state = jax.eval_shape(optimizer.init, params)
    moments = {spec.path: shardings.optimizer_state(spec) for spec in table}

    def place(path: tuple[object, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        key = getattr(path[-1], "key", None)
        return moments[key] if key in moments and leaf.shape else shardings.replicated()

    return state, jax.tree_util.tree_map_with_path(place, state)
