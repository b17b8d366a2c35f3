"""What one run of each sample executes, by kind, operand bytes and mesh axes.

The figures are those of the samples' own list, which another program made before shardlab existed; axes are
worked out by hand from the groups, and the kinds of transfers between slices follow from the collective that
was compiled (a psum over dcn sends an all-reduce). Whole training steps are in test_samples.py.
"""

from __future__ import annotations

from collections import Counter

import pytest
from samples import GOLDEN, sample_path

from shardlab.analysis import analyze

KIB, MIB = 1 << 10, 1 << 20
D2M4 = {"data": 2, "model": 4}
D4M4 = {"data": 4, "model": 4}
D32M4 = {"data": 32, "model": 4}
ABC = {"a": 2, "b": 2, "c": 4}
SLICES = {"dcn": 2, "data": 4, "model": 4}
FOUR_SLICES = {"d1": 2, "d2": 2, "data": 2, "model": 4}
H100 = "h100_1x2x8."
TWO, FOUR = "v5e_4x4_x2slices.shard_map_", "v5e_2x4_x4slices."
REDUCE, GATHER, SCATTER = "all-reduce", "all-gather", "reduce-scatter"
PERMUTE, EXCHANGE = "collective-permute", "all-to-all"

# sample, mesh, (executions, kind, operand bytes, axes)…
SAMPLES = [
    ("bf16_promoted_to_f32", D2M4, (1, REDUCE, 8_192, "model")),
    (
        "combined_operands",
        D2M4,
        (1, REDUCE, 128, "model"),
        (1, REDUCE, 256, "model"),
        (1, REDUCE, 1_028, "model"),
    ),
    ("gspmd_sub_axis", ABC, (1, EXCHANGE, 4_096, "c:(2)2"), (1, PERMUTE, 4_096, "a+b+c")),
    ("hostile_axis_names", D2M4, (1, REDUCE, 512, "model"), (1, REDUCE, 512, "data")),
    ("hostile_op_name", D2M4, (1, REDUCE, 512, "model")),
    ("loop_nested_4x5", D2M4, (20, REDUCE, 512, "model"), (4, REDUCE, 512, "data")),
    ("loop_psum_scan12", D2M4, (12, REDUCE, 512, "model")),
    ("loop_scan10_unroll3", D2M4, (10, REDUCE, 512, "model")),
    ("permuted_mesh", D2M4, (1, REDUCE, 512, "model")),
    (f"{H100}all_gather_scan4.full_unroll", D4M4, (4, GATHER, 512 * KIB, "data")),
    (f"{H100}all_gather_scan5.double_buffer", D4M4, (5, GATHER, 512 * KIB, "data")),
    (f"{H100}all_gather_scan6.pipelined", D4M4, (6, GATHER, 512 * KIB, "data")),
    (f"{H100}ppermute_scan6.send_recv", D4M4, (6, "send", MIB, "data")),
    (
        f"{H100}shard_map_overlap",
        D4M4,
        (1, PERMUTE, MIB, "data"),
        (1, GATHER, MIB, "data"),
        (1, EXCHANGE, MIB, "data"),
        (1, SCATTER, 4 * MIB, "data"),
    ),
    (f"{H100}shard_map_pbroadcast", D4M4, (1, "collective-broadcast", 16 * KIB, "data")),
    (f"{H100}shard_map_psend", D4M4, (1, "send", 16 * KIB, "data")),
    (f"{H100}shard_map_psum2", D4M4, (1, REDUCE, 2 * MIB, "data")),
    (f"{H100}shard_map_ra2a", D4M4, (1, "ragged-all-to-all", MIB, "data")),
    (f"{H100}shard_map_s4", D4M4, (1, GATHER, 128 * KIB, "data")),
    ("tpu7x_4x4x4.shard_map_ag_data", D32M4, (1, GATHER, MIB, "data")),
    ("tpu7x_4x4x4.shard_map_psum_data", D32M4, (1, REDUCE, MIB, "data")),
    ("tpu7x_4x4x4.shard_map_ra2a", D32M4, (1, "ragged-all-to-all", MIB, "data")),
    ("tpu7x_4x4x4.shard_map_rs_data", D32M4, (1, SCATTER, MIB, "data")),
    ("v5e_2x2.host_callback", {"x": 4}, (1, GATHER, 8 * KIB, "x"), (1, REDUCE, 4, "x")),
    ("v5e_2x2.host_hostoffload", {"x": 4}),
    ("v5e_2x2.pallas_remote_copy", {"x": 4}),
    ("v5e_4x4.shard_map_a2a_data", D4M4, (1, EXCHANGE, MIB, "data")),
    ("v5e_4x4.shard_map_all_gather_int4", D4M4, (1, GATHER, 128 * KIB, "model")),
    ("v5e_4x4.shard_map_pp_data", D4M4, (1, PERMUTE, MIB, "data")),
    ("v5e_4x4.shard_map_psum_data", D4M4, (1, REDUCE, MIB, "data")),
    ("v5e_4x4.shard_map_psum_f64", D4M4, (2, GATHER, MIB, "model")),
    ("v5e_4x4.shard_map_psum_int8", D4M4, (1, REDUCE, 256 * KIB, "model")),
    ("v5e_4x4.shard_map_ra2a", D4M4, (1, "ragged-all-to-all", MIB, "data")),
    ("v5e_4x4.shard_map_rs_data", D4M4, (1, SCATTER, MIB, "data")),
    (f"{TWO}a2a_dcn", SLICES, (1, EXCHANGE, MIB, "dcn")),
    (f"{TWO}ag_dcn", SLICES, (1, GATHER, MIB, "dcn")),
    (f"{TWO}ag_dcn_data", SLICES, (1, GATHER, MIB, "dcn"), (1, GATHER, 2 * MIB, "data")),
    (f"{TWO}pp_dcn", SLICES, (1, PERMUTE, MIB, "dcn")),
    (f"{TWO}pp_dcn1", SLICES, (1, PERMUTE, MIB, "dcn")),
    (
        f"{TWO}psum_all",
        SLICES,
        (1, SCATTER, MIB, "data+model"),
        (1, REDUCE, MIB // 16, "dcn"),
        (1, GATHER, MIB // 16, "data+model"),
    ),
    (f"{TWO}psum_dcn", SLICES, (1, REDUCE, MIB, "dcn")),
    (f"{TWO}psum_dcn.shuffled_mesh", SLICES, (1, REDUCE, MIB, "dcn")),
    (f"{TWO}rs_dcn", SLICES, (1, SCATTER, MIB, "dcn")),
    (f"{TWO}rs_dcn_data", SLICES, (1, REDUCE, MIB, "data"), (1, SCATTER, MIB // 4, "dcn")),
    (f"{FOUR}psum_d1", FOUR_SLICES, (1, REDUCE, 256 * KIB, "d1")),
    (f"{FOUR}psum_d1d2", FOUR_SLICES, (1, REDUCE, 256 * KIB, "d1+d2")),
    (
        f"{FOUR}psum_d1_data",
        FOUR_SLICES,
        (1, SCATTER, 256 * KIB, "data"),
        (1, REDUCE, 128 * KIB, "d1"),
        (1, GATHER, 128 * KIB, "data"),
    ),
    (
        "gspmd_dots_mixed_groups",
        ABC,
        (1, GATHER, 1_024, "b"),
        (1, REDUCE, 2_048, "b"),
        (1, GATHER, 2_048, "a+c"),
        (1, REDUCE, 8_192, "a+c"),
        (1, GATHER, 8_192, "b"),
    ),
    (
        "gspmd_reshard_mixed_groups",
        ABC,
        (1, EXCHANGE, 4_096, "a"),
        (1, PERMUTE, 4_096, "a+b"),
        (2, GATHER, 1_024, "b"),
        (1, EXCHANGE, 2_048, "a"),
        (1, PERMUTE, 2_048, "a+b+c"),
        (1, GATHER, 1_024, "c"),
        (1, EXCHANGE, 4_096, "b"),
        (1, PERMUTE, 4_096, "a+b"),
        (1, GATHER, 1_024, "a+b"),
        (1, GATHER, 2_048, "a+c"),
    ),
    (
        "unrolled_40_layers_grad",
        D2M4,
        (159, GATHER, 8_192, "data"),
        (79, REDUCE, 4_096, "model"),
        (1, REDUCE, 1_310_720, "data"),
    ),
]
# What is not counted, or not exactly. Of all others nothing.
LEDGER = {
    "v5e_2x2.host_callback": {"host-transfer"},
    "v5e_2x2.host_hostoffload": {"module"},
    "v5e_2x2.pallas_remote_copy": {"custom-call", "module"},
    f"{TWO}psum_dcn.shuffled_mesh": {"groups"},
}
ELSEWHERE = {"conditional", "loop_dynamic_trip"}  # ranges, in the tests below


@pytest.mark.parametrize(
    ("name", "mesh", "rows"), [(n, m, rows) for n, m, *rows in SAMPLES], ids=[s[0] for s in SAMPLES]
)
def test_what_a_sample_executes(
    name: str, mesh: dict[str, int], rows: list[tuple[int, str, int, str]]
) -> None:
    found = analyze(sample_path(f"{name}.hlo"), axes=mesh)
    executed: Counter[tuple[str, int, str | None]] = Counter()
    for row in found.collectives:
        assert row.executions[0] == row.executions[1]
        operand_bytes = row.payload_bytes // (row.group_size if row.kind == GATHER else 1)
        axes = None if row.axes is None else "+".join(row.axes)
        executed[row.kind, operand_bytes, axes] += row.executions[0]
    expected: Counter[tuple[str, int, str | None]] = Counter()
    for times, kind, size, over in rows:
        expected[kind, size, over] += times
    assert executed == expected
    assert {entry.what for entry in found.ledger} == LEDGER.get(name, set())


def test_a_sample_whose_loop_ends_by_its_data() -> None:
    found = analyze(sample_path("loop_dynamic_trip.hlo"), axes=D2M4)
    assert [(row.executions, row.payload_bytes, row.axes) for row in found.collectives] == [
        ((0, None), 512, ("model",))
    ]
    assert [entry.what for entry in found.ledger] == ["while"]


def test_a_sample_of_which_one_branch_runs() -> None:
    found = analyze(sample_path("conditional.hlo"), axes=D2M4)
    assert sorted((row.executions, row.wire_bytes, row.axes) for row in found.collectives) == [
        ((0, 1), 512, ("data",)),
        ((0, 1), 768, ("model",)),
    ]
    assert found.totals.wire_bytes == (512, 768)


def test_every_sample_is_in_a_table() -> None:
    held = {path.name.removesuffix(".hlo.gz") for path in (GOLDEN / "samples").iterdir()}
    whole_steps = {name for name in held if ".scan" in name}  # in test_samples.py
    assert held - whole_steps <= {name for name, *_ in SAMPLES} | ELSEWHERE
    assert len(whole_steps) == 7
