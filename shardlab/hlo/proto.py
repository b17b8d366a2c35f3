"""Serialised HLO (`HloModuleProto`, or `HloProto` around it) to the same records that the text reader gives.

Field numbers: XLA, xla/service/hlo.proto and xla/xla_data.proto. Ids are opaque 64-bit integers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shardlab.errors import ParseError
from shardlab.hlo.module import Computation, Instruction, Module, Operand, Shape, SourceFrame
from shardlab.hlo.proto_attributes import Named, instruction_attributes, literal_text
from shardlab.hlo.wire import Message, blobs, decode, integer, integers, string, submessage

_DTYPES = {
    1: "pred", 2: "s8", 3: "s16", 4: "s32", 5: "s64", 6: "u8", 7: "u16", 8: "u32", 9: "u64", 10: "f16",
    11: "f32", 12: "f64", 13: "tuple", 14: "opaque", 15: "c64", 16: "bf16", 17: "token", 18: "c128",
    19: "f8e5m2", 20: "f8e4m3fn", 21: "s4", 22: "u4", 23: "f8e4m3b11fnuz", 24: "f8e5m2fnuz", 25: "f8e4m3fnuz",
    26: "s2", 27: "u2", 28: "f8e4m3", 29: "f8e3m4", 30: "s1", 31: "u1", 32: "f4e2m1fn", 33: "f8e8m0fnu",
}  # fmt: skip
_PRED, _BUFFER = 1, 34
_UNBOUNDED = -(1 << 63)
_MAX_DEPTH = 100


def parse_proto(data: bytes, source: str = "<proto>") -> tuple[Module, ...]:
    """Read an `HloProto` (what `.hlo.pb` dumps hold) or a bare `HloModuleProto`.

    Raises ParseError (without line and column) when `data` is neither, or is cut off.
    """
    try:
        message = decode(data)
        inner = blobs(message, 1)
        if 3 in message and 2 in message:
            return (_module(message),)
        if inner:
            module = decode(inner[-1])
            if 3 in module and 2 in module:
                return (_module(module),)
        raise ParseError("neither an HloProto nor an HloModuleProto")
    except ParseError as error:
        raise ParseError(error.message, source=source) from None


def _module(message: Message) -> Module:
    parts = [decode(blob) for blob in blobs(message, 3)]
    names = {integer(part, 5): string(part, 1) for part in parts}
    payloads = [string(decode(blob), 2) or string(decode(blob), 1) for blob in blobs(message, 22)]
    order = _schedule(submessage(message, 7))
    computations = {}
    for part in parts:
        computation = _computation(part, names, order.get(integer(part, 5), ()), payloads)
        if computation.name in computations:
            raise ParseError(f"two computations are named {computation.name}")
        computations[computation.name] = computation
    # The name first: an id of 0 is not written, so in a cut proto it could be any computation's.
    entry = string(message, 2) or names.get(integer(message, 6), "")
    if entry not in computations:
        raise ParseError("the module has no entry computation")
    devices = submessage(message, 15)
    per_computation = [integers(decode(blob), 1) for blob in blobs(devices, 3)]
    return Module(
        name=string(message, 1),
        entry=entry,
        computations=computations,
        num_partitions=integer(devices, 2) or None,
        replica_count=integer(devices, 1) or None,
        is_scheduled=bool(order),
        stack_frames=_stack_frames(submessage(message, 17)),
        device_assignment=_assignment(per_computation),
    )


def _assignment(per_computation: Sequence[Sequence[int]]) -> tuple[int, ...] | None:
    """Device ids by flattened id, replica * partitions + partition, from each partition's replicas."""
    if not per_computation or len({len(ids) for ids in per_computation}) != 1:
        return None
    return tuple(ids[replica] for replica in range(len(per_computation[0])) for ids in per_computation)


def _schedule(message: Message) -> dict[int, list[int]]:
    """Instruction ids in execution order by computation id."""
    entries = [decode(blob) for blob in blobs(message, 1)]
    return {integer(entry, 1): integers(submessage(entry, 2), 1) for entry in entries}


def _stack_frames(message: Message) -> dict[int, SourceFrame]:
    """Frames by 1-based position; every reference inside is a 1-based position too, 0 means none."""
    files = [blob.decode("utf-8", "replace") for blob in blobs(message, 1)]
    functions = [blob.decode("utf-8", "replace") for blob in blobs(message, 2)]
    locations = [decode(blob) for blob in blobs(message, 3)]
    frames = {}
    for position, blob in enumerate(blobs(message, 4), 1):
        frame = decode(blob)
        at = integer(frame, 1)
        location = locations[at - 1] if 0 < at <= len(locations) else {}
        frames[position] = SourceFrame(
            file=_nth(files, integer(location, 1)),
            line=integer(location, 3),
            function=_nth(functions, integer(location, 2)),
            parent=integer(frame, 2),
        )
    return frames


