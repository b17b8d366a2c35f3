"""What the permutes of a loop carry out together: an all-gather or a reduce-scatter in the form of a ring.

Decided by structure: a loop carries a buffer, permutes hand it around closed cycles of n devices, and the
loop's permutes make at least n - 1 hops. Handed on unchanged (through copies, bitcasts, converts) it is a
gather: every device sees every shard. With something added before each hop that does not depend on the buffer
it is a scatter: the buffer collects everyone's part. Two directions of one ring count together, and what the
loop leaves to a peeled trip is not needed. Anything else that meets the buffer on its way (a layer of a
pipeline, the neighbour's rows that a stencil adds) makes it neither.

Only where structure says nothing does the name of the loop count: XLA calls the loops of a windowed einsum
`windowed_dot_general_body_ag` or `…_rs` (XLA: spmd/dot_handler.cc). So the permute before or after the loop,
which brings the two directions together, carries out nothing by itself.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from shardlab.attribute.calls import CallGraph
from shardlab.attribute.collectives import Collective
from shardlab.hlo.attributes import computation_names
from shardlab.hlo.module import Computation, Instruction, Module, Operand

Realized = Literal["all-gather", "reduce-scatter"]
Pairs = Sequence[tuple[int, int]]
_Cycles = frozenset[frozenset[int]]

_WINDOWED = re.compile(r"windowed_dot_general_body_(ag|rs)")
_NUMBER = re.compile(r"[0-9]{1,9}")
_BY_NAME: Mapping[str, Realized] = {"ag": "all-gather", "rs": "reduce-scatter"}
# Instructions that hand the elements of their first operand on.
_FORWARDING = frozenset(
    {"bitcast", "copy", "reshape", "transpose", "convert", "copy-start", "optimization-barrier"}
)
_CONSTANT = frozenset({"constant", "broadcast", "bitcast", "convert", "copy", "reshape", "iota"})


class _Step(NamedTuple):
    """Where a value comes from, one step back, and whether something was added to it there."""

    source: Operand
    added: bool = False


@dataclass(frozen=True, slots=True)
class _Carried:
    """A buffer that a loop hands around: the names of the permutes that it passes in one trip, and what they
    do.
    """

    hops: tuple[str, ...]
    realized: Realized


def realized_by_permutes(
    module: Module, graph: CallGraph, permutes: Sequence[tuple[Collective, Pairs]]
) -> dict[tuple[str, str], Realized]:
    """What each permute is part of, by (computation, instruction); permutes that stand for themselves are
    left out.

    permutes: the program's collective-permutes, each with its (source, target) devices.
    """
    in_body: dict[str, dict[str, tuple[Collective, Pairs]]] = defaultdict(dict)
    for collective, pairs in permutes:
        in_body[collective.outermost][_moving(collective).name] = collective, pairs
    found: dict[tuple[str, str], Realized] = {}
    for name, moving in in_body.items():
        trips = _least_trips(graph, name)
        of_hop = _rings(module.computations[name], module, moving, trips) if trips else {}
        for hop, (collective, _) in moving.items():
            realized = of_hop.get(hop) or _by_name(collective)
            if realized:
                found[collective.computation, collective.instruction.name] = realized
    return found


def _moving(collective: Collective) -> Instruction:
    """The instruction of the outermost computation that carries a permute out."""
    return collective.around[-1] if collective.around else collective.instruction


def _by_name(collective: Collective) -> Realized | None:
    for name in (collective.computation, collective.outermost):
        windowed = _WINDOWED.search(name)
        if windowed:
            return _BY_NAME[windowed[1]]
    return None


def _least_trips(graph: CallGraph, body: str) -> int:
    """How often the loop runs at least that `body` belongs to; 0 when it is no loop's body."""
    sites = graph.sites.by_callee.get(body, ())
    if len(sites) != 1 or sites[0].role != "body":
        return 0
    return graph.loops[sites[0].caller, sites[0].instruction.name].low


