"""Where a value comes from and what uses it, through copies, tuples, fusions, calls, async starts and loops.

Only instructions that hand elements on unchanged are passed through. Whatever cannot be followed (a branch, a
kernel, the result of the program) is a use of its own, so that a rule that asks for "only" these uses says
nothing. An element of a loop's state goes to the body, the condition and the result, whatever the trip: its
uses may be more than the value has, never fewer. What a program can make as deep as it likes is followed
without recursion.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from shardlab.attribute.edges import CallSites
from shardlab.hlo.attributes import computation_names
from shardlab.hlo.module import Computation, Instruction, Module, Shape

MAX_STEPS = 1_000
MAX_NESTED = 8
MAX_CALLERS = 64
MISSING = 10**9

# One operand's elements, in another order, form or memory.
_MOVING = frozenset({"bitcast", "copy", "reshape", "transpose", "copy-done", "copy-start", "opt-barrier"})
# What runs a computation once on its operands, and the attribute that names it.
_RUNS = {"fusion": "calls", "call": "to_apply", "async-start": "calls"}


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """A computation, and the instruction of `parent` that runs it; none for ENTRY and for loop bodies."""

    computation: Computation
    site: Instruction | None = None
    parent: Place | None = None


class Value(NamedTuple):
    """Element `path` of the result of instruction `name`; of a start: of what its done will give."""

    place: Place
    name: str
    path: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Use:
    """`instruction` takes a value as operand number `position`; position -1: the value leaves the
    computation.
    """

    place: Place
    instruction: Instruction
    position: int
    shape: Shape | None


@dataclass(slots=True)
class Flow:
    """Follows values of one module; remembers users and places."""

    module: Module
    sites: CallSites
    _users: dict[str, dict[str, list[tuple[Instruction, int]]]] = field(default_factory=dict)
    _places: dict[tuple[str, int, str], Place] = field(default_factory=dict)
    _nested: int = 0

    def home(self, name: str) -> Place:
        """The place of a computation: in its caller where one fusion, call or async start alone runs it."""
        chain: list[tuple[str, Instruction]] = []
        callers = self.sites.by_callee.get(name, ())
        while len(callers) == 1 and callers[0].role in ("call", "async") and len(chain) < MAX_CALLERS:
            chain.append((name, callers[0].instruction))
            name = callers[0].caller
            callers = self.sites.by_callee.get(name, ())
        place = self._place(name, None, None)
        for inner, site in reversed(chain):
            place = self._place(inner, site, place)
        return place

    def _place(self, name: str, site: Instruction | None, parent: Place | None) -> Place:
        key = (name, id(parent), site.name if site else "")
        if key not in self._places:
            self._places[key] = Place(self.module.computations[name], site, parent)
        return self._places[key]

    def instruction(self, value: Value) -> Instruction | None:
        """The instruction that gives a value."""
        return value.place.computation.instructions.get(value.name)

    def shape(self, value: Value) -> Shape | None:
        """The shape of a value of an instruction that is no start; None when it has no such element."""
        instruction = self.instruction(value)
        shape = instruction.shape if instruction else None
        for position in value.path:
            if shape is None or position >= len(shape.leaves):
                return None
            shape = shape.leaves[position]
        return shape

    def operand(self, value: Value, position: int, index: tuple[int, ...] = ()) -> Value | None:
        """The value that an instruction takes as operand number `position`."""
        instruction = self.instruction(value)
        if instruction is None or position >= len(instruction.operands):
            return None
        operand = instruction.operands[position]
        return Value(value.place, operand.name, (*operand.index, *index))

    def origin(self, value: Value) -> Value:
        """Where a value's elements were made: back through data movement, tuples, fusions and calls."""
        for _ in range(MAX_STEPS):
            before = self._before(value)
            if before is None:
                break
            value = before
        return value

    def _before(self, value: Value) -> Value | None:
        """One step back; None where the value was made."""
        instruction = self.instruction(value)
        if instruction is None:
            return None
        opcode, index = instruction.opcode, value.path
        if opcode == "parameter":
            place = value.place
            if place.site is None or place.parent is None:
                return None
            outer = Value(place.parent, place.site.name)
            return self.operand(outer, _integer(instruction.literal), index)
        if opcode == "get-tuple-element":
            return self.operand(value, 0, (_integer(instruction.attributes.get("index")), *index))
        if opcode == "tuple":
            return self.operand(value, index[0], index[1:]) if index else None
        if opcode in _MOVING:
            return self.operand(value, 0, () if opcode == "copy-start" else index)
        if opcode == "while":
            return self._before_loop(value) if index else None
        body = self._body(value.place, instruction)
        return Value(body, body.computation.root, index) if body else None

    def _before_loop(self, value: Value) -> Value | None:
        """What a loop was given, where it gives that back; None where its body changes it."""
        (name,) = computation_names(value.place.computation.instructions[value.name], "body") or ("",)
        if name not in self.module.computations or self._nested >= MAX_NESTED:
            return None
        body = self.home(name)
        self._nested += 1
        made = self.origin(Value(body, body.computation.root, value.path))
        self._nested -= 1
        given = self.instruction(made)
        kept = given is not None and given.opcode == "parameter" and made.place is body
        return self.operand(value, 0, value.path) if kept and made.path == value.path else None

    def _body(self, place: Place, instruction: Instruction) -> Place | None:
        """The computation that a fusion, a call or an async start runs on its operands, once; or None."""
        attribute = _RUNS.get(instruction.opcode)
        names = computation_names(instruction, attribute) if attribute else ()
        known = len(names) == 1 and names[0] in self.module.computations
        return self._place(names[0], instruction, place) if known else None

    def uses(self, value: Value) -> Iterator[Use]:
        """Everything that takes the value's elements, found by following what only moves them."""
        queue: list[Value] = [value]
        seen: set[object] = {value}
        for current in queue:
            if len(seen) > MAX_STEPS:
                yield Use(current.place, current.place.computation.instructions[current.name], -1, None)
                return
            for found in self._following(current):
                key = (
                    found
                    if isinstance(found, Value)
                    else (found.place, found.instruction.name, found.position)
                )
                if key in seen:
                    continue
                seen.add(key)
                if isinstance(found, Use):
                    yield found
                else:
                    queue.append(found)

    def _following(self, value: Value) -> Iterator[Use | Value]:
        instruction = self.instruction(value)
        if instruction is None:
            return
        if value.name == value.place.computation.root:
            yield from self._returned(value, instruction)
        for user, position in self._using(value.place.computation).get(value.name, ()):
            if user.opcode == "while" and value.path:
                yield from self._carried(value.place, user, value.path)
                continue
            found = self._through(value, user, position)
            if found is not None:
                yield found

    def _returned(self, value: Value, instruction: Instruction) -> Iterator[Use | Value]:
        place = value.place
        if place.site is not None and place.parent is not None:
            yield Value(place.parent, place.site.name, value.path)
            return
        callers = self.sites.by_callee.get(place.computation.name, ())
        if value.path and len(callers) == 1 and callers[0].role == "body":
            yield from self._carried(self.home(callers[0].caller), callers[0].instruction, value.path)
        else:
            yield Use(place, instruction, -1, None)

    def _carried(self, place: Place, loop: Instruction, path: tuple[int, ...]) -> Iterator[Use | Value]:
        """An element of a loop's state: what the loop gives back, and what a trip begins with."""
        yield Value(place, loop.name, path)
        for role in ("body", "condition"):
            names = computation_names(loop, role)
            state = self.home(names[0]) if len(names) == 1 else None
            parameter = _parameter(state.computation, 0) if state else None
            # A loop that someone else runs too, or one without state, cannot be followed.
            yield Value(state, parameter, path) if state and parameter else Use(place, loop, 0, None)

    def _through(self, value: Value, user: Instruction, position: int) -> Use | Value | None:
        """What a user makes of the value: the same elements elsewhere, another element (None), or a use."""
        opcode, index = user.opcode, value.path
        path = user.operands[position].index
        if index[: len(path)] != path:
            return None if index else Use(value.place, user, position, None)
        index = index[len(path) :]
        if opcode == "get-tuple-element" and index:
            wanted = _integer(user.attributes.get("index"))
            return Value(value.place, user.name, index[1:]) if index[0] == wanted else None
        if opcode == "tuple":
            return Value(value.place, user.name, (position, *index))
        ends = opcode.endswith(("-done", "-update")) and opcode not in ("send-done", "recv-done")
        if (ends or opcode in _MOVING) and position == 0:
            return Value(value.place, user.name, index)
        body = self._body(value.place, user)
        parameter = _parameter(body.computation, position) if body else None
        if body and parameter:
            return Value(body, parameter, index)
        return Use(value.place, user, position, self.shape(value) if not index else None)

    def _using(self, computation: Computation) -> dict[str, list[tuple[Instruction, int]]]:
        if computation.name not in self._users:
            users: dict[str, list[tuple[Instruction, int]]] = {}
            for instruction in computation.instructions.values():
                for position, operand in enumerate(instruction.operands):
                    users.setdefault(operand.name, []).append((instruction, position))
            self._users[computation.name] = users
        return self._users[computation.name]


def _integer(text: str | None) -> int:
    """A parameter's number or an element's; what is none is beyond every operand."""
    digits = (text or "").strip()
    return int(digits) if digits.isdecimal() and len(digits) < 10 else MISSING


def _parameter(computation: Computation, number: int) -> str | None:
    """The name of parameter `number`."""
    for instruction in computation.instructions.values():
        if instruction.opcode == "parameter" and (instruction.literal or "").strip() == str(number):
            return instruction.name
    return None
