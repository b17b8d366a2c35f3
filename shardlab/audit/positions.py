"""Which part of an array each device takes: the index of a slice, computed for every device of a group.

A small interpreter of the integer arithmetic that XLA makes of a device's position: shifts and masks of
`partition-id`, or a constant table indexed by it. Anything else is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from shardlab.attribute.arithmetic import COMPARISONS, OPERATIONS, wrap
from shardlab.audit.flow import Flow, Value
from shardlab.hlo.groups import flattened_groups
from shardlab.hlo.module import Instruction, Module

MAX_NODES = 500
MAX_OPERATIONS = 2_000_000

_Number = int | tuple[int, ...]
_TABLE = re.compile(r"\{\s*(-?\d+(?:\s*,\s*-?\d+)*)\s*\}", re.ASCII)
_SAME = frozenset({"convert", "broadcast"})
_INTEGERS = frozenset({"pred", "s32", "u32", "s64", "u64"})


class _Step(NamedTuple):
    instruction: Instruction
    args: tuple[int, ...]


def tiles(flow: Flow, module: Module, collective: Instruction, start: Value, extent: int, size: int) -> bool:
    """Whether the members of each group take different parts, which together are the whole extent.

    start: the index at which a device's part of `size` begins; as in HLO it is clamped to 0 … extent - size.
    False also where it cannot be computed.
    """
    replicas, partitions = module.replica_count or 1, module.num_partitions
    program = _program(flow, start)
    if program is None or partitions is None or len(program) * replicas * partitions > MAX_OPERATIONS:
        return False
    wanted = list(range(0, extent, size))
    for group in flattened_groups(collective, replicas, partitions):
        found = [_run(program, member // partitions, member % partitions) for member in group]
        starts = [min(max(at, 0), extent - size) for at in found if isinstance(at, int)]
        if sorted(starts) != wanted:
            return False
    return True


def _program(flow: Flow, value: Value) -> list[_Step] | None:
    """The instructions that make a scalar, operands first; None when there are too many."""
    start = flow.origin(value)
    order: dict[Value, int] = {}
    program: list[_Step] = []
    stack = [start]
    for _ in range(4 * MAX_NODES):
        if not stack:
            return program
        current = stack[-1]
        instruction = flow.instruction(current)
        if instruction is None or len(order) > MAX_NODES:
            return None
        args = [flow.operand(current, position) for position in range(len(instruction.operands))]
        needed = [flow.origin(arg) for arg in args if arg is not None]
        missing = [arg for arg in needed if arg not in order]
        if missing and current not in order:
            stack += missing
            continue
        stack.pop()
        if current not in order:
            order[current] = len(program)
            program.append(_Step(instruction, tuple(order[arg] for arg in needed)))
    return None


def _run(program: Sequence[_Step], replica: int, partition: int) -> _Number | None:
    values: list[_Number | None] = []
    for step in program:
        args = [values[position] for position in step.args]
        values.append(_apply(step.instruction, args, replica, partition))
    return values[-1]


def _apply(
    instruction: Instruction, args: Sequence[_Number | None], replica: int, partition: int
) -> _Number | None:
    opcode = instruction.opcode
    if opcode == "partition-id":
        return partition
    if opcode == "replica-id":
        return replica
    if opcode == "constant":
        return _constant(instruction.literal or "")
    if opcode == "dynamic-slice" and len(args) == 2:
        return _looked_up(instruction, args[0], args[1])
    numbers = [arg for arg in args if isinstance(arg, int)]
    if len(numbers) < len(args) or instruction.shape.dtype not in _INTEGERS:
        return None
    try:
        value = _computed(instruction, numbers)
    except (ArithmeticError, LookupError, ValueError, TypeError):
        return None
    return None if value is None else wrap(value, instruction.shape.dtype)


def _computed(instruction: Instruction, args: Sequence[int]) -> int | None:
    opcode = instruction.opcode
    if opcode == "compare":
        compare = COMPARISONS.get(instruction.attributes.get("direction", ""))
        return None if compare is None else int(compare(*args))
    if opcode in _SAME and len(args) == 1:
        return args[0]
    if opcode == "shift-right-logical" and args[0] >= 0 and 0 <= args[1] < 32:
        return args[0] >> args[1]
    return OPERATIONS[opcode](*args) if opcode in OPERATIONS else None


def _constant(literal: str) -> _Number | None:
    text = literal.strip()
    if re.fullmatch(r"-?\d{1,18}", text):
        return int(text)
    if text in ("true", "false"):
        return int(text == "true")
    match = _TABLE.fullmatch(text)
    return tuple(int(part) for part in match[1].split(",")) if match else None


def _looked_up(instruction: Instruction, table: _Number | None, at: _Number | None) -> int | None:
    """One entry of a table; the index is clamped, as in HLO."""
    if not isinstance(table, tuple) or not isinstance(at, int) or instruction.shape.dims != (1,):
        return None
    return table[min(max(at, 0), len(table) - 1)]
