"""What stands next to an instruction that does not say where it comes from.

XLA's multi-slice and collective rewrites drop metadata. The nearest instruction that a value comes from, or
goes to,
still has it: a gathered weight belongs to the product that uses it, a reduced gradient to the one that made
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from shardlab.attribute.edges import CallSites
from shardlab.hlo.attributes import metadata, tuple_index
from shardlab.hlo.module import Computation, Instruction

MAX_VISITED = 64

_TOWARDS_USERS = ("all-gather", "collective-permute")


@dataclass(slots=True)
class Neighbours:
    """Finds named neighbours; remembers who uses what, per computation."""

    _users: dict[str, dict[str, list[Instruction]]] = field(default_factory=dict)

    def op_name(self, computation: Computation, instruction: Instruction, kind: str) -> str:
        """The op_name nearest to `instruction`: for gathers among its users first, else among its operands;
        or ``.

        Names without a `/` are those of inputs, and say nothing.
        """
        ways: list[Callable[[Instruction], Iterable[Instruction]]] = [
            lambda one: self._using(computation).get(one.name, ()),
            lambda one: _sources(computation, one),
        ]
        for way in ways if kind in _TOWARDS_USERS else reversed(ways):
            found = _nearest(instruction, way)
            if found:
                return found
        return ""

    def _using(self, computation: Computation) -> dict[str, list[Instruction]]:
        if computation.name not in self._users:
            users: dict[str, list[Instruction]] = {}
            for instruction in computation.instructions.values():
                for operand in instruction.operands:
                    users.setdefault(operand.name, []).append(instruction)
            self._users[computation.name] = users
        return self._users[computation.name]


def enclosing_op_name(sites: CallSites, computation: str) -> str:
    """The op_name of the loop, branch or call that runs `computation`, or of what runs that; or ``."""
    for _ in range(MAX_VISITED):
        callers = sites.by_callee.get(computation, ())
        if not callers:
            break
        name = metadata(callers[0].instruction).op_name
        if "/" in name:
            return name
        computation = callers[0].caller
    return ""


def _sources(computation: Computation, instruction: Instruction) -> list[Instruction]:
    """Where the operands come from; an element of a loop's state comes from the trip before."""
    instructions = computation.instructions
    found = [instructions[operand.name] for operand in instruction.operands if operand.name in instructions]
    root = instructions[computation.root]
    if (
        instruction.opcode == "get-tuple-element"
        and root.opcode == "tuple"
        and found
        and found[0].opcode == "parameter"
        and found[0].shape == root.shape
    ):
        carried = root.operands[tuple_index(instruction) :][:1]
        return [instructions[operand.name] for operand in carried if operand.name in instructions]
    return found


def _nearest(start: Instruction, way: Callable[[Instruction], Iterable[Instruction]]) -> str:
    """Breadth first, so the nearest; a bounded number of instructions."""
    queue, seen = [start], {start.name}
    for visited in queue:
        for following in way(visited):
            if following.name in seen or len(seen) >= MAX_VISITED:
                continue
            name = metadata(following).op_name
            if "/" in name:
                return name
            seen.add(following.name)
            queue.append(following)
    return ""
