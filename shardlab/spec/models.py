"""Model dimensions as values: the named configurations. `model/` builds them; nothing here imports jax."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, NamedTuple

from shardlab.errors import Problem, UserError
from shardlab.hardware.toml_file import did_you_mean, quoted
from shardlab.spec.locality import Locality

VOCAB_MULTIPLE = 128  # lanes of a TPU vector register, and a multiple of every tensor-core tile


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention: queries, and keys with values, pass through narrow latent vectors.

    query_rank, kv_rank: their widths. nope_dim, rope_dim: of each head's queries and keys the part without
    and with rotary positions; rotated keys are shared by all heads. value_dim: of each head's values.
    Source: DeepSeek-V2, arXiv:2405.04434, section 2.1.
    """

    query_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """How tokens choose experts: the `experts_per_token` with the highest scores.

    scoring: softmax over the experts, or each expert's own sigmoid; weights are the chosen scores' shares of
    their sum, times `scaling`. groups, groups_per_token: experts come in groups, and only those of the groups
    with the highest sums of two scores are eligible (node-limited routing). bias: a number per expert is
    added to its score for the choice alone, and moved against its load after every step.
    Sources: Mixtral, arXiv:2401.04088, section 2.1; DeepSeek-V3, arXiv:2412.19437, section 2.1.2.
    """

    experts_per_token: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    scaling: float = 1.0
    groups: int = 1
    groups_per_token: int = 1
    bias: bool = False


class Stack(NamedTuple):
    """Layers of one kind: name (the first part of their parameters' paths), layers, their dimensions."""

    name: str
    layers: int
    config: ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer. Sizes are counts of elements; `vocab` is the real one, `padded_vocab` is
    stored.

    num_experts: of a mixture of experts, 0 for a dense model; `mlp` is then the width of each expert, and
    every token goes to `experts_per_token` of them and to all `shared_experts`, which are one MLP of their
    joint width. dense_layers: how many of `layers`, the first, have an MLP of width `dense_mlp` instead.
    balance_coefficient: what the load-balance loss counts; balance: whether load is judged over the batch or
    for each sequence alone. head_dim: of queries and keys. latent: multi-head latent attention, None for
    grouped queries. window, attention_chunk: how far attention sees (`Locality`); global_every: the last of
    every so many layers sees all nevertheless, 0 for none. Source of each named configuration: see `MODELS`.
    """

    name: str
    layers: int
    embed: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    context: int
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_epsilon: float = 1e-5
    activation: Literal["swiglu", "gelu"] = "swiglu"
    positions: Literal["rope", "learned"] = "rope"
    rope_theta: float = 10_000.0
    tied_embeddings: bool = False
    bias: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    balance_coefficient: float = 0.0
    balance: Literal["batch", "sequence"] = "batch"
    shared_experts: int = 0
    dense_layers: int = 0
    dense_mlp: int = 0
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    routed_scaling: float = 1.0
    expert_groups: int = 1
    groups_per_token: int = 1
    router_bias: bool = False
    latent: LatentAttention | None = None
    window: int = 0
    attention_chunk: int = 0
    global_every: int = 0

    @property
    def locality(self) -> Locality:
        """How far attention sees, but in the layers that see all."""
        return Locality(self.window, self.attention_chunk)

    def sees_all(self, layer: int) -> bool:
        """Whether this layer, counted from 0, sees all whatever the locality."""
        return bool(self.global_every) and (layer + 1) % self.global_every == 0

    @property
    def value_dim(self) -> int:
        """Of each head's values."""
        return self.latent.value_dim if self.latent else self.head_dim

    @property
    def router(self) -> Router:
        """How tokens choose experts."""
        return Router(
            experts_per_token=self.experts_per_token,
            scoring=self.scoring,
            scaling=self.routed_scaling,
            groups=self.expert_groups,
            groups_per_token=self.groups_per_token,
            bias=self.router_bias,
        )

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The layers by kind, first to last: `dense_layers` where a mixture of experts has some, `layers`.

        `config` describes a layer of the kind; its number of layers stays that of the whole model.
        """
        if not self.dense_layers:
            return (Stack("layers", self.layers, self),)
        dense = replace(self, num_experts=0, shared_experts=0, mlp=self.dense_mlp, dense_layers=0)
        left = self.layers - self.dense_layers
        return Stack("dense_layers", self.dense_layers, dense), Stack("layers", left, self)

    @property
    def padded_vocab(self) -> int:
        """Vocabulary rounded up to a multiple of 128; the padding is masked in the loss."""
        return -(-self.vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


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
)

MODELS: Mapping[str, ModelConfig] = MappingProxyType({config.name: config for config in _NAMED})


def find_model(name: str, where: str = "--model") -> ModelConfig:
    """The named configuration. Raises UserError (at `where`) that lists the known names."""
    if name in MODELS:
        return MODELS[name]
    fix = did_you_mean(name.lower(), MODELS, "known models")
    raise UserError(Problem(where, f"unknown model {quoted(name)}", fix))


def num_params(config: ModelConfig, *, padded: bool = False) -> int:
    """Number of parameters, counted from the dimensions; with `padded` those of the stored (padded)
    vocabulary.

    Equal to the published counts: GPT-2 124,439,808; Llama 3 8B 8,030,261,248; Mixtral 8x7B 46,702,792,704;
    DeepSeek-V3 671,026,419,200, with the router's biases and without the multi-token prediction module.
    """
    vocab = config.padded_vocab if padded else config.vocab
    tables = vocab * config.embed * (1 if config.tied_embeddings else 2)
    positions = config.context * config.embed if config.positions == "learned" else 0
    layers = sum(stack.layers * _layer_params(stack.config) for stack in config.stacks)
    return tables + positions + _norm_params(config) + layers


def attention_weights(config: ModelConfig) -> int:
    """Elements of the kernels of one layer's attention."""
    E, H = config.embed, config.heads
    if config.latent is None:
        return E * config.head_dim * (2 * H + 2 * config.kv_heads)
    to = config.latent
    queries = to.query_rank * (E + H * config.head_dim)
    keys_values = E * (to.kv_rank + to.rope_dim) + to.kv_rank * H * (to.nope_dim + to.value_dim)
    return queries + keys_values + H * to.value_dim * E


def mlp_weights(config: ModelConfig, width: int) -> int:
    """Elements of the kernels of one MLP: gate (SwiGLU has one), up and down."""
    return (3 if config.activation == "swiglu" else 2) * config.embed * width


def _norm_params(config: ModelConfig) -> int:
    return config.embed * (2 if config.norm == "layernorm" else 1)


def _layer_params(config: ModelConfig) -> int:
    """One layer: norms, attention's projections, and the MLP, or the experts, the shared ones and the
    router."""
    mlp = mlp_weights(config, config.mlp) * ((config.num_experts or 1) + config.shared_experts)
    router = (config.embed + config.router_bias) * config.num_experts
    ranks = config.latent.query_rank + config.latent.kv_rank if config.latent else 0
    return 2 * _norm_params(config) + ranks + attention_weights(config) + router + mlp + _biases(config)


def _biases(config: ModelConfig) -> int:
    """Of one layer's projections and MLP."""
    query, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    inward = 2 if config.activation == "swiglu" else 1  # gate and up, or up alone
    return (query + 2 * kv + config.embed) + (inward * config.mlp + config.embed) if config.bias else 0
