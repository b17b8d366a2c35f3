"""Model dimensions as values: the named configurations. `model/` builds them; nothing here imports jax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer. Sizes are counts of elements; `vocab` is the real one, `padded_vocab` is stored.

    Source of each named configuration: see `MODELS`.
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

    @property
    def padded_vocab(self) -> int:
        """Vocabulary rounded up to a multiple of 128; the padding is masked in the loss."""
        return -(-self.vocab // 128) * 128
