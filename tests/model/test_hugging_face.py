"""Our transformer against Hugging Face's Llama, Mixtral, Gemma 3 and GPT-2: logits, loss and every gradient,
in f32.

The golden files come from tests/golden/hf/make_golden.py. What each deliberate mistake is caught by:

- a wrong RoPE theta, the interleaved RoPE convention: llama_gqa and llama_default
- a wrong epsilon: llama_gqa (1e-2) for RMSNorm, gpt2 for LayerNorm
- a wrong grouping of query heads on KV heads: llama_gqa only (llama_default has one KV head per query head)
- exact GELU instead of the tanh form: gpt2
- expert weights that are not made to sum to one, and a load-balance loss per layer: mixtral
- one kind of positions for all layers, scores by the size of a head, unscaled embeddings, SwiGLU: gemma3
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardlab.model.attention import CausalAttention, reference_attention
from shardlab.model.experts import Load, Routing, balance_loss, route
from shardlab.model.layers import rotate
from shardlab.model.loss import cross_entropy
from shardlab.model.runtime import Runtime
from shardlab.model.transformer import abstract_model, with_params
from shardlab.spec.models import MODELS, ModelConfig, Rope, Router
from shardlab.spec.params import parameter_table

GOLDEN = Path(__file__).parent.parent / "golden" / "hf"

balanced = balance_loss

# Largest difference over largest value: f32 carries 6e-8; products of depth a few hundred leave 1e-5 with
# room.
TOLERANCE = 1e-5

LLAMA = ModelConfig(
    name="llama-default",
    layers=2,
    embed=16,
    heads=4,
    kv_heads=4,
    head_dim=8,
    mlp=32,
    vocab=50,
    context=32,
    norm_epsilon=1e-6,
)
CONFIGS = {
    "llama_default": LLAMA,
    "llama_gqa": replace(LLAMA, name="llama-gqa", kv_heads=2, norm_epsilon=1e-2, rope_theta=100.0),
    "mixtral": replace(
        LLAMA,
        name="mixtral",
        kv_heads=2,
        norm_epsilon=1e-5,
        rope_theta=1e6,
        num_experts=4,
        experts_per_token=2,
        balance_coefficient=0.5,
    ),
    "gemma3": replace(
        MODELS["tiny-gemma3"],
        name="gemma3",
        layers=3,
        embed=16,
        heads=4,
        kv_heads=2,
        head_dim=8,
        mlp=32,
        vocab=50,
        context=32,
        window=5,
        global_every=2,
        rope_theta=100.0,
        global_rope=Rope(1000.0, scaling=4.0),
        query_scalar=12,
    ),
    "gpt2": ModelConfig(
        name="gpt2",
        layers=2,
        embed=32,
        heads=4,
        kv_heads=4,
        head_dim=8,
        mlp=128,
        vocab=50,
        context=32,
        norm="layernorm",
        activation="gelu",
        positions="learned",
        tied_embeddings=True,
        bias=True,
    ),
}

LLAMA_NAMES = {
    "attention_norm/scale": "input_layernorm.weight",
    "attention/query/kernel": "self_attn.q_proj.weight",
    "attention/key/kernel": "self_attn.k_proj.weight",
    "attention/value/kernel": "self_attn.v_proj.weight",
    "attention/output/kernel": "self_attn.o_proj.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "mlp/gate/kernel": "mlp.gate_proj.weight",
    "mlp/up/kernel": "mlp.up_proj.weight",
    "mlp/down/kernel": "mlp.down_proj.weight",
}
GEMMA3_NAMES = {
    "attention/query_norm/scale": "self_attn.q_norm.weight",
    "attention/key_norm/scale": "self_attn.k_norm.weight",
    "attention_post_norm/scale": "post_attention_layernorm.weight",
    "mlp_norm/scale": "pre_feedforward_layernorm.weight",
    "mlp_post_norm/scale": "post_feedforward_layernorm.weight",
}
# Hugging Face: [expert, out, in], gate and up in one array.
MIXTRAL_NAMES = {
    "moe/router/kernel": "mlp.gate.weight",
    "moe/gate/kernel": "mlp.experts.gate_up_proj",
    "moe/up/kernel": "mlp.experts.gate_up_proj",
    "moe/down/kernel": "mlp.experts.down_proj",
}
GPT2_NAMES = {
    "attention_norm": "ln_1",
    "attention/output": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp/up": "mlp.c_fc",
    "mlp/down": "mlp.c_proj",
}
OUTSIDE_LAYERS = {
    "llama": {
        "embedding/table": "model.embed_tokens.weight",
        "final_norm/scale": "model.norm.weight",
        "head/kernel": "lm_head.weight",
    },
    "gpt2": {
        "embedding/table": "transformer.wte.weight",
        "positions/table": "transformer.wpe.weight",
        "final_norm/scale": "transformer.ln_f.weight",
        "final_norm/bias": "transformer.ln_f.bias",
    },
}


def from_hugging_face(arrays: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """Hugging Face's arrays by our paths and in our shapes (unrolled layers), the vocabulary padded with
    zeros."""
    return {
        spec.path: _one(arrays, spec.path, spec.shape) for spec in parameter_table(config, scan_layers=False)
    }


def _one(arrays: Mapping[str, np.ndarray], path: str, shape: tuple[int, ...]) -> np.ndarray:
    family = "gpt2" if "transformer.wte.weight" in arrays else "llama"
    if path in OUTSIDE_LAYERS[family]:
        array = arrays[OUTSIDE_LAYERS[family][path]]
        array = array.T if path.startswith("head") else array
        return np.pad(array, [(0, size - had) for size, had in zip(shape, array.shape, strict=True)])
    _, index, name = path.split("/", 2)
    if name in MIXTRAL_NAMES:
        array = arrays[f"model.layers.{index}.{MIXTRAL_NAMES[name]}"].swapaxes(-1, -2)
        gate_and_up = name in ("moe/gate/kernel", "moe/up/kernel")
        return np.split(array, 2, axis=-1)[name == "moe/up/kernel"] if gate_and_up else array
    if family == "llama":
        after = f"model.layers.{index}.post_feedforward_layernorm.weight" in arrays
        names = LLAMA_NAMES | GEMMA3_NAMES if after else LLAMA_NAMES
        array = arrays[f"model.layers.{index}.{names[name]}"]
        return (
            array.reshape(shape) if array.ndim == 1 else array.T.reshape(shape)
        )  # torch's Linear is [out, in]
    module, leaf = name.rsplit("/", 1)
    leaf = {"kernel": "weight", "scale": "weight", "bias": "bias"}[leaf]
    if module in GPT2_NAMES:
        return arrays[f"transformer.h.{index}.{GPT2_NAMES[module]}.{leaf}"].reshape(shape)
    part = ["attention/query", "attention/key", "attention/value"].index(module)
    return np.split(arrays[f"transformer.h.{index}.attn.c_attn.{leaf}"], 3, axis=-1)[part].reshape(shape)


class Outcome:
    """The largest relative differences between our model and the golden file; gradients where asked."""

    def __init__(
        self,
        name: str,
        config: ModelConfig | None = None,
        *,
        attention: CausalAttention = reference_attention,
        gradients: bool = False,
    ) -> None:
        with np.load(GOLDEN / f"{name}.npz") as golden:
            arrays = dict(golden)
        truth = CONFIGS[name]
        config = config or truth
        params, expected = (
            from_hugging_face(
                {key.removeprefix(kind): value for key, value in arrays.items() if key.startswith(kind)},
                truth,
            )
            for kind in ("weight:", "gradient:")
        )
        params = {path: jnp.asarray(array) for path, array in params.items()}
        model = abstract_model(config, scan_layers=False)

        def loss_and_logits(params: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            near = partial(attention, window=config.window) if config.window else attention
            run = Runtime(compute_dtype=jnp.float32, attention=near, global_attention=attention)
            logits, load = with_params(model, params).logits_and_load(jnp.asarray(arrays["tokens"]), run)
            loss = cross_entropy(logits, jnp.asarray(arrays["targets"]))
            return loss if load is None else loss + config.balance_coefficient * balance_loss(load), logits

        if gradients:
            (loss, logits), found = jax.jit(jax.value_and_grad(loss_and_logits, has_aux=True))(params)
            self.gradients = {path: difference(found[path], expected[path]) for path in expected}
        else:
            loss, logits = jax.jit(loss_and_logits)(params)
        self.loss = difference(loss, arrays["loss"])
        self.logits = difference(logits[..., : config.vocab], arrays["logits"])


def difference(ours: jax.Array, theirs: np.ndarray) -> float:
    """max |ours - theirs| / max |theirs|."""
    return float(np.max(np.abs(np.asarray(ours) - theirs)) / np.max(np.abs(theirs)))


@pytest.mark.parametrize("name", CONFIGS)
def test_matches_hugging_face(name: str) -> None:
    outcome = Outcome(name, gradients=True)
    assert outcome.loss < TOLERANCE
    assert outcome.logits < TOLERANCE
    # A key's bias adds the same to all scores of a query, so its true gradient is 0 and both sides hold
    # rounding only.
    wrong = {
        path: value
        for path, value in outcome.gradients.items()
        if value >= TOLERANCE and not path.endswith("key/bias")
    }
    assert not wrong


def test_gradients_of_key_biases_vanish() -> None:
    with np.load(GOLDEN / "gpt2.npz") as golden:
        key_part = np.split(golden["gradient:transformer.h.0.attn.c_attn.bias"], 3)
    assert np.abs(key_part[1]).max() < 1e-6 * np.abs(key_part[2]).max()


def interleaved_rotate(x_BxLxHxD: jax.Array, position_L: jax.Array, theta: float) -> jax.Array:
    """The other RoPE convention, GPT-J's: dimension 2i pairs with 2i + 1."""
    halves = jnp.concatenate([x_BxLxHxD[..., ::2], x_BxLxHxD[..., 1::2]], axis=-1)
    first, second = jnp.split(rotate(halves, position_L, theta), 2, axis=-1)
    return jnp.stack([first, second], axis=-1).reshape(x_BxLxHxD.shape)


