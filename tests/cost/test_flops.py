from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from shardlab.cost.flops import Flops, hardware_flops, model_flops
from shardlab.hlo.reader import parse
from shardlab.spec.models import ModelConfig, find_model

N = 64  # every matrix is N x N
PRODUCT = 2 * N**3
SQUARE = jax.ShapeDtypeStruct((N, N), jnp.float32)


def compiled_flops(function, *arguments):
    (module,) = parse(jax.jit(function).lower(*arguments).compile().as_text())
    return hardware_flops(module)


def layer(x_NxN, w_NxN):
    return jnp.tanh(x_NxN @ w_NxN), None


def scan(length, **options):
    weights_LxNxN = jax.ShapeDtypeStruct((length, N, N), jnp.float32)
    return lambda x, w: jax.lax.scan(layer, x, w, **options)[0], weights_LxNxN


@pytest.mark.parametrize(("length", "options"), [(1, {}), (2, {}), (10, {}), (10, {"unroll": 3}), (100, {})])
def test_scans_count_every_trip(length, options):
    # HLO.md section 4.3: XLA's own cost_analysis counts the body once whatever the length.
    function, weights = scan(length, **options)
    assert compiled_flops(function, SQUARE, weights) == Flops(matmul=length * PRODUCT, attention=0)


def test_nested_loops_multiply():
    def inner(x, w):
        return jax.lax.scan(lambda x, _: layer(x, w), x, None, length=5)[0], None

    weights = jax.ShapeDtypeStruct((4, N, N), jnp.float32)
    assert compiled_flops(lambda x, w: jax.lax.scan(inner, x, w)[0], SQUARE, weights).matmul == 20 * PRODUCT


@pytest.mark.parametrize(
    ("wrap", "products"),
    [
        # Per layer: one forward, two backward (dx, dw).
        pytest.param(lambda body: body, 3, id="no-remat"),
        # tanh's derivative needs its result, so the product is computed again.
        pytest.param(jax.checkpoint, 4, id="remat"),
    ],
)
def test_gradient_of_a_scan_includes_recomputation(wrap, products):
    def loss(x, w):
        return jax.lax.scan(wrap(layer), x, w)[0].sum()

    weights = jax.ShapeDtypeStruct((6, N, N), jnp.float32)
    assert compiled_flops(jax.grad(loss, argnums=(0, 1)), SQUARE, weights).matmul == 6 * products * PRODUCT


def test_unbounded_loop_is_unknown_not_one():
    def run(x, w, steps):
        return jax.lax.while_loop(lambda s: s[0] < steps, lambda s: (s[0] + 1, layer(s[1], w)[0]), (0, x))

    steps = jax.ShapeDtypeStruct((), jnp.int32)
    flops = compiled_flops(run, SQUARE, SQUARE, steps)
    assert flops.matmul is None
    assert flops.total is None
    assert flops.attention == 0


def test_conditional_takes_its_dearest_branch():
    branches = [lambda x, w: x, lambda x, w: x @ w, lambda x, w: (x @ w) @ w]
    flops = compiled_flops(
        lambda i, x, w: jax.lax.switch(i, branches, x, w), jax.ShapeDtypeStruct((), jnp.int32), SQUARE, SQUARE
    )
    assert flops.matmul == 2 * PRODUCT  # not 3: only one branch runs


@pytest.mark.parametrize(
    ("spec", "a", "b", "expected"),
    [
        ("ij,jk->ik", (3, 5), (5, 7), 2 * 3 * 5 * 7),
        ("bij,bjk->bik", (4, 3, 5), (4, 5, 7), 2 * 4 * 3 * 5 * 7),
        ("bqhd,bkhd->bhqk", (2, 8, 4, 16), (2, 6, 4, 16), 2 * 2 * 4 * 8 * 6 * 16),
        ("ijk,kjl->il", (3, 4, 5), (5, 4, 7), 2 * 3 * 20 * 7),
    ],
)
def test_einsums(spec, a, b, expected):
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (a, b)]
    assert compiled_flops(lambda a, b: jnp.einsum(spec, a, b), *shapes).matmul == expected


