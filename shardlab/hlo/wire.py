"""The protobuf wire format, as much as HLO protos need: no schema; unknown fields are passed over."""

from __future__ import annotations

from shardlab.errors import ParseError

Field = int | bytes
Message = dict[int, list[Field]]
"""Field number -> values in order: ints of varint fields, bytes of all others."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {_FIXED64: 8, _FIXED32: 4}


def decode(data: bytes) -> Message:
    """Split one message into its fields. Raises ParseError where `data` is not a message or is cut off."""
    fields: Message = {}
    offset, end = 0, len(data)
    while offset < end:
        key, offset = read_varint(data, offset)
        number, kind = key >> 3, key & 7
        value: Field
        if kind == _VARINT:
            value, offset = read_varint(data, offset)
        else:
            size = _FIXED_BYTES.get(kind, -1)
            if kind == _BYTES:
                size, offset = read_varint(data, offset)
            if size < 0 or offset + size > end or not number:
                raise ParseError(f"not a protobuf message, or cut off: byte {offset} of {end}")
            value, offset = data[offset : offset + size], offset + size
        fields.setdefault(number, []).append(value)
    return fields


def read_varint(data: bytes, offset: int) -> tuple[int, int]:
    """The unsigned varint at `offset`, of at most ten bytes, and the offset after it."""
    value = shift = 0
    for index in range(offset, min(offset + 10, len(data))):
        byte = data[index]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, index + 1
        shift += 7
    raise ParseError(f"not a protobuf message, or cut off: byte {offset} of {len(data)}")


def signed(value: int) -> int:
    """A varint as int64: two's complement of 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


def integer(message: Message, number: int, default: int = 0) -> int:
    """The last value of a varint field, as int64."""
    value = message.get(number, [default])[-1]
    if not isinstance(value, int):
        raise ParseError(f"field {number} is not an integer: not an HLO proto")
    return signed(value)


def integers(message: Message, number: int) -> list[int]:
    """All values of a repeated varint field, packed or not, as int64."""
    values: list[int] = []
    for value in message.get(number, ()):
        if isinstance(value, int):
            values.append(signed(value))
            continue
        offset = 0
        while offset < len(value):
            item, offset = read_varint(value, offset)
            values.append(signed(item))
    return values


def blobs(message: Message, number: int) -> list[bytes]:
    """All values of a repeated bytes, string or message field."""
    values = message.get(number, [])
    if any(isinstance(value, int) for value in values):
        raise ParseError(f"field {number} is not bytes: not an HLO proto")
    return [value for value in values if isinstance(value, bytes)]


def submessage(message: Message, number: int) -> Message:
    """A message field, decoded; empty when it is absent."""
    values = blobs(message, number)
    return decode(values[-1]) if values else {}


def string(message: Message, number: int) -> str:
    """A string field; bytes that are not UTF-8 are replaced."""
    values = blobs(message, number)
    return values[-1].decode("utf-8", "replace") if values else ""
