"""The dimensions of a model as a value. Nothing here imports jax."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

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


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions: theta is the base of the frequencies, and positions are divided by `scaling` (linear
    scaling, Chen et al. 2023, arXiv:2306.15595)."""

    theta: float
    scaling: float = 1.0


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
    every so many layers sees all nevertheless, 0 for none; global_rope: positions in those, None where they
    are as in the others. query_scalar: scores are divided by its root, 0 for head_dim's. query_key_norms: an
    RMSNorm of each query and key. post_norms: norms of what attention and the MLP give too, before it is
    added. zero_centered_norms: scales are stored less 1. scaled_embedding: embeddings times √embed. Source of
    each named configuration: see `spec.models`.
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
    activation: Literal["swiglu", "geglu", "gelu"] = "swiglu"
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
    global_rope: Rope | None = None
    query_scalar: int = 0
    query_key_norms: bool = False
    post_norms: bool = False
    zero_centered_norms: bool = False
    scaled_embedding: bool = False

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies two projections of its input, gate and up."""
        return self.activation != "gelu"

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
