"""What stands next to an instruction that does not say where it comes from.

XLA's multi-slice and collective rewrites drop metadata. The nearest instruction that a value comes from, or
goes to,
still has it: a gathered weight belongs to the product that uses it, a reduced gradient to the one that made
it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from shardlab.attribute.edges import CallSites
from shardlab.errors import ParseError
from shardlab.hlo.attributes import metadata, read_metadata, tuple_index
from shardlab.hlo.lookup import names_of, operand_names, raw_metadata
from shardlab.hlo.module import Computation, Instruction

MAX_VISITED = 64
MAX_REMEMBERED = 16  # collectives come computation by computation, and this is large

_TOWARDS_USERS = ("all-gather", "collective-permute")


@dataclass(frozen=True, slots=True)
class _Wires:
    """Who uses what in one computation, by name.

    op_names: the telling ones, as far as they were read. barren: where all ways towards operands, or towards
    users, are known to lead to none.
    """

    operands: Mapping[str, Sequence[str]]
    users: Mapping[str, Sequence[str]]
    op_names: dict[str, str] = field(default_factory=dict)
    barren: tuple[set[str], set[str]] = field(default_factory=lambda: (set(), set()))


@dataclass(slots=True)
class Neighbours:
    """Finds named neighbours; remembers who uses what in the computations that it was asked about last."""

    _wires: dict[str, _Wires] = field(default_factory=dict)

    def op_name(self, computation: Computation, instruction: Instruction, kind: str) -> str:
        """The op_name nearest to `instruction`: for gathers among its users first, else among its operands;
        or ``.

        Names without a `/` are those of inputs, and say nothing.
        """
        wires = self._wires.get(computation.name)
        if wires is None:
            if len(self._wires) == MAX_REMEMBERED:
                del self._wires[next(iter(self._wires))]
            wires = self._wires[computation.name] = _wires_of(computation)
        for towards_users in (True, False) if kind in _TOWARDS_USERS else (False, True):
            found = _nearest(computation, instruction.name, wires, towards_users=towards_users)
            if found:
                return found
        return ""


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


def _wires_of(computation: Computation) -> _Wires:
    """An element of a loop's state comes from the trip before; everything else from its operands."""
    operands = operand_names(computation.instructions)
    users: dict[str, list[str]] = {}
    for name, sources in operands.items():
        for source in sources:
            users.setdefault(source, []).append(name)
    return _Wires({**operands, **_carried(computation, operands)}, users)


def _carried(computation: Computation, operands: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """What the trip before left for each get-tuple-element of a parameter, if this is the body of a loop."""
    instructions = computation.instructions
    root = instructions.get(computation.root)
    if root is None:
        return {}
    parameters = set(names_of(instructions, "parameter"))
    if root.opcode != "tuple" or all(instructions[name].shape != root.shape for name in parameters):
        return {}
    taken = [name for name in names_of(instructions, "get-tuple-element") if operands[name]]
    elements = [name for name in taken if operands[name][0] in parameters]
    return {
        name: [operand.name for operand in root.operands[tuple_index(instructions[name]) :][:1]]
        for name in elements
        if instructions[operands[name][0]].shape == root.shape
    }


def _nearest(computation: Computation, start: str, wires: _Wires, *, towards_users: bool) -> str:
    """Breadth first, so the nearest; a bounded number of instructions."""
    way, barren = wires.users if towards_users else wires.operands, wires.barren[towards_users]
    queue, seen = [start], {start}
    for visited in queue:
        for name in way.get(visited, ()):
            if name in seen or name in barren:
                continue
            op_name = wires.op_names.get(name)
            if op_name is None:
                op_name = wires.op_names[name] = _telling(computation, name)
            if op_name:
                return op_name
            seen.add(name)
            queue.append(name)
            if len(seen) == MAX_VISITED:
                return ""
    barren |= seen
    return ""


def _telling(computation: Computation, name: str) -> str:
    """The op_name of an instruction if it says where in the program it belongs, else ``."""
    instructions = computation.instructions
    raw = raw_metadata(instructions, name) if name in instructions else ""
    if "/" not in raw:
        return ""
    try:
        op_name = read_metadata(raw).op_name
    except ParseError:
        op_name = metadata(instructions[name]).op_name  # fails as well, and says where
    return op_name if "/" in op_name else ""