def _rings(
    body: Computation, module: Module, moving: Mapping[str, tuple[Collective, Pairs]], trips: int
) -> dict[str, Realized]:
    """What the hops of complete rings carry out."""
    hops: dict[tuple[_Cycles, Realized], list[str]] = defaultdict(list)
    if not any(_cycles(pairs) for _, pairs in moving.values()):
        return {}  # as of most halos: spares the walk
    for carried in _carried(body, module, moving):
        cycles = {_cycles(moving[hop][1]) for hop in carried.hops}
        ring = cycles.pop()
        if ring and not cycles:
            hops[ring, carried.realized].extend(carried.hops)
    return {
        name: realized
        for (ring, realized), names in hops.items()
        if len(names) * trips >= len(next(iter(ring))) - 1
        for name in names
    }


def _cycles(pairs: Pairs) -> _Cycles:
    """The device sets of the closed cycles that pairs make; empty unless all are closed and of one size."""
    target = dict(pairs)
    if len(target) != len(pairs) or set(target) != set(target.values()):
        return frozenset()
    found, left = set(), set(target)
    while left:
        device, cycle = left.pop(), set[int]()
        while device not in cycle:
            cycle.add(device)
            device = target[device]
        left -= cycle
        found.add(frozenset(cycle))
    sizes = {len(cycle) for cycle in found}
    return frozenset(found) if len(sizes) == 1 and sizes != {1} else frozenset()


def _carried(body: Computation, module: Module, moving: Mapping[str, object]) -> Iterator[_Carried]:
    """The buffers that a loop's body hands around."""
    root = body.instructions.get(body.root)
    if root is None or root.opcode != "tuple":
        return
    moved = _depending(body, lambda one: one.name in moving)
    for index, last in enumerate(root.operands):
        if last.name not in moved:
            continue
        walk = _Walk(body, module, index)
        carried = walk.back(last, moving)
        if carried:
            yield carried


@dataclass
class _Walk:
    """From what one trip leaves in element `index` of the loop's state back to what it found there."""

    body: Computation
    module: Module
    index: int

    @cached_property
    def _later(self) -> frozenset[str]:
        return _depending(self.body, self._begins)

    def _begins(self, one: Instruction) -> bool:
        """Whether an instruction takes the element from the state, or the state as a whole."""
        taken = one.attributes.get("index") if one.opcode == "get-tuple-element" else None
        return any(
            self._is_state(operand)
            and str(operand.index[0] if operand.index else taken or self.index) == str(self.index)
            for operand in one.operands
        )

    def _is_state(self, operand: Operand) -> bool:
        source = self.body.instructions.get(operand.name)
        return source is not None and source.opcode == "parameter"

    def _depends(self, operand: Operand) -> bool:
        return operand.name in self._later or (
            self._is_state(operand) and operand.index[:1] in ((), (self.index,))
        )

    def back(self, at: Operand, moving: Mapping[str, object]) -> _Carried | None:
        """The permutes on the way; None when the way does not end where it began, or has none."""
        hops: list[str] = []
        passed: set[str] = set()
        added = False
        for _ in range(len(self.body.instructions)):
            instruction = self.body.instructions.get(at.name)
            if instruction is None:
                return None
            if instruction.opcode == "parameter":
                used = added or self._is_used(passed)
                realized: Realized = "reduce-scatter" if added else "all-gather"
                carried = used and hops and at.index == (self.index,)
                return _Carried(tuple(hops), realized) if carried else None
            passed.add(instruction.name)
            if instruction.name in moving and instruction.opcode not in ("fusion", "call"):
                hops.append(instruction.name)
                step: _Step | None = _Step(_moved(instruction, at.index))
            elif instruction.opcode == "fusion":
                step = self._through(instruction, at.index)
            else:
                step = _one_back(self.body, instruction, at.index, self._depends)
            if step is None:
                return None
            at, added = step.source, added or step.added
        return None

    def _is_used(self, passed: set[str]) -> bool:
        """Whether the body does more with the buffer than to hand it on."""
        others = (
            one for name, one in self.body.instructions.items() if name not in passed | {self.body.root}
        )
        return any(
            operand.name in passed or (operand.index and self._begins(one))
            for one in others
            for operand in one.operands
        )

    def _through(self, fusion: Instruction, index: tuple[int, ...]) -> _Step | None:
        """Through a fusion, from one of its results to one of its operands."""
        names = computation_names(fusion, "calls")
        inner = self.module.computations.get(names[0]) if names else None
        if inner is None:
            return None
        given = {str(position) for position, operand in enumerate(fusion.operands) if self._depends(operand)}
        later = _depending(inner, lambda one: one.opcode == "parameter" and one.literal in given)
        at, added = Operand(inner.root, index), False
        for _ in range(len(inner.instructions)):
            instruction = inner.instructions.get(at.name)
            if instruction is None:
                return None
            if instruction.opcode == "parameter":
                operand = _parameter_of(fusion, instruction)
                return _Step(Operand(operand.name, (*operand.index, *at.index)), added) if operand else None
            step = _one_back(inner, instruction, at.index, lambda operand: operand.name in later)
            if step is None:
                return None
            at, added = step.source, added or step.added
        return None


