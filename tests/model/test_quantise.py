"""fp8 and int8 products: as near to the exact ones as the formats' steps say, and a model still learns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardlab.model.quantise import dequantised, quantised, quantised_project, quantised_tokens
from shardlab.model.runtime import Runtime, project

F32 = Runtime(compute_dtype=jnp.float32)
# Half a step of a float with m bits of mantissa, relative: 2^-(m+1). arXiv:2209.05433, table 1: e4m3 has 3
# bits, e5m2 has 2.
HALF_STEP = {"e4m3": 2.0**-4, "e5m2": 2.0**-3}
SMALLEST = {"e4m3": 2.0**-9, "e5m2": 2.0**-16}  # subnormals, the step around zero: table 1
LARGEST = {"e4m3": 448.0, "e5m2": 57_344.0}
DTYPES: dict[str, Any] = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}


def off_by(x: np.ndarray, kind: str, summed: tuple[int, ...] = ()) -> np.ndarray:
    """The largest error of each element once it is quantised: from the format's definition alone."""
    if kind == "int8":
        return np.broadcast_to(np.abs(x).max(summed, keepdims=True) / 127 / 2, x.shape)
    around_zero = np.abs(x).max(summed or None, keepdims=True) / LARGEST[kind] * SMALLEST[kind] / 2
    return np.maximum(np.abs(x) * HALF_STEP[kind], around_zero)


def product_bound(a: np.ndarray, b: np.ndarray, off_a: np.ndarray, off_b: np.ndarray) -> np.ndarray:
    """|(a + da)(b + db) - ab| is at most |a| db + da |b| + da db; and a little for sums in f32."""
    bound = np.abs(a) @ off_b + off_a @ np.abs(b) + off_a @ off_b
    return bound * (1 + 1e-5) + 1e-5 * (np.abs(a) @ np.abs(b))


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_floats_are_rounded_by_half_a_step_at_most(kind: str) -> None:
    x = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32) * 1e-3
    q = quantised(jnp.array(x), DTYPES[kind])
    assert float(jnp.abs(q.values.astype(jnp.float32)).max()) == LARGEST[kind]
    back = np.asarray(dequantised(q, jnp.float32))
    assert (np.abs(back - x) <= off_by(x, kind) * (1 + 1e-5)).all()


def test_integers_have_one_scale_for_what_is_summed() -> None:
    x = np.array([[1.0, -127.0], [2.0, 0.5], [0.0, 0.0]], np.float32)
    q = quantised(jnp.array(x), jnp.int8, (1,))
    np.testing.assert_array_equal(q.values, [[1, -127], [127, 32], [0, 0]])  # 0.5 is 31.75 steps of 2 / 127
    np.testing.assert_allclose(q.scale, [[1.0], [2 / 127], [1.0]], rtol=1e-6)


# Types of inputs and weights, of gradients; whether a row has a scale of its own.
KINDS = {
    "fp8": ("e4m3", "e5m2", False),
    "fp8-rowwise": ("e4m3", "e4m3", True),
    "int8": ("int8", "int8", True),
}


@pytest.mark.parametrize("format", KINDS)
def test_a_product_and_both_gradients(format: Any) -> None:
    rng = np.random.default_rng(0)
    kernel, x, dy = (rng.normal(size=s).astype(np.float32) for s in ((48, 32), (64, 48), (64, 32)))
    x[:, 3] *= 30  # an outlier, which stretches the scale
    run = replace(F32, project=quantised_project(format))
    y, pull = jax.vjp(
        lambda k, x: run.project(k, ("embed", "mlp"), x, 1, run), jnp.array(kernel), jnp.array(x)
    )
    d_kernel, dx = pull(jnp.array(dy))
    weights, grads, per_row = KINDS[format]
    row, column = ((1,), (0,)) if per_row else ((), ())
    pairs = {
        "y": (y, x, kernel, off_by(x, weights, row), off_by(kernel, weights, column)),
        "dx": (dx, dy, kernel.T, off_by(dy, grads, row), off_by(kernel.T, weights, column)),
    }
    if format != "int8":
        pairs["d_kernel"] = (d_kernel, x.T, dy, off_by(x.T, weights, row), off_by(dy, grads, column))
    else:  # in the compute type
        np.testing.assert_allclose(d_kernel, x.T @ dy, rtol=1e-4, atol=1e-4)
    for name, (found, a, b, off_a, off_b) in pairs.items():
        error, bound = np.abs(np.asarray(found) - a @ b), product_bound(a, b, off_a, off_b)
        assert (error <= bound).all(), name
        assert error.max() > 1e-3 * bound.max(), name  # it was quantised


@pytest.mark.parametrize("format", KINDS)
def test_products_of_shards_add_up_to_the_product(format: Any) -> None:
    """What is summed lies in four shards of heads: scales are those of whole arrays, so that only sums are
    rounded differently."""
    rng = np.random.default_rng(0)
    kernel, x, dy = (
        jnp.array(rng.normal(size=s).astype(np.float32)) for s in ((8, 4, 16), (2, 6, 8, 4), (2, 6, 16))
    )
    axes = ("heads", "head_dim", "embed")
    found = []
    for ways in (1, 4):
        run = replace(
            F32, project=quantised_project(format), ways=lambda axis, n=ways: n if axis == "heads" else 1
        )
        y, pull = jax.vjp(lambda k, x, run=run: run.project(k, axes, x, 2, run), kernel, x)
        found.append((y, *pull(dy)))
    for whole, of_shards in zip(*found, strict=True):
        np.testing.assert_allclose(of_shards, whole, rtol=1e-5, atol=1e-5)


def test_tokens_that_are_quantised_once_give_the_same_numbers() -> None:
    rng = np.random.default_rng(0)
    kernel, x, dy = (
        jnp.array(rng.normal(size=s).astype(np.float32)) for s in ((16, 8), (2, 6, 16), (2, 6, 8))
    )
    run = replace(F32, project=quantised_project("fp8"), small_tokens=quantised_tokens)

    def product(kernel: jax.Array, x: jax.Array, take: Any) -> jax.Array:
        return run.project(kernel, ("embed", "mlp"), take(x, run), 1, run)

    once, each = (
        (y, *pull(dy))
        for y, pull in (
            jax.vjp(lambda k, x, take=take: product(k, x, take), kernel, x)
            for take in (quantised_tokens, lambda x, _: x)
        )
    )
    jax.tree.map(np.testing.assert_array_equal, once, each)


def test_the_head_is_not_quantised() -> None:
    kernel, x = jax.random.normal(jax.random.key(0), (2, 16, 16))
    run = replace(F32, project=quantised_project("fp8"))
    exact = project(kernel, ("embed", "vocab"), x, 1, F32)
    np.testing.assert_array_equal(run.project(kernel, ("embed", "vocab"), x, 1, run), exact)
    assert (run.project(kernel, ("embed", "mlp"), x, 1, run) != exact).any()
