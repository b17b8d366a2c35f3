"""Real compiled programs (JAX 0.12, compile-only for accelerators): the checks that their README lists.

FSDP(data) x TP(model) MLP with remat and an SGD step, scanned; and one shard_map of every collective on 8 CPU
devices.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from samples import sample, sample_path

from shardlab.analysis import Analysis, CollectiveRow, analyze
from shardlab.attribute.calls import call_graph
from shardlab.hlo.reader import parse

MIB = 1 << 20
GPU = [
    "hlo",
    "gpu_after_optimizations.txt",
    "gpu_after_optimizations.hlo.pb",
    "double_buffer.hlo",
    "pipelined.hlo",
]


def analysis(name: str, **mesh: int) -> Analysis:
    return analyze(sample_path(name), axes=mesh or None)


def shard_bytes(row: CollectiveRow) -> int:
    """Operand bytes: an all-gather's payload is its result."""
    return row.payload_bytes // row.group_size if row.kind == "all-gather" else row.payload_bytes


def executed(found: Analysis) -> Counter[tuple[str, int]]:
    """(kind, operand bytes) -> executions per step, all of which must be exact."""
    assert found.ledger == ()
    counts: Counter[tuple[str, int]] = Counter()
    for row in found.collectives:
        low, high = row.executions
        assert low == high
        counts[row.kind, shard_bytes(row)] += low
    return counts


@pytest.mark.parametrize("form", GPU)
def test_one_gpu_program_however_it_was_transformed_and_printed(form: str) -> None:
    found = analysis(f"h100_1x2x8.scan6.{form}", data=4, model=4)
    assert executed(found) == {
        ("all-gather", MIB): 12,
        ("all-reduce", MIB): 12,
        ("reduce-scatter", 4 * MIB): 6,
    }
    # 12 gathers of 3 MiB and 6 scatters of 3 MiB over data, 12 reductions of 1.5 MiB over model
    sent = {axes: amounts["wire_bytes"] for axes, amounts in found.totals.by_axes.items()}
    assert sent == {"data": (54 * MIB, 54 * MIB), "model": (18 * MIB, 18 * MIB)}
    assert found.modules[0].backend == "gpu"


@pytest.mark.parametrize("form", GPU[:3])
def test_text_dump_and_proto_give_equal_tables(form: str) -> None:
    assert (
        analysis(f"h100_1x2x8.scan6.{form}", data=4, model=4).collectives
        == analysis("h100_1x2x8.scan6.hlo", data=4, model=4).collectives
    )


