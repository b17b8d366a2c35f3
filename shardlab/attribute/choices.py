"""Which branch of a conditional each device takes at each tick of the loop around it.

A pipeline's schedule is a constant table: `switch(table[tick, stage], …)` inside a scan. The index is
followed (`scalars.Slice`) to constants, the loop's counter and the device's number. Where nothing else
decides it, it is run for every tick and every kind of device; anything else stays unknown, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from shardlab.attribute.edges import CallSite
from shardlab.attribute.effort import OPERATIONS_SPENT, STEPS_SPENT
from shardlab.attribute.nodes import (
    DEVICE_NUMBERS,
    Frame,
    LoopKey,
    Node,
    Ref,
    is_odd,
    operand_ref,
    operand_shape,
    operation,
)
from shardlab.attribute.scalars import Slice
from shardlab.attribute.trips import Trips
from shardlab.hlo.attributes import computation_names
from shardlab.hlo.module import Instruction

OUTER_COUNTER = "the branch index depends on the counter of an outer loop"

_FAILURES = (ZeroDivisionError, ValueError, TypeError)

Values = dict[int, int]
Compute = Callable[[Mapping[int, int]], int]


@dataclass(frozen=True, slots=True)
class Choice:
    """What is chosen at each tick of the loop around it, for each kind of device.

    ticks: how many there are; None when all choose alike, and tick 0 stands for all. kinds: the kind of each
    device by flattened id; empty where all are of kind 0. taken: kind -> branch -> the ticks at which it
    runs, as the bits of an integer.
    """

    ticks: int | None
    kinds: tuple[int, ...]
    taken: tuple[Mapping[int, int], ...]


@dataclass(slots=True)
class _Program:
    """What an index depends on: arguments first in `order`; `args` lead through unchanged loop state.

    first, after: of each changing element of the loop's state, the nodes of its first and its next value.
    fixed: nodes that do not change over the ticks.
    """

    order: list[int] = field(default_factory=list)
    args: dict[int, tuple[int, ...]] = field(default_factory=dict)
    first: Values = field(default_factory=dict)
    after: Values = field(default_factory=dict)
    fixed: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Choices:
    """Reads the choices of one module's conditionals.

    contexts: computations that one caller runs, with what their parameters stand for there.
    """

    scalars: Slice
    loops: Mapping[LoopKey, Trips]
    contexts: dict[str, Frame] = field(default_factory=dict)
    _same: Values = field(default_factory=dict)
    _kinds: dict[tuple[int, ...], tuple[tuple[int, ...], tuple[Values, ...]] | str] = field(
        default_factory=dict
    )

    def enter(self, site: CallSite) -> None:
        """Give `site.callee`, which nothing else calls, its context."""
        caller = self.context(site.caller)
        instruction = site.instruction
        if site.role in ("body", "condition"):
            key = (site.caller, instruction.name)
            frame = self.scalars.frame(site.callee, caller=caller, loop=key)
        else:
            skip = site.position + 1 if site.role == "branch" else 0
            operands = instruction.operands[skip:]
            frame = self.scalars.frame(site.callee, caller=caller, site=instruction.name, operands=operands)
        self.contexts[site.callee] = frame

    def context(self, computation: str) -> Frame:
        """The context of a computation; without one caller, what its callers agree on."""
        return self.contexts.get(computation) or self.scalars.frame(computation)

    def read(
        self, caller: str, conditional: Instruction, branches: int, loop: LoopKey | None
    ) -> Choice | str:
        """What a conditional of computation `caller` chooses, or why it is unknown.

        loop: whose trips run `caller`, None outside loops.
        """
        if not conditional.operands:
            return "the conditional has no operands"
        frame = self.context(caller)
        index = self._unchanged(self.scalars.node(operand_ref(frame, conditional.operands[0])))
        program = self._follow([index])
        if isinstance(program, str):
            return program
        ticks = self._ticks(program, loop)
        if isinstance(ticks, str):
            return ticks
        found = self._kinds_of(program, index)
        if isinstance(found, str):
            return found
        kinds, starts = found
        is_predicate = operand_shape(frame, conditional, 0).dtype == "pred"
        rule = _Rule(index, branches, is_predicate)
        changing = [i for i in program.order if i not in program.fixed and i not in program.first]
        length = 1 if ticks is None else ticks
        if not self.scalars.effort.spend(len(starts) * length * (len(changing) + len(program.after) + 1)):
            return OPERATIONS_SPENT
        steps = [(i, self._compute(program, i)) for i in changing]
        try:
            taken = tuple(_run(program, steps, rule, length, start) for start in starts)
        except _FAILURES as error:
            return f"the branch index cannot be computed: {error}"
        return Choice(ticks, kinds, taken)

    def _ticks(self, program: _Program, loop: LoopKey | None) -> int | str | None:
        """How many ticks there are, None when the index does not depend on the loop's counter."""
        if not program.after:
            return None
        nodes = self.scalars.nodes
        if {nodes[state].loop for state in program.after} != {loop}:
            return OUTER_COUNTER
        if not program.fixed.issuperset(program.first.values()):
            return "the loop's first value depends on another loop's counter"
        trips = self.loops.get(loop, Trips(0, None)) if loop else Trips(0, None)
        return trips.low if trips.low == trips.high else f"the trip count is unknown: {trips.reason}"

    def _unchanged(self, index: int) -> int:
        """A node, or what it is equal to outside the loops that hand it on unchanged."""
        start, nodes = index, self.scalars.nodes
        if start in self._same:
            return self._same[start]
        while nodes[index].op == "state":
            first, after = self._around(nodes[index])
            if after != index:
                break
            index = first
        self._same[start] = index
        return index

    def _around(self, state: Node) -> tuple[int, int]:
        """The nodes of a state's value before the first trip and after one."""
        assert state.loop is not None
        outer = self.context(state.loop[0])
        loop = outer.computation.instructions[state.loop[1]]
        names = computation_names(loop, "body")
        if not names or not loop.operands:
            return (self.scalars.nodes.unknown("the loop has no body or state"),) * 2
        body = self.scalars.frame(names[0], caller=outer, loop=state.loop)
        before = self.scalars.node(operand_ref(outer, loop.operands[0], state.path))
        return before, self.scalars.node(Ref(body, body.computation.root, state.path))

    def _follow(self, todo: list[int]) -> _Program | str:
        """Everything that the nodes depend on, over all trips; or why that is not known."""
        nodes, program = self.scalars.nodes, _Program()
        opened: set[int] = set()
        while todo:
            index = todo[-1]
            if index in program.args:
                todo.pop()
                continue
            node = nodes[index]
            if is_odd(node):
                return node.note
            args = tuple(self._unchanged(arg) for arg in node.args)
            if index not in opened:
                if not self.scalars.effort.follow():
                    return STEPS_SPENT
                opened.add(index)
                todo += [arg for arg in args if arg not in program.args]
                continue
            todo.pop()
            program.args[index] = args
            program.order.append(index)
            if node.op == "state":
                first, after = (self._unchanged(end) for end in self._around(node))
                program.first[index], program.after[index] = first, after
                todo[:0] = [first, after]
            elif program.fixed.issuperset(args):
                program.fixed.add(index)
        return program

    def _compute(self, program: _Program, index: int) -> Compute:
        return operation(replace(self.scalars.nodes[index], args=program.args[index]))

    def _kinds_of(self, program: _Program, index: int) -> tuple[tuple[int, ...], tuple[Values, ...]] | str:
        """Devices told apart by the fixed values that the index needs: the kind of each, and of each kind
        the values.
        """
        fixed = [i for i in program.order if i in program.fixed]
        used = {arg for i in program.order if i not in program.fixed for arg in program.args[i]}
        needed = tuple(i for i in fixed if i in used | {index} | set(program.first.values()))
        needed += tuple(i for i in program.after.values() if i in program.fixed and i not in needed)
        if needed not in self._kinds:
            self._kinds[needed] = self._told_apart(program, fixed, needed)
        return self._kinds[needed]

    def _told_apart(
        self, program: _Program, fixed: Sequence[int], needed: tuple[int, ...]
    ) -> tuple[tuple[int, ...], tuple[Values, ...]] | str:
        nodes, module = self.scalars.nodes, self.scalars.module
        differs = any(nodes[i].op in DEVICE_NUMBERS for i in fixed)
        if differs and module.num_partitions is None:
            return "the branch index depends on the device, and the text does not say how many there are"
        partitions = (module.num_partitions or 1) if differs else 1
        devices = partitions * (module.replica_count or 1) if differs else 1
        if not self.scalars.effort.spend(devices * len(fixed)):
            return OPERATIONS_SPENT
        steps = [
            (i, self._compute(program, i)) for i in fixed if nodes[i].op not in (*DEVICE_NUMBERS, "constant")
        ]
        values: Values = {i: nodes[i].value for i in fixed if nodes[i].op == "constant"}
        numbers = [(i, nodes[i].op == "partition-id") for i in fixed if nodes[i].op in DEVICE_NUMBERS]
        found: dict[tuple[int, ...], int] = {}
        kinds = []
        try:
            for device in range(devices):
                for i, is_partition in numbers:
                    values[i] = device % partitions if is_partition else device // partitions
                for i, compute in steps:
                    values[i] = compute(values)
                kinds.append(found.setdefault(tuple(values[i] for i in needed), len(found)))
        except _FAILURES as error:
            return f"the branch index cannot be computed: {error}"
        starts = tuple(dict(zip(needed, seen, strict=True)) for seen in found)
        return (tuple(kinds) if len(found) > 1 else ()), starts


@dataclass(frozen=True, slots=True)
class _Rule:
    """How the number `index` chooses: a predicate takes branch 0 when true; a number outside the branches
    the last one (XLA, "Operation Semantics").
    """

    index: int
    branches: int
    is_predicate: bool

    def branch(self, number: int) -> int:
        """The branch that a number takes."""
        if self.is_predicate:
            return 0 if number else 1
        return number if 0 <= number < self.branches else self.branches - 1


def _run(
    program: _Program, steps: Iterable[tuple[int, Compute]], rule: _Rule, ticks: int, start: Values
) -> Mapping[int, int]:
    """Branch -> the ticks at which one kind of device takes it."""
    steps = list(steps)
    values = {**start, **{state: start[first] for state, first in program.first.items()}}
    taken: dict[int, bytearray] = {}
    for tick in range(ticks):
        for index, compute in steps:
            values[index] = compute(values)
        bits = taken.setdefault(rule.branch(values[rule.index]), bytearray(ticks // 8 + 1))
        bits[tick >> 3] |= 1 << (tick & 7)
        values.update({state: values[after] for state, after in program.after.items()})
    return {branch: int.from_bytes(bits, "little") for branch, bits in taken.items()}
