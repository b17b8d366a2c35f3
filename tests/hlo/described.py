"""What the described cases a01 to c23 hold, from the tables of the format notes: not from our own output.

Bytes of one device: IN sums the operands that carry data, OUT the result (of the done op for pairs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shardlab.hlo.module import Computation, Instruction, Module, Shape
from shardlab.hlo.reader import parse
from shardlab.hlo.shape import shape_bytes

GOLDEN = Path(__file__).parents[1] / "golden" / "hlo"

MODEL = [{0, 1, 2, 3}, {4, 5, 6, 7}]
DATA = [{0, 4}, {1, 5}, {2, 6}, {3, 7}]
ALL = [set(range(8))]
PAIRS = [{0, 1}, {2, 3}, {4, 5}, {6, 7}]
STRIDED = [{0, 2}, {1, 3}, {4, 6}, {5, 7}]
DATA_4x4 = [{0, 4, 8, 12}, {1, 5, 9, 13}, {2, 6, 10, 14}, {3, 7, 11, 15}]


@dataclass(frozen=True, slots=True)
class Collective:
    """One printed collective: its name, bytes of the operands that carry data and of the result, groups.

    done: the instruction whose shape is the result, where it is not the collective itself.
    """

    name: str
    in_bytes: int
    out_bytes: int
    groups: Sequence[set[int]] = ()
    operands: int | None = None
    done: str = ""
    module: int = 0


def case_text(case: str) -> str:
    """The text of a case, newlines untouched."""
    return (GOLDEN / f"{case}.hlo").read_bytes().decode()


def case_modules(case: str) -> tuple[Module, ...]:
    return parse(case_text(case), case)


def find(module: Module, name: str) -> tuple[Computation, Instruction]:
    """The one instruction of that name."""
    found = [c for c in module.computations.values() if name in c.instructions]
    assert len(found) == 1, f"{name} is in {len(found)} computations"
    return found[0], found[0].instructions[name]


def operand_bytes(computation: Computation, instruction: Instruction, count: int | None) -> int:
    """Bytes of the first `count` operands, looked up."""
    return sum(
        shape_bytes(operand_shape(computation, op.name, op.index)) for op in instruction.operands[:count]
    )


def operand_shape(computation: Computation, name: str, index: Sequence[int]) -> Shape:
    shape = computation.instructions[name].shape
    for step in index:
        shape = shape.leaves[step]
    return shape


CASES: dict[str, list[Collective]] = {
    "a01_2023_style": [Collective("ar", 2048, 2048, MODEL)],
    "a02_short_parsable": [Collective("ar", 2048, 2048, MODEL)],
    "a03_stack_frame_tables": [Collective("ar", 2048, 2048, DATA)],
    "a04_hostile_op_name": [Collective("ar", 2048, 2048, MODEL)],
    "a05_index_comments": [Collective("ar", 384, 384, MODEL)],
    "a06_tpu_layouts": [Collective("ag", 4_194_304, 16_777_216, MODEL)],
    "a07_tail_padding_and_split": [Collective("ag", 244, 1952, ALL)],
    "a08_dynamic_dims": [Collective("ar", 8192, 8192, MODEL)],
    "a09_sub_byte": [
        Collective("ag", 131_072, 524_288, MODEL),
        Collective("ag.1", 8, 30, MODEL),
        Collective("ag.2", 3, 9, MODEL),
        Collective("ag.3", 2048, 8192, MODEL),
    ],
    "a10_f8_c64_pred": [
        Collective("ag", 4096, 16_384, MODEL),
        Collective("ag.1", 64, 256, MODEL),
        Collective("ag.2", 100, 400, MODEL),
        Collective("ag.3", 16, 64, MODEL),
        Collective("ar", 256, 256, MODEL),
    ],
    "a11_multi_line_and_comments": [Collective("ar", 2048, 2048, MODEL)],
    "a12_json_in_frontend_attributes": [Collective("cp", 2048, 2048, PAIRS)],
    "a13_pseudo_json_backend_config": [Collective("ar", 24_576, 24_576, MODEL)],
    "a14_constants": [Collective("ar", 16, 16, MODEL)],
    "a15_names_lie": [Collective("psum.7", 2048, 2048, MODEL)],
    "a16_two_modules": [Collective("ar", 64, 64, MODEL), Collective("ar", 128, 128, MODEL, module=1)],
    "a17_compact_gte": [Collective("ar.0", 128, 128, MODEL), Collective("ar.1", 256, 256, MODEL)],
    "a18_header_tables": [Collective("cp", 12, 12, DATA)],
    "a19_unpacked_narrow_types": [
        Collective("ag", 512, 2048, MODEL),
        Collective("ag.1", 64, 256, MODEL),
        Collective("ag.2", 48, 192, MODEL),
    ],
    "a20_frontend_attribute_over_lines": [Collective("ar", 262_144, 262_144, MODEL)],
    "b01_combined_mixed_dtypes": [Collective("ar", 4046, 4046, DATA)],
    "b02_ar_start_native": [Collective("ar", 4096, 4096, MODEL, done="done")],
    "b03_ar_start_native_tuple": [Collective("ar", 4128, 4128, MODEL, done="done")],
    "b04_ar_start_generic": [Collective("ar", 4096, 4096, MODEL, done="done")],
    "b05_ag_start_native_single": [Collective("ag", 1024, 4096, MODEL, done="done")],
    "b06_ag_start_multi": [Collective("ag", 1152, 4608, MODEL, done="done")],
    "b07_ag_start_generic_single": [Collective("ag", 1024, 4096, MODEL, done="done")],
    "b08_rs_start_sugar": [Collective("rs", 4_194_304, 1_048_576, MODEL, done="done")],
    "b09_async_start_calls": [Collective("ag", 1024, 4096, MODEL)],
    "b10_async_thread": [Collective("ar", 4096, 4096, MODEL)],
    "b11_collectives_group": [
        Collective("ar.0", 256, 256, MODEL),
        Collective("ar.1", 128, 128, [{device} for device in range(8)]),
    ],
    "b12_cp_start_tpu": [Collective("cp", 1_048_576, 1_048_576, PAIRS, done="done")],
    "b13_cp_start_gpu_multi": [Collective("cp", 1_048_576, 1_048_576, DATA, done="done")],
    "b14_cp_self_and_partial": [Collective("cp", 4096, 4096, [{0}, {1}, {2, 4}, {3, 7}])],
    "b16_a2a_tuple": [Collective("aa", 512, 512, MODEL)],
    "b17_a2a_array": [Collective("aa", 512, 512, MODEL)],
    "b18_ragged": [Collective("ra", 524_288, 2_097_152, MODEL, operands=1)],
    "b19_broadcast_dynamic_root": [Collective("cb", 16_384, 16_384, MODEL, operands=1)],
    "b20_gpu_p2p": [Collective("send", 1_048_576, 1_048_576, operands=1, done="data")],
    "b21_host_callback": [Collective("ag", 32_768, 262_144, ALL)],
    "b23_multi_slice_in_slice_groups": [Collective("ag", 2_097_152, 8_388_608, DATA_4x4)],
    "b24_tpu_async_collective_fusion": [
        Collective(name, 2_097_152, 8_388_608, DATA_4x4) for name in ("ag.start", "ag.carry", "ag.done")
    ],
    "b25_tpu_all_reduce_scatter": [Collective("ar", 8_650_752, 2_162_688, DATA_4x4, done="scattered")],
    "b26_tpu_sparsecore": [Collective("ar", 1_048_576, 1_048_576, [set(range(m, 128, 4)) for m in range(4)])],
    "b27_gpu_collective_in_fusion": [Collective("ar", 131_072, 131_072, MODEL)],
    "b28_call_twice_and_dead_code": [Collective("ar", 256, 256, MODEL)],
    "b29_windowed_einsum_gpu": [
        Collective("cp.0", 524_288, 524_288, PAIRS),
        Collective("cp.1", 524_288, 524_288, PAIRS),
    ],
    "b30_opaque_remote_dma": [Collective("ring_hop", 262_144, 262_144)],
    "c01_iota_plain": [Collective("c", 4096, 4096, MODEL)],
    "c02_iota_transposed": [Collective("c", 4096, 4096, DATA)],
    "c03_iota_3d": [
        Collective(
            "c", 4096, 4096, [{16 * a + 4 * b + c for b in range(4)} for a in range(2) for c in range(4)]
        )
    ],
    "c04_iota_outer_and_inner": [
        Collective(
            "c", 4096, 4096, [{16 * a + 4 * b + c for a in range(2) for c in range(4)} for b in range(4)]
        )
    ],
    "c05_iota_half_axis": [Collective("c", 4096, 4096, PAIRS)],
    "c06_iota_strided_half_axis": [Collective("c", 4096, 4096, STRIDED)],
    "c07_v3_mesh": [Collective("c", 4096, 4096, MODEL)],
    "c08_v3_axis_order": [Collective("c", 4096, 4096, ALL)],
    "c09_v3_sub_axis": [Collective("c", 4096, 4096, PAIRS)],
    "c10_v3_sub_axis_major": [Collective("c", 4096, 4096, STRIDED)],
    "c11_v3_device_ids_list": [Collective("c", 4096, 4096, [{0, 2, 4, 6}, {1, 3, 5, 7}])],
    "c12_v3_device_ids_iota": [Collective("c", 4096, 4096, DATA)],
    "c13_v3_foreign_names": [Collective("c", 4096, 4096, DATA)],
    "c14_v3_other_factorisation": [Collective("c", 4096, 4096, STRIDED)],
    "c15_v3_hostile_names": [Collective("c", 4096, 4096, MODEL)],
    "c16_empty_groups_cross_replica": [Collective("c", 4096, 4096, ALL)],
    "c17_cross_replica_and_partition": [Collective("c", 4096, 4096, ALL)],
    "c18_flattened_with_replicas": [Collective("c", 4096, 4096, DATA)],
    "c19_a2a_cross_partition_mode": [Collective("c", 4096, 4096, PAIRS)],
    "c20_uneven_groups": [Collective("c", 4096, 4096, [{0, 1, 2}, {3, 4, 5, 6, 7}])],
    "c21_group_of_one": [Collective("c", 4096, 4096, [{device} for device in range(8)])],
    "c22_one_group_missing_devices": [Collective("c", 4096, 4096, [{0, 1, 2, 3}])],
    "c23_shuffled_members": [Collective("c", 4096, 4096, MODEL)],
}
