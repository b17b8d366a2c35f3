"""Windows and chunks: every kernel against a mask written out pair by pair, and models of which some layers
see all."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated import GROUPED, PLANS, SMALL, PROMPT_BxL, asked, case_of, inference, params_of, plan

from shardlab.cost.flops import model_flops
from shardlab.errors import Infeasible
from shardlab.model.attention import in_chunks, reference_attention, splash_attention
from shardlab.model.cache import first_seen
from shardlab.model.runtime import Runtime
from shardlab.model.transformer import abstract_model, with_params
from shardlab.parallel.kernels import choose_kernel
from shardlab.parallel.tiles import blockwise_attention
from shardlab.spec.case import check_feasible
from shardlab.spec.locality import Locality
from shardlab.spec.models import ModelConfig, Rope

Attention = Callable[..., jax.Array]


def seen(length: int, window: int, chunk: int) -> np.ndarray:
    """[L, L], one pair after the other."""
    found = np.zeros((length, length), bool)
    for query, key in itertools.product(range(length), repeat=2):
        near = not window or query - key < window
        found[query, key] = key <= query and near and (not chunk or query // chunk == key // chunk)
    return found


def by_hand(q: jax.Array, k: jax.Array, v: jax.Array, *, window: int, chunk: int) -> jax.Array:
    """A softmax over what is seen, in f32."""
    k, v = (jnp.repeat(a, q.shape[2] // k.shape[2], axis=2) for a in (k, v))
    scores = jnp.einsum("blhd,bshd->bhls", q, k) / np.sqrt(q.shape[-1])
    weights = jnp.where(seen(q.shape[1], window, chunk), jnp.exp(scores - scores.max(-1, keepdims=True)), 0)
    return jnp.einsum("bhls,bshd->blhd", weights / weights.sum(-1, keepdims=True), v)


def check_kernel(attention: Attention, length: int, heads: int, dim: int, window: int, chunk: int) -> None:
    """In result and gradients."""
    keys = jax.random.split(jax.random.key(1), 4)
    q, d_out = (jax.random.normal(key, (2, length, heads, dim)) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, length, heads // 2, dim)) for key in keys[2:])

    @jax.jit
    def both() -> list[list[jax.Array]]:
        results = []
        for attend in (attention, partial(by_hand, window=window, chunk=chunk)):
            out, pull = jax.vjp(attend, q, k, v)
            results.append([out, *pull(d_out)])
        return results

    for ours, truth in zip(*both(), strict=True):
        np.testing.assert_allclose(ours, truth, rtol=1e-4, atol=1e-4)


LOCAL = {
    "itself-alone": (24, 1, 0),
    "window": (24, 5, 0),
    "window-of-the-sequence": (24, 24, 0),
    "chunks": (24, 0, 8),
    "chunks-and-a-rest": (20, 0, 8),
    "a-chunk-beyond-the-sequence": (20, 0, 99),
    "a-window-in-chunks": (20, 3, 8),
}
EACH = [pytest.param(*value, id=name) for name, value in LOCAL.items()]


def some(*names: str) -> list[object]:
    """All of them; the full set alone tries others than these."""
    marks = {name: () if name in names else pytest.mark.full for name in LOCAL}
    return [pytest.param(*value, id=name, marks=marks[name]) for name, value in LOCAL.items()]


@pytest.mark.parametrize(("length", "window", "chunk"), some("a-window-in-chunks"))
def test_the_reference(length: int, window: int, chunk: int) -> None:
    check_kernel(partial(reference_attention, window=window, chunk=chunk), length, 2, 4, window, chunk)


@pytest.mark.parametrize(("length", "window", "chunk"), some("a-window-in-chunks"))
def test_chunks_as_sequences_of_their_own(length: int, window: int, chunk: int) -> None:
    attention: Attention = partial(reference_attention, window=window)
    check_kernel(in_chunks(attention, chunk or length), length, 2, 4, window, chunk)


@pytest.mark.parametrize(
    ("length", "window"),
    [
        pytest.param(8, 5, id="one-tile", marks=pytest.mark.full),
        pytest.param(32, 1, id="diagonals", marks=pytest.mark.full),
        pytest.param(32, 3, id="less-than-a-tile", marks=pytest.mark.full),
        pytest.param(32, 16, id="whole-tiles", marks=pytest.mark.full),
        # The last query of a tile sees all but the first key of the tile two before it.
        pytest.param(32, 23, id="two-far-edges"),
    ],
)
def test_blockwise_windows(length: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tiles of 8."""
    monkeypatch.setattr("shardlab.parallel.tiles.MAX_TILE", 8)
    check_kernel(partial(blockwise_attention, window=window), length, 2, 4, window, 0)


