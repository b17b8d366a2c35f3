"""The real transformer, compiled for GPUs: its layers move what the literature says, within 2 %.

What moves outside the layers is listed by name here: anything new that the compiler adds fails a test.
"""

from __future__ import annotations

from fractions import Fraction

import pytest
from compiled_plans import Remat, compiled_plan
from second_counter.literature import (
    BF16_BYTES,
    MEGATRON_ALL_REDUCES,
    REMAT_ALL_REDUCES,
    REMAT_SEQUENCE_GATHERS,
    REMAT_SEQUENCE_SCATTERS,
    SEQUENCE_GATHERS,
    SEQUENCE_SCATTERS,
    Dims,
    activation_all_reduce,
    zero3_gathers,
    zero3_scatters,
)

from shardlab.analysis import CollectiveRow, analyze

pytestmark = pytest.mark.gpu
TOLERANCE = Fraction(2, 100)
# Llama 3, arXiv:2407.21783, table 3.
LLAMA_8B = Dims(layers=32, embed=4_096, heads=32, kv_heads=8, head_dim=128, mlp=14_336)
LLAMA_70B = Dims(layers=80, embed=8_192, heads=64, kv_heads=8, head_dim=128, mlp=28_672)
VOCAB, SEQ = 128_256, 4_096
FSDP8_TENSOR8 = "h100x64-fsdp8-tensor8"
SMALL = 10_000_000  # bytes per step: norms, loss and scalars


def rows_of(name: str) -> list[CollectiveRow]:
    _, program, _ = compiled_plan(name)
    return list(analyze(program).collectives)


def rows_of_8b(name: str, remat: Remat) -> list[CollectiveRow]:
    """With one sequence per FSDP shard: where activations do not fit, XLA adds its own rematerialisation."""
    _, program, _ = compiled_plan(name, remat=remat, model="llama3-8b", batch=8)
    return list(analyze(program).collectives)


def sent(row: CollectiveRow) -> Fraction:
    """Bytes per device per step."""
    low, high = row.executions
    assert low == high
    return row.wire_bytes * low


def in_layers(rows: list[CollectiveRow], axis: str, kind: str) -> Fraction:
    chosen = (r for r in rows if r.layer.startswith("layers") and r.axes == (axis,) and r.kind == kind)
    return sum(map(sent, chosen), Fraction(0))


def around_layers(rows: list[CollectiveRow]) -> dict[tuple[str, str, str], Fraction]:
    """(layer, axis, kind) -> bytes of all large rows outside the layers; the small ones must stay small."""
    found: dict[tuple[str, str, str], Fraction] = {}
    small = Fraction(0)
    for row in rows:
        if row.layer.startswith("layers"):
            continue
        if sent(row) < SMALL:
            small += sent(row)
            continue
        key = (row.layer, "+".join(row.axes or ("unknown",)), row.kind)
        found[key] = found.get(key, Fraction(0)) + sent(row)
    assert small < SMALL
    return found


def assert_within(actual: Fraction, expected: Fraction) -> None:
    assert abs(actual - expected) <= TOLERANCE * expected, (
        f"{float(actual):.6g} against {float(expected):.6g}"
    )


def table_volume(embed: int, shards: int, tensor: int = 1) -> Fraction:
    """A vocabulary table gathered, or its gradient scattered, once."""
    return Fraction(shards - 1, shards) * VOCAB * embed * BF16_BYTES / tensor


def test_fsdp() -> None:
    rows = rows_of("h100x8-fsdp8")
    assert_within(in_layers(rows, "fsdp", "all-gather"), zero3_gathers(LLAMA_8B, 8))
    assert_within(in_layers(rows, "fsdp", "reduce-scatter"), zero3_scatters(LLAMA_8B, 8))
    around = around_layers(rows)
    kinds = ("all-gather", "reduce-scatter")
    assert set(around) == {(name, "fsdp", kind) for name in ("embedding", "head") for kind in kinds}
    for volume in around.values():
        assert_within(volume, table_volume(4_096, 8))


@pytest.mark.matrix
def test_fsdp_and_tensor_parallel() -> None:
    rows = rows_of(FSDP8_TENSOR8)
    one = activation_all_reduce(8, SEQ, 8_192, 8)
    assert_within(in_layers(rows, "tensor", "all-reduce"), LLAMA_70B.layers * REMAT_ALL_REDUCES * one)
    assert_within(in_layers(rows, "fsdp", "all-gather"), zero3_gathers(LLAMA_70B, 8, tensor=8))
    assert_within(in_layers(rows, "fsdp", "reduce-scatter"), zero3_scatters(LLAMA_70B, 8, tensor=8))
    around = around_layers(rows)
    assert set(around) == {
        ("embedding", "fsdp", "all-gather"),
        ("embedding", "fsdp", "reduce-scatter"),
        ("embedding", "tensor", "all-reduce"),  # rows that other devices hold
        ("head", "fsdp", "all-gather"),
        ("head", "fsdp", "reduce-scatter"),
        ("head", "tensor", "all-reduce"),  # the gradient of the hidden state
    }
    for (_, axis, _), volume in around.items():
        assert_within(volume, one if axis == "tensor" else table_volume(8_192, 8, tensor=8))


@pytest.mark.full
def test_without_remat() -> None:
    rows = rows_of_8b(FSDP8_TENSOR8, "none")
    one = activation_all_reduce(1, SEQ, 4_096, 8)
    assert_within(in_layers(rows, "tensor", "all-reduce"), LLAMA_8B.layers * MEGATRON_ALL_REDUCES * one)
    # Gathered weights are not kept for the backward pass.
    assert_within(in_layers(rows, "fsdp", "all-gather"), zero3_gathers(LLAMA_8B, 8, tensor=8))
    assert_within(in_layers(rows, "fsdp", "reduce-scatter"), zero3_scatters(LLAMA_8B, 8, tensor=8))


@pytest.mark.full
@pytest.mark.parametrize(
    ("remat", "gathers", "scatters"),
    [
        ("none", SEQUENCE_GATHERS, SEQUENCE_SCATTERS),
        ("full", REMAT_SEQUENCE_GATHERS, REMAT_SEQUENCE_SCATTERS),
    ],
)
def test_sequence_parallel(remat: Remat, gathers: int, scatters: int) -> None:
    rows = rows_of_8b(f"{FSDP8_TENSOR8}-seq", remat)
    half = activation_all_reduce(1, SEQ, 4_096, 8) / 2
    assert_within(in_layers(rows, "tensor", "all-gather"), LLAMA_8B.layers * gathers * half)
    assert_within(in_layers(rows, "tensor", "reduce-scatter"), LLAMA_8B.layers * scatters * half)
