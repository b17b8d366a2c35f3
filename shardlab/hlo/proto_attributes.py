"""The attributes of an `HloInstructionProto` as the text that XLA's printer writes for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from shardlab.errors import ParseError
from shardlab.hlo.module import Shape
from shardlab.hlo.strings import escape
from shardlab.hlo.wire import Message, blobs, decode, integer, integers, string, submessage

Named = dict[int, tuple[str, Message]]
"""Instruction id -> its name and its message."""

_CALLS = ("fusion", "async-start", "async-update", "async-done")
_NUMBERS = {"channel_id": 26, "feature_group_count": 50, "batch_group_count": 58}
_FLAGS = {
    "is_host_transfer": 47,
    "use_global_device_ids": 71,
    "constrain_layout": 56,
    "has_dynamic_root": 100,
    "custom_call_has_side_effect": 65,
}
_STRINGS = {"custom_call_target": 28, "async_execution_thread": 79}
_WORDS = {"direction": 63, "kind": 11}
_MAX_NESTING = 3
_HAS_DIMENSIONS = {
    "all-gather", "all-gather-start", "all-to-all", "broadcast", "concatenate", "iota", "map", "reduce",
    "reduce-scatter", "reverse", "scan", "sort", "transpose",
}  # fmt: skip


def instruction_attributes(
    message: Message, opcode: str, names: Mapping[int, str], payloads: Sequence[str], *, by_predicate: bool
) -> dict[str, str]:
    """Every attribute that shardlab reads, in its printed form.

    names: computations by id. by_predicate: the first operand is a truth value, not a branch index.
    """
    found: dict[str, str] = {}
    for name, number in _NUMBERS.items():
        value = integer(message, number)
        if value > (0 if name == "channel_id" else 1):
            found[name] = str(value)
    found.update((name, "true") for name, number in _FLAGS.items() if integer(message, number))
    found.update(
        (name, string(message, number)) for name, number in _WORDS.items() if string(message, number)
    )
    found.update(
        (name, f'"{escape(string(message, number))}"')
        for name, number in _STRINGS.items()
        if string(message, number)
    )
    if opcode == "get-tuple-element":
        found["index"] = str(integer(message, 13))
    if opcode in _HAS_DIMENSIONS and (14 in message or opcode == "broadcast"):
        found["dimensions"] = _braced(integers(message, 14))
    found.update(_called(message, opcode, names, by_predicate=by_predicate))
    found.update(_group_attributes(message, opcode))
    found.update(_product_attributes(message, opcode))
    found.update(_free_text(message, payloads))
    return found


def _braced(values: Sequence[int]) -> str:
    return "{" + ",".join(map(str, values)) + "}"


def _called(message: Message, opcode: str, names: Mapping[int, str], *, by_predicate: bool) -> dict[str, str]:
    called = [f"%{names.get(key, key)}" for key in integers(message, 38)]
    if not called:
        return {}
    if opcode == "while":
        return {"condition": called[-1], "body": called[0]}
    if opcode == "conditional" and by_predicate and len(called) == 2:
        return {"true_computation": called[0], "false_computation": called[1]}
    if opcode == "conditional":
        return {"branch_computations": "{" + ", ".join(called) + "}"}
    if opcode == "custom-call":
        return {"called_computations": "{" + ", ".join(called) + "}"}
    return {"calls" if opcode in _CALLS else "to_apply": ", ".join(called)}


def _group_attributes(message: Message, opcode: str) -> dict[str, str]:
    found = {}
    groups = _replica_groups(message)
    if groups is not None:
        found["replica_groups"] = groups
    elif opcode.removesuffix("-start") in ("all-reduce", "all-gather", "reduce-scatter", "all-to-all"):
        found["replica_groups"] = "{}"
    if opcode.startswith("collective-permute") or 52 in message:
        pairs = [decode(blob) for blob in blobs(message, 52)]
        found["source_target_pairs"] = (
            "{" + ",".join(f"{{{integer(pair, 1)},{integer(pair, 2)}}}" for pair in pairs) + "}"
        )
        if integers(message, 20):
            found["slice_sizes"] = _slice_sizes(message)
    return found


def _slice_sizes(message: Message) -> str:
    """Extents of the slices that an in-place permute sends: one list, as long as slices times the rank of
    the array.
    """
    extents, shape = integers(message, 20), submessage(message, 3)
    for _ in range(_MAX_NESTING):  # of a start's tuple the first element is what it sends
        if 4 not in shape:
            break
        shape = decode(blobs(shape, 4)[0])
    rank = len(integers(shape, 3))
    if not rank or len(extents) % rank:
        raise ParseError(f"{string(message, 1)}: slice sizes do not fit an array of rank {rank}")
    return "{" + ",".join(_braced(extents[at : at + rank]) for at in range(0, len(extents), rank)) + "}"


def _replica_groups(message: Message) -> str | None:
    """V3 in field 93, V2 in 92 (before December 2025 inside 87), V1 in 87 or the older 49."""
    if 93 in message:
        return _mesh_groups(submessage(message, 93))
    legacy = submessage(message, 87)
    iota = submessage(message, 92) or submessage(legacy, 2)
    if iota:
        perm = integers(iota, 4)
        transpose = f"T({','.join(map(str, perm))})" if len(perm) > 1 else ""
        dims = ",".join(map(str, integers(iota, 3)))
        return f"[{integer(iota, 1)},{integer(iota, 2)}]<=[{dims}]{transpose}"
    groups = blobs(legacy, 1) or blobs(message, 49)
    if not groups:
        return None
    return "{" + ",".join(_braced(integers(decode(group), 1)) for group in groups) + "}"


def _mesh_groups(message: Message) -> str:
    mesh = submessage(message, 1)
    axes = [decode(blob) for blob in blobs(mesh, 1)]
    devices = integers(mesh, 2)
    if not axes and devices:
        return f"maximal_mesh[device_id={devices[0]}] {{}}"
    listed = ",".join(f"'{string(axis, 1)}'={integer(axis, 2)}" for axis in axes)
    ids = f", device_ids=({_device_order(mesh, devices)})" if devices or 3 in mesh else ""
    refs = ",".join(_axis(decode(blob), axes) for blob in blobs(message, 2))
    return f"mesh[{listed}]{ids} {{{refs}}}"


def _device_order(mesh: Message, devices: Sequence[int]) -> str:
    """`0,2,1,3`, or `[2,2]T(1,0)`: field 3 holds 1 reshape dims and 2 transpose permutation (as in protos of
    jaxlib 0.10.2 and 0.12, whose text prints the same).
    """
    if devices:
        return ",".join(map(str, devices))
    iota = submessage(mesh, 3)
    dims, perm = (",".join(map(str, integers(iota, field))) for field in (1, 2))
    return f"[{dims}]T({perm})" if perm else f"[{dims}]"


def _axis(ref: Message, axes: Sequence[Message]) -> str:
    index = integer(ref, 1)
    name = f"'{string(axes[index], 1)}'" if 0 <= index < len(axes) else str(index)
    part = submessage(ref, 2)
    return f"{name}:({integer(part, 1)}){integer(part, 2)}" if part else name


def _product_attributes(message: Message, opcode: str) -> dict[str, str]:
    """Dimension numbers of dot and convolution, sizes of slices."""
    found = {}
    if opcode == "dot":
        numbers = submessage(message, 30)
        for name, number in (
            ("lhs_batch", 3),
            ("lhs_contracting", 1),
            ("rhs_batch", 4),
            ("rhs_contracting", 2),
        ):
            if integers(numbers, number):
                found[f"{name}_dims"] = _braced(integers(numbers, number))
    elif opcode == "convolution":
        found["dim_labels"] = _dim_labels(submessage(message, 16))
        window = [decode(blob) for blob in blobs(submessage(message, 15), 1)]
        if window:
            found["window"] = "{size=" + "x".join(str(integer(dim, 1)) for dim in window) + "}"
    elif opcode == "slice":
        parts = [decode(blob) for blob in blobs(message, 17)]
        found["slice"] = "{" + ", ".join(_slice(part) for part in parts) + "}"
    elif opcode == "dynamic-slice":
        found["dynamic_slice_sizes"] = _braced(integers(message, 20))
    return found


def _slice(part: Message) -> str:
    stride = integer(part, 3, 1)
    return f"[{integer(part, 1)}:{integer(part, 2)}" + (f":{stride}]" if stride != 1 else "]")


def _dim_labels(numbers: Message) -> str:
    """`bf_io->bf`: batch, feature and spatial dimensions of input, kernel and output."""

    def labels(first: str, first_at: int, second: str, second_at: int, spatial: Sequence[int]) -> str:
        placed = {first_at: first, second_at: second} | {at: str(index) for index, at in enumerate(spatial)}
        return "".join(placed[at] for at in sorted(placed))

    lhs = labels("b", integer(numbers, 7), "f", integer(numbers, 8), integers(numbers, 11))
    rhs = labels("i", integer(numbers, 3), "o", integer(numbers, 4), integers(numbers, 6))
    out = labels("b", integer(numbers, 9), "f", integer(numbers, 10), integers(numbers, 12))
    return f"{lhs}_{rhs}->{out}"


def _free_text(message: Message, payloads: Sequence[str]) -> dict[str, str]:
    """Metadata, frontend attributes and backend config."""
    found = {}
    metadata = _metadata(submessage(message, 7))
    if metadata:
        found["metadata"] = "{" + metadata + "}"
    entries = [decode(blob) for blob in blobs(submessage(message, 68), 1)]
    if entries:
        pairs = ",".join(f"{string(entry, 1)}={_frontend_value(string(entry, 2))}" for entry in entries)
        found["frontend_attributes"] = "{" + pairs + "}"
    config = string(message, 43) or _payload(submessage(message, 99), payloads)
    if config:
        found["backend_config"] = f'"{escape(config)}"'
    return found


def _frontend_value(value: str) -> str:
    return f'"{escape(value)}"'


def _payload(message: Message, payloads: Sequence[str]) -> str:
    """A backend config that is kept inline, or once per module in a table."""
    for values in message.values():
        for value in values:
            if isinstance(value, bytes) and value:
                return value.decode("utf-8", "replace")
            if isinstance(value, int) and 0 < value <= len(payloads):
                return payloads[value - 1]
    return ""


def _metadata(message: Message) -> str:
    fields = [
        f'{name}="{escape(string(message, number))}"'
        for name, number in (("op_type", 1), ("op_name", 2), ("source_file", 3))
        if string(message, number)
    ]
    fields += [
        f"{name}={integer(message, number)}"
        for name, number in (("source_line", 4), ("stack_frame_id", 15))
        if integer(message, number)
    ]
    return " ".join(fields)


_INT_FIELDS = {"pred": 2, "s32": 4, "s64": 5, "u32": 6, "u64": 7}
_BYTE_FIELDS = {"s8": (15, 1), "u8": (3, 1), "s16": (17, 2), "u16": (16, 2), "s4": (21, 1), "u4": (22, 1)}


MAX_ENTRIES = 1_000_000
_ELIDED = "{...}"


def literal_text(message: Message, shape: Shape) -> str:
    """The text of integers or truth values, all that later stages evaluate; else `{...}`.

    Of an array: its entries in row-major order, without the braces of the rows.
    """
    size = math.prod(extent or 0 for extent in shape.dims)
    if not message or size > MAX_ENTRIES or not (shape.dtype in _INT_FIELDS or shape.dtype in _BYTE_FIELDS):
        return _ELIDED
    packed = shape.dtype in ("s4", "u4")  # two to a byte
    if shape.dims and (packed or not _is_row_major(submessage(message, 1), len(shape.dims))):
        return _ELIDED
    values = _entries(message, shape.dtype, size)
    if not shape.dims:
        return (values or [_entry(0, shape.dtype)])[0]
    return "{" + ", ".join(values) + "}" if len(values) == size else _ELIDED


def _is_row_major(shape: Message, rank: int) -> bool:
    """Entries are stored in the order of the literal's own layout, from the minor dimension up."""
    minor_to_major = integers(submessage(shape, 5), 1)
    return rank < 2 or list(minor_to_major) == list(range(rank))[::-1]


def _entries(message: Message, dtype: str, size: int) -> list[str]:
    if dtype in _INT_FIELDS:
        return [_entry(value, dtype) for value in integers(message, _INT_FIELDS[dtype])]
    number, width = _BYTE_FIELDS[dtype]
    raw = (blobs(message, number) or [b""])[0][: size * width]
    signed = dtype.startswith("s")
    parts = [raw[offset : offset + width] for offset in range(0, len(raw), width)]
    return [_entry(int.from_bytes(part, "little", signed=signed), dtype) for part in parts]


def _entry(value: int, dtype: str) -> str:
    if dtype == "pred":
        return "true" if value else "false"
    return str(value % (1 << 64) if dtype == "u64" else value)
