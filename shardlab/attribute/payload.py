"""What a collective carries: its operands' own shapes, and what the source asked for where XLA:CPU widened
it.

A start's tuple is never read for operands: the same text means different things on different backends
(HLO.md 2.3).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from shardlab.errors import ParseError
from shardlab.hlo.attributes import computation_names, is_true, tuple_index
from shardlab.hlo.lookup import of_opcodes, shape_of
from shardlab.hlo.module import Computation, Instruction, Module, Operand, Shape
from shardlab.hlo.shape import array_leaves, try_shape_bytes

# What XLA:CPU computes collectives of a narrow type in (XLA: cpu_float_support, all_reduce_promotion).
_WIDENED_TO = {
    "f32": frozenset({"bf16"}),
    "f16": frozenset(
        {"f8e5m2", "f8e4m3", "f8e4m3fn", "f8e4m3b11fnuz", "f8e3m4", "f8e5m2fnuz", "f8e4m3fnuz", "f8e8m0fnu"}
        | {"f4e2m1fn"}
    ),
    "s8": frozenset({"s4"}),
    "u8": frozenset({"u4"}),
}
# XLA:CPU promotes reductions of bf16 only, and often computes their operand in f32 with no convert to see
# (XLA: cpu_compiler, all_reduce_promotion; excess precision is allowed).
_PROMOTED_FROM = {"f32": Shape("bf16")}
# Instructions that hand the first operand's elements on, in another order or form.
_FORWARDING = frozenset(
    {"bitcast", "copy", "reshape", "transpose", "get-tuple-element", "copy-done", "copy-start"}
)
_MAX_STEPS = 32
_SLICE = re.compile(r"\{(\s*[0-9]{1,18}\s*(?:,\s*[0-9]{1,18}\s*)*)\}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """Bytes on one device. None where a size is unknown (`?` extents).

    operand_bytes: of the data operands. gathered_bytes: the result of an all-gather, 0 for other kinds.
    upper_bound: an extent is only a bound, or the operand is more than what is sent.
    """

    dtypes: tuple[str, ...]
    operand_bytes: int | None
    gathered_bytes: int | None = 0
    upper_bound: bool = False


def payload_of(computation: Computation, instruction: Instruction, kind: str) -> Payload:
    """What `instruction` carries as the text says it. Raises ParseError for an operand that is not
    defined.
    """
    shapes = _operand_shapes(computation, instruction, kind)
    return _payload(shapes, _gathered(instruction) if kind == "all-gather" else [], instruction, kind)


def may_be_widened(payload: Payload, is_mentioned: Callable[[str], bool]) -> bool:
    """Whether XLA:CPU may have widened it; is_mentioned: whether the module mentions a type at all."""
    for dtype in payload.dtypes:
        for narrow in _WIDENED_TO.get(dtype, ()):
            if is_mentioned(narrow):
                return True
    return False


def logical_payload(
    module: Module, computation: Computation, instruction: Instruction, kind: str
) -> Payload | None:
    """What the source asked for, when XLA:CPU widened the operands: their reducer says so, or a convert just
    before; None when it did not.
    """
    promoted = _is_promoted(instruction)
    if kind in ("all-reduce", "reduce-scatter") and not promoted:
        return None
    operands = _data_operands(instruction, kind)
    narrow = [
        _narrow_source(module, computation, operand)
        or (_PROMOTED_FROM.get(_shape_of(computation, instruction, operand).dtype) if promoted else None)
        for operand in operands
    ]
    if not any(narrow) or "slice_sizes" in instruction.attributes:
        return None
    shapes = [
        _retyped(_shape_of(computation, instruction, operand), source)
        for operand, source in zip(operands, narrow, strict=True)
    ]
    results = _gathered(instruction) if kind == "all-gather" else []
    if len(results) == len(narrow):
        results = [_retyped(shape, source) for shape, source in zip(results, narrow, strict=True)]
    logical = _payload(shapes, results, instruction, kind)
    actual = payload_of(computation, instruction, kind)
    return logical if logical.operand_bytes != actual.operand_bytes else None


def element_at(shape: Shape, index: Sequence[int]) -> Shape:
    """The element of a tuple shape at `index`. Raises ParseError when there is none."""
    for position in index:
        if position >= len(shape.leaves):
            raise ParseError(f"no element {position} in a tuple of {len(shape.leaves)}")
        shape = shape.leaves[position]
    return shape


def _payload(
    shapes: Sequence[Shape], results: Sequence[Shape], instruction: Instruction, kind: str
) -> Payload:
    leaves = shapes
    if len(shapes) != 1 or shapes[0].dtype in ("tuple", "token"):
        leaves = [leaf for shape in shapes for leaf in array_leaves(shape) if leaf.dtype != "token"]
    slices = instruction.attributes.get("slice_sizes")
    return Payload(
        dtypes=tuple(dict.fromkeys([leaf.dtype for leaf in leaves])),
        operand_bytes=_slice_bytes(slices, leaves[0]) if slices and leaves else _total(leaves),
        gathered_bytes=_total(results),
        upper_bound=kind == "ragged-all-to-all" or True in [leaf.bounded for leaf in leaves],
    )


def _total(shapes: Sequence[Shape]) -> int | None:
    total = 0
    for shape in shapes:
        size = try_shape_bytes(shape)
        if size is None:
            return None
        total += size
    return total


def _slice_bytes(slices: str, shape: Shape) -> int | None:
    """In-place permute (TPU): the bytes of `slice_sizes={{1,8,128},{1,8,128}}`."""
    counts = [math.prod(int(extent) for extent in match.split(",")) for match in _SLICE.findall(slices)]
    return _total([replace(shape, dims=(count,)) for count in counts])


def _data_operands(instruction: Instruction, kind: str) -> tuple[Operand, ...]:
    """Operands that carry data: of a ragged-all-to-all the first, of a broadcast with a dynamic root all but
    the last, of an in-place permute the first."""
    operands = instruction.operands
    if kind == "ragged-all-to-all" or "slice_sizes" in instruction.attributes:
        return operands[:1]
    if kind == "collective-broadcast" and is_true(instruction, "has_dynamic_root"):
        return operands[:-1]
    return operands


def _operand_shapes(computation: Computation, instruction: Instruction, kind: str) -> list[Shape]:
    return [_shape_of(computation, instruction, operand) for operand in _data_operands(instruction, kind)]


def _shape_of(computation: Computation, instruction: Instruction, operand: Operand) -> Shape:
    shape = shape_of(computation.instructions, operand.name)
    if shape is None:
        message = f"{instruction.name}: operand %{operand.name} is not defined in {computation.name}"
        raise ParseError(message, line=instruction.line, column=1)
    return element_at(shape, operand.index)


def _gathered(instruction: Instruction) -> list[Shape]:
    """Results of an all-gather. Every form of its start is (operands, results, …)."""
    shape = instruction.shape
    if instruction.opcode.endswith("-start"):
        shape = element_at(shape, (1,))
    return list(shape.leaves) if shape.dtype == "tuple" else [shape]


def _is_promoted(instruction: Instruction) -> bool:
    """XLA names the reducer of a widened reduction `add.clone_promoted`."""
    return any("promoted" in name for name in computation_names(instruction, "to_apply"))


def _retyped(shape: Shape, source: Shape | None) -> Shape:
    return replace(shape, dtype=source.dtype, element_bits=source.element_bits) if source else shape


def _narrow_source(module: Module, computation: Computation, operand: Operand) -> Shape | None:
    """The narrower array that a convert just before `operand` widened, through copies and fusions."""
    index = operand.index
    instruction = computation.instructions.get(operand.name)
    for _ in range(_MAX_STEPS):
        if instruction is None or not (instruction.operands or instruction.opcode == "fusion"):
            return None
        if instruction.opcode == "convert" and instruction.operands:
            source = _shape_of(computation, instruction, instruction.operands[0])
            return source if source.dtype in _WIDENED_TO.get(instruction.shape.dtype, ()) else None
        if instruction.opcode == "fusion":
            called = computation_names(instruction, "calls")
            if not called:
                return None
            computation = module.computations[called[0]]
            instruction = computation.instructions.get(computation.root)
            continue
        if instruction.opcode == "tuple" and index and index[0] < len(instruction.operands):
            following, index = instruction.operands[index[0]], index[1:]
        elif instruction.opcode in _FORWARDING and instruction.operands:
            following = instruction.operands[0]
            if instruction.opcode == "get-tuple-element":
                index = (tuple_index(instruction), *index)
        else:
            return None
        index = (*following.index, *index)
        instruction = computation.instructions.get(following.name)
    return None


def sliced_from(computation: Computation, instruction: Instruction) -> bool:
    """Whether a dynamic-slice keeps a part of what `instruction` gives, through bitcasts and copies."""
    for part in of_opcodes(computation.instructions, ("dynamic-slice",)):
        source: Instruction | None = part
        for _ in range(_MAX_STEPS):
            if source is None or not source.operands:
                break
            source = computation.instructions.get(source.operands[0].name)
            if source is not None and source.name == instruction.name:
                return True
            if source is None or source.opcode not in _FORWARDING:
                break
    return False
