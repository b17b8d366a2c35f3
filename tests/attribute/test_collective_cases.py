"""The cases of HLO.md sections 8.1 to 8.5, one small module each, with the numbers of its tables.

A file named `…x_…` is a neighbour of the case before it; its numbers are by hand, next to it.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from shardlab.analysis import Analysis, analyze

GOLDEN = Path(__file__).parents[1] / "golden" / "hlo"
MESHES = {
    "d2m4": {"data": 2, "model": 4},
    "d4m4": {"data": 4, "model": 4},
    "abc": {"a": 2, "b": 4, "c": 4},
    "dcn": {"dcn": 2, "data": 4, "model": 4},
    "d32m4": {"data": 32, "model": 4},
    "r8": {"replica": 8},
    "r2": {"replica": 2, "data": 2, "model": 2},
}
M = "model"
SUB_MINOR, SUB_MAJOR = "model:(2)2", "model:(1)2"

SUB_BYTE = ((524_288, 393_216), (30, 24), (9, 9), (8_192, 6_144))
F8 = ((16_384, 12_288), (256, 192), (400, 300), (64, 48))
F8_REDUCED = (1, "all-reduce", 256, 4, M, 384)
UNPACKED = ((2_048, 1_536), (256, 192), (192, 144))

# case, mesh, one row per collective: executions, kind, payload S (an all-gather's is its OUT), members, axes,
# and what is sent in all: the total per device and step, as in the tables.
CASES = [
    ("a01_2023_style", "d2m4", (1, "all-reduce", 2_048, 4, M, 3_072)),
    ("a02_short_parsable", "d2m4", (1, "all-reduce", 2_048, 4, M, 3_072)),
    ("a03_stack_frame_tables", "d2m4", (1, "all-reduce", 2_048, 2, "data", 2_048)),
    ("a04_hostile_op_name", "d2m4", (1, "all-reduce", 2_048, 4, M, 3_072)),
    ("a05_index_comments", "d2m4", (1, "all-reduce", 384, 4, M, 576)),
    ("a06_tpu_layouts", "d2m4", (1, "all-gather", 16_777_216, 4, M, 12_582_912)),
    ("a07_tail_padding_and_split", "d2m4", (1, "all-gather", 1_952, 8, "data+model", 1_708)),
    ("a08_dynamic_dims", "d2m4", (1, "all-reduce", 8_192, 4, M, 12_288)),
    # What is sent is three times the operand, whose bits are rounded up to bytes by themselves.
    ("a09_sub_byte", "d2m4", *((1, "all-gather", out, 4, M, sent) for out, sent in SUB_BYTE)),
    ("a10_f8_c64_pred", "d2m4", *((1, "all-gather", out, 4, M, sent) for out, sent in F8), F8_REDUCED),
    ("a11_multi_line_and_comments", "d2m4", (1, "all-reduce", 2_048, 4, M, 3_072)),
    ("a12_json_in_frontend_attributes", "d2m4", (1, "collective-permute", 2_048, 2, M, 2_048)),
    ("a13_pseudo_json_backend_config", "d2m4", (1, "all-reduce", 24_576, 4, M, 36_864)),
    ("a14_constants", "d2m4", (1, "all-reduce", 16, 4, M, 24)),
    ("a15_names_lie", "d2m4", (1, "all-reduce", 2_048, 4, M, 3_072)),
    ("a16_two_modules", "d2m4", (1, "all-reduce", 64, 4, M, 96), (1, "all-reduce", 128, 4, M, 192)),
    ("a17_compact_gte", "d2m4", (1, "all-reduce", 128, 4, M, 192), (1, "all-reduce", 256, 4, M, 384)),
    ("a18_header_tables", "d2m4", (1, "collective-permute", 12, 2, "data", 12)),
    ("a19_unpacked_narrow_types", "d2m4", *((1, "all-gather", out, 4, M, sent) for out, sent in UNPACKED)),
    ("a20_frontend_attribute_over_lines", "d2m4", (1, "all-reduce", 262_144, 4, M, 393_216)),
    ("b01_combined_mixed_dtypes", "d2m4", (1, "all-reduce", 4_046, 2, "data", 4_046)),
    ("b02_ar_start_native", "d2m4", (1, "all-reduce", 4_096, 4, M, 6_144)),
    ("b03_ar_start_native_tuple", "d2m4", (1, "all-reduce", 4_128, 4, M, 6_192)),
    ("b04_ar_start_generic", "d2m4", (1, "all-reduce", 4_096, 4, M, 6_144)),
    ("b05_ag_start_native_single", "d2m4", (1, "all-gather", 4_096, 4, M, 3_072)),
    ("b06_ag_start_multi", "d2m4", (1, "all-gather", 4_608, 4, M, 3_456)),
    ("b07_ag_start_generic_single", "d2m4", (1, "all-gather", 4_096, 4, M, 3_072)),
    ("b08_rs_start_sugar", "d2m4", (1, "reduce-scatter", 4_194_304, 4, M, 3_145_728)),
    ("b09_async_start_calls", "d2m4", (1, "all-gather", 4_096, 4, M, 3_072)),
    ("b10_async_thread", "d2m4", (1, "all-reduce", 4_096, 4, M, 6_144)),
    (
        "b11_collectives_group",
        "d2m4",
        (1, "all-reduce", 256, 4, M, 384),
        (1, "all-reduce", 128, 1, "none", 0),
    ),
    ("b12_cp_start_tpu", "d2m4", (1, "collective-permute", 1_048_576, 2, M, 1_048_576)),
    ("b13_cp_start_gpu_multi", "d2m4", (1, "collective-permute", 1_048_576, 2, "data", 1_048_576)),
    ("b14_cp_self_and_partial", "d2m4", (1, "collective-permute", 4_096, 2, "data+model", 4_096)),
    ("b15_cp_in_place_slices", "d2m4", (1, "collective-permute", 4_096, 2, M, 4_096)),
    ("b16_a2a_tuple", "d2m4", (1, "all-to-all", 512, 4, M, 384)),
    ("b17_a2a_array", "d2m4", (1, "all-to-all", 512, 4, M, 384)),
    ("b18_ragged", "d2m4", (1, "ragged-all-to-all", 524_288, 4, M, 524_288)),
    ("b19_broadcast_dynamic_root", "d2m4", (1, "collective-broadcast", 16_384, 4, M, 16_384)),
    ("b20_gpu_p2p", "d2m4", (1, "send", 1_048_576, 2, "data", 1_048_576)),
    ("b21_host_callback", "d2m4", (1, "all-gather", 262_144, 8, "data+model", 229_376)),
    (
        "b22_megascale",
        "dcn",
        (1, "all-reduce", 1_048_576, 2, "dcn", 1_048_576),
        (1, "all-gather", 2_097_152, 2, "dcn", 1_048_576),
        (1, "all-to-all", 1_048_576, 2, "dcn", 524_288),
        (1, "collective-permute", 1_048_576, 2, "dcn", 1_048_576),
    ),
    ("b23_multi_slice_in_slice_groups", "dcn", (1, "all-gather", 8_388_608, 4, "data", 6_291_456)),
    ("b24_tpu_async_collective_fusion", "d4m4", (1, "all-gather", 8_388_608, 4, "data", 6_291_456)),
    # The same, older: only the custom calls at its ends tell that it is one transfer.
    ("b24x_chain_without_flags", "d4m4", (1, "all-gather", 8_388_608, 4, "data", 6_291_456)),
    ("b25_tpu_all_reduce_scatter", "d4m4", (1, "reduce-scatter", 8_650_752, 4, "data", 6_488_064)),
    # 2 * 3/4 * 2048 * 2048 * 2: the slice is a use of a real all-reduce, not a part of its fusion.
    ("b25x_all_reduce_sliced_outside_a_fusion", "d4m4", (1, "all-reduce", 8_388_608, 4, "data", 12_582_912)),
    ("b26_tpu_sparsecore", "d32m4", (1, "all-reduce", 1_048_576, 32, "data", 2_031_616)),
    ("b27_gpu_collective_in_fusion", "d2m4", (1, "all-reduce", 131_072, 4, M, 196_608)),
    ("b28_call_twice_and_dead_code", "d2m4", (2, "all-reduce", 256, 4, M, 768)),
    (
        "b29_windowed_einsum_gpu",
        "d2m4",
        (2, "collective-permute", 524_288, 2, M, 1_048_576),
        (2, "collective-permute", 524_288, 2, M, 1_048_576),
    ),
    ("b30_opaque_remote_dma", "d2m4"),
    ("c01_iota_plain", "d2m4", (1, "all-reduce", 4_096, 4, M, 6_144)),
    ("c02_iota_transposed", "d2m4", (1, "all-reduce", 4_096, 2, "data", 4_096)),
    ("c03_iota_3d", "abc", (1, "all-reduce", 4_096, 4, "b", 6_144)),
    ("c04_iota_outer_and_inner", "abc", (1, "all-reduce", 4_096, 8, "a+c", 7_168)),
    ("c05_iota_half_axis", "d2m4", (1, "all-reduce", 4_096, 2, SUB_MINOR, 4_096)),
    ("c06_iota_strided_half_axis", "d2m4", (1, "all-reduce", 4_096, 2, SUB_MAJOR, 4_096)),
    ("c07_v3_mesh", "d2m4", (1, "all-reduce", 4_096, 4, M, 6_144)),
    ("c08_v3_axis_order", "d2m4", (1, "all-reduce", 4_096, 8, "data+model", 7_168)),
    ("c09_v3_sub_axis", "d2m4", (1, "all-reduce", 4_096, 2, SUB_MINOR, 4_096)),
    ("c10_v3_sub_axis_major", "d2m4", (1, "all-reduce", 4_096, 2, SUB_MAJOR, 4_096)),
    ("c11_v3_device_ids_list", "d2m4", (1, "all-reduce", 4_096, 4, f"data+{SUB_MAJOR}", 6_144)),
    ("c12_v3_device_ids_iota", "d2m4", (1, "all-reduce", 4_096, 2, "data", 4_096)),
    ("c13_v3_foreign_names", "d2m4", (1, "all-reduce", 4_096, 2, "data", 4_096)),
    ("c14_v3_other_factorisation", "d2m4", (1, "all-reduce", 4_096, 2, SUB_MAJOR, 4_096)),
    ("c15_v3_hostile_names", "d2m4", (1, "all-reduce", 4_096, 4, M, 6_144)),
    ("c16_empty_groups_cross_replica", "r8", (1, "all-reduce", 4_096, 8, "replica", 7_168)),
    ("c17_cross_replica_and_partition", "r2", (1, "all-reduce", 4_096, 8, "replica+data+model", 7_168)),
    ("c18_flattened_with_replicas", "r2", (1, "all-reduce", 4_096, 2, "replica", 4_096)),
    ("c19_a2a_cross_partition_mode", "r2", (1, "all-to-all", 4_096, 2, M, 2_048)),
    # 2 * 4/5 * 4096: the busier of the two groups.
    ("c20_uneven_groups", "d2m4", (1, "all-reduce", 4_096, 5, "unknown", Fraction(32_768, 5))),
    ("c21_group_of_one", "d2m4", (1, "all-reduce", 4_096, 1, "none", 0)),
    ("c22_one_group_missing_devices", "d2m4", (1, "all-reduce", 4_096, 4, M, 6_144)),
    ("c23_shuffled_members", "d2m4", (1, "all-reduce", 4_096, 4, M, 6_144)),
    ("d01_known_trip_count", "d2m4", (12, "all-reduce", 4_096, 4, M, 73_728)),
    ("d02_no_trip_count", "d2m4", (12, "all-reduce", 4_096, 4, M, 73_728)),
    ("d03_limit_in_tuple", "d2m4", (12, "all-reduce", 4_096, 4, M, 73_728)),
    ("d04_copies_and_layouts", "d2m4", (12, "all-reduce", 4_096, 4, M, 73_728)),
    ("d05_step_3_from_2", "d2m4", (6, "all-reduce", 4_096, 4, M, 36_864)),
    ("d06_le", "d2m4", (10, "all-reduce", 4_096, 4, M, 61_440)),
    ("d07_count_down", "d2m4", (9, "all-reduce", 4_096, 4, M, 55_296)),
    ("d08_swapped_compare", "d2m4", (7, "all-reduce", 4_096, 4, M, 43_008)),
    ("d09_not_equal", "d2m4", (9, "all-reduce", 4_096, 4, M, 55_296)),
    ("d10_geometric", "d2m4", (7, "all-reduce", 4_096, 4, M, 43_008)),
    ("d11_zero_trips", "d2m4", (0, "all-reduce", 4_096, 4, M, 0)),
    ("d12_full_unroll_count_lies", "d2m4", (1, "all-reduce", 4_096, 4, M, 6_144)),
    (
        "d14_nested",
        "d2m4",
        (4, "all-reduce", 4_096, 2, "data", 16_384),
        (20, "all-reduce", 4_096, 4, M, 122_880),
    ),
    (
        "d15_peeled",
        "d2m4",
        (1, "all-reduce", 4_096, 4, M, 6_144),
        (3, "all-reduce", 4_096, 4, M, 18_432),
    ),
    (
        "d16_double_buffered",
        "d2m4",
        (1, "all-gather", 4_096, 4, M, 3_072),
        (2, "all-gather", 4_096, 4, M, 6_144),
        (2, "all-gather", 4_096, 4, M, 6_144),
    ),
    ("d18_scan_opcode", "d2m4", (1, "all-reduce", 64, 4, M, 96)),
    # 16 slices of 64 floats, 2 * 3/4 * 256 bytes each.
    ("d18x_collective_in_a_scan", "d2m4", (16, "all-reduce", 256, 4, M, 6_144)),
    ("e01_cpu_promotes_bf16", "d2m4", (1, "all-reduce", 8_192, 4, M, 12_288)),
    # 4 * (1024 + 64 + 256) gathered, three times the operands sent.
    ("e01x_gathers_seen_through_a_fused_tuple", "d2m4", (1, "all-gather", 5_376, 4, M, 4_032)),
    ("e02_tpu_packed_int8", "d2m4", (1, "all-reduce", 262_144, 4, M, 393_216)),
    (
        "e03_tpu_f64_becomes_gathers",
        "d2m4",
        (1, "all-gather", 4_194_304, 4, M, 3_145_728),
        (1, "all-gather", 4_194_304, 4, M, 3_145_728),
    ),
]


def analysis(case: str, mesh: str = "d2m4") -> Analysis:
    return analyze(GOLDEN / f"{case}.hlo", axes=MESHES[mesh])


@pytest.mark.parametrize(
    ("case", "mesh", "rows"), [(c, m, rows) for c, m, *rows in CASES], ids=[c[0] for c in CASES]
)
def test_tables_of_collectives(case: str, mesh: str, rows: list[tuple[int, str, int, int, str, int]]) -> None:
    found = analysis(case, mesh)
    read = [
        (
            row.executions,
            row.kind,
            row.payload_bytes,
            row.group_size,
            "unknown" if row.axes is None else "+".join(row.axes) or "none",
            row.wire_bytes * row.executions[0],
        )
        for row in found.collectives
    ]
    assert read == [((times, times), *rest) for times, *rest in rows]
    sent = sum(row[-1] for row in rows)
    assert found.totals.wire_bytes == (sent, sent)


def test_every_case_file_is_in_the_table() -> None:
    ranges = {"d13_dynamic_trip", "d17_conditional"}  # tested by themselves, below
    assert {path.stem for path in GOLDEN.glob("[a-e][0-9]*.hlo")} == {case[0] for case in CASES} | ranges


def test_unknown_trips_have_no_upper_bound_and_are_on_the_ledger() -> None:
    found = analysis("d13_dynamic_trip")
    (row,) = found.collectives
    assert (row.executions, row.wire_bytes) == ((0, None), 6_144)
    assert found.totals.wire_bytes == (0, None)
    assert found.totals.by_axes["model"]["payload_bytes"] == (0, None)
    (entry,) = found.ledger
    assert (entry.what, entry.name) == ("while", "w")
    assert "input of the program" in entry.why


def test_a_conditional_adds_its_least_and_greatest_branch_never_their_sum() -> None:
    found = analysis("d17_conditional")
    assert [(row.executions, row.axes, row.wire_bytes) for row in found.collectives] == [
        ((0, 1), ("model",), 6_144),
        ((0, 1), ("data",), 4_096),
        ((0, 1), ("data",), 4_096),
        ((0, 1), ("model",), 6_144),
    ]
    assert found.totals.wire_bytes == (8_192, 12_288)
    assert found.totals.by_axes["model"]["wire_bytes"] == (0, 12_288)
    assert found.totals.by_axes["data"]["wire_bytes"] == (0, 8_192)


@pytest.mark.parametrize(
    ("case", "asynchronous"),
    [
        ("b02_ar_start_native", True),
        ("b04_ar_start_generic", True),
        ("b10_async_thread", True),
        ("b24_tpu_async_collective_fusion", True),
        ("b26_tpu_sparsecore", True),
        ("b01_combined_mixed_dtypes", False),
        ("b25_tpu_all_reduce_scatter", False),
        ("b27_gpu_collective_in_fusion", False),
    ],
)
def test_what_is_asynchronous(case: str, asynchronous: bool) -> None:
    mesh = {"b24": "d4m4", "b25": "d4m4", "b26": "d32m4"}.get(case[:3], "d2m4")
    assert [row.asynchronous for row in analysis(case, mesh).collectives] == [asynchronous]


@pytest.mark.parametrize(
    ("case", "mesh", "what", "why"),
    [
        ("b21_host_callback", "d2m4", "host-transfer", "not network"),
        ("b30_opaque_remote_dma", "d2m4", "custom-call", "opaque"),
        ("c22_one_group_missing_devices", "d2m4", "groups", "only 4 of 8 devices"),
    ],
)
def test_what_is_not_counted_is_on_the_ledger(case: str, mesh: str, what: str, why: str) -> None:
    entries = [entry for entry in analysis(case, mesh).ledger if entry.what == what]
    assert len(entries) == 1
    assert why in entries[0].why


def test_an_exact_program_has_an_empty_ledger() -> None:
    assert analysis("b01_combined_mixed_dtypes").ledger == ()


def test_a_ragged_collective_is_an_upper_bound() -> None:
    (row,) = analysis("b18_ragged").collectives
    assert row.bound == "upper"


def test_transfers_between_slices_are_dcn() -> None:
    assert {row.tier for row in analysis("b22_megascale", "dcn").collectives} == {"dcn"}
    assert {row.tier for row in analysis("b23_multi_slice_in_slice_groups", "dcn").collectives} == {None}


def test_a_windowed_loop_says_what_its_permutes_realize() -> None:
    assert {row.realizes for row in analysis("b29_windowed_einsum_gpu").collectives} == {"reduce-scatter"}


def test_irregular_groups_say_why_they_have_no_axes() -> None:
    (row,) = analysis("c20_uneven_groups").collectives
    assert row.axes_reason == "groups of different sizes (3, 5)"
    # 3 devices send 2 * 2/3 * 4096, 5 send 2 * 4/5 * 4096.
    assert row.fabric_bytes == 3 * Fraction(4, 3) * 4_096 + 5 * Fraction(8, 5) * 4_096


@pytest.mark.parametrize(
    ("case", "payload", "wire"),
    [
        ("e01_cpu_promotes_bf16", 4_096, 6_144),
        # bf16, s4 packed and f32: 512 + 32 + 256 bytes per device.
        ("e01x_gathers_seen_through_a_fused_tuple", 4 * 800, 3 * 800),
    ],
)
def test_widened_collectives_have_the_bytes_that_the_source_asked_for(
    case: str, payload: int, wire: int
) -> None:
    (row,) = analysis(case).collectives
    assert (row.logical_payload_bytes, row.logical_wire_bytes) == (payload, wire)


def test_a_reduction_that_xla_did_not_promote_is_what_the_source_asked_for() -> None:
    text = (GOLDEN / "e01_cpu_promotes_bf16.hlo").read_text().replace("add.clone_promoted", "add")
    (row,) = analyze(text, axes=MESHES["d2m4"]).collectives
    assert row.logical_payload_bytes is None


def test_a_proto_of_an_in_place_permute_carries_its_slices() -> None:
    """bf16 slices of 1 x 8 x 128 and 2 x 4 x 64 elements, not the 8 x 16 x 128 of the buffers."""
    proto = GOLDEN / "printed" / "in_place_permute_start.hlo_module.pb"
    (row,) = analyze(proto, axes=MESHES["d2m4"]).collectives
    assert row.payload_bytes == 2 * (1 * 8 * 128 + 2 * 4 * 64)


@pytest.mark.parametrize(
    ("case", "mean"),
    [
        ("a18_header_tables", 6),
        ("b14_cp_self_and_partial", 2_048),
        ("b20_gpu_p2p", 524_288),
        ("b12_cp_start_tpu", 1_048_576),
    ],
)
def test_a_permute_in_which_some_send_nothing_has_a_mean_below_its_maximum(case: str, mean: int) -> None:
    (row,) = analysis(case).collectives
    assert row.fabric_bytes == 8 * mean


def test_a_bounded_extent_is_an_upper_bound() -> None:
    (row,) = analysis("a08_dynamic_dims").collectives
    assert row.bound == "upper"


def test_rows_of_joined_modules_say_whose_they_are() -> None:
    assert [row.module for row in analysis("a16_two_modules").collectives] == ["jit_a", "jit_b"]
