"""The named models. `model/` builds them; nothing here imports jax."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from shardlab.errors import Problem, UserError
from shardlab.hardware.toml_file import did_you_mean, quoted
from shardlab.spec.model_config import LatentAttention, ModelConfig, Rope, Router, Stack

__all__ = ["MODELS", "LatentAttention", "ModelConfig", "Rope", "Router", "Stack", "find_model"]


def _gpt(
    name: str, *, layers: int, embed: int, heads: int, vocab: int = 50_257, context: int = 1_024
) -> ModelConfig:
    """GPT-2 and GPT-3: LayerNorm with bias, tanh-GELU, learned positions, tied embeddings, mlp = 4 embed."""
    return ModelConfig(
        name=name,
        layers=layers,
        embed=embed,
        heads=heads,
        kv_heads=heads,
        head_dim=embed // heads,
        mlp=4 * embed,
        vocab=vocab,
        context=context,
        norm="layernorm",
        activation="gelu",
        positions="learned",
        tied_embeddings=True,
        bias=True,
    )


def _megatron(name: str, *, layers: int, embed: int, heads: int) -> ModelConfig:
    """Megatron's GPTs: sequences of 2,048; the vocabulary is GPT-2's, padded to 1,024 = 128 · 8-way tensor
    parallelism."""
    return _gpt(name, layers=layers, embed=embed, heads=heads, vocab=51_200, context=2_048)


def _llama2(name: str, *, layers: int, embed: int, heads: int, kv_heads: int, mlp: int) -> ModelConfig:
    """Llama 2: as Llama 3, with a vocabulary of 32,000, theta 10,000 and a context of 4,096."""
    return ModelConfig(
        name=name,
        layers=layers,
        embed=embed,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=128,
        mlp=mlp,
        vocab=32_000,
        context=4_096,
    )


def _mixtral(
    name: str, *, layers: int, embed: int, heads: int, mlp: int, context: int, balance: float
) -> ModelConfig:
    """Mixtral: Llama's layers with 8 KV heads of 128 and 8 experts, of which a token goes to 2."""
    return ModelConfig(
        name=name,
        layers=layers,
        embed=embed,
        heads=heads,
        kv_heads=8,
        head_dim=128,
        mlp=mlp,
        vocab=32_000,
        context=context,
        rope_theta=1_000_000.0,
        num_experts=8,
        experts_per_token=2,
        balance_coefficient=balance,
    )


def _llama3(name: str, *, layers: int, embed: int, heads: int, mlp: int) -> ModelConfig:
    """Llama 3: RMSNorm, SwiGLU, RoPE with theta 500,000, 8 KV heads of 128, untied embeddings, no bias."""
    return ModelConfig(
        name=name,
        layers=layers,
        embed=embed,
        heads=heads,
        kv_heads=8,
        head_dim=128,
        mlp=mlp,
        vocab=128_256,
        context=8_192,
        rope_theta=500_000.0,
    )


def _gemma3(
    name: str,
    *,
    layers: int,
    embed: int,
    heads: int,
    kv_heads: int,
    mlp: int,
    head_dim: int = 256,
    query_scalar: int = 0,
    window: int = 1_024,
    context: int = 131_072,
    scaling: float = 8.0,
) -> ModelConfig:
    """Gemma 3, its text layers: five with a window for each that sees all, norms on both sides, GeGLU."""
    return ModelConfig(
        name=name,
        layers=layers,
        embed=embed,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=mlp,
        vocab=262_144,
        context=context,
        norm_epsilon=1e-6,
        activation="geglu",
        tied_embeddings=True,
        window=window,
        global_every=6,
        global_rope=Rope(1_000_000.0, scaling),
        query_scalar=query_scalar,
        query_key_norms=True,
        post_norms=True,
        zero_centered_norms=True,
        scaled_embedding=True,
    )


_TINY = ModelConfig(  # ours: for tests and for training on a laptop; every dimension is divisible by 8
    name="tiny",
    layers=2,
    embed=128,
    heads=8,
    kv_heads=8,
    head_dim=16,
    mlp=512,
    vocab=512,
    context=256,
)

