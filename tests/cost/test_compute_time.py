"""Instructions against published rates: memory, fused attention, and the longer of the two."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardlab.cost.compute_time import ComputeTimes, compute_times
from shardlab.cost.hbm import Traffic
from shardlab.cost.instructions import InstructionCost
from shardlab.cost.kernels import AttentionShape, Work
from shardlab.cost.products import MatmulShape
from shardlab.hardware.data_files import load_chip, shipped
from shardlab.hardware.machine import Chip


def times_of(chip: str) -> ComputeTimes:
    found = compute_times(load_chip(chip))
    assert found is not None
    return found


def instruction(kind: str, traffic: Traffic) -> InstructionCost:
    """One without products."""
    return InstructionCost(
        name="s",
        computation="main",
        kind=kind,
        executions=(1, 1),
        matmul_flops=0,
        attention_flops=0,
        recompute=False,
        traffic=traffic,
        phase="other",
        layer="",
        op_name="",
        source="",
    )


@pytest.mark.parametrize(
    ("chip", "read", "written", "tb_per_s"),
    [  # Azure's BabelStream: Copy reads as much as it writes, Triad twice as much, Dot writes nothing
        ("h100", 1, 1, 2.90),
        ("h100", 2, 1, 2.97),
        ("h100", 1, 0, 3.18),
        ("a100", 1, 1, 1.61),
        ("h200", 1, 0, 4.48),
        ("h100", 0, 1, 2.90),  # nothing was measured below a half
        ("h100", 7, 5, 2.90 + 0.07 * (7 / 12 - 0.5) / (2 / 3 - 0.5)),  # half-way between Copy and Triad
    ],
)
def test_memory_goes_at_the_measured_rate(chip: str, read: int, written: int, tb_per_s: float) -> None:
    found = times_of(chip).memory_s(Traffic(read * 10**9, written * 10**9))
    assert found == pytest.approx((read + written) * 1e9 / (tb_per_s * 1e12), rel=1e-3)


@pytest.mark.parametrize(
    ("length", "head_dim", "causal", "backward", "tflops_per_s"),
    [  # cuDNN's bars in figures 5 and 6 of FlashAttention-3 (arXiv:2407.08608)
        (4096, 128, True, False, 518),
        (2048, 128, False, False, 617),
        (16384, 64, True, False, 388),
        (8192, 128, False, True, 518),
        (4096, 256, True, False, 483),
        (32768, 128, True, False, 539),  # the longest that was measured
        (4096, 96, True, False, 518),  # 128 is nearer to 96 than 64 is
    ],
)
def test_attention_goes_at_the_published_rate(
    length: int, head_dim: int, causal: bool, backward: bool, tflops_per_s: int
) -> None:
    shape = AttentionShape(length, length, head_dim, causal, backward, "bf16")
    launch = times_of("h100").product_s(Work("attention", 0, shape=shape))
    found = times_of("h100").product_s(Work("attention", 10**15, shape=shape))
    assert 1e15 / (found - launch) == pytest.approx(tflops_per_s * 1e12)


def test_a_mask_slows_the_backward_pass_as_it_slows_the_forward_pass() -> None:
    shape = AttentionShape(4096, 4096, 128, True, True, "bf16")
    one_s = times_of("h100").product_s(Work("attention", 10**15, shape=shape)) - 1e-6
    assert 1e15 / one_s == pytest.approx(499e12 * 518 / 609)


def test_a_window_goes_as_fast_as_as_many_keys() -> None:
    """1,024 for each query, as under a causal mask over 2,048: 484 TFLOP/s (FlashAttention-3, figure 5)."""
    shape = AttentionShape(16384, 16384, 128, True, False, "bf16", window=1024)
    one_s = times_of("h100").product_s(Work("attention", 10**15, shape=shape)) - 1e-6
    assert 1e15 / one_s == pytest.approx(484e12, rel=1e-3)
    wide = replace(shape, window=16384)
    assert times_of("h100").product_s(Work("attention", 10**15, shape=wide)) == times_of("h100").product_s(
        Work("attention", 10**15, shape=replace(shape, window=0))
    )


def test_attention_on_a100_goes_through_the_point_that_is_published() -> None:
    """FlashAttention-2: up to 73 % of 312 TFLOP/s forward, 63 % backward."""
    for backward, share in ((False, 0.73), (True, 0.63)):
        shape = AttentionShape(16384, 16384, 128, False, backward, "bf16")
        one_s = times_of("a100").product_s(Work("attention", 10**15, shape=shape)) - 1e-6
        assert 1e15 / one_s == pytest.approx(share * 312e12, rel=1e-3)


def test_an_instruction_takes_the_longer_of_arithmetic_and_memory() -> None:
    times = times_of("h100")
    product = Work("matmul", 2 * 4096**3, shape=MatmulShape(1, 4096, 4096, 4096, "bf16"))
    alone_s = times.product_s(product)
    little, much = Traffic(10**6, 10**6), Traffic(10**10, 10**10)
    assert times.work_s([product], little) == alone_s
    assert times.work_s([product, product], little) == 2 * alone_s
    assert times.work_s([product], much) == times.work_s([], much)
    assert times.work_s([], much) == pytest.approx(2e10 / 2.90e12 + 1e-6, rel=1e-3)


@pytest.mark.parametrize(("head_dim", "times"), [(64, 2), (128, 2), (192, 1), (256, 1)])
def test_heads_are_padded_to_a_tpu_s_matrix_unit(head_dim: int, times: float) -> None:
    """Units are 256 x 256 on v6e and 128 x 128 on v5p (Google Cloud TPU docs): heads of 128 fill half of the
    one, and all of the other; heads of 64 a quarter and a half."""
    shape = AttentionShape(8192, 8192, head_dim, True, False, "bf16")
    v6e, v5p = (times_of(chip).product_s(Work("attention", 10**18, shape=shape)) for chip in ("v6e", "v5p"))
    assert v6e * 918 / (v5p * 459) == pytest.approx(times, rel=1e-3)


def test_vmem_of_a_tpu_is_not_hbm() -> None:
    """22 times HBM's datasheet rate (scaling book, v5e), and no start of a transfer to wait for."""
    times = times_of("v5e")
    assert times.work_s([], Traffic(0, 0, 22 * 819 * 10**9)) == pytest.approx(1)
    assert times.work_s([], Traffic(1, 0)) > 1e-6


