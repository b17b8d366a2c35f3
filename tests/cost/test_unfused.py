"""Megatron's attention of 2022: what its kernels write and multiply is what arXiv:2205.05198 counts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardlab.cost.compute_time import UNFUSED, compute_times
from shardlab.cost.kernels import AttentionShape, Work
from shardlab.cost.unfused import unfused_kernels, unfused_s
from shardlab.hardware.data_files import load_chip

# Section 4: b sequences of s tokens, a heads of width d (h = a d).
B, S, A, D = 4, 2_048, 8, 96
FORWARD = AttentionShape(S, S, D, True, False, "f16")
BACKWARD = replace(FORWARD, backward=True)


def test_forward_leaves_the_activations_of_section_4() -> None:
    """Softmax's result 2as²b, dropout's mask as²b and result 2as²b: 5as²b, what recomputation saves."""
    _, softmax, dropout, _ = unfused_kernels(FORWARD, A * B)
    assert (softmax.written + dropout.written) * A * B * S * S == 5 * A * S * S * B


@pytest.mark.parametrize(("shape", "passes"), [(FORWARD, 1), (BACKWARD, 2)], ids=["forward", "backward"])
def test_products_are_those_of_appendix_a(shape: AttentionShape, passes: int) -> None:
    """4 b s² h forward, twice that backward."""
    products = [kernel.product for kernel in unfused_kernels(shape, A * B) if kernel.product is not None]
    flops = sum(2 * one.batch * one.m * one.n * one.k for one in products)
    assert flops == passes * 4 * B * S * S * A * D


@pytest.mark.parametrize(("shape", "per_score"), [(FORWARD, 13), (BACKWARD, 19)], ids=["forward", "backward"])
def test_memory_is_what_bounds_narrow_heads(shape: AttentionShape, per_score: int) -> None:
    """Counted kernel by kernel: 2 | 2 + 2 | 2 + 3 | 2 and 2 | 2 | 3 + 2 | 4 + 2 | 2 | 2 bytes."""
    moved = unfused_s(shape, A * B, lambda _: 0.0, lambda read, written: float(read + written))
    assert moved == per_score * A * B * S * S


def test_a_fused_call_stands_for_the_unfused_kernels() -> None:
    times = compute_times(load_chip("a100"))
    assert times is not None
    work = Work("attention", 4 * B * S * S * A * D // 2, "", FORWARD, A * B)
    scores = A * B * S * S
    unfused = replace(times, attention_kernel=UNFUSED).product_s(work)
    # 13 bytes a score at no more than 1.75 TB/s, and no less than 1.4 with launches and products.
    assert 13 * scores / 1.75e12 < unfused < 13 * scores / 1.4e12
    assert times.product_s(work) < unfused / 3
