"""Prefill and decode on a mesh equal one device, in logits and in the cache; slots equal sequences alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
from emulated import (
    GROUPED,
    PLANS,
    SMALL,
    TENSOR,
    PROMPT_BxL,
    case_of,
    inference,
    params_of,
    plan,
    prefilled,
    served_params,
    slots_of,
    step_of,
)

from shardlab.model.cache import KeysValues
from shardlab.model.runtime import Runtime
from shardlab.model.transformer import abstract_model, with_params
from shardlab.spec.models import ModelConfig
from shardlab.spec.plan import Plan

EMBED = {"embed": ("data",)}
X = ("tensor", "x")
SPLIT_HEADS = {axis: X for axis in ("heads", "mlp", "vocab")}
# Each id says what the cache is split by.
LAYOUTS: dict[str, tuple[Plan, ModelConfig]] = {
    "batch": (plan({"data": 8}, EMBED, {"batch": ("data",)}), GROUPED),
    "heads": (plan({"tensor": 8}, TENSOR, {}), SMALL),
    "heads-replicated": (plan({"tensor": 8}, TENSOR, {}), GROUPED),
    "heads-part": (plan({"tensor": 2, "x": 4}, SPLIT_HEADS | {"kv_heads": ("tensor",)}, {}), GROUPED),
    "positions": (plan({"x": 8}, {}, {"cache": ("x",)}), GROUPED),
    "positions-two-axes": (plan({"x": 2, "y": 4}, {}, {"cache": ("x", "y")}), GROUPED),
    # 2 KV heads for 8 devices of tensor parallelism: what KV heads cannot split, positions do.
    "heads-positions": (
        plan({"tensor": 2, "x": 4}, SPLIT_HEADS | {"kv_heads": ("tensor",)}, {"cache": ("x",)}),
        GROUPED,
    ),
    "positions-tensor": (
        plan({"tensor": 8}, {axis: ("tensor",) for axis in SPLIT_HEADS}, {"cache": ("tensor",)}),
        GROUPED,
    ),
    "all-three": (
        plan({"data": 2, "tensor": 2, "x": 2}, TENSOR | EMBED, {"batch": ("data",), "cache": ("x",)}),
        GROUPED,
    ),
}
IN_FULL = ("batch", "heads", "heads-part", "positions", "positions-tensor", "positions-two-axes")


@cache
def on_one_device(model: ModelConfig) -> tuple[np.ndarray, KeysValues]:
    return inference(PLANS["one-device"], model)


def check_inference(plan: Plan, model: ModelConfig) -> None:
    logits, held = inference(plan, model)
    expected, expected_held = on_one_device(model)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    for found, wanted in zip(held, expected_held, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.full] if n in IN_FULL else []) for n in LAYOUTS]
)
def test_a_cache_split_by(name: str) -> None:
    check_inference(*LAYOUTS[name])


CONTEXT: dict[str, dict[str, Any]] = {
    "ring": {"axes": {"split": 4}, "seq": ("split",), "cache": ("split",)},
    "all-gather": {"axes": {"split": 4}, "seq": ("split",), "cache": ()},
    "ulysses": {"axes": {"split": 8}, "seq": ("split",), "cache": ("split",)},
    "ring+ulysses": {"axes": {"r": 2, "u": 2}, "seq": ("r", "u"), "cache": ("r", "u")},
}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=[pytest.mark.full] if k in ("all-gather", "ulysses") else []) for k in CONTEXT],
)
def test_a_prompt_split_over_devices_leaves_the_cache_in_natural_order(kind: str) -> None:
    """Logits and cache of a context parallel prefill equal those of one device."""
    asked = CONTEXT[kind]
    split = plan(asked["axes"], {}, {"seq": asked["seq"], "cache": asked["cache"]}, context=kind)
    logits, held = prefilled(split, SMALL)
    expected, expected_held = prefilled(PLANS["one-device"], SMALL)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    for found, wanted in zip(held, expected_held, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


LENGTHS = np.array([0, 1, 5, 7, 8, 11, 14, 3])  # what each of eight slots holds
COUNTS = np.array([4, 1, 4, 1, 3, 1, 2, 4])  # new tokens: four of a prompt at a time beside slots that decode


def slots_after(plan: Plan, count_B: np.ndarray) -> tuple[np.ndarray, KeysValues]:
    """One step of eight slots that hold `LENGTHS` tokens of the prompts; what is beyond them is noise."""
    chunk = int(count_B.max())
    asked = plan.model_copy(update={"method": plan.method.model_copy(update={"chunk": chunk})})
    step = step_of(case_of(asked, GROUPED, workload="decode", batch=8))
    _, held = prefilled(PLANS["one-device"], GROUPED)
    noise = np.random.default_rng(1).normal(size=held.keys[:, :8].shape)
    empty = np.arange(noise.shape[2])[None, :] >= LENGTHS[:, None]
    dirty = (np.where(empty[None, :, :, None, None], noise, a[:, :8]) for a in held)
    cache = jax.tree.map(
        lambda a, leaf: jax.device_put(a.astype(leaf.dtype), leaf.sharding),
        KeysValues(*dirty),
        step.arguments[1],
    )
    places = np.minimum(LENGTHS[:, None] + np.arange(chunk), PROMPT_BxL.shape[1] - 1)
    real = np.arange(chunk)[None] < count_B[:, None]
    tokens = np.where(real, np.take_along_axis(PROMPT_BxL[:8], places, axis=1), 99)
    logits, cache = step.function(
        served_params(step, GROUPED), cache, slots_of(step, tokens, LENGTHS, count_B)
    )
    return np.asarray(logits), jax.tree.map(np.asarray, cache)


@cache
def without_cache() -> np.ndarray:
    """Logits [B, L, V] of whole prompts: causal, so those of every beginning of each prompt alone."""
    params = {path: jax.numpy.asarray(a) for path, a in params_of(GROUPED).items()}
    model = with_params(abstract_model(GROUPED), params)
    run = Runtime(compute_dtype=np.float32)
    return np.asarray(jax.jit(lambda tokens: model(tokens, run))(PROMPT_BxL))


@pytest.mark.parametrize("counts", [np.ones_like(COUNTS), COUNTS], ids=["decode", "chunks"])
@pytest.mark.parametrize(
    "name", ["all-three", *(pytest.param(n, marks=pytest.mark.full) for n in ("one-device", "positions"))]
)
def test_each_slot_is_at_its_own_position(name: str, counts: np.ndarray) -> None:
    """Decoding, and prompts in chunks beside it: each slot as its sequence alone; noise is not seen."""
    asked = PLANS[name] if name in PLANS else LAYOUTS[name][0]
    logits, held = slots_after(asked, counts)
    _, whole = prefilled(PLANS["one-device"], GROUPED)
    for slot, end in enumerate(LENGTHS + counts):
        wanted_logits = without_cache()[slot, end - 1]
        np.testing.assert_allclose(logits[slot], wanted_logits, rtol=1e-4, atol=1e-5)
        for found, wanted in zip(held, whole, strict=True):  # the prompt's own entries, where they belong
            np.testing.assert_allclose(found[:, slot, :end], wanted[:, slot, :end], rtol=1e-4, atol=1e-5)
