"""Attention as Megatron ran it in 2022, before fused kernels: products, a fused softmax, and dropout.

Which arrays pass through memory: figure 3 and section 4.1 of arXiv:2205.05198, by kernel as in
NVIDIA/Megatron-LM `megatron/model/transformer.py`, `CoreAttention` (v3.0): scores, probabilities and the
output of dropout in 16 bits, its mask in 8. The mask of causal attention saves no product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shardlab.cost.kernels import AttentionShape
from shardlab.cost.products import MatmulShape

VALUE, MASK = 2, 1  # bytes of a score, and of a bit of dropout's mask


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel of unfused attention: bytes per score that it reads and writes, and its product if any."""

    read: int
    written: int
    product: MatmulShape | None = None


def unfused_kernels(shape: AttentionShape, heads: int) -> tuple[Kernel, ...]:
    """The kernels of one call. heads: of all sequences together."""
    q, k, d, dtype = shape.queries, shape.keys, shape.head_dim, shape.dtype
    to_scores = MatmulShape(heads, q, k, d, dtype)
    to_values, to_keys = MatmulShape(heads, q, d, k, dtype), MatmulShape(heads, k, d, q, dtype)
    if not shape.backward:
        return (
            Kernel(0, VALUE, to_scores),
            Kernel(VALUE, VALUE),  # scale, mask and softmax
            Kernel(VALUE, VALUE + MASK),  # dropout
            Kernel(VALUE, 0, to_values),
        )
    return (
        Kernel(0, VALUE, to_scores),  # of the output's gradient and the values
        Kernel(VALUE, 0, to_keys),  # gradient of the values
        Kernel(VALUE + MASK, VALUE),  # dropout
        Kernel(2 * VALUE, VALUE),  # softmax, from its result
        Kernel(VALUE, 0, to_values),  # gradient of the queries
        Kernel(VALUE, 0, to_keys),  # gradient of the keys
    )


def unfused_s(
    shape: AttentionShape,
    heads: int,
    product_s: Callable[[MatmulShape], float],
    memory_s: Callable[[int, int], float],
) -> float:
    """Seconds of one call. memory_s: of so many bytes read and written, launch included."""
    scores = heads * shape.queries * shape.keys
    return sum(
        max(
            product_s(kernel.product) if kernel.product is not None else 0.0,
            memory_s(kernel.read * scores, kernel.written * scores),
        )
        for kernel in unfused_kernels(shape, heads)
    )