def cyclic_attention(q_BxLxHxD: jax.Array, k_BxLxKxD: jax.Array, v_BxLxKxD: jax.Array) -> jax.Array:
    """Wrong grouping: query head h reads KV head h mod K."""
    repeats = (1, 1, q_BxLxHxD.shape[2] // k_BxLxKxD.shape[2], 1)
    return reference_attention(q_BxLxHxD, jnp.tile(k_BxLxKxD, repeats), jnp.tile(v_BxLxKxD, repeats))


@pytest.mark.parametrize(
    ("golden", "changes"),
    [
        pytest.param("llama_gqa", {"rope_theta": 10_000.0}, id="rope-theta"),
        pytest.param("llama_default", {"rope_theta": 100.0}, id="rope-theta-of-the-other"),
        pytest.param("llama_gqa", {"norm_epsilon": 1e-5}, id="epsilon"),
        pytest.param("gpt2", {"norm_epsilon": 1e-2}, id="epsilon-of-layernorm"),
        pytest.param("gemma3", {"global_rope": None}, id="one-kind-of-positions"),
        pytest.param(
            "gemma3", {"global_rope": Rope(1000.0)}, id="unscaled-positions", marks=pytest.mark.full
        ),
        pytest.param("gemma3", {"global_every": 3}, id="another-layer-sees-all", marks=pytest.mark.full),
        pytest.param("gemma3", {"window": 4}, id="window"),
        pytest.param(
            "gemma3", {"query_scalar": 0}, id="scores-by-the-size-of-a-head", marks=pytest.mark.full
        ),
        pytest.param("gemma3", {"scaled_embedding": False}, id="unscaled-embeddings", marks=pytest.mark.full),
        pytest.param(
            "gemma3", {"zero_centered_norms": False}, id="norms-around-zero", marks=pytest.mark.full
        ),
        pytest.param("gemma3", {"activation": "swiglu"}, id="swiglu", marks=pytest.mark.full),
    ],
)
def test_a_wrong_number_does_not_match(golden: str, changes: dict[str, Any]) -> None:
    assert Outcome(golden, replace(CONFIGS[golden], **changes)).logits > 100 * TOLERANCE


@pytest.mark.parametrize("golden", ["llama_gqa", "llama_default"])
def test_the_other_rope_convention_does_not_match(golden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardlab.model.layers.rotate", interleaved_rotate)
    assert Outcome(golden).logits > 100 * TOLERANCE


def test_a_wrong_grouping_does_not_match() -> None:
    assert Outcome("llama_gqa", attention=cyclic_attention).logits > 100 * TOLERANCE


def test_only_grouped_queries_can_tell_the_grouping() -> None:
    """With one KV head per query head the mistake above is no mistake: why llama_gqa is needed."""
    assert Outcome("llama_default", attention=cyclic_attention).logits < TOLERANCE


def test_exact_gelu_does_not_match(monkeypatch: pytest.MonkeyPatch) -> None:
    gelu = jax.nn.gelu
    monkeypatch.setattr("jax.nn.gelu", lambda x, approximate: gelu(x, approximate=False))
    assert Outcome("gpt2").logits > 10 * TOLERANCE


def unweighted(logits: jax.Array, router: Router, bias_X: jax.Array | None) -> Routing:
    """Wrong: the experts' probabilities as they are."""
    right = route(logits, router, bias_X)
    return right._replace(weights=jnp.take_along_axis(right.probabilities, right.experts, axis=-1))


def test_weights_that_do_not_sum_to_one_do_not_match(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardlab.model.experts.route", unweighted)
    assert Outcome("mixtral").logits > 100 * TOLERANCE


def loss_per_layer(load: Load) -> jax.Array:
    """Another convention (Switch's): every layer's product, then their mean."""
    return jax.vmap(balanced)(load).mean()


def test_another_load_balance_loss_does_not_match(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.balance_loss", loss_per_layer)
    assert Outcome("mixtral").loss > 10 * TOLERANCE
