"""How often a while loop runs: what the compiler wrote down, or what its counter says.

XLA:CPU and XLA:GPU print `known_trip_count`, which wins over everything else (after unrolling, the printed
init and step may be stale). TPU text has no counts: the integer part of condition, body and initial state is
interpreted.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardlab.attribute.arithmetic import limits
from shardlab.attribute.effort import OPERATIONS_SPENT, STEPS_SPENT, Effort
from shardlab.attribute.nodes import DEVICE_NUMBERS, LoopKey, Node, Path, Ref, is_odd, operation
from shardlab.attribute.scalars import Slice
from shardlab.hlo.attributes import computation_names, known_trip_count
from shardlab.hlo.module import Instruction

MAX_ITERATIONS = 100_000

_MIRRORED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "EQ": "EQ", "NE": "NE"}


@dataclass(frozen=True, slots=True)
class Trips:
    """A loop runs at least `low` and at most `high` times; None: no upper bound is known, `reason` says
    why.
    """

    low: int
    high: int | None
    reason: str = ""


def trip_count(slice_: Slice, caller: str, loop: Instruction) -> Trips:
    """Trips of the while instruction `loop` of computation `caller`. slice_: of the module that holds it; all
    loops of a module share one, and its effort.
    """
    known = known_trip_count(loop)
    if known is not None and known >= 0:
        return Trips(known, known)
    condition = computation_names(loop, "condition")
    body = computation_names(loop, "body")
    if not condition or not body or not loop.operands:
        return Trips(0, None, "the loop has no condition, body or state")
    return _derive(_Loop(slice_, caller, loop, condition[0], body[0]))


@dataclass(slots=True)
class _Loop:
    """A loop and the arithmetic that was found around it."""

    slice: Slice
    caller: str
    instruction: Instruction
    condition: str
    body: str

    @property
    def key(self) -> LoopKey:
        return self.caller, self.instruction.name

    def test(self) -> int:
        """The node that says whether the loop goes on."""
        frame = self.slice.frame(self.condition, loop=self.key)
        return self.slice.node(Ref(frame, frame.computation.root))

    def after(self, path: Path) -> int:
        """The node of state element `path` after one trip."""
        frame = self.slice.frame(self.body, loop=self.key)
        return self.slice.node(Ref(frame, frame.computation.root, path))

    def before(self, path: Path) -> Node:
        """State element `path` before the first trip."""
        operand = self.instruction.operands[0]
        frame = self.slice.frame(self.caller)
        return self.slice.nodes[self.slice.node(Ref(frame, operand.name, (*operand.index, *path)))]


@dataclass(frozen=True, slots=True)
class _Machine:
    """One test and all that it depends on: a state machine over integers.

    program: the nodes to compute per trip, earlier ones first. first: the state's values. after: state ->
    next node.
    """

    nodes: list[Node]
    test: int
    program: tuple[int, ...]
    first: dict[int, int]
    after: dict[int, int]


def _derive(loop: _Loop) -> Trips:
    """The loop ends when the first of its tests fails; a test that cannot be followed leaves an upper
    bound.
    """
    counts, reasons = [], []
    for test in _tests(loop):
        machine = _machine(loop, test)
        outcome = machine if isinstance(machine, str) else _count(machine, loop.slice.effort)
        if isinstance(outcome, str):
            reasons.append(outcome)
        else:
            counts.append(outcome)
    if not counts:
        return Trips(0, None, reasons[0])
    high = min(counts)
    return Trips(0, high, reasons[0]) if reasons and high else Trips(high, high)


def _tests(loop: _Loop) -> list[int]:
    """The condition, split at its outermost ands."""
    nodes, todo = loop.slice.nodes, [loop.test()]
    found: dict[int, None] = {}
    seen = set(todo)
    while todo:
        index = todo.pop()
        if nodes[index].op == "and":
            todo.extend(arg for arg in dict.fromkeys(nodes[index].args) if arg not in seen)
            seen.update(nodes[index].args)
        else:
            found[index] = None
    return list(found)


def _machine(loop: _Loop, test: int) -> _Machine | str:
    """Everything `test` depends on over the trips, or why that is not known."""
    nodes = loop.slice.nodes
    needed: set[int] = set()
    first: dict[int, int] = {}
    after: dict[int, int] = {}
    todo = [test]
    while todo:
        index = todo.pop()
        if index in needed:
            continue
        if not loop.slice.effort.follow():
            return STEPS_SPENT
        needed.add(index)
        node = nodes[index]
        if is_odd(node):
            return node.note
        if node.op in DEVICE_NUMBERS:
            return f"the count depends on the device's {node.op}"
        todo.extend(node.args)
        if node.op == "state":
            start = loop.before(node.path)
            if start.op != "constant":
                return start.note or "the loop's first value is not a constant"
            first[index] = start.value
            after[index] = loop.after(node.path)
            todo.append(after[index])
    program = tuple(sorted(i for i in needed if nodes[i].op != "state"))
    return _Machine(nodes, test, program, first, after)


def _count(machine: _Machine, effort: Effort) -> int | str:
    exact = _closed_form(machine)
    return exact if exact is not None else _simulate(machine, effort)


def _closed_form(machine: _Machine) -> int | None:
    """Trips of `counter + offset ◇ limit` with `counter += step`; None when the test is anything else, or
    would wrap around.
    """
    nodes, test = machine.nodes, machine.nodes[machine.test]
    if test.op != "compare" or test.note not in _MIRRORED:
        return None
    (left, right), direction = test.args, test.note
    if _linear(machine, left) is None:
        left, right, direction = right, left, _MIRRORED[direction]
    counter, limit = _linear(machine, left), _fixed(machine, right)
    if counter is None or limit is None:
        return None
    state, offset = counter
    after = _linear(machine, machine.after[state])
    if after is None or after[0] != state:
        return None
    start, step = machine.first[state] + offset, after[1]
    count = _arithmetic(start, step, limit, direction)
    if count is None:
        return None
    low, high = limits(nodes[left].dtype)
    ends = (start, start + step * count)
    return count if low <= min(ends) and max(ends) <= high else None


def _fixed(machine: _Machine, index: int) -> int | None:
    """The value of a node that never changes: a constant, or a state that the body hands on."""
    node = machine.nodes[index]
    if node.op == "constant":
        return node.value
    return machine.first[index] if machine.after.get(index) == index else None


def _linear(machine: _Machine, index: int) -> tuple[int, int] | None:
    """A node as (changing state, what is added to it), through additions of what never changes."""
    offset = 0
    while machine.nodes[index].op in ("add", "subtract"):
        node = machine.nodes[index]
        left, right = node.args
        by = _fixed(machine, right)
        if by is None and node.op == "add":
            left, by = right, _fixed(machine, left)
        if by is None:
            return None
        index, offset = left, offset + (by if node.op == "add" else -by)
    if machine.nodes[index].op != "state" or _fixed(machine, index) is not None:
        return None
    return index, offset


def _arithmetic(start: int, step: int, limit: int, direction: str) -> int | None:
    """How many of start, start + step, … pass `value direction limit` before the first that fails; None:
    endless.
    """
    if direction in ("GT", "GE"):
        start, step, limit, direction = -start, -step, -limit, _MIRRORED[direction]
    if direction in ("LT", "LE"):
        distance = limit - start + (direction == "LE")
        if distance <= 0:
            return 0
        return -(-distance // step) if step > 0 else None
    if direction == "EQ":
        return None if start == limit and step == 0 else int(start == limit)
    if start == limit:
        return 0
    return (
        (limit - start) // step
        if step and (limit - start) % step == 0 and (limit - start) // step > 0
        else None
    )


def _simulate(machine: _Machine, effort: Effort) -> int | str:
    """Run the loop's integers; a state that stands still, or too long a run, is not a count."""
    values = {**machine.first}
    for index in machine.program:
        if machine.nodes[index].op == "constant":
            values[index] = machine.nodes[index].value
    running = [(i, operation(machine.nodes[i])) for i in machine.program if machine.nodes[i].op != "constant"]
    for trip in range(MAX_ITERATIONS):
        if not effort.spend(len(running) + len(machine.after)):
            return OPERATIONS_SPENT
        try:
            for index, compute in running:
                values[index] = compute(values)
        except (ZeroDivisionError, ValueError, TypeError) as error:
            return f"the loop's arithmetic fails: {error}"
        if not values[machine.test]:
            return trip
        following = {state: values[after] for state, after in machine.after.items()}
        if all(values[state] == value for state, value in following.items()):
            return "the loop's counter stands still"
        values.update(following)
    return f"the loop does not end within {MAX_ITERATIONS} trips"
