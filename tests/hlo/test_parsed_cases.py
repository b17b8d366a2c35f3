"""The described cases 8.1 to 8.3, as far as reading goes: bytes of operands and results, and groups."""

from __future__ import annotations

import pytest
from hlo.described import CASES, GOLDEN, Collective, case_modules, case_text, find, operand_bytes

from shardlab.hlo import attributes
from shardlab.hlo.groups import flattened_groups, flattened_pairs, parse_replica_groups
from shardlab.hlo.module import Module
from shardlab.hlo.reader import parse, parse_with_care
from shardlab.hlo.shape import is_bounded, parse_shape, shape_bytes

ROWS = [(case, row) for case, rows in CASES.items() for row in rows]
SPECIAL = {"b15_cp_in_place_slices", "b22_megascale"}


def device_sets(module: Module, row: Collective) -> list[set[int]]:
    _, instruction = find(module, row.name)
    replicas, partitions = module.replica_count or 1, module.num_partitions or 1
    if "source_target_pairs" in instruction.attributes:
        pairs = flattened_pairs(instruction, replicas, partitions)
        return sorted({frozenset(pair) for pair in pairs}, key=min)  # type: ignore[arg-type]
    if "replica_groups" not in instruction.attributes:
        return []
    count = partitions if module.num_partitions or module.replica_count else 8
    return [set(group) for group in flattened_groups(instruction, replicas, count)]


def test_every_golden_case_has_expectations() -> None:
    assert {
        path.stem for path in GOLDEN.glob("*.hlo") if path.stem[0] in "abc" and path.stem[3] != "x"
    } == set(CASES) | SPECIAL


@pytest.mark.parametrize(("case", "row"), ROWS, ids=[f"{case}-{row.name}" for case, row in ROWS])
def test_bytes_and_groups_are_those_described(case: str, row: Collective) -> None:
    module = case_modules(case)[row.module]
    computation, instruction = find(module, row.name)
    _, result = find(module, row.done or row.name)
    assert operand_bytes(computation, instruction, row.operands) == row.in_bytes
    assert shape_bytes(result.shape) == row.out_bytes
    assert sorted(device_sets(module, row), key=min) == sorted(map(set, row.groups), key=min)


@pytest.mark.parametrize("case", [*CASES, *sorted(SPECIAL)])
def test_the_fast_path_reads_what_the_careful_one_reads(case: str) -> None:
    assert parse(case_text(case), case) == parse_with_care(case_text(case), case)


@pytest.mark.parametrize("case", [*CASES, *sorted(SPECIAL)])
def test_line_ends_and_byte_order_marks_make_no_difference(case: str) -> None:
    if "\n'" not in case_text(case):  # a newline inside an axis name is part of the name
        assert parse("\ufeff" + case_text(case).replace("\n", "\r\n"), case) == case_modules(case)


def test_a01_reads_what_text_of_2023_prints() -> None:
    (module,) = case_modules("a01_2023_style")
    _, ar = find(module, "ar")
    assert (module.num_partitions, module.replica_count) == (None, None)
    assert attributes.metadata(ar).source_file == "/home/me/train.py"
    assert attributes.metadata(ar).source_line == 12
    assert attributes.config_value(ar, "note") == 'a "quoted" } brace'
    assert [(op.name, op.index) for op in ar.operands] == [("Arg_0.1", ())]


def test_a03_joins_the_tables() -> None:
    (module,) = case_modules("a03_stack_frame_tables")
    _, ar = find(module, "ar")
    frame = module.stack_frames[attributes.metadata(ar).stack_frame_id]
    assert list(module.computations) == ["add", "main"]
    assert (frame.line, frame.parent) == (7, 1)
    assert frame.file == "ENTRY %evil (p: f32[]) -> f32[] {"
    assert (module.stack_frames[1].file, module.stack_frames[1].parent) == ("train.py", 0)


def test_a04_op_name_is_one_string() -> None:
    _, ar = find(case_modules("a04_hostile_op_name")[0], "ar")
    op_name = 'jit(g)/we{ird"}, channel_id=7, replica_groups={{0,7}}, to_apply=%x\\'
    assert attributes.metadata(ar).op_name == op_name
    assert attributes.metadata(ar).source_line == 3
    assert attributes.channel_id(ar) == 1
    assert attributes.called_computations(ar) == ("add",)


def test_a08_bound_is_marked() -> None:
    _, ar = find(case_modules("a08_dynamic_dims")[0], "ar")
    assert is_bounded(ar.shape)


def test_a11_keeps_lines_and_ignores_comments() -> None:
    (module,) = case_modules("a11_multi_line_and_comments")
    assert list(module.computations) == ["add", "main"]
    assert module.is_scheduled
    assert find(module, "ar")[1].line == 17
    assert find(module, "add.1")[1].is_root


