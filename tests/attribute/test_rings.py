"""What loops of permutes realise, on compiled loops (golden/rings) and on TPU's and GPU's own."""

from __future__ import annotations

import pytest
from samples import GOLDEN, sample

from shardlab.analysis import analyze

RINGS = GOLDEN / "rings"
# Loops of XLA's windowed einsum under another name: only their structure is left to tell what they do.
WINDOWED, PLAIN = "windowed_dot_general_body", "region"


def realized(text: str) -> list[str | None]:
    """Of each permute in turn."""
    rows = analyze(text, axes={"x": 4} if "num_partitions=4" in text else None).collectives
    return [row.realizes for row in rows if row.kind == "collective-permute"]


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("gather.hlo", "all-gather"),
        ("gather.dump.txt", "all-gather"),
        ("scatter.hlo", "reduce-scatter"),
        ("scatter.dump.txt", "reduce-scatter"),
        ("window.hlo", None),
        ("chain.hlo", None),
        ("halo.hlo", None),
        ("pipeline.hlo", None),
    ],
)
def test_a_loop_of_permutes_is_read_as_what_it_carries_out(program: str, expected: str | None) -> None:
    assert realized((RINGS / program).read_text()) == [expected]


@pytest.mark.parametrize("program", ["gather.hlo", "scatter.hlo"])
def test_what_a_ring_realizes_changes_no_bytes(program: str) -> None:
    """4 trips of one shard: k is f32[16,64], 4,096 bytes; the sums are f32[8,16], 512 bytes."""
    found = analyze(RINGS / program, axes={"x": 4})
    shard = 4_096 if program == "gather.hlo" else 512
    (row,) = found.collectives
    assert row.kind == "collective-permute"
    assert row.executions == (4, 4)
    assert [row.payload_bytes, row.wire_bytes] == [shard, shard]
    assert list(found.totals.wire_bytes) == [4 * shard, 4 * shard]


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ("{0,1},{1,2},{2,3},{3,0}", "all-gather"),
        ("{0,3},{1,0},{2,1},{3,2}", "all-gather"),
        ("{0,2},{2,0},{1,3},{3,1}", "all-gather"),
        ("{0,0},{1,1},{2,2},{3,3}", None),
        ("{0,1},{1,2},{2,0},{3,3}", None),
        ("{0,1},{1,0},{2,3}", None),
    ],
    ids=["up", "down", "two rings", "to itself", "one left out", "open"],
)
def test_only_closed_cycles_of_one_size_are_rings(pairs: str, expected: str | None) -> None:
    text = (RINGS / "gather.hlo").read_text()
    assert "{0,1},{1,2},{2,3},{3,0}" in text
    assert realized(text.replace("{0,1},{1,2},{2,3},{3,0}", pairs)) == [expected]


def test_a_buffer_that_nobody_uses_on_its_way_is_not_gathered() -> None:
    text = (GOLDEN / "hlo" / "b29_windowed_einsum_gpu.hlo").read_text()
    assert realized(text.replace(WINDOWED, PLAIN)) == [None, None]
    assert realized(text) == ["reduce-scatter", "reduce-scatter"]  # by the loop's name


@pytest.mark.parametrize("name", ["v4_4x4x4.scan4", "tpu7x_4x4x4.scan4", "h100_1x2x8.scan6.windowed_einsum"])
def test_structure_and_name_say_the_same_of_windowed_einsum(name: str) -> None:
    text = sample(f"{name}.hlo").decode()
    assert WINDOWED in text
    by_structure = realized(text.replace(WINDOWED, PLAIN))
    assert by_structure == realized(text)
    assert {"reduce-scatter", None} <= set(by_structure)


def test_a_neighbours_rows_in_a_tpu_loop_are_not_a_ring() -> None:
    """v5e pads a scattered gradient and fetches the missing rows from its neighbour, once per layer."""
    assert realized(sample("v5e_4x4.scan8.hlo").decode()) == [None]