_NAMED = (
    _TINY,
    # Radford et al. 2019, Table 2; karpathy/nanoGPT config (12 layers, 768, 12 heads, vocabulary 50257,
    # context 1024).
    _gpt("gpt2-124m", layers=12, embed=768, heads=12),
    # GPT-2 XL: karpathy/llm.c (48 layers, 1600, 25 heads, 1558M).
    _gpt("gpt2-1.5b", layers=48, embed=1_600, heads=25),
    # Llama 3, arXiv:2407.21783 Table 3 (layers, model dimension, FFN dimension, heads, KV heads, theta,
    # vocabulary); the same in AI-Hypercomputer/maxtext src/maxtext/configs/models/llama3.1-*.yml. Context of
    # pretraining: 8,192.
    _llama3("llama3-8b", layers=32, embed=4_096, heads=32, mlp=14_336),
    _llama3("llama3-70b", layers=80, embed=8_192, heads=64, mlp=28_672),
    _llama3("llama3-405b", layers=126, embed=16_384, heads=128, mlp=53_248),
    # Mistral 7B v0.1, arXiv:2310.06825 table 1; theta and epsilon from mistralai/Mistral-7B-v0.1 config.json.
    ModelConfig(
        name="mistral-7b",
        layers=32,
        embed=4_096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        mlp=14_336,
        vocab=32_000,
        context=8_192,
        window=4_096,
    ),
    # Mixtral of experts, arXiv:2401.04088 table 1; theta, epsilon and the coefficient from
    # mistralai/Mixtral-8x7B-v0.1 config.json.
    _mixtral("mixtral-8x7b", layers=32, embed=4_096, heads=32, mlp=14_336, context=32_768, balance=0.02),
    # mistralai/Mixtral-8x22B-v0.1 config.json.
    _mixtral("mixtral-8x22b", layers=56, embed=6_144, heads=48, mlp=16_384, context=65_536, balance=0.001),
    # Llama 2, arXiv:2307.09288 table 1 and appendix A; dimensions as in AI-Hypercomputer/maxtext
    # src/maxtext/configs/models/llama2-*.yml @e591f30cb.
    _llama2("llama2-7b", layers=32, embed=4_096, heads=32, kv_heads=32, mlp=11_008),
    _llama2("llama2-13b", layers=40, embed=5_120, heads=40, kv_heads=40, mlp=13_824),
    _llama2("llama2-70b", layers=80, embed=8_192, heads=64, kv_heads=8, mlp=28_672),
    # GPT-3, arXiv:2005.14165 table 2.1; AI-Hypercomputer/maxtext src/maxtext/configs/models/gpt3-175b.yml
    # @e591f30cb pads the vocabulary to 50,304, as we do.
    _gpt("gpt3-175b", layers=96, embed=12_288, heads=96, context=2_048),
    # Korthikanti et al. 2022, arXiv:2205.05198 table 3.
    _megatron("megatron-22b", layers=48, embed=6_144, heads=64),
    _megatron("megatron-175b", layers=96, embed=12_288, heads=96),
    _megatron("megatron-530b", layers=105, embed=20_480, heads=128),
    _megatron("megatron-1t", layers=128, embed=25_600, heads=160),
    # DeepSeek-V3, arXiv:2412.19437, section 4.2 and deepseek-ai/DeepSeek-V3 config.json. Context of
    # pretraining: 4,096 (YaRN, which extends it later, is left out, and so is the multi-token prediction
    # module). balance: equation 17.
    ModelConfig(
        name="deepseek-v3",
        layers=61,
        embed=7_168,
        heads=128,
        kv_heads=128,
        head_dim=192,
        mlp=2_048,
        vocab=129_280,
        context=4_096,
        norm_epsilon=1e-6,
        num_experts=256,
        experts_per_token=8,
        balance_coefficient=0.0001,
        balance="sequence",
        shared_experts=1,
        dense_layers=3,
        dense_mlp=18_432,
        scoring="sigmoid",
        routed_scaling=2.5,
        expert_groups=8,
        groups_per_token=4,
        router_bias=True,
        latent=LatentAttention(query_rank=1_536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128),
    ),
    # ours: DeepSeek-V3's parts at the size of `tiny`
    replace(
        _TINY,
        name="tiny-deepseek",
        layers=3,
        head_dim=24,
        mlp=64,
        num_experts=16,
        experts_per_token=4,
        balance_coefficient=0.0001,
        balance="sequence",
        shared_experts=1,
        dense_layers=1,
        dense_mlp=256,
        scoring="sigmoid",
        routed_scaling=2.5,
        expert_groups=4,
        groups_per_token=2,
        router_bias=True,
        latent=LatentAttention(query_rank=48, kv_rank=32, nope_dim=16, rope_dim=8, value_dim=16),
    ),
    # Gemma 3, arXiv:2503.19786, table 1 and section 2; dimensions from config.json of google/gemma-3-*-pt, of
    # which those from 4B have 64 rows of vocabulary more, for images. 12B is also in AI-Hypercomputer/maxtext
    # src/maxtext/configs/models/gemma3-12b.yml @e591f30cb.
    _gemma3(
        "gemma3-1b",
        layers=26,
        embed=1_152,
        heads=4,
        kv_heads=1,
        mlp=6_912,
        window=512,
        context=32_768,
        scaling=1.0,
    ),
    _gemma3("gemma3-4b", layers=34, embed=2_560, heads=8, kv_heads=4, mlp=10_240),
    _gemma3("gemma3-12b", layers=48, embed=3_840, heads=16, kv_heads=8, mlp=15_360),
    _gemma3(
        "gemma3-27b",
        layers=62,
        embed=5_376,
        heads=32,
        kv_heads=16,
        mlp=21_504,
        head_dim=128,
        query_scalar=168,
    ),
    # ours: Gemma 3's parts at the size of `tiny`
    replace(
        _gemma3(
            "tiny-gemma3", layers=5, embed=128, heads=8, kv_heads=8, mlp=512, head_dim=16, query_scalar=24
        ),
        vocab=512,
        context=256,
        window=64,
        global_every=2,
    ),
)

MODELS: Mapping[str, ModelConfig] = MappingProxyType({config.name: config for config in _NAMED})


def find_model(name: str, where: str = "--model") -> ModelConfig:
    """The named configuration. Raises UserError (at `where`) that lists the known names."""
    if name in MODELS:
        return MODELS[name]
    fix = did_you_mean(name.lower(), MODELS, "known models")
    raise UserError(Problem(where, f"unknown model {quoted(name)}", fix))