def test_the_host_is_as_far_as_its_link() -> None:
    """v6e: 32 GB/s to the host (scaling book). Of tpu7x no source says, so the time is not known."""
    moved = Traffic(10**9, 0, 10**9, 10**9)
    assert times_of("v6e").memory_s(moved) == pytest.approx(1 / 32)
    row = instruction("copy", moved)
    assert times_of("v6e").instruction_s(row) == pytest.approx(1 / 32, rel=1e-3)
    assert times_of("tpu7x").instruction_s(row) is None


@pytest.mark.parametrize(
    ("kind", "dtype", "flops_per_s"),
    [
        pytest.param("dot", "bf16", 30e9, id="Eigen's bf16"),
        pytest.param("fusion", "bf16", 300e9, id="YNNPACK's"),
        pytest.param("dot", "f32", 150e9, id="Eigen's f32"),
    ],
)
def test_a_bare_bf16_product_of_a_cpu_has_a_rate_of_its_own(
    kind: str, dtype: str, flops_per_s: float
) -> None:
    cores = Chip(
        name="c", family="cpu", memory_bytes=None, bf16_flops_per_s=300e9, memory_bytes_per_s=30e9,
        dot_bf16_flops_per_s=30e9,
    )  # fmt: skip
    times, work = (
        compute_times(cores),
        Work("matmul", 2 * 10**9, shape=MatmulShape(1, 10**3, 10**3, 10**3, dtype)),
    )
    assert times is not None
    row = replace(instruction(kind, Traffic(4 * 10**6, 2 * 10**6)), matmul_flops=work.flops, products=(work,))
    assert times.instruction_s(row) == pytest.approx(2e9 / flops_per_s, rel=1e-3)
    much = replace(row, traffic=Traffic(10**10, 5 * 10**9))
    assert times.instruction_s(much) == pytest.approx(0.5, rel=1e-3)


def test_a_chip_says_what_its_prices_rest_on() -> None:
    assert dict(times_of("h100").basis) == dict.fromkeys(("matmul", "memory", "attention"), "measured")
    assert all(times_of(chip).basis.values() for chip in shipped("chips"))
    v5p = times_of("v5p").basis
    assert v5p["memory"] == "extrapolated from v6e"
    assert v5p["matmul"].startswith("extrapolated from tpu7x") and "v6e" in v5p["matmul"]


def test_a_user_chip_of_a_known_kind_takes_that_kind_s_share_of_its_own_rates() -> None:
    """torchtitan's H100s have HBM2e at 2.4 TB/s: 2.90 of 3.352 TB/s of it."""
    slow = compute_times(replace(load_chip("h100"), memory_bytes_per_s=2.4e12))
    assert slow is not None
    assert slow.basis["memory"] == "extrapolated from h100"
    assert slow.basis["matmul"] == "measured"
    assert slow.memory_s(Traffic(10**9, 10**9)) == pytest.approx(2e9 / (2.4e12 * 2.90 / 3.35232), rel=1e-3)


def test_a_chip_without_rates_or_kin_has_no_prices() -> None:
    assert compute_times(Chip(name="cpu", family="cpu", memory_bytes=None)) is None
    assert compute_times(replace(load_chip("h100"), bf16_flops_per_s=None)) is None
    unheard = Chip(name="X1", family="gpu", memory_bytes=1, bf16_flops_per_s=1e12, memory_bytes_per_s=1e12)
    assert compute_times(unheard) is None
