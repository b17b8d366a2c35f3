"""Reads a serialized HloModuleProto with a hand-written protobuf wire decoder, as far as counting needs.

Field numbers: xla/service/hlo.proto and xla_data.proto, each seen in protos of jaxlib 0.10.2 and 0.12.0.1
(CPU, TPU and GPU programs).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

Value = int | bytes

TUPLE, OPAQUE, TOKEN, BUFFER = 13, 14, 17, 34
# PrimitiveType of xla_data.proto -> bits of one element.
ELEMENT_BITS = {
    **dict.fromkeys((30, 31), 1),
    **dict.fromkeys((26, 27), 2),
    **dict.fromkeys((21, 22, 32), 4),
    **dict.fromkeys((1, 2, 6, 19, 20, 23, 24, 25, 28, 29, 33), 8),
    **dict.fromkeys((3, 7, 10, 16), 16),
    **dict.fromkeys((4, 8, 11), 32),
    **dict.fromkeys((5, 9, 12, 15), 64),
    18: 128,
}
# Integer types whose scalar constants matter to loops: LiteralProto field, signed.
INTEGER_LITERALS = {
    1: (2, False),  # pred
    2: (15, True),  # s8, as bytes
    6: (3, False),  # u8, as bytes
    3: (17, True),  # s16, as bytes
    7: (16, False),  # u16, as bytes
    4: (4, True),
    5: (5, True),
    8: (6, False),
    9: (7, False),
}


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    """The base-128 integer at `position` and the position after it."""
    result = shift = 0
    while True:
        byte = data[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, position
        shift += 7


def fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """Every (field number, value) of a message: int for varints, bytes for everything else."""
    position = 0
    while position < len(data):
        tag, position = read_varint(data, position)
        number, wire_type = tag >> 3, tag & 7
        value: Value
        if wire_type == 0:
            value, position = read_varint(data, position)
        else:
            if wire_type == 2:
                length, position = read_varint(data, position)
            else:
                length = {1: 8, 5: 4}[wire_type]
            value = data[position : position + length]
            if len(value) != length:
                raise ValueError("truncated protobuf message")
            position += length
        yield number, value


def group(data: bytes) -> dict[int, list[Value]]:
    """Field number -> its values, in order."""
    result: dict[int, list[Value]] = {}
    for number, value in fields(data):
        result.setdefault(number, []).append(value)
    return result


def integers(values: list[Value]) -> list[int]:
    """A repeated int64 field, packed or not."""
    result = []
    for value in values:
        if isinstance(value, int):
            result.append(signed(value, 64))
            continue
        position = 0
        while position < len(value):
            number, position = read_varint(value, position)
            result.append(signed(number, 64))
    return result


def signed(value: int, bits: int) -> int:
    """Two's complement of `bits` bits."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def message(values: dict[int, list[Value]], number: int) -> bytes | None:
    """The last value of a sub-message, None when the field is absent."""
    found = values.get(number)
    return found[-1] if found and isinstance(found[-1], bytes) else None


def scalar(values: dict[int, list[Value]], number: int, default: int = 0) -> int:
    """The last value of a singular integer field."""
    found = values.get(number)
    return integers(found)[-1] if found else default


def text(values: dict[int, list[Value]], number: int) -> str:
    """The last value of a string field."""
    return (message(values, number) or b"").decode()