def test_a12_frontend_values_are_quoted_or_braced() -> None:
    _, cp = find(case_modules("a12_json_in_frontend_attributes")[0], "cp")
    assert attributes.frontend_attributes(cp) == {
        "_xla_pairs": "{{0,4},{4,0}}",
        "config": '{"permutation": [[0, 1]], "channel_id": 1}',
        "plain": 'a="b", c',
    }
    assert attributes.channel_id(cp) == 1


def test_a13_config_need_not_be_json() -> None:
    (module,) = case_modules("a13_pseudo_json_backend_config")
    _, sort = find(module, "sort")
    assert attributes.backend_config_text(sort) == '{is_stable = true, order = "TOTAL"}'
    assert attributes.backend_config(sort) == {}
    assert attributes.called_computations(sort) == ("compare",)


@pytest.mark.parametrize(
    ("name", "literal"),
    [
        ("c0", "{ { 1, 2 }, { inf, -nan(0x7) } }"),
        ("c1", "(1, (2, 3))"),
        ("c2", "{...}"),
        ("c3", r'"\x01)}\"\\"'),
        ("c4", "-inf"),
        ("c5", "-12"),
        ("c6", "true"),
    ],
)
def test_a14_literals(name: str, literal: str) -> None:
    assert find(case_modules("a14_constants")[0], name)[1].literal == literal


def test_a16_two_modules_keep_their_names() -> None:
    assert [module.name for module in case_modules("a16_two_modules")] == ["jit_a", "jit_b"]


def test_a18_module_inside_a_string_is_not_read() -> None:
    (module,) = case_modules("a18_header_tables")
    assert list(module.computations) == ["main"]
    assert module.num_partitions == 8


def test_a20_attribute_over_three_lines_is_one_value() -> None:
    _, kernel = find(case_modules("a20_frontend_attribute_over_lines")[0], "kernel")
    assert attributes.frontend_attributes(kernel) == {"kernel_metadata": '{\n"mesh_axes":"[\\"x\\"]"\n}'}
    assert attributes.metadata(kernel).stack_frame_id == 3
    assert attributes.config_value(kernel, "custom_call_config", "needs_hlo_passes") is True


def test_b09_async_start_names_the_computation_that_does_the_work() -> None:
    _, start = find(case_modules("b09_async_start_calls")[0], "start")
    assert attributes.called_computations(start) == ("async_computation",)
    assert attributes.config_value(start, "is_sync") is False


def test_b10_thread_of_a_computation() -> None:
    (module,) = case_modules("b10_async_thread")
    assert module.computations["async_computation"].execution_thread == "parallel"
    assert module.computations["main"].execution_thread == ""


def test_b15_in_place_permute_keeps_its_slices_apart_from_its_operands() -> None:
    _, cp = find(case_modules("b15_cp_in_place_slices")[0], "cp")
    assert cp.attributes["slice_sizes"] == "{{1,8,128}}"
    assert [op.name for op in cp.operands] == ["in", "out", "offsets", "offsets"]


@pytest.mark.parametrize(
    ("send", "kind", "in_bytes", "out_bytes"),
    [
        ("0", "ALL_REDUCE", 1_048_576, 1_048_576),
        ("1", "ALL_GATHER", 1_048_576, 2_097_152),
        ("2", "ALL_TO_ALL", 1_048_576, 1_048_576),
        ("3", "ONE_TO_ONE", 1_048_576, 1_048_576),
    ],
)
def test_b22_megascale_transfers(send: str, kind: str, in_bytes: int, out_bytes: int) -> None:
    (module,) = case_modules("b22_megascale")
    computation, sent = find(module, f"send.{send}")
    _, received = find(module, f"recv-done.{send}")
    found = attributes.frontend_attributes(sent)
    assert found["_xla_megascale_transfer_type"] == kind
    assert found["_xla_host_transfer_handler_name"] == "xla_megascale_runtime"
    assert operand_bytes(computation, sent, 1) == in_bytes
    assert shape_bytes(received.shape.leaves[0]) == out_bytes
    assert attributes.is_true(sent, "is_host_transfer")


def test_b22_targets_are_quoted_or_braced() -> None:
    (module,) = case_modules("b22_megascale")
    targets = [
        attributes.frontend_attributes(find(module, f"send.{i}")[1])["_xla_megascale_target"]
        for i in range(4)
    ]
    assert targets[0] == targets[1] == "{1,2}x{0:15}"
    assert targets[2].startswith("{{100000,200000},{100001,200001},")
    assert targets[3].startswith("{{100000->200000},{100001->200001},")


def test_c08_axis_order_is_member_order() -> None:
    _, collective = find(case_modules("c08_v3_axis_order")[0], "c")
    groups = parse_replica_groups(collective.attributes["replica_groups"])
    assert groups.groups == ((0, 4, 1, 5, 2, 6, 3, 7),)


def test_tuple_start_shape_is_kept_as_a_structure() -> None:
    _, start = find(case_modules("b06_ag_start_multi")[0], "ag")
    expected = parse_shape("((f32[256]{0}, bf16[64]{0}), (f32[1024]{0}, bf16[256]{0}))")
    assert start.shape == expected
