"""Blockwise attention against the reference that writes all scores down."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlab.model.attention import reference_attention
from shardlab.parallel import tiles as tiles_module
from shardlab.parallel.tiles import blockwise_attention, from_tiles, tile_size, to_tiles, triangle


def drawn(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32)) * 3


def results(attention: Callable[..., jax.Array], *inputs: jax.Array) -> list[np.ndarray]:
    """Out, and the gradients of queries, keys and values for a fixed gradient of out."""
    out, pull = jax.vjp(attention, *inputs)
    return [np.asarray(a) for a in (out, *pull(drawn(9, *out.shape)))]


@pytest.mark.parametrize(
    ("length", "tile", "heads", "kv_heads"),
    [(16, 4, 4, 4), (16, 16, 4, 1), (12, 3, 6, 2), (8, 1, 2, 2)],
    ids=lambda value: str(value),
)
def test_equal_to_the_reference(
    length: int, tile: int, heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles_module, "MAX_TILE", tile)
    shapes = [(2, length, h, 8) for h in (heads, kv_heads, kv_heads)]
    inputs = [drawn(i, *shape) for i, shape in enumerate(shapes)]
    for found, expected in zip(
        results(blockwise_attention, *inputs), results(reference_attention, *inputs), strict=True
    ):
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_scores_of_any_size_do_not_overflow() -> None:
    inputs = [drawn(i, 1, 8, 1, 4) * 1e3 for i in range(3)]
    np.testing.assert_allclose(blockwise_attention(*inputs), reference_attention(*inputs), rtol=1e-5)


def test_half_precision_keeps_the_softmax_in_f32() -> None:
    """As near to the f32 result as the reference in half precision is."""
    inputs = [drawn(i, 1, 64, 2, 8) for i in range(3)]
    half = [a.astype(jnp.bfloat16) for a in inputs]
    exact = np.asarray(reference_attention(*(a.astype(jnp.float32) for a in half)))
    worst = [
        np.abs(np.asarray(f(*half), np.float32) - exact).max()
        for f in (blockwise_attention, reference_attention)
    ]
    assert worst[0] <= 2 * worst[1]


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 5_000))
def test_tiles_divide_the_sequence(length: int) -> None:
    tile = tile_size(length)
    assert length % tile == 0
    assert tile <= 512
    assert not [t for t in range(tile + 1, min(length, 512) + 1) if length % t == 0]


def test_to_tiles_and_back() -> None:
    x = drawn(0, 2, 6, 4, 3)
    tiles = to_tiles(x, 2, 3)
    assert tiles.shape == (2, 2, 2, 2, 3, 3)
    assert (tiles[1, 0, 1, 0] == x[0, 3:, 2]).all()  # the second KV head's first query head
    assert (from_tiles(tiles) == x).all()


def test_a_triangle_has_no_pair_that_the_mask_hides() -> None:
    diagonal, full = (list(zip(p.query.tolist(), p.key.tolist(), strict=True)) for p in triangle(4)[:2])
    assert diagonal == [(i, i) for i in range(4)]
    assert full == [(q, k) for q in range(4) for k in range(q)]
