"""Serving with int8 and fp8 weights: the program, its error, the bytes it holds and gathers."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated import GROUPED, TENSOR, PROMPT_BxL, case_of, inference, params_of, plan, prefilled

from shardlab.compile import compile_case
from shardlab.errors import Infeasible
from shardlab.model.quantise import Quantised, dequantised
from shardlab.model.runtime import Runtime
from shardlab.model.transformer import Params, abstract_model, with_params
from shardlab.parallel.weights import quantise_weights
from shardlab.spec.case import Case, make_case
from shardlab.spec.models import find_model

F32 = Runtime(compute_dtype=np.float32)
FORMATS = ("int8", "fp8")


def alone(weights: str) -> Case:
    return case_of(plan({"data": 1}, {}, {}, weights=weights), GROUPED, workload="prefill")


def small(weights: str) -> dict[str, Any]:
    return quantise_weights(alone(weights), {path: jnp.asarray(a) for path, a in params_of(GROUPED).items()})


@pytest.mark.parametrize("weights", FORMATS)
def test_each_weight_is_as_near_as_its_type_allows(weights: str) -> None:
    """int8: within half a step of its channel's scale. e4m3 (3 bits of mantissa): within 2^-4 of itself, or
    half of the smallest step, which is 2^-9 of the scale."""
    found = small(weights)
    kernels = [path for path in found if path.endswith("/kernel")]
    assert kernels == [path for path, a in found.items() if isinstance(a, Quantised)]
    for path in kernels:
        q, w = found[path], params_of(GROUPED)[path]
        scale = np.asarray(q.scale)
        bound = scale / 2 if weights == "int8" else np.maximum(np.abs(w) / 16, scale * 2.0**-10)
        assert (np.abs(np.asarray(dequantised(q, jnp.float32)) - w) <= bound * (1 + 1e-5)).all(), path
        outputs = (
            np.prod(w.shape[-2:])
            if path.endswith(("query/kernel", "key/kernel", "value/kernel"))
            else w.shape[-1]
        )
        stack = w.shape[0] if path.startswith("layers") else 1
        assert q.scale.size == stack * outputs  # one scale per output channel


LAYOUTS = {
    "fsdp": plan({"data": 8}, {"embed": ("data",)}, {"batch": ("data",)}),
    "tensor-positions": plan({"tensor": 2, "x": 4}, TENSOR, {"cache": ("x",)}),
}


@pytest.mark.parametrize(
    ("layout", "weights"),
    [("fsdp", "int8"), pytest.param("tensor-positions", "fp8", marks=pytest.mark.matrix)],
)
def test_on_a_mesh_as_on_one_device(layout: str, weights: str) -> None:
    asked = LAYOUTS[layout]
    method = asked.method.model_copy(update={"weights": weights})
    found = inference(asked.model_copy(update={"method": method}), GROUPED)
    expected = inference(alone(weights).plan, GROUPED)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def logits_of(params: Params) -> jax.Array:
    """Of the last of four tokens, eight numbers of the vocabulary."""
    model = with_params(abstract_model(GROUPED), params)
    return model(PROMPT_BxL[:1, :4], F32)[0, -1, :8]


@cache
def slopes() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The unquantised logits [8], and their derivatives by each weight [8, ...]."""
    params = {path: jnp.asarray(a) for path, a in params_of(GROUPED).items()}
    return np.asarray(logits_of(params)), jax.tree.map(np.asarray, jax.jit(jax.jacrev(logits_of))(params))


@pytest.mark.parametrize("weights", FORMATS)
def test_the_error_of_the_model_is_that_of_rounding_its_weights(weights: str) -> None:
    """Rounding errors are taken as independent and even within a step d: variance d²/12 each (Widrow and
    Kollar, Quantization Noise, chapter 1). By the slopes of the unquantised model, a logit's variance is the
    sum of slope² d²/12: the error stays within five deviations, and is not far below one."""
    exact, slope = slopes()
    variance = np.zeros(8)
    for path, q in small(weights).items():
        if isinstance(q, Quantised):
            scale, w = np.asarray(q.scale), np.abs(params_of(GROUPED)[path])
            # A step of e4m3: 2^-3 of the power of two at or below the number, from 2^-6 of the scale on.
            exponent = np.floor(np.log2(np.maximum(w / scale, 2.0**-6)))
            step = scale if weights == "int8" else scale * 2.0 ** (exponent - 3)
            variance += (slope[path] ** 2 * step**2 / 12).reshape(8, -1).sum(1)
    held = jax.tree.map(
        lambda a: dequantised(a, jnp.float32) if isinstance(a, Quantised) else a,
        small(weights),
        is_leaf=lambda a: isinstance(a, Quantised),
    )
    error = (np.asarray(jax.jit(logits_of)(held)) - exact) / np.sqrt(variance)
    assert np.abs(error).max() < 5
    assert np.abs(error).max() > 0.5


@pytest.mark.parametrize("weights", FORMATS)
def test_scaled_after_the_product_as_before_it(weights: str) -> None:
    """The step on small weights against the plain model on the same weights made large again."""
    model = abstract_model(GROUPED)
    params = jax.tree.map(
        lambda a: dequantised(a, jnp.float32) if isinstance(a, Quantised) else a,
        small(weights),
        is_leaf=lambda a: isinstance(a, Quantised),
    )
    expected, _ = jax.jit(lambda p: with_params(model, p).prefill(PROMPT_BxL, F32))(params)
    found, _ = prefilled(alone(weights).plan, GROUPED)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_weights_that_train_or_have_experts_are_answered() -> None:
    for model, workload, reason in (
        ("tiny", "train", "which updates its weights"),
        ("mixtral-8x7b", "decode", "for a model with experts"),
    ):
        with pytest.raises(Infeasible, match=reason):
            make_case(alone("int8").plan, find_model(model), "cpu:1", 8, 16, workload)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.full
@pytest.mark.parametrize(
    "weights",
    ["bf16", *FORMATS],
)
def test_the_bytes_that_a_device_holds(weights: str) -> None:
    """Eight H100s, tensor parallel: an eighth of every kernel and scale, the cache, and eight slots."""
    model = replace(GROUPED, kv_heads=8)
    asked = plan({"tensor": 8}, TENSOR, {}, weights=weights)
    case = case_of(asked, model, machine="h100:1x8", batch=8, seq=64, workload="decode")
    kernels = sum(p.size for p in case.parameters() if p.path.endswith("/kernel"))
    norms = sum(p.size for p in case.parameters() if "norm" in p.path)
    # Outputs per layer: heads and KV heads, gate and up, split; those of output and down, whole.
    split = model.layers * (3 * 64 + 2 * model.mlp) + model.padded_vocab
    scales = 4 * (split // 8 + model.layers * 2 * model.embed)
    held = 2 * norms + 2 * model.padded_vocab * model.embed // 8
    held += kernels // 8 * 2 if weights == "bf16" else kernels // 8 + scales
    cache_bytes = 2 * model.layers * 8 * 64 * model.kv_heads * model.head_dim * 2 // 8
    memory = compile_case(case, find_largest_batch=False).memory
    assert memory is not None
    # A token and a position for each slot; the count of one token a slot is not used.
    assert memory.argument_bytes == held + cache_bytes + 2 * 4 * 8