@pytest.mark.parametrize(
    ("dtype", "result"),
    [(jnp.float8_e4m3fn, jnp.float32), (jnp.float8_e5m2, jnp.bfloat16), (jnp.int8, jnp.int32)],
)
def test_narrow_products_are_counted_as_wide_ones(dtype, result):
    shapes = [jax.ShapeDtypeStruct((N, N), dtype)] * 2
    flops = compiled_flops(lambda a, b: jnp.matmul(a, b, preferred_element_type=result), *shapes)
    assert (flops.matmul, flops.unknown) == (PRODUCT, ())


def test_work_in_a_computation_that_never_runs_is_not_counted():
    (module,) = parse(
        """HloModule m

%unused (a: f32[4,4]) -> f32[4,4] {
  %a = f32[4,4] parameter(0)
  ROOT %d = f32[4,4] dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (a: f32[4,4]) -> f32[4,4] {
  ROOT %a = f32[4,4] parameter(0)
}
"""
    )
    assert hardware_flops(module) == Flops(matmul=0, attention=0)


def test_an_opaque_kernel_in_a_loop_of_no_trips_is_not_listed():
    text = """HloModule m

%body (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %t = (s32[], f32[4]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[4] get-tuple-element(%t), index=1
  %k = f32[4] custom-call(%x), custom_call_target="opaque"
  ROOT %r = (s32[], f32[4]) tuple(%i, %k)
}

%condition (t: (s32[], f32[4])) -> pred[] {
  %t = (s32[], f32[4]) parameter(0)
  ROOT %p = pred[] constant(true)
}

ENTRY %main (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %t = (s32[], f32[4]) parameter(0)
  ROOT %w = (s32[], f32[4]) while(%t), condition=%condition, body=%body, CONFIG
}
"""
    for trips, listed in (("0", 0), ("3", 1)):
        config = f'backend_config={{"known_trip_count":{{"n":"{trips}"}}}}'
        (module,) = parse(text.replace("CONFIG", config))
        assert len(hardware_flops(module).unknown) == listed


LLAMA_70B = ModelConfig(
    name="llama3-70b",
    layers=80,
    embed=8192,
    heads=64,
    kv_heads=8,
    head_dim=128,
    mlp=28672,
    vocab=128_256,
    context=8192,
)
GPT2 = ModelConfig(
    name="gpt2-124m",
    layers=12,
    embed=768,
    heads=12,
    kv_heads=12,
    head_dim=64,
    mlp=3072,
    vocab=50_257,
    context=1024,
    activation="gelu",
    tied_embeddings=True,
)
# Weights in matrix products, by hand: q, k, v, o, then the MLP; the head.
LLAMA_LAYER = 8192 * 8192 + 2 * 8192 * 1024 + 8192 * 8192 + 3 * 8192 * 28672
LLAMA_HEAD = 8192 * 128_256
GPT2_LAYER, GPT2_HEAD = 4 * 768 * 768 + 2 * 768 * 3072, 768 * 50_257


