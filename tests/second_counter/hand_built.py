"""Writes small serialized HLO modules by hand, for testing the counter: the reverse of `proto.py`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

F32, S32, PRED, TUPLE, U32, S4, BF16, TOKEN = 11, 4, 1, 13, 8, 21, 16, 17  # PrimitiveType


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number: int, value: int | bytes | str) -> bytes:
    """One field: ints as varints, the rest length-delimited."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def packed(number: int, values: Iterable[int]) -> bytes:
    return field(number, b"".join(varint(v) for v in values))


def array(element_type: int, *dims: int, bits: int = 0) -> bytes:
    """ShapeProto of an array; bits: E(n) of its layout."""
    return field(2, element_type) + packed(3, dims) + field(5, field(7, bits) if bits else b"")


def tuple_of(*shapes: bytes) -> bytes:
    return field(2, TUPLE) + b"".join(field(4, s) for s in shapes)


F32_1K = array(F32, 1024)  # 4096 bytes
SCALAR = array(S32)


class Builder:
    """Adds instructions to one computation, whose identity (unique in the module) starts their ids."""

    def __init__(self, identity: int, name: str = "") -> None:
        self.identity = identity
        self.name = name or f"computation.{identity}"
        self._instructions: list[bytes] = []

    def add(
        self,
        opcode: str,
        shape: bytes = F32_1K,
        operands: Sequence[int] = (),
        *,
        called: Sequence[int] = (),
        config: object = None,
        attributes: Mapping[str, str] | None = None,
        extra: bytes = b"",
    ) -> int:
        """Append an instruction, the root so far; its id."""
        number = (self.identity << 32) + len(self._instructions)
        data = field(1, f"{opcode}.{len(self._instructions)}") + field(2, opcode) + field(3, shape)
        data += field(35, number) + packed(36, operands) + packed(38, called) + extra
        if config is not None:
            data += field(43, json.dumps(config))
        entries = (field(1, key) + field(2, value) for key, value in (attributes or {}).items())
        data += field(68, b"".join(field(1, entry) for entry in entries))
        self._instructions.append(data)
        return number

    def parameter(self, shape: bytes = F32_1K, number: int = 0) -> int:
        return self.add("parameter", shape, extra=field(9, number))

    def constant(self, value: int, element_type: int = S32) -> int:
        literal = packed({S32: 4, U32: 6}[element_type], [value])
        return self.add("constant", array(element_type), extra=field(8, field(2, 0) + literal))

    def element(self, shape: bytes, operand: int, index: int) -> int:
        return self.add("get-tuple-element", shape, [operand], extra=field(13, index))

    def compare(self, a: int, b: int, direction: str) -> int:
        return self.add("compare", array(PRED), [a, b], extra=field(63, direction))

    def encode(self) -> bytes:
        instructions = b"".join(field(2, i) for i in self._instructions)
        root = (self.identity << 32) + len(self._instructions) - 1
        return field(1, self.name) + instructions + field(5, self.identity) + field(6, root)


def module(entry: Builder, *others: Builder, partitions: int = 8, devices: Sequence[int] = ()) -> bytes:
    """An HloModuleProto; devices: the device id at each partition, in order by default."""
    ids = devices or range(partitions)
    assignment = field(1, 1) + field(2, partitions) + b"".join(field(3, field(1, i)) for i in ids)
    computations = b"".join(field(3, c.encode()) for c in (*others, entry))
    return field(1, "jit_step") + computations + field(6, entry.identity) + field(15, assignment)


CHANNEL, GLOBAL_IDS = field(26, 1), field(71, 1)


def v1(*groups: Sequence[int], number: int = 87) -> bytes:
    """Listed groups: nested in field 87, or flat in the legacy field 49."""
    if number == 49:
        return b"".join(field(49, packed(1, g)) for g in groups)
    return field(87, b"".join(field(1, packed(1, g)) for g in groups))


def v2(
    groups: int, size: int, dims: Sequence[int], order: Sequence[int] = (), *, nested: bool = False
) -> bytes:
    iota = field(1, groups) + field(2, size) + packed(3, dims) + packed(4, order or range(len(dims)))
    return field(87, field(2, iota)) if nested else field(92, iota)


Axis = tuple[int, int, int] | int


def v3(
    mesh: Mapping[str, int],
    axes: Sequence[Axis],
    devices: Sequence[int] = (),
    iota: tuple[Sequence[int], Sequence[int]] | None = None,
) -> bytes:
    """axes: an index into the mesh, or (index, pre-size, size) of a sub-axis. iota: dims and their order."""
    names = b"".join(field(1, field(1, name) + field(2, size)) for name, size in mesh.items())
    ids = packed(2, devices) if devices else b""
    ids += field(3, packed(1, iota[0]) + packed(2, iota[1])) if iota else b""
    references = b""
    for axis in axes:
        index, *sub = (axis,) if isinstance(axis, int) else axis
        info = field(2, field(1, sub[0]) + field(2, sub[1])) if sub else b""
        references += field(2, field(1, index) + info)
    return field(93, field(1, names + ids) + references)


def pairs(*listed: tuple[int, int]) -> bytes:
    return b"".join(field(52, field(1, source) + field(2, target)) for source, target in listed)
