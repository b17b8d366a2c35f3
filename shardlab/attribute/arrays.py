"""One element of an integer array: back through slices, reshapes and gathers to a constant table.

A pipeline's schedule is a constant array that is read at a tick and a stage. Each reader takes the index
nodes of the element that is wanted and asks for elements of the operands, so that no array is ever built.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

from shardlab.attribute.arithmetic import BITS, wrap
from shardlab.attribute.nodes import (
    ELEMENTWISE,
    Nodes,
    Ref,
    Steps,
    Table,
    is_array,
    operand_ref,
    operand_shape,
)
from shardlab.hlo.attributes import first_operand
from shardlab.hlo.lexer import without_comments
from shardlab.hlo.module import Instruction, Shape

MAX_ENTRIES = 1_000_000
ELIDED = "its entries are left out of the text (`{...}`); a proto holds them"
TOO_LARGE = f"it has more than {MAX_ENTRIES} entries"

_ENTRY = re.compile(r"-?[0-9]{1,20}|true|false", re.ASCII)
_OTHER = re.compile(r"[^-0-9,{}\struefals]", re.ASCII)
_RANGE = re.compile(r"\[([0-9]{1,12}):[0-9]{1,12}(?::([0-9]{1,12}))?\]", re.ASCII)
_NUMBER = re.compile(r"[0-9]{1,9}", re.ASCII)


def constant_table(instruction: Instruction) -> Table | str:
    """The entries of a constant array of integers, or why they are not known."""
    dtype, dims = instruction.shape.dtype, instruction.shape.dims
    extents = [extent for extent in dims if extent is not None]
    literal = instruction.literal or ""
    size = math.prod(extents)
    if dtype not in BITS or len(extents) < len(dims):
        return f"a table of {dtype}"
    if size > MAX_ENTRIES or len(literal) > 64 * MAX_ENTRIES:
        return TOO_LARGE
    if "..." in literal:
        return ELIDED
    text = without_comments(literal)
    entries = _ENTRY.findall(text)
    if len(entries) != size or _OTHER.search(text):
        return "its entries could not be read"
    values = [entry == "true" if entry[0] in "tf" else int(entry) for entry in entries]
    return Table(tuple(wrap(int(value), dtype) for value in values), tuple(extents))


def element(nodes: Nodes, ref: Ref, instruction: Instruction) -> Steps:
    """The element at `ref.at` of what `instruction` makes; of an array of one, its only element."""
    at, dims = ref.at, instruction.shape.dims
    if not is_array(instruction.shape):
        zero = nodes.constant(0)
        at = (zero,) * len(dims)
    elif len(at) != len(dims):
        return nodes.unknown(f"{instruction.opcode} %{ref.name} is an array")
    opcode = instruction.opcode
    if opcode in _READERS:
        return (yield from _READERS[opcode](nodes, ref, instruction, at))
    if opcode in ELEMENTWISE and instruction.shape.dtype in BITS:
        args = []
        for operand in instruction.operands:
            args.append((yield operand_ref(ref.frame, operand, at=at)))
        direction = instruction.attributes.get("direction", "")
        return nodes.apply(opcode, instruction.shape.dtype, tuple(args), direction)
    return nodes.unknown(f"{opcode} %{ref.name} ({instruction.shape.dtype})")


At = tuple[int, ...]


def _of_constant(nodes: Nodes, ref: Ref, instruction: Instruction, at: At) -> Steps:
    yield from ()
    key = (ref.frame.computation.name, ref.name)
    if key not in nodes.tables:
        nodes.tables[key] = constant_table(instruction)
    table = nodes.tables[key]
    if isinstance(table, str):
        return nodes.unknown(f"the table %{instruction.name}: {table}")
    return nodes.lookup(table, instruction.shape.dtype, at)


def _of_same(nodes: Nodes, ref: Ref, instruction: Instruction, at: At) -> Steps:
    return (yield operand_ref(ref.frame, first_operand(instruction), at=at))


def _of_iota(nodes: Nodes, ref: Ref, instruction: Instruction, at: At) -> Steps:
    yield from ()
    dimension = _numbers(instruction, "iota_dimension") or _numbers(instruction, "dimensions")
    if len(dimension) != 1 or dimension[0] >= len(at) or instruction.shape.dtype not in BITS:
        return nodes.unknown(f"iota %{instruction.name}")
    return nodes.apply("convert", instruction.shape.dtype, (at[dimension[0]],))


def _of_broadcast(nodes: Nodes, ref: Ref, instruction: Instruction, at: At) -> Steps:
    dimensions = _numbers(instruction, "dimensions")
    source = operand_shape(ref.frame, instruction, 0)
    if len(dimensions) != len(source.dims) or any(d >= len(at) for d in dimensions):
        return nodes.unknown(f"broadcast %{instruction.name}")
    return (yield operand_ref(ref.frame, first_operand(instruction), at=tuple(at[d] for d in dimensions)))


def _of_transpose(nodes: Nodes, ref: Ref, instruction: Instruction, at: At) -> Steps:
    permutation = _numbers(instruction, "dimensions")
    if sorted(permutation) != list(range(len(at))):
        return nodes.unknown(f"transpose %{instruction.name}")
    found = tuple(at[permutation.index(dimension)] for dimension in range(len(at)))
    return (yield operand_ref(ref.frame, first_operand(instruction), at=found))


def _of_reshape(nodes: Nodes, ref: Ref, instruction: Instruction, at: At) -> Steps:
    """By the position in row-major order. A bitcast is that only where at most one extent is not one, since
    layouts are not read."""
    source, result = operand_shape(ref.frame, instruction, 0), instruction.shape
    extents = [extent for extent in (*source.dims, *result.dims) if extent is not None]
    wide = sum(extent != 1 for extent in result.dims)
    known = len(extents) == len(source.dims) + len(result.dims)
    if not known or source.dtype != result.dtype or (instruction.opcode == "bitcast" and wide > 1):
        return nodes.unknown(f"{instruction.opcode} %{instruction.name}")
    split = len(source.dims)
    if math.prod(extents[:split]) != math.prod(extents[split:]):
        return nodes.unknown(f"{instruction.opcode} %{instruction.name} changes the size")
    flat = nodes.constant(0)
    for index, extent in zip(at, extents[split:], strict=True):
        flat = nodes.apply("multiply", "s64", (flat, nodes.constant(extent)))
        flat = nodes.apply("add", "s64", (flat, index))
    found: list[int] = []
    for extent in reversed(extents[:split]):
        found.insert(0, nodes.apply("remainder", "s64", (flat, nodes.constant(extent))))
        flat = nodes.apply("divide", "s64", (flat, nodes.constant(extent)))
    return (yield operand_ref(ref.frame, first_operand(instruction), at=tuple(found)))


def _of_slice(nodes: Nodes, ref: Ref, instruction: Instruction, at: At) -> Steps:
    ranges = _RANGE.findall(instruction.attributes.get("slice", ""))
    if len(ranges) != len(at):
        return nodes.unknown(f"slice %{instruction.name}")
    found = []
    for index, (start, stride) in zip(at, ranges, strict=True):
        step = nodes.apply("multiply", "s64", (index, nodes.constant(int(stride or 1))))
        found.append(nodes.apply("add", "s64", (step, nodes.constant(int(start)))))
    return (yield operand_ref(ref.frame, first_operand(instruction), at=tuple(found)))


def _of_dynamic_slice(nodes: Nodes, ref: Ref, instruction: Instruction, at: At) -> Steps:
    """Starts are clamped, so that the slice lies inside (XLA, "Operation Semantics")."""
    source, sizes = operand_shape(ref.frame, instruction, 0), instruction.shape.dims
    starts = instruction.operands[1:]
    if not len(starts) == len(sizes) == len(source.dims):
        return nodes.unknown(f"dynamic-slice %{instruction.name}")
    found = []
    for index, start, extent, size in zip(at, starts, source.dims, sizes, strict=True):
        first = yield operand_ref(ref.frame, start)
        found.append(_clamped(nodes, first, extent, size, index))
    return (yield operand_ref(ref.frame, first_operand(instruction), at=tuple(found)))


def _clamped(nodes: Nodes, first: int, extent: int | None, size: int | None, index: int) -> int:
    if extent is None or size is None:
        return nodes.unknown("an unbounded extent")
    ends = nodes.constant(0), nodes.constant(max(extent - size, 0))
    return nodes.apply("add", "s64", (nodes.apply("clamp", "s64", (ends[0], first, ends[1])), index))


def _of_gather(nodes: Nodes, ref: Ref, instruction: Instruction, at: At) -> Steps:
    """Of single elements: `slice_sizes` are ones, so that result and start indices differ in the index
    vector alone.
    """
    source, indices = (operand_shape(ref.frame, instruction, position) for position in (0, 1))
    dims, start_map = source.dims, _numbers(instruction, "start_index_map")
    vector = (*_numbers(instruction, "index_vector_dim"), len(indices.dims))[0]
    batches = [index for index, extent in enumerate(instruction.shape.dims) if extent != 1]
    plain = set(_numbers(instruction, "slice_sizes")) == {1} and sorted(start_map) == list(range(len(dims)))
    if not plain or batches or not _has_batch_of_one(indices, vector) or len(instruction.operands) != 2:
        return nodes.unknown(f"gather %{instruction.name}")
    zero, found = nodes.constant(0), [0] * len(dims)
    for position, dimension in enumerate(start_map):
        place = [zero] * len(indices.dims)
        if vector < len(place):
            place[vector] = nodes.constant(position)
        first = yield operand_ref(ref.frame, instruction.operands[1], at=tuple(place))
        found[dimension] = _clamped(nodes, first, dims[dimension], 1, zero)
    return (yield operand_ref(ref.frame, first_operand(instruction), at=tuple(found)))


def _has_batch_of_one(indices: Shape, vector: int) -> bool:
    return all(extent == 1 for index, extent in enumerate(indices.dims) if index != vector)


def _of_concatenate(nodes: Nodes, ref: Ref, instruction: Instruction, at: At) -> Steps:
    """Only at an index that is known beforehand."""
    along = _numbers(instruction, "dimensions")
    if len(along) != 1 or along[0] >= len(at) or nodes[at[along[0]]].op != "constant":
        return nodes.unknown(f"concatenate %{instruction.name}")
    axis, index = along[0], nodes[at[along[0]]].value
    for position, operand in enumerate(instruction.operands):
        shape = operand_shape(ref.frame, instruction, position)
        extent = shape.dims[axis] if axis < len(shape.dims) else None
        if extent is None:
            break
        if index < extent:
            found = (*at[:axis], nodes.constant(index), *at[axis + 1 :])
            return (yield operand_ref(ref.frame, operand, at=found))
        index -= extent
    return nodes.unknown(f"concatenate %{instruction.name}")


def _numbers(instruction: Instruction, attribute: str) -> tuple[int, ...]:
    return tuple(int(number) for number in _NUMBER.findall(instruction.attributes.get(attribute, "")))


_READERS: Mapping[str, Callable[[Nodes, Ref, Instruction, At], Steps]] = {
    "constant": _of_constant,
    "copy": _of_same,
    "opt-barrier": _of_same,
    "iota": _of_iota,
    "broadcast": _of_broadcast,
    "transpose": _of_transpose,
    "reshape": _of_reshape,
    "bitcast": _of_reshape,
    "slice": _of_slice,
    "dynamic-slice": _of_dynamic_slice,
    "gather": _of_gather,
    "concatenate": _of_concatenate,
}
READ_FROM_ARRAYS = frozenset({"iota", "slice", "dynamic-slice", "gather", "concatenate"})
"""What makes an array of one element out of larger ones."""
