"""Protos against the text that XLA printed for the same programs, and hostile bytes."""

from __future__ import annotations

import gzip
import random

import pytest
from hlo.described import GOLDEN
from hypothesis import given
from hypothesis import strategies as st

from shardlab.errors import ParseError
from shardlab.hlo.attributes import (
    backend_config,
    called_computations,
    channel_id,
    computation_names,
    frontend_attributes,
    known_trip_count,
    metadata,
)
from shardlab.hlo.groups import parse_replica_groups
from shardlab.hlo.module import Instruction, Module, Shape
from shardlab.hlo.proto import parse_proto, read_shape
from shardlab.hlo.proto_attributes import literal_text
from shardlab.hlo.reader import parse
from shardlab.hlo.shape import shape_bytes
from shardlab.hlo.wire import Message, decode, integers

PRINTED = GOLDEN / "printed"
CPU = "module_0000.jit__lambda.cpu_after_optimizations"
GPU = "h100_1x2x8.scan6.gpu_after_optimizations"
PAIRS = [
    (f"{CPU}.txt", f"{CPU}.hlo.pb"),
    (f"{GPU}.txt.gz", f"{GPU}.hlo.pb.gz"),
    ("permuted_mesh.hlo", "permuted_mesh.hlo_module.pb"),
]
IDS = ["cpu dump", "gpu dump", "bare HloModuleProto"]
# No device assignment in it, which is where a proto holds the number of partitions.
DEVICE_ORDER = ("v3_device_order.hlo", "v3_device_order.hlo_module.pb")
SAME_TEXT = ["dimensions", "direction", "custom_call_target", "kind", "source_target_pairs", "dim_labels",
             "slice", "lhs_contracting_dims", "rhs_contracting_dims", "lhs_batch_dims", "rhs_batch_dims",
             "dynamic_slice_sizes",
             "use_global_device_ids", "index"]  # fmt: skip


def contents(name: str) -> bytes:
    data = (PRINTED / name).read_bytes()
    return gzip.decompress(data) if name.endswith(".gz") else data


def read_pair(text: str, proto: str) -> tuple[Module, Module]:
    (printed,), (serialised,) = parse(contents(text).decode()), parse_proto(contents(proto))
    return printed, serialised


def facts(instruction: Instruction) -> tuple[object, ...]:
    groups = instruction.attributes.get("replica_groups")
    return (
        instruction.opcode,
        instruction.shape,
        instruction.is_root,
        channel_id(instruction),
        metadata(instruction),
        called_computations(instruction),
        computation_names(instruction, "body"),
        known_trip_count(instruction),
        backend_config(instruction),
        frontend_attributes(instruction),
        parse_replica_groups(groups) if groups else None,
        [instruction.attributes.get(name) for name in SAME_TEXT],
    )


@pytest.mark.parametrize(("text", "proto"), [*PAIRS, DEVICE_ORDER], ids=[*IDS, "device orders of meshes"])
def test_proto_and_text_hold_the_same_instructions(text: str, proto: str) -> None:
    """Dump text leaves get-tuple-elements out; everything else is there, in the same (scheduled) order."""
    printed, serialised = read_pair(text, proto)
    assert list(printed.computations) and set(printed.computations) == set(serialised.computations)
    for name, computation in printed.computations.items():
        other = serialised.computations[name]
        kept = [
            i
            for i in other.instructions.values()
            if i.opcode != "get-tuple-element" or i.name in computation.instructions
        ]
        assert [i.name for i in kept] == list(computation.instructions)
        assert computation.root == other.root
        for instruction in kept:
            assert facts(instruction) == facts(computation.instructions[instruction.name])


@pytest.mark.parametrize(("text", "proto"), PAIRS, ids=IDS)
def test_proto_and_text_hold_the_same_module(text: str, proto: str) -> None:
    printed, serialised = read_pair(text, proto)
    for field in ("name", "entry", "num_partitions", "is_scheduled", "stack_frames"):
        assert getattr(printed, field) == getattr(serialised, field)