@pytest.mark.parametrize(
    ("config", "weights", "width"),
    [
        pytest.param(LLAMA_70B, 80 * LLAMA_LAYER + LLAMA_HEAD, 80 * 8192, id="llama3-70b"),
        pytest.param(GPT2, 12 * GPT2_LAYER + GPT2_HEAD, 12 * 768, id="gpt2-124m"),
    ],
)
def test_model_flops_of_training(config, weights, width):
    # WORKLOADS.md section 4, per token: 6 · N + 12 · L·a·dh · S, the second term halved when causal.
    batch, seq = 64, 1024
    tokens = batch * seq
    assert model_flops(config, batch, seq, "train", "full") == tokens * (6 * weights + 12 * width * seq)
    assert model_flops(config, batch, seq, "train") == tokens * (6 * weights + 6 * width * seq)
    windowed = model_flops(replace(config, window=seq // 4), batch, seq, "train")
    assert windowed == tokens * (6 * weights + 6 * width * seq * 7 // 16)  # 2 · 1/4 - 1/16 of causal pairs
    lora = model_flops(config, batch, seq, "train", frozen=True)  # no gradients of weights
    assert lora == tokens * (4 * weights + 6 * width * seq)


def test_llama_70b_step_of_the_design():
    # DESIGN section 5: 512 devices, batch 64, sequence 4096, so 512 tokens a device; 6·N·D is 2.2e14 each.
    # N = 80 · 855,638,016 + 1,050,673,152 = 69,501,714,432 weights in products (70.55e9 with embedding and
    # norms); causal attention adds 6 · 80 · 8192 · 4096 per token.
    assert 80 * LLAMA_LAYER + LLAMA_HEAD == 69_501_714_432
    products, attention = 6 * 69_501_714_432 * 512, 6 * 80 * 8192 * 4096 * 512
    assert model_flops(LLAMA_70B, 64, 4096, "train") == 512 * (products + attention)
    assert (f"{products:.3g}", f"{attention:.3g}") == ("2.14e+14", "8.25e+12")


def test_of_experts_those_of_a_token_count():
    # Mixtral 8x7B: q, k, v, o, router, two of eight experts; the head. 12.9e9 active parameters with the
    # embedding, as arXiv:2401.04088 says (13 B).
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 8 * 4096 + 2 * 3 * 4096 * 14_336
    weights = 32 * layer + 4096 * 32_000
    assert weights + 4096 * 32_000 == pytest.approx(12.9e9, rel=0.01)
    flops = model_flops(find_model("mixtral-8x7b"), 1, 1000, "train", "full")
    assert flops == 1000 * (6 * weights + 12 * 32 * 4096 * 1000)


def test_model_flops_of_inference():
    layers, head, width = 80 * LLAMA_LAYER, LLAMA_HEAD, 80 * 8192
    # Prefill: 2 FLOPs per weight and token, the head for the last position, half of the pairs.
    prefill = 3 * (2 * layers * 100 + 2 * head + 4 * width * 100 * 100 // 2)
    assert model_flops(LLAMA_70B, 3, 100, "prefill") == prefill
    # Decode: one token a sequence, attending to all 100 cached ones.
    assert model_flops(LLAMA_70B, 3, 100, "decode") == 3 * (2 * (layers + head) + 4 * width * 100)


def test_model_flops_of_gemma():
    """MaxText logs 349.442 TFLOP/s for each of 256 TPU v6e at 7.318 s and a sequence of 32,768 (tpu-recipes
    training/trillium/Gemma3-12B-MaxText/v6e-256 @c8cfe2f). It halves windows too: of 1,024 keys 512."""
    flops = model_flops(find_model("gemma3-12b"), 256, 32_768, "train") / 256
    window = 6 * 40 * 16 * 2 * 256  # per pair, in 40 of 48 layers
    ours, halved = 32_768 * 1_024 - 1_024**2 / 2, 32_768 * 512
    assert flops - window * (ours - halved) == pytest.approx(349.442e12 * 7.318, rel=1e-4)


def test_model_flops_of_deepseek():
    """arXiv:2412.19437: 37B of the 671B parameters are activated for a token; 61 layers of 128 heads, 192 for
    queries and keys, 128 for values."""
    activated = (
        model_flops(find_model("deepseek-v3"), 1, 1000, "train", "full") - 1000**2 * 6 * 61 * 128 * 320
    )
    assert round(activated / 6_000 / 1e9) == 37
    latent = 2 * 61 * 128 * (512 + 64 + 512)
    step = model_flops(find_model("deepseek-v3"), 1, 1001, "decode")
    assert step - model_flops(find_model("deepseek-v3"), 1, 1000, "decode") == latent