def test_gpu_windowed_einsum() -> None:
    found = analysis("h100_1x2x8.scan6.windowed_einsum.hlo", data=4, model=4)
    assert executed(found) == {
        ("all-gather", MIB): 12,
        ("all-reduce", MIB): 12,
        ("collective-permute", MIB // 2): 24,
        ("collective-permute", MIB): 18,
    }
    assert {row.realizes for row in found.collectives if row.executions == (6, 6)} >= {None, "reduce-scatter"}


CPU_FORMS = [
    "shard_map_ops.jax0.12.hlo",
    "shard_map_ops.jax0.10.2.hlo",
    "print_short_parsable.hlo",
    "print_no_layouts.hlo",
    "print_no_percent.hlo",
    "print_operand_shapes.hlo",
    "module_0000.jit__lambda.cpu_after_optimizations.txt",
    "module_0000.jit__lambda.cpu_after_optimizations.hlo.pb",
]


@pytest.mark.parametrize("form", CPU_FORMS)
def test_every_collective_of_shard_map_in_every_print(form: str) -> None:
    """float32[8,16] per device, 512 bytes, on data=2 x model=4: the closed form of each."""
    found = analysis(form, data=2, model=4)
    rows = Counter((row.kind, row.axes, row.payload_bytes, row.wire_bytes) for row in found.collectives)
    assert rows == {
        ("all-reduce", ("data",), 512, 512): 1,
        ("all-reduce", ("model",), 512, 768): 1,
        ("all-reduce", ("data", "model"), 512, 896): 1,
        ("all-gather", ("model",), 2_048, 1_536): 1,
        ("reduce-scatter", ("data",), 512, 256): 1,
        ("all-to-all", ("model",), 512, 384): 1,
        ("collective-permute", ("model",), 512, 512): 1,
    }
    assert found.ledger == ()


def test_v5e_chains_scatter_fusions_and_halos() -> None:
    found = analysis("v5e_4x4.scan8.hlo", data=4, model=4)
    assert executed(found) == {
        ("all-gather", 2 * MIB): 32,  # 72 when each fusion of a chain is counted
        ("all-reduce", 2 * MIB): 16,
        ("reduce-scatter", 8 * MIB): 8,
        ("reduce-scatter", 8_650_752): 8,  # padded from 2048 to 2112 rows
        ("collective-permute", 196_608): 8,
    }
    assert set(found.totals.by_axes) == {"data", "model"}
    assert set(found.totals.by_phase) == {"forward", "backward"}


def test_without_the_marks_of_a_chain_each_of_its_fusions_would_count() -> None:
    """The marks are what makes 32 of 72: the list of the samples gives both figures."""
    text = sample("v5e_4x4.scan8.hlo").decode()
    for mark in ("async_collective_fusion_config", "AsyncCollectiveStart", "AsyncCollectiveDone"):
        assert mark in text
        text = text.replace(mark, "unmarked")
    found = analyze(text, axes={"data": 4, "model": 4})
    assert sum(row.executions[0] for row in found.collectives if row.kind == "all-gather") == 72


def test_two_slices_of_v5e() -> None:
    found = analysis("v5e_4x4_x2slices.scan4.hlo", dcn=2, data=4, model=4)
    assert executed(found) == {
        ("all-gather", 2 * MIB): 16,
        ("all-reduce", 2 * MIB): 16,  # 8 within slices, 8 between them
        ("reduce-scatter", 8 * MIB): 4,
        ("reduce-scatter", 8_650_752): 4,
        ("collective-permute", 196_608): 4,
    }
    # 2 weights x 4 layers x 2 MiB, peeled by one layer or not
    assert found.totals.by_axes["dcn"]["payload_bytes"] == (16 * MIB, 16 * MIB)
    assert {row.tier for row in found.collectives if row.axes == ("dcn",)} == {"dcn"}
    assert found.modules[0].num_devices == 32
    assert set(found.totals.by_phase) == {
        "forward",
        "backward",
    }  # the text itself has no names on its collectives


@pytest.mark.parametrize(
    ("sample", "data", "expected"),
    [
        (
            "v6e_4x4.scan4.hlo",
            4,
            {("all-gather", 2 * MIB): 16, ("all-reduce", 2 * MIB): 8, ("reduce-scatter", 8 * MIB): 8},
        ),
        *(
            (
                sample,
                32,
                # 4 layers x 4 weights, 8 trips x 4 + 1 permutes each
                {
                    ("all-gather", MIB // 4): 8,
                    ("all-reduce", 2 * MIB): 8,
                    ("collective-permute", MIB // 4): 528,
                },
            )
            for sample in ("v4_4x4x4.scan4.hlo", "tpu7x_4x4x4.scan4.hlo")
        ),
    ],
)
def test_other_tpus(sample: str, data: int, expected: dict[tuple[str, int], int]) -> None:
    found = analysis(sample, data=data, model=4)
    assert executed(found) == expected
    assert {row.axes for row in found.collectives} == {("data",), ("model",)}
    realized = Counter[str | None]()
    for row in found.collectives:
        if row.kind == "collective-permute":
            realized[row.realizes] += row.executions[0]
    assert realized in ({}, {"all-gather": 256, "reduce-scatter": 256, None: 16})


@pytest.mark.parametrize("form", ["hlo", "double_buffer.hlo", "pipelined.hlo", "windowed_einsum.hlo"])
def test_derived_trip_counts_agree_with_printed_ones(form: str) -> None:
    """GPU text prints the count: with that struck out, the interpreter must find the same."""
    text = sample(f"h100_1x2x8.scan6.{form}").decode()
    struck = text.replace('"known_trip_count"', '"no_longer_known"')
    counts = [[*call_graph(*parse(version)).loops.values()] for version in (text, struck)]
    assert counts[0] == counts[1]
    assert len(counts[0]) >= 2


def test_every_print_of_one_program_gives_equal_tables() -> None:
    """Names and sources too; ShortParsable prints no metadata, so that only these are missing."""
    mesh = {"data": 2, "model": 4}
    tables = {form: analysis(form, **mesh) for form in CPU_FORMS}
    short = tables.pop("print_short_parsable.hlo")
    first = tables[CPU_FORMS[0]]
    assert sorted(row.source for row in first.collectives) == [f"train.py:{line}" for line in range(14, 21)]
    for found in tables.values():
        assert (found.collectives, found.totals, found.ledger) == (first.collectives, first.totals, ())
    silent = [replace(row, phase="other", op_name="", source="") for row in first.collectives]
    assert list(short.collectives) == silent


PERMUTED = (3, 1, 2, 0, 7, 5, 6, 4)


def test_a_permuted_mesh_is_in_the_proto_and_moves_no_axis() -> None:
    """The text of the identity order is the same; only the proto knows which device stands where."""
    mesh = {"data": 2, "model": 4}
    text = analyze(sample("permuted_mesh.hlo"), axes=mesh)
    proto = analyze(sample("permuted_mesh.hlo_module.pb"), axes=mesh)
    assert text.collectives == proto.collectives
    assert "device_order" not in text.made_by
    assert proto.made_by["device_order"] == list(PERMUTED)
    assert analyze(sample("permuted_mesh.hlo"), axes=mesh, device_ids=PERMUTED).made_by == proto.made_by
