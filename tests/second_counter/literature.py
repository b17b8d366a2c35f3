"""Communication of a transformer's layers as the literature gives it: bytes that one device sends per step.

Weights and activations move in bf16. What surrounds the layers (embedding, head, loss) is not in here.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

BF16_BYTES = 2


@dataclass(frozen=True)
class Dims:
    """A Llama layer's dimensions, and how many layers there are."""

    layers: int
    embed: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int

    @property
    def matrix_params(self) -> int:
        """Of one layer: query, key, value, output; gate, up, down. Norms are left out (they are 0.01 %)."""
        attention = self.embed * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.embed * self.mlp


def zero3_gathers(dims: Dims, shards: int, *, tensor: int = 1) -> Fraction:
    """All-gathers of FSDP: every layer's weights once forward and once backward.

    ZeRO stage 3 (arXiv:1910.02054, section 7.2.2) sends 3Ψ for Ψ parameters, Ψ forward, Ψ backward, Ψ for the
    gradients. With full remat the backward gather serves the recomputed forward too. A device sends
    (shards - 1) / shards of what it gathers.
    """
    gathered = dims.layers * dims.matrix_params * BF16_BYTES // tensor
    return 2 * Fraction(shards - 1, shards) * gathered


def zero3_scatters(dims: Dims, shards: int, *, tensor: int = 1) -> Fraction:
    """Reduce-scatters of FSDP: the third Ψ of `zero3_gathers`, every layer's gradients once."""
    return zero3_gathers(dims, shards, tensor=tensor) / 2


def activation_all_reduce(batch: int, seq: int, embed: int, tensor: int) -> Fraction:
    """One all-reduce of a residual-stream activation over the tensor axis; batch: of this device.

    2 (t - 1) / t of its bytes, half for each of the reduce-scatter and the all-gather that it is equal to
    (Korthikanti et al., arXiv:2205.05198, section 4.2.2).
    """
    return Fraction(2 * (tensor - 1), tensor) * batch * seq * embed * BF16_BYTES


# Megatron-LM (arXiv:1909.08053, section 3, figure 4): a layer all-reduces twice forward and twice backward.
MEGATRON_ALL_REDUCES = 4
# Full remat runs the forward again. Of its two all-reduces the second makes only the layer's output, which
# the backward pass does not read: the compiler drops it.
REMAT_ALL_REDUCES = MEGATRON_ALL_REDUCES + 1
# Sequence parallelism (arXiv:2205.05198, section 4.2.2) turns each all-reduce into a reduce-scatter and an
# all-gather. (The paper then stores only shards and gathers twice more backward; without remat we store all.)
SEQUENCE_SCATTERS = SEQUENCE_GATHERS = MEGATRON_ALL_REDUCES
# Full remat gathers both inputs again; of its two reduce-scatters it needs the first, as above.
REMAT_SEQUENCE_SCATTERS, REMAT_SEQUENCE_GATHERS = SEQUENCE_SCATTERS + 1, SEQUENCE_GATHERS + 2
