"""Memory: figure 1 of arXiv:2205.05198 as a closed form, per GPU."""

from __future__ import annotations

from dataclasses import dataclass

from shardlab.spec.models import ModelConfig

# Adam with 16-bit weights: weights 2, gradients 4, f32 copy 4, two moments 8.
STATE_BYTES = 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Of one of Megatron's runs; chunks: of layers on a stage, 1 without interleaving."""

    model: ModelConfig
    tensor: int
    stages: int
    chunks: int
    micro_batch: int
    seq: int

    @property
    def state_bytes(self) -> float:
        """Of the layers alone, 12 layers embed^2 parameters (section 6), as the figure counts."""
        parameters = 12 * self.model.layers * self.model.embed**2
        return STATE_BYTES * parameters / (self.tensor * self.stages)

    def activation_bytes(self, *, selective: bool) -> float:
        """Of the first stage; selective: sequence parallel, attention recomputed (table 2 of the paper)."""
        s, h, t = self.seq, self.model.embed, self.tensor
        scores = 5 * self.model.heads * s / h
        layer = s * self.micro_batch * h * (34 / t if selective else 10 + 24 / t + scores / t)
        waiting = 1 + (self.stages - 1) / (self.stages * self.chunks) if self.chunks > 1 else 1.0
        return layer * self.model.layers * waiting