@pytest.mark.parametrize("window", [129, pytest.param(1, marks=pytest.mark.full)])
def test_splash_windows(window: int) -> None:
    """Three tiles of 128, of which the last does not meet the first."""
    check_kernel(partial(splash_attention, window=window, interpret=True), 384, 2, 64, window, 0)


@pytest.mark.parametrize(("length", "window", "chunk"), EACH)
def test_the_first_that_is_seen(length: int, window: int, chunk: int) -> None:
    """By a token that is decoded; every third layer sees all."""
    model = replace(SMALL, window=window, attention_chunk=chunk, global_every=3)
    position_BxL = jnp.arange(length)[None]
    for layer, far in enumerate([False, False, True]):
        (found_L,) = np.asarray(first_seen(model, position_BxL, jnp.asarray(layer)))
        expected = np.zeros(length, int) if far else seen(length, window, chunk).argmax(axis=1)
        np.testing.assert_array_equal(found_L, expected)


@pytest.mark.parametrize("every", [0, 3], ids=["all-layers", "every-third-sees-all"])
@pytest.mark.parametrize(("length", "window", "chunk"), EACH)
@pytest.mark.parametrize("kind", ["causal", "full"])
def test_model_flops_by_hand(length: int, window: int, chunk: int, every: int, kind: str) -> None:
    """Full: every pair of a square of the sequence or chunk, and of a window w each query's w."""
    model = replace(SMALL, layers=7, window=window, attention_chunk=chunk, global_every=every)
    size = chunk or length
    segments = [min(size, length - start) for start in range(0, length, size)]
    local = 0
    for s in segments:
        w = min(window or s, s)
        local += 2 * s * w - (w * w if kind == "causal" else 0)
    everywhere = 2 * length**2 - (length**2 if kind == "causal" else 0)
    pairs = (5 * local + 2 * everywhere) if every else 7 * local  # of seven layers the third and the sixth
    one, none = (model_flops(m, 3, length, "train", kind) for m in (model, replace(model, head_dim=0)))  # type: ignore[arg-type]
    weights = 6 * 3 * length * 7 * 4 * SMALL.embed * SMALL.heads * SMALL.head_dim
    assert one - none - weights == 3 * 3 * 2 * SMALL.heads * 2 * SMALL.head_dim * pairs // 2


def test_model_flops_are_those_of_the_pairs() -> None:
    """Half of a square stands for L · (L + 1) / 2 pairs: off by L / 2 at most."""
    for length, window, chunk in LOCAL.values():
        half = Locality(window, chunk).pairs_times_two(length, causal=True) / 2
        assert half <= seen(length, window, chunk).sum() <= half + length / 2


PATTERN = replace(
    GROUPED,
    name="pattern",
    layers=5,
    window=5,
    global_every=2,
    global_rope=Rope(100.0, scaling=4.0),
    query_scalar=12,
    query_key_norms=True,
    post_norms=True,
)
CHUNKS = replace(GROUPED, name="chunks", layers=3, attention_chunk=6, global_every=3)
MODELS = [
    pytest.param(PATTERN, id="two-groups-and-one-layer"),
    pytest.param(CHUNKS, id="one-group", marks=pytest.mark.full),
]


def layer_by_layer(model: ModelConfig, params: dict[str, jax.Array]) -> jax.Array:
    """Logits [B, L, V] of the prompt: each layer by itself, with the mask that its number says."""
    unrolled = {path: a for path, a in params.items() if not path.startswith("layers/")}
    for path in params.keys() - unrolled.keys():
        for index in range(model.layers):
            unrolled[path.replace("layers/", f"layers/{index}/", 1)] = params[path][index]
    module = with_params(abstract_model(model, scan_layers=False), unrolled)
    run = Runtime(compute_dtype=jnp.float32)
    x_BxLxE = module.embed(PROMPT_BxL, run)
    position_L = jnp.arange(PROMPT_BxL.shape[1])
    for number, layer in enumerate(module.layers, start=1):
        local = number % model.global_every != 0
        window, chunk = (model.window, model.attention_chunk) if local else (0, 0)
        own = replace(run, attention=partial(by_hand, window=window, chunk=chunk), sees_all=not local)
        x_BxLxE, _, _ = layer(x_BxLxE, position_L, own)
    return module.logits(x_BxLxE, run)[..., : model.vocab]


