"""LoRA: adapters alone are trained, on any mesh as on one device; of a frozen weight nothing is reduced."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from emulated import OPTIMIZER, SMALL, asked, batch_for, case_of, mesh_of, step_of

from shardlab.analysis import analyze
from shardlab.compile import compile_step
from shardlab.parallel.step import TrainState, init_state
from shardlab.spec.case import Case

ALL = ["query", "key", "value", "output", "gate", "up", "down"]
RANK = 4
Arrays = dict[str, np.ndarray]


def state_of(case: Case) -> TrainState:
    """A fresh state; outward adapters are random, since a zero one hides the other from the gradient."""
    state = init_state(case, mesh_of(case.plan), 0, optimizer=OPTIMIZER)
    rng = np.random.default_rng(0)
    params = dict(state.params)
    for path in sorted(path for path in params if path.endswith("lora_out")):
        value = rng.normal(size=params[path].shape).astype(np.float32) / 10
        params[path] = jax.device_put(value, params[path].sharding)
    return state._replace(params=params)


def trained(case: Case) -> tuple[np.ndarray, Arrays, Arrays, Arrays]:
    """(loss, gradient norm) of five steps, first moments after one, parameters before and after."""
    step, state = step_of(case), state_of(case)
    before = {path: np.array(a) for path, a in state.params.items()}
    batch, points, first = batch_for(step, case), [], {}
    for _ in range(5):
        state, metrics = step.function(state, batch)
        points.append((float(metrics.loss), float(metrics.gradient_norm)))
        first = first or {path: np.array(a) for path, a in state.optimizer[1][0].mu.items()}
    return np.array(points), first, before, {path: np.array(a) for path, a in state.params.items()}


@pytest.mark.parametrize(
    ("axes", "features", "method"),
    [
        pytest.param({"fsdp": 2, "tensor": 4}, "seq", {}, id="fsdp-tensor-seq"),
        pytest.param({"data": 2, "fsdp": 4}, "zero1", {"accumulate": 2}, marks=pytest.mark.full, id="hsdp"),
        pytest.param({"data": 8}, "zero2", {"accumulate": 2}, marks=pytest.mark.full, id="zero2"),
        pytest.param({"tensor": 4, "y": 2}, "", {}, marks=pytest.mark.full, id="2d"),
        pytest.param({"fsdp": 8}, "", {"remat": "none"}, marks=pytest.mark.full, id="fsdp-kept"),
    ],
)
def test_adapters_train_as_on_one_device(axes: dict[str, int], features: str, method: Any) -> None:
    lora = {"lora": RANK, "lora_targets": ALL, "lora_alpha": 8}
    points, first, before, after = trained(case_of(asked(axes, features, **lora, **method)))
    expected_points, expected, _, expected_after = trained(case_of(asked({"data": 1}, **lora)))
    np.testing.assert_allclose(points, expected_points, rtol=1e-5)
    assert points[-1, 0] < points[0, 0]
    assert first.keys() == expected.keys()
    for path, gradient in first.items():
        assert np.abs(gradient - expected[path]).max() <= 1e-5 * np.abs(expected[path]).max(), path
        assert np.abs(expected[path]).max() > 0
    for path, array in after.items():
        frozen = path not in first
        assert (array == before[path]).all() == frozen, path
        assert str(array.dtype) == ("bfloat16" if frozen else "float32")
    assert set(first) == {path for path in expected_after if "/lora_" in path}


def test_an_adapter_that_starts_at_zero_changes_nothing() -> None:
    case = case_of(asked({"data": 1}, lora=RANK))
    params = init_state(case, mesh_of(case.plan), 0, optimizer=OPTIMIZER).params
    adapters = {path: a for path, a in params.items() if "/lora_" in path}
    E, H, D, N = SMALL.embed, SMALL.heads, SMALL.head_dim, SMALL.layers
    assert {path: a.shape for path, a in adapters.items()} == {
        f"layers/attention/{name}/lora_{side}": shape
        for name in ("query", "value")
        for side, shape in (("in", (N, E, RANK)), ("out", (N, RANK, H, D)))
    }
    assert all((np.asarray(a) == 0).all() == path.endswith("out") for path, a in adapters.items())


@pytest.mark.matrix
def test_no_gradient_of_a_frozen_weight_is_reduced() -> None:
    """What is reduced is the adapters' gradients (f32), the loss, and its norm: closed form; no kernel's.

    XLA:CPU makes no reduce-scatter: it all-reduces, 2 (n - 1) / n of the array, and slices.
    """
    plan = asked({"fsdp": 8}, lora=RANK, lora_targets=["query", "value"])
    step = step_of(case_of(plan))
    analysis = analyze(compile_step(step.function, *step.arguments))
    reductions = [r for r in analysis.collectives if r.kind in ("all-reduce", "reduce-scatter")]
    sent = sum(r.wire_bytes * r.executions[1] for r in reductions if r.executions[1] is not None)
    adapters = SMALL.layers * 2 * RANK * (SMALL.embed + SMALL.heads * SMALL.head_dim)
    scalars = 256  # bytes: the loss, and squares of gradients
    assert 0 <= sent - 2 * 7 / 8 * adapters * 4 <= scalars