def _nth(names: Sequence[str], position: int) -> str:
    return names[position - 1] if 0 < position <= len(names) else ""


def _computation(
    message: Message, names: Mapping[int, str], order: Sequence[int], payloads: Sequence[str]
) -> Computation:
    found: Named = {}
    for blob in blobs(message, 2):
        part = decode(blob)
        found[integer(part, 35)] = (string(part, 1), part)
    if not found:
        raise ParseError(f"computation {string(message, 1)} has no instruction")
    if len(order) == len(found) and set(order) != found.keys():
        raise ParseError(f"the schedule of computation {string(message, 1)} lists other instructions than it")
    by_id = {key: found[key] for key in order} if len(order) == len(found) else found
    root_id = integer(message, 6)
    instructions: dict[str, Instruction] = {}
    for key, (name, part) in by_id.items():
        if name in instructions:
            raise ParseError(f"two instructions are named {name} in one computation")
        instructions[name] = _instruction(part, key == root_id, found, names, payloads)
    root = found[root_id][0] if root_id in found else next(reversed(list(instructions)))
    return Computation(
        name=string(message, 1), instructions=instructions, root=root, execution_thread=string(message, 8)
    )


def _instruction(
    message: Message, is_root: bool, found: Named, names: Mapping[int, str], payloads: Sequence[str]
) -> Instruction:
    opcode = string(message, 2)
    operands = tuple(Operand(_name_of(found, key)) for key in integers(message, 36))
    shape = read_shape(blobs(message, 3)[-1] if blobs(message, 3) else b"")
    literal = None
    if opcode == "parameter":
        literal = str(integer(message, 9))
    elif opcode == "constant":
        literal = literal_text(submessage(message, 8), shape)
    return Instruction(
        name=string(message, 1),
        opcode=opcode,
        shape=shape,
        operands=operands,
        attributes=instruction_attributes(
            message, opcode, names, payloads, by_predicate=_has_predicate(message, found)
        ),
        literal=literal,
        is_root=is_root,
    )


def _has_predicate(message: Message, found: Named) -> bool:
    """Whether the first operand is a truth value: such a conditional has a true and a false computation."""
    operands = integers(message, 36)[:1]
    part = found.get(operands[0]) if operands else None
    return part is not None and integer(submessage(part[1], 3), 2) == _PRED


def _name_of(found: Named, key: int) -> str:
    """The operand's name; since 2025 an id may carry its computation in the upper 32 bits."""
    named = found.get(key) or found.get(key & 0xFFFFFFFF)
    if named is None:
        raise ParseError(f"operand {key} is in no instruction of its computation")
    return named[0]


def read_shape(data: bytes) -> Shape:
    """A `ShapeProto`, without recursion: children are built before the tuple that holds them.

    Raises ParseError beyond the nesting that protobuf itself accepts.
    """
    todo: list[tuple[Message, int, bool]] = [(decode(data), 0, False)]
    done: list[Shape] = []
    while todo:
        message, depth, has_children = todo.pop()
        children = blobs(message, 4)
        if depth > _MAX_DEPTH:
            raise ParseError(f"a shape is nested deeper than {_MAX_DEPTH} levels")
        if children and not has_children:
            todo.append((message, depth, True))
            todo.extend((decode(child), depth + 1, False) for child in reversed(children))
            continue
        leaves = tuple(done[len(done) - len(children) :]) if children else ()
        del done[len(done) - len(children) :]
        done.append(leaves[0] if integer(message, 2) == _BUFFER and leaves else _one_shape(message, leaves))
    return done[0]


def _one_shape(message: Message, leaves: tuple[Shape, ...]) -> Shape:
    dynamic = integers(message, 6)
    dims = integers(message, 3)
    layout = submessage(message, 5)
    return Shape(
        dtype=_DTYPES.get(integer(message, 2), f"type{integer(message, 2)}"),
        dims=tuple(None if dim == _UNBOUNDED else dim for dim in dims),
        element_bits=integer(layout, 7),
        bounded=any(flag and dim != _UNBOUNDED for flag, dim in zip(dynamic, dims, strict=False)),
        memory_space=integer(layout, 8),
        leaves=leaves,
    )