@pytest.mark.parametrize(("text", "proto"), PAIRS, ids=IDS)
def test_operands_agree_but_for_tuple_accesses(text: str, proto: str) -> None:
    """`%x#1` in dump text is a get-tuple-element of %x at 1 in the proto."""
    printed, serialised = read_pair(text, proto)
    for name, computation in printed.computations.items():
        other = serialised.computations[name].instructions
        for instruction in computation.instructions.values():
            seen = []
            for operand in other[instruction.name].operands:
                at, path = other[operand.name], []
                while at.opcode == "get-tuple-element" and at.name not in computation.instructions:
                    path.insert(0, int(at.attributes["index"]))
                    at = other[at.operands[0].name]
                seen.append((at.name, tuple(path)))
            assert seen == [(operand.name, operand.index) for operand in instruction.operands]


def test_integer_literals_agree() -> None:
    printed, serialised = read_pair(*PAIRS[1])
    compared = 0
    for name, computation in printed.computations.items():
        for instruction in computation.instructions.values():
            if (
                instruction.opcode == "constant"
                and instruction.shape.dtype in ("s32", "u32", "pred")
                and not instruction.shape.dims
            ):
                assert (
                    serialised.computations[name].instructions[instruction.name].literal
                    == instruction.literal
                )
                compared += 1
    assert compared > 5


S32_2x3 = Shape("s32", (2, 3))


def literal_of(layout: list[int], values: list[int], number: int = 4) -> Message:
    """A LiteralProto: its shape's layout, minor dimension first, and the values in field `number`."""
    minor_to_major = bytes([10, len(layout), *layout])
    shape = bytes([42, len(minor_to_major)]) + minor_to_major
    return {1: [shape], number: [bytes(values)]}


@pytest.mark.parametrize(
    ("message", "shape", "text"),
    [
        (literal_of([1, 0], [1, 2, 3, 4, 5, 6]), S32_2x3, "{1, 2, 3, 4, 5, 6}"),
        (literal_of([0, 1], [1, 4, 2, 5, 3, 6]), S32_2x3, "{...}"),
        (literal_of([1, 0], [1, 2, 3]), S32_2x3, "{...}"),
        (literal_of([0], [255, 1, 2, 0], 17), Shape("s16", (2,)), "{511, 2}"),
        (literal_of([0], [255, 128], 15), Shape("s8", (2,)), "{-1, -128}"),
        (literal_of([0], [1, 0], 2), Shape("pred", (2,)), "{true, false}"),
        (literal_of([0], [0x21], 21), Shape("s4", (2,)), "{...}"),
        (literal_of([0], [1], 8), Shape("f32", (1,)), "{...}"),
        (literal_of([1, 0], [7] * 6), Shape("s32", (1_000_001, 1)), "{...}"),
    ],
    ids=["rows", "columns first", "too few", "s16", "s8", "pred", "packed", "not integers", "too many"],
)
def test_integer_arrays(message: Message, shape: Shape, text: str) -> None:
    assert literal_text(message, shape) == text


def test_device_assignment_is_the_order_of_the_mesh() -> None:
    """The mesh was built from devices [3, 1, 2, 0, 7, 5, 6, 4]."""
    (module,) = parse_proto(contents("permuted_mesh.hlo_module.pb"))
    assert module.device_assignment == (3, 1, 2, 0, 7, 5, 6, 4)
    assert (module.replica_count, module.num_partitions) == (1, 8)


def test_device_assignment_of_replicas_is_in_flattened_order() -> None:
    """Two partitions, each with the devices of its two replicas: replica 0 of both comes first."""
    devices = field(1, 2) + field(2, 2) + field(3, field(1, b"\x0a\x0c")) + field(3, field(1, b"\x0b\x0d"))
    (module,) = parse_proto(contents("permuted_mesh.hlo_module.pb") + field(15, devices))
    assert module.device_assignment == (10, 11, 12, 13)
    assert (module.replica_count, module.num_partitions) == (2, 2)


@pytest.mark.parametrize("form", ["", "_start"], ids=["sync", "start"])
def test_slices_of_an_in_place_permute(form: str) -> None:
    """XLA made these protos of a text with slice_sizes={{1,8,128},{2,4,64}}."""
    (module,) = parse_proto(contents(f"in_place_permute{form}.hlo_module.pb"))
    slices = [
        one.attributes["slice_sizes"]
        for one in module.computations[module.entry].instructions.values()
        if one.opcode in ("collective-permute", "collective-permute-start")
    ]
    assert slices == ["{{1,8,128},{2,4,64}}"]


