"""Experts on eight emulated devices: each plan trains as one device does."""

from dataclasses import replace
from fractions import Fraction
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated import FSDP, SMALL, TENSOR, Rules, batch_for, case_of, plan, state_of, step_of

from shardlab.model.experts import balance_loss, dropless, grouped_experts, with_capacity
from shardlab.model.loss import cross_entropy
from shardlab.model.runtime import Runtime
from shardlab.model.transformer import with_params, abstract_model
from shardlab.spec.case import Case
from shardlab.spec.models import ModelConfig
from shardlab.spec.plan import Plan

MIXTURE = replace(
    SMALL, name="mixture", kv_heads=4, num_experts=8, experts_per_token=2, balance_coefficient=0.02
)
EXPERT: Rules = {"expert": ("expert",)}
ALONE = plan({"data": 1}, {}, {"batch": ("data",)})


def on(axes: dict[str, int], params: Rules, activations: Rules, optimizer: Rules | None = None, **method: Any) -> Plan:
    """As in a mesh file, experts of activations follow the parameters."""
    follow = {"expert": params["expert"]} if "expert" in params else {}
    return plan(axes, params, {**follow, **activations}, optimizer, **method)


GRIDS: dict[str, Plan] = {
    "expert": on({"expert": 8}, EXPERT, {"batch": ("expert",)}),
    "data-expert": on({"data": 2, "expert": 4}, EXPERT, {"batch": ("data", "expert")}),
    "data-expert-tensor": on(
        {"data": 2, "expert": 2, "tensor": 2}, EXPERT | TENSOR, {"batch": ("data", "expert")}
    ),
    "fsdp-expert-tensor-sequence": on(
        {"fsdp": 2, "expert": 2, "tensor": 2},
        EXPERT | FSDP | TENSOR,
        {"batch": ("fsdp", "expert"), "norm_seq": ("tensor",)},
    ),
    "fsdp": on({"fsdp": 8}, FSDP, {"batch": ("fsdp",)}),
}


def trained(case: Case) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    step, state = step_of(case), state_of(case)
    batch, points, first = batch_for(step, case), [], {}
    for _ in range(5):
        state, metrics = step.function(state, batch)
        points.append((float(metrics.loss), float(metrics.gradient_norm)))
        first = first or {path: np.array(a) for path, a in state.optimizer[1][0].mu.items()}
    return np.array(points), first


@cache
def alone(model: ModelConfig) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    return trained(case_of(ALONE, model))


@pytest.mark.parametrize("name", GRIDS)
def test_dropless_trains_as_one_device(name: str) -> None:
    points, gradients = trained(case_of(GRIDS[name], MIXTURE))
    expected_points, expected = alone(MIXTURE)
    np.testing.assert_allclose(points, expected_points, rtol=1e-5)
    for path, gradient in gradients.items():
        worst = np.abs(gradient - expected[path]).max()
        assert worst <= 1e-5 * np.abs(expected[path]).max(), path