@pytest.mark.parametrize("model", MODELS)
def test_layers_in_groups_are_as_one_after_the_other(model: ModelConfig) -> None:
    """In logits and in the gradients of all parameters."""
    local = partial(reference_attention, window=model.window, chunk=model.attention_chunk)
    run = Runtime(compute_dtype=jnp.float32, attention=local)

    def in_groups(params: dict[str, jax.Array]) -> jax.Array:
        return with_params(abstract_model(model), params)(PROMPT_BxL, run)[..., : model.vocab]

    @jax.jit
    def both(params: dict[str, jax.Array]) -> list[dict[str, jax.Array]]:
        results = []
        for logits_of in (in_groups, partial(layer_by_layer, model)):
            logits, pull = jax.vjp(logits_of, params)
            (gradients,) = pull(jax.random.normal(jax.random.key(2), logits.shape))
            results.append({"logits": logits, **gradients})
        return results

    found, wanted = both({path: jnp.asarray(a) for path, a in params_of(model).items()})
    assert found.keys() == wanted.keys()
    for path, expected in wanted.items():
        np.testing.assert_allclose(found[path], expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("axes", "activations"),
    [
        pytest.param({"data": 1}, {"batch": ("data",)}, id="one-device", marks=pytest.mark.full),
        pytest.param({"x": 8}, {"cache": ("x",)}, id="positions-split"),
    ],
)
@pytest.mark.parametrize("model", MODELS)
def test_a_cache_is_seen_as_far(
    model: ModelConfig, axes: dict[str, int], activations: dict[str, tuple[str, ...]]
) -> None:
    """Prefill's logits and those of the last token decoded after it."""
    params = {path: jnp.asarray(a) for path, a in params_of(model).items()}
    expected = np.asarray(jax.jit(partial(layer_by_layer, model))(params))[:, -1]
    for logits in inference(plan(axes, {}, activations), model)[0]:
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("target", "changes", "kernel", "note"),
    [
        pytest.param("cpu", {"window": 100}, "reference", "", id="cpu"),
        pytest.param("gpu", {"window": 100}, "cudnn", "", id="gpu-window"),
        pytest.param("gpu", {"attention_chunk": 100}, "cudnn", "", id="gpu-chunks"),
        pytest.param("tpu", {"window": 100}, "splash", "", id="tpu-window"),
        pytest.param("tpu", {"attention_chunk": 128}, "splash", "", id="tpu-chunks"),
        pytest.param("tpu", {"attention_chunk": 100}, "reference", "tiles of 128", id="tpu-odd-chunks"),
        pytest.param("tpu", {"attention_chunk": 900}, "splash", "", id="tpu-a-chunk-beyond-the-sequence"),
    ],
)
def test_kernel_of_a_local_attention(target: str, changes: dict[str, int], kernel: str, note: str) -> None:
    case = case_of(PLANS["data"], replace(SMALL, head_dim=64, **changes), seq=256)  # type: ignore[arg-type]
    chosen, notes = choose_kernel(case, target)
    assert chosen == kernel
    assert (note in notes[0]) if note else notes == ()


@pytest.mark.parametrize(
    ("changes", "axes", "method", "reason", "nearest"),
    [
        pytest.param(
            {"window": 5}, {"context": 8}, {"context": "ring"}, "a window of 5", "ulysses", id="ring"
        ),
        pytest.param(
            {"attention_chunk": 8},
            {"context": 8},
            {"context": "all-gather"},
            "chunks of 8",
            "seq at most 8",
            id="all-gather",
        ),
        pytest.param(
            {"window": 5, "global_every": 2},
            {"stage": 2, "data": 4},
            {"pipeline": "1f1b", "microbatches": 4},
            "a pipeline of layers",
            "pipeline = 'none'",
            id="pattern-in-a-pipeline",
        ),
        pytest.param(
            {"global_every": 2, "global_rope": Rope(100.0)},
            {"stage": 2, "data": 4},
            {"pipeline": "1f1b", "microbatches": 4},
            "layers that differ in positions in a pipeline",
            "pipeline = 'none'",
            id="positions-in-a-pipeline",
        ),
        pytest.param(
            {"num_experts": 4, "experts_per_token": 2, "post_norms": True},
            {"data": 8},
            {},
            "experts with norms after them",
            "a dense MLP",
            id="experts-with-norms-after-them",
        ),
    ],
)
def test_refused_with_what_would_do(
    changes: dict[str, Any], axes: dict[str, int], method: dict[str, object], reason: str, nearest: str
) -> None:
    model = replace(SMALL, **changes)
    case = case_of(asked(axes, **method), model)
    with pytest.raises(Infeasible, match=reason) as caught:
        check_feasible(case)
    assert nearest in (caught.value.nearest or "")
    check_feasible(case.model_copy(update={"model": SMALL}))
