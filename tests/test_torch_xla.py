"""A training step of PyTorch/XLA: its dump, held to arithmetic. golden/torch_xla/make.py makes it."""

from __future__ import annotations

from pathlib import Path

from shardlab.analysis import analyze

STEP = Path(__file__).parent / "golden" / "torch_xla" / "step.hlo"
DATA, MODEL = 2, 4
BATCH, WIDTH, HIDDEN, F32 = 16, 32, 64, 4


def reduced(size: int, n: int) -> int:
    return 2 * size * (n - 1) // n


def test_every_collective_of_a_megatron_step() -> None:
    """The output of the second layer over model; over data the loss, and the gradient of each device's shard
    of both weights. The first layer's input is data, and has no gradient."""
    activation, weight = BATCH // DATA * WIDTH * F32, WIDTH * HIDDEN // MODEL * F32
    analysis = analyze(STEP, axes={"data": DATA, "model": MODEL})
    assert sorted(
        (row.kind, row.axes, row.executions, row.wire_bytes) for row in analysis.collectives
    ) == sorted(
        [
            ("all-reduce", ("model",), (1, 1), reduced(activation, MODEL)),
            ("all-reduce", ("data",), (1, 1), reduced(F32, DATA)),
            ("all-reduce", ("data",), (1, 1), reduced(weight, DATA)),
            ("all-reduce", ("data",), (1, 1), reduced(weight, DATA)),
        ]
    )
    assert analysis.ledger == ()


def test_names_of_another_framework_are_no_phases_or_layers() -> None:
    """PyTorch/XLA names operations, `aten__mm`, and the line of the forward pass; a gradient has none."""
    rows = analyze(STEP, axes={"data": DATA, "model": MODEL}).collectives
    assert {(row.phase, row.layer) for row in rows} == {("other", "")}
    assert sorted(row.source for row in rows) == ["", "", "linear.py:134", "make.py:46"]