@dataclass(frozen=True)
class Shape:
    """element_type is the PrimitiveType number; element_bits the layout's E(n), 0 when it does not pack."""

    element_type: int
    dims: tuple[int, ...] = ()
    element_bits: int = 0
    leaves: tuple[Shape, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Logical bytes, as XLA counts them (ShapeUtil::ByteSizeOfElements)."""
        if self.element_type in (TUPLE, BUFFER):
            return sum(leaf.num_bytes for leaf in self.leaves)
        if self.element_type in (OPAQUE, TOKEN):
            return 0
        elements = 1
        for extent in self.dims:
            elements *= extent
        if self.element_bits:
            return -(-elements * self.element_bits // 8)
        return elements * -(-ELEMENT_BITS[self.element_type] // 8)


def decode_shape(data: bytes) -> Shape:
    """ShapeProto: 2 element type, 3 dimensions, 4 tuple shapes, 5 layout (7 element size in bits)."""
    raw = group(data)
    layout = message(raw, 5)
    return Shape(
        element_type=scalar(raw, 2),
        dims=tuple(integers(raw.get(3, []))),
        element_bits=scalar(group(layout), 7) if layout else 0,
        leaves=tuple(decode_shape(leaf) for leaf in raw.get(4, []) if isinstance(leaf, bytes)),
    )


@dataclass(frozen=True)
class Instruction:
    """One HloInstructionProto; `raw` keeps its fields for whoever needs the rarer ones."""

    name: str
    opcode: str
    id: int
    operands: tuple[int, ...]
    called: tuple[int, ...]
    raw: dict[int, list[Value]] = field(repr=False)
    payloads: tuple[bytes, ...] = field(default=(), repr=False)

    @cached_property
    def shape(self) -> Shape:
        return decode_shape(message(self.raw, 3) or b"")

    @cached_property
    def attributes(self) -> dict[str, str]:
        """Frontend attributes (68, a map<string, string> in field 1)."""
        result = {}
        for entry in group(message(self.raw, 68) or b"").get(1, []):
            pair = group(entry if isinstance(entry, bytes) else b"")
            result[text(pair, 1)] = text(pair, 2)
        return result

    @cached_property
    def backend_config_text(self) -> str:
        """Field 43, or 99: inline (1) or an id (2) into the module's payload table."""
        inline = text(self.raw, 43)
        reference = message(self.raw, 99)
        if inline or reference is None:
            return inline
        raw = group(reference)
        return text(raw, 1) or self.payloads[scalar(raw, 2)].decode()

    @cached_property
    def backend_config(self) -> dict[str, Any]:
        """The backend config when it is a JSON object, else {}."""
        try:
            value = json.loads(self.backend_config_text or "{}")
        except json.JSONDecodeError:
            return {}
        return value if isinstance(value, dict) else {}

    @property
    def integer_literal(self) -> int | None:
        """The value of a scalar integer or predicate constant, None for any other."""
        literal = message(self.raw, 8)
        kind = INTEGER_LITERALS.get(self.shape.element_type)
        if (
            literal is None
            or kind is None
            or self.shape.num_bytes != -(-ELEMENT_BITS[self.shape.element_type] // 8)
        ):
            return None
        number, is_signed = kind
        values = group(literal).get(number, [])
        if number in (3, 15, 16, 17):  # stored as little-endian bytes
            return int.from_bytes(
                b"".join(v for v in values if isinstance(v, bytes)), "little", signed=is_signed
            )
        value = integers(values)[0] if values else 0
        return value if is_signed else value & ((1 << ELEMENT_BITS[self.shape.element_type]) - 1)


@dataclass(frozen=True)
class Computation:
    """instructions by id, in the stored (dependency) order."""

    name: str
    id: int
    root_id: int
    instructions: dict[int, Instruction]

    @property
    def root(self) -> Instruction:
        return self.instructions[self.root_id]

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Parameter number (field 9) -> instruction."""
        found = (i for i in self.instructions.values() if i.opcode == "parameter")
        return {scalar(i.raw, 9): i for i in found}


@dataclass(frozen=True)
class Module:
    """assignment: the device id of each partition of replica 0 (field 15), () when the proto holds none."""

    name: str
    entry_id: int
    computations: dict[int, Computation]
    num_replicas: int
    assignment: tuple[int, ...]


def decode_module(data: bytes) -> Module:
    """A bare HloModuleProto, or the HloProto of a dump file (field 1 holds the module)."""
    raw = group(data)
    if 6 not in raw:
        inner = message(raw, 1)
        if inner is None:
            raise ValueError("neither an HloModuleProto nor an HloProto")
        raw = group(inner)
    payloads = tuple(p for p in raw.get(22, []) if isinstance(p, bytes))
    computations = [decode_computation(c, payloads) for c in raw[3] if isinstance(c, bytes)]
    replicas, assignment = decode_assignment(message(raw, 15) or b"")
    return Module(text(raw, 1), scalar(raw, 6), {c.id: c for c in computations}, replicas, assignment)


def decode_assignment(data: bytes) -> tuple[int, tuple[int, ...]]:
    """DeviceAssignmentProto: 1 replicas, 3 one entry per partition holding 1 the device of each replica."""
    raw = group(data)
    devices = [integers(group(entry).get(1, [])) for entry in raw.get(3, []) if isinstance(entry, bytes)]
    return scalar(raw, 1, 1), tuple(ids[0] if ids else 0 for ids in devices)


def decode_computation(data: bytes, payloads: tuple[bytes, ...]) -> Computation:
    raw = group(data)
    instructions = [decode_instruction(i, payloads) for i in raw.get(2, []) if isinstance(i, bytes)]
    return Computation(text(raw, 1), scalar(raw, 5), scalar(raw, 6), {i.id: i for i in instructions})


def decode_instruction(data: bytes, payloads: tuple[bytes, ...]) -> Instruction:
    raw = group(data)
    return Instruction(
        name=text(raw, 1),
        opcode=text(raw, 2),
        id=scalar(raw, 35),
        operands=tuple(integers(raw.get(36, []))),
        called=tuple(integers(raw.get(38, []))),
        raw=raw,
        payloads=payloads,
    )
