"""AdamW's schedule, clipping and decay, from closed forms."""

import jax.numpy as jnp
import numpy as np
import pytest
from emulated import SMALL

from shardlab.parallel.optimizer import OptimizerConfig, make_optimizer
from shardlab.spec.params import parameter_table

TABLE = parameter_table(SMALL)
CONFIG = OptimizerConfig(
    peak_learning_rate=0.1, warmup_steps=1, total_steps=100, weight_decay=0.5, clip_norm=1.0
)


def first_update(config: OptimizerConfig, gradient: float, parameter: float) -> dict[str, float]:
    """Each parameter's first update, all elements alike."""
    params = {p.path: jnp.full(p.shape, parameter) for p in TABLE}
    gradients = {p.path: jnp.full(p.shape, gradient) for p in TABLE}
    tx = make_optimizer(config, TABLE)
    updates, _ = tx.update(gradients, tx.init(params), params)
    return {path: float(update.reshape(-1)[0]) for path, update in updates.items()}


@pytest.mark.parametrize("gradient", [3.0, -5e-3], ids=["clipped", "as-it-is"])
def test_first_update_is_the_sign_and_the_decay(gradient: float) -> None:
    """Adam's first update is lr · g / |g| whatever the scale of g; decay adds lr · 0.5 · parameter to
    kernels alone."""
    updates = first_update(CONFIG, gradient, parameter=4.0)
    np.testing.assert_allclose(updates["layers/mlp/up/kernel"], -0.1 * (np.sign(gradient) + 2.0), rtol=1e-3)
    np.testing.assert_allclose(updates["final_norm/scale"], -0.1 * np.sign(gradient), rtol=1e-3)


def test_clipping_scales_by_the_global_norm() -> None:
    """With b1 = b2 = 0 and a large epsilon the update is lr · g / (|g| + ε) ≈ lr · g / ε, |g| clipped."""
    config = OptimizerConfig(
        peak_learning_rate=1.0, warmup_steps=1, total_steps=100, weight_decay=0.0, b1=0.0, b2=0.0, epsilon=1e3
    )
    elements = sum(p.size for p in TABLE)
    update = first_update(config, gradient=5.0, parameter=0.0)["head/kernel"]
    np.testing.assert_allclose(update, -(elements**-0.5) / 1e3, rtol=1e-3)


def test_schedule_warms_up_and_decays() -> None:
    """The size of each step of one parameter with a constant gradient is the learning rate."""
    config = OptimizerConfig(peak_learning_rate=0.4, warmup_steps=4, total_steps=10, weight_decay=0.0)
    params = {p.path: jnp.zeros(p.shape) for p in TABLE}
    gradients = {p.path: jnp.ones(p.shape) for p in TABLE}
    tx = make_optimizer(config, TABLE)
    state, rates = tx.init(params), []
    for _ in range(11):
        updates, state = tx.update(gradients, state, params)
        rates.append(-float(updates["final_norm/scale"][0]))
    cosine = [0.04 + 0.36 * (1 + np.cos(np.pi * t / 6)) / 2 for t in range(7)]
    np.testing.assert_allclose(rates, [0.1, 0.175, 0.25, 0.325, *cosine], rtol=1e-3)