def test_slices_that_do_not_fit_the_array_are_refused() -> None:
    """The proto's list of six extents, one taken away: five do not make slices of a rank 3 array."""
    data = contents("in_place_permute.hlo_module.pb")
    packed, five = field(20, b"\x01\x08\x80\x01\x02\x04\x40"), field(20, b"\x01\x08\x80\x01\x02\x84\x40")
    assert len(packed) == len(five)
    assert packed in data
    with pytest.raises(ParseError, match="slice sizes do not fit an array of rank 3"):
        parse_proto(data.replace(packed, five))


@pytest.mark.parametrize("proto", [pair[1] for pair in PAIRS], ids=IDS)
def test_cut_protos_are_refused(proto: str) -> None:
    """A cut inside the module's bytes; what follows the module in a dump (buffer assignment) is not read."""
    data = contents(proto)
    message = decode(data)
    module = data if 3 in message and 2 in message else message[1][-1]
    assert isinstance(module, bytes)
    for cut in random.Random(proto).sample(range(len(module) - 1), 60):
        try:
            (read,) = parse_proto(data[:cut])
        except ParseError as error:
            assert error.source == "<proto>"
        else:
            # A bare module cut between two fields is a message whose entry and computations are whole.
            assert module is data and read.entry in read.computations


@given(st.binary(max_size=300))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(ParseError):
        parse_proto(data)


@given(st.integers(0, 10**6), st.integers(0, 255), st.sampled_from([pair[1] for pair in PAIRS[::2]]))
def test_one_changed_byte_is_read_or_refused(at: int, value: int, proto: str) -> None:
    data = bytearray(contents(proto))
    data[at % len(data)] = value
    try:
        modules = parse_proto(bytes(data))
    except ParseError:
        return
    assert modules[0].entry in modules[0].computations


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value % (1 << 64))
    return varint(number << 3 | 2) + varint(len(value)) + value


@given(st.lists(st.integers(-(2**63), 2**63 - 1)), st.booleans())
def test_integers_packed_or_not(values: list[int], packed: bool) -> None:
    apart = b"".join(field(7, value) for value in values)
    together = field(7, b"".join(varint(value % (1 << 64)) for value in values))
    assert integers(decode(together if packed else apart), 7) == values


def one_instruction(scheduled: int) -> bytes:
    """A module of one parameter with id 7, and a schedule that lists `scheduled`."""
    parameter = field(1, b"p") + field(2, b"parameter") + field(3, field(2, 11)) + field(35, 7)
    computation = field(1, b"e") + field(2, parameter) + field(5, 1) + field(6, 7)
    sequence = field(1, 1) + field(2, field(1, scheduled))
    return field(1, b"m") + field(2, b"e") + field(3, computation) + field(7, field(1, sequence))


def test_a_schedule_of_other_instructions_is_refused() -> None:
    """Fuzzer: the instruction was dropped, and the computation left without any."""
    (module,) = parse_proto(one_instruction(7))
    assert list(module.computations["e"].instructions) == ["p"]
    assert module.is_scheduled
    with pytest.raises(ParseError, match="schedule of computation e"):
        parse_proto(one_instruction(8))


def nested_tuple(depth: int) -> bytes:
    shape = field(2, 11) + field(3, b"\x03")
    for _ in range(depth):
        shape = field(2, 13) + field(4, shape)
    return shape


def test_nested_shapes_to_protobufs_own_limit() -> None:
    assert shape_bytes(read_shape(nested_tuple(100))) == 12
    with pytest.raises(ParseError, match="nested deeper"):
        read_shape(nested_tuple(101))


def test_shape_fields() -> None:
    """s4[<=5, ?] with E(4) in memory space 5."""
    layout = field(7, 4) + field(8, 5)
    shape = read_shape(
        field(2, 21) + field(3, varint(5) + varint(1 << 63)) + field(6, b"\x01\x01") + field(5, layout)
    )
    assert (shape.dtype, shape.dims, shape.bounded) == ("s4", (5, None), True)
    assert (shape.element_bits, shape.memory_space) == (4, 5)
