"""What a fusion reads of each operand and writes of each result, from what its instructions ask for.

A fusion computes only what its results need: an operand that is merely sliced is read as far as the slices
go, and one that a `dynamic-update-slice` at the root overwrites in place is not read at all, and written
where it is updated. Demand is followed from the root to the parameters, in elements. Several slices of one
operand add up, at most to the whole: an upper bound where they overlap.

XLA's own count (`HloCostAnalysis::FusionParameterReadBytes`) agrees, but takes a sliced operand as whole
when anything stands between the parameter and the slice, a gathered or scattered table as whole always, and
an operand that is broadcast twice as read twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from shardlab.hlo.attributes import computation_names, parameter_number
from shardlab.hlo.module import Computation, Instruction, Operand, Shape
from shardlab.hlo.shape import array_leaves, try_shape_bytes

# Each element of the result takes one of an operand: at most as many are read as are asked for.
_POINTWISE_WORDS = """
    abs add and atan2 broadcast cbrt ceil clamp compare complex concatenate convert copy cosine
    count-leading-zeros divide erf exponential exponential-minus-one floor imag is-finite log log-plus-one
    logistic maximum minimum multiply negate not or pad popcnt power real reduce-precision remainder reshape
    reverse round-nearest-afz round-nearest-even rsqrt select shift-left shift-right-arithmetic
    shift-right-logical sign sine slice sqrt subtract tan tanh transpose xor
"""
_POINTWISE = frozenset(_POINTWISE_WORDS.split())
# So many leading operands are treated so; the rest are indices.
_FOLLOWING = {"dynamic-slice": 1, "gather": 1, "dynamic-update-slice": 2}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # the operand that holds what is put in place
_MAX_CHAIN = 64


@dataclass(frozen=True, slots=True)
class FusedTraffic:
    """Bytes that one run of a fused computation asks for; None where a size is unknown.

    reads: by parameter number; what is not there is not read. writes: of each array of the result, in order.
    pointwise: each element of the result takes at most one of each operand.
    """

    reads: Mapping[int, int | None]
    writes: tuple[int | None, ...]
    pointwise: bool = False


def num_elements(shape: Shape) -> int | None:
    """Elements of a shape, a tuple's arrays summed; None when an extent is unbounded."""
    total = 0
    for leaf in array_leaves(shape):
        if None in leaf.dims:
            return None
        total += 0 if leaf.dtype in ("token", "opaque") else math.prod(d for d in leaf.dims if d is not None)
    return total


def fused_traffic(computation: Computation, inner: Mapping[str, FusedTraffic]) -> FusedTraffic:
    """What the fused `computation` reads and writes. inner: the same for the computations that it calls."""
    instructions = computation.instructions
    root = instructions[computation.root]
    target = root.attributes.get("custom_call_target", "").strip('"')
    if target == "AsyncCollectiveDone":  # the start has counted the transfer
        return FusedTraffic({}, tuple(0 for _ in array_leaves(root.shape)))
    changed = dict(_in_place(computation))
    demand = _Demand(computation, inner, changed).of_all(root)
    reads: dict[int, int | None] = {}
    for instruction in instructions.values():
        asked = demand.get(instruction.name, 0)
        if instruction.opcode == "parameter" and asked != 0:
            reads[parameter_number(instruction)] = bytes_of(instruction.shape, asked)
    writes = tuple(
        bytes_of(leaf, changed.get(name, num_elements(leaf))) for name, leaf in _results(computation)
    )
    if target == "AsyncCollectiveStart":  # (operands, results, flags): only the results are new
        writes = _started(root.shape, writes)
    pointwise = all(one.opcode in _POINTWISE or not one.operands for one in instructions.values())
    return FusedTraffic(reads, writes, pointwise)