def _parameter_of(fusion: Instruction, parameter: Instruction) -> Operand | None:
    """The operand that a fusion hands to one of its computation's parameters."""
    at = _number(parameter.literal or "")
    return fusion.operands[at] if at is not None and at < len(fusion.operands) else None


def _number(text: str) -> int | None:
    """A position in a tuple or a list of parameters; None for a text that is none."""
    return int(text) if _NUMBER.fullmatch(text) else None


def _depending(computation: Computation, begins: Callable[[Instruction], bool]) -> frozenset[str]:
    """The instructions for which `begins` holds, and all that use them, directly or not."""
    known: set[str] = set()
    for one in computation.instructions.values():
        if begins(one) or any(operand.name in known for operand in one.operands):
            known.add(one.name)
    return frozenset(known)


def _moved(permute: Instruction, index: tuple[int, ...]) -> Operand:
    """The operand of a permute that becomes its result at `index`; several operands make a tuple."""
    position, rest = (index[0], index[1:]) if len(permute.operands) > 1 and index else (0, index)
    operand = permute.operands[min(position, len(permute.operands) - 1)]
    return Operand(operand.name, (*operand.index, *rest))


def _one_back(
    computation: Computation,
    instruction: Instruction,
    index: tuple[int, ...],
    depends: Callable[[Operand], bool],
) -> _Step | None:
    """Where the value at `index` of an instruction comes from, when it is handed on or added to."""
    opcode, operands = instruction.opcode, instruction.operands
    if opcode == "tuple":
        if not index or index[0] >= len(operands):
            return None
        operands, index = operands[index[0] : index[0] + 1], index[1:]
    elif opcode == "get-tuple-element":
        position = _number(instruction.attributes.get("index", ""))
        if position is None:
            return None
        index = (position, *index)
    elif opcode in ("add", "select"):
        operands = tuple(operand for operand in operands if depends(operand))
        if len(operands) != 1 or (opcode == "select" and not _starts_at_constant(computation, instruction)):
            return None
    elif opcode not in _FORWARDING and not opcode.endswith(("-done", "-update")):
        return None
    if not operands:
        return None
    return _Step(Operand(operands[0].name, (*operands[0].index, *index)), opcode == "add")


def _starts_at_constant(computation: Computation, select: Instruction) -> bool:
    """Whether one of the two values that a select chooses from is a constant: the empty buffer of a first
    trip.
    """
    return any(_is_constant(computation, operand.name) for operand in select.operands[1:])


def _is_constant(computation: Computation, name: str) -> bool:
    for _ in range(8):
        source = computation.instructions.get(name)
        if source is None or source.opcode not in _CONSTANT:
            return False
        if not source.operands:
            return True
        name = source.operands[0].name
    return False