def bytes_of(shape: Shape, elements: int | None) -> int | None:
    """Bytes of that many elements of a shape, rounded up; None when a size is unknown."""
    whole, count = try_shape_bytes(shape), num_elements(shape)
    if whole is None or count is None or elements is None:
        return None
    return -(-whole * elements // count) if count else 0


def update_elements(instruction: Instruction, computation: Computation) -> int | None:
    """Elements that a `dynamic-update-slice` or a scatter of one array puts in place; None: not known."""
    position = _UPDATES[instruction.opcode]
    if len(instruction.operands) <= position or (
        instruction.shape.leaves and instruction.opcode == "scatter"
    ):
        return None
    shape = operand_shape(instruction.operands[position], computation)
    return None if shape is None else num_elements(shape)


def operand_shape(use: Operand, computation: Computation) -> Shape | None:
    """The shape of a use; None when it names nothing."""
    source = computation.instructions.get(use.name)
    shape = source.shape if source is not None else None
    for index in use.index:
        shape = shape.leaves[index] if shape is not None and index < len(shape.leaves) else None
    return shape


def is_update(instruction: Instruction) -> bool:
    """Whether the instruction changes a part of its first operand."""
    return instruction.opcode in _UPDATES


def _results(computation: Computation) -> Iterator[tuple[str, Shape]]:
    """The instruction that makes each array of the result, and the array's shape."""
    instructions = computation.instructions
    root = instructions[computation.root]
    if root.opcode != "tuple":
        yield from ((root.name, leaf) for leaf in array_leaves(root.shape))
        return
    for use, shape in zip(root.operands, root.shape.leaves, strict=False):
        yield from ((use.name, leaf) for leaf in array_leaves(shape))


def in_place_operands(computation: Computation) -> dict[int, int]:
    """Of a fused computation the results that are an operand's memory with a part changed: array of the
    result -> parameter number."""
    return {index: parameter_number(chain.parameter) for index, chain in _in_place_chains(computation)}


@dataclass(frozen=True, slots=True)
class _Chain:
    """A result made in place: the names from it to the parameter, and how many elements change."""

    names: tuple[str, ...]
    parameter: Instruction
    changed: int


def _in_place(computation: Computation) -> Iterator[tuple[str, int]]:
    """Results that are a parameter's memory with a part changed, and how many elements change.

    Each instruction of the chain is in place too, so it is listed as well.
    """
    for _, chain in _in_place_chains(computation):
        yield from ((name, chain.changed) for name in chain.names)


def _in_place_chains(computation: Computation) -> Iterator[tuple[int, _Chain]]:
    """The chain of each array of the result that has one."""
    for index, (name, leaf) in enumerate(_results(computation)):
        chain, changed = [], 0
        one = computation.instructions.get(name)
        for _ in range(_MAX_CHAIN):
            if one is None or not one.operands or not (one.opcode == "bitcast" or is_update(one)):
                break
            more = update_elements(one, computation) if is_update(one) else 0
            if more is None:
                break
            chain.append(one.name)
            changed += more
            one = computation.instructions.get(one.operands[0].name)
        if one is not None and one.opcode == "parameter" and changed:
            whole = num_elements(leaf)
            yield index, _Chain(tuple(chain), one, changed if whole is None else min(changed, whole))


@dataclass(frozen=True, slots=True)
class _Demand:
    """Elements that each value is asked for. changed: instructions that are done in place."""

    computation: Computation
    inner: Mapping[str, FusedTraffic]
    changed: Mapping[str, int]

    def of_all(self, root: Instruction) -> dict[str, int | None]:
        """Elements asked for by name. What is used is printed before its users: one pass from the end."""
        instructions = self.computation.instructions
        updates = [instructions[name] for name in self.changed if is_update(instructions[name])]
        demand = {one.name: num_elements(one.shape) for one in (root, *updates)}
        for instruction in reversed(list(instructions.values())):
            asked = demand.get(instruction.name, 0)
            for position, use in enumerate(instruction.operands if asked != 0 else ()):
                source = instructions.get(use.name)
                if source is not None:
                    more = self._of_operand(instruction, position, asked)
                    demand[use.name] = _at_most(num_elements(source.shape), demand.get(use.name, 0), more)
        return demand

    def _of_operand(self, user: Instruction, position: int, asked: int | None) -> int | None:
        """Elements of one operand that `asked` elements of the user's result need."""
        opcode = user.opcode
        shape = operand_shape(user.operands[position], self.computation)
        available = None if shape is None else num_elements(shape)
        if opcode == "fusion" and shape is not None:
            return self._of_inner(user, position, shape, asked)
        if position == 0 and user.name in self.changed and is_update(user):
            # A scatter combines what it puts with what is there.
            return 0 if opcode == "dynamic-update-slice" else update_elements(user, self.computation)
        if available is None or asked is None:
            return available
        if opcode in ("bitcast", "bitcast-convert"):  # the same bits, perhaps in other elements
            size = num_elements(user.shape)
            return -(-asked * available // size) if size else available
        follows = opcode in _POINTWISE or position < _FOLLOWING.get(opcode, 0)
        return min(available, asked) if follows else available

    def _of_inner(self, fusion: Instruction, position: int, shape: Shape, asked: int | None) -> int | None:
        """What a fusion inside the fusion reads of an operand, as if all its results were asked for, unless
        it is pointwise: TPU programs move a whole stack of int8 weights to other tiles so, and slice it."""
        callees = computation_names(fusion, "calls")
        traffic = self.inner.get(callees[0]) if callees else None
        available, whole = num_elements(shape), try_shape_bytes(shape)
        if traffic is None or available is None or whole is None:
            return available
        read = traffic.reads.get(position, 0)
        if read is None:
            return None
        elements = -(-read * available // whole) if whole else 0
        return min(elements, asked) if traffic.pointwise and asked is not None else elements


def _at_most(whole: int | None, one: int | None, other: int | None) -> int | None:
    return None if whole is None or one is None or other is None else min(whole, one + other)


def _started(shape: Shape, writes: Sequence[int | None]) -> tuple[int | None, ...]:
    """Writes of an AsyncCollectiveStart, by the array: those of the second member alone."""
    kept: list[int | None] = []
    for position, member in enumerate(shape.leaves):
        count = len(array_leaves(member))
        kept += writes[len(kept) : len(kept) + count] if position == 1 else [0] * count
    return tuple(kept)
