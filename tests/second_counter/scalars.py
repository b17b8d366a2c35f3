"""Evaluates the scalar integers of an HLO module on demand, to find how often a loop runs.

A value is asked for by (instruction, path into its tuple). Nothing but that value's ancestors is looked at,
and whatever is not plain integer arithmetic is None: unknown.
"""

from __future__ import annotations

from collections.abc import Callable

from second_counter.proto import ELEMENT_BITS, Computation, Instruction, Module, scalar, signed, text

Path = tuple[int, ...]
Argument = Callable[[int, Path], int | None]
MAX_TRIPS = 1_000_000

UNSIGNED = {1, 6, 7, 8, 9}
INTEGERS = UNSIGNED | {2, 3, 4, 5}
FORWARDING = {"copy", "bitcast", "reshape", "broadcast", "optimization-barrier", "copy-done", "transpose"}
COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}
# HLO division truncates towards zero; a shift or division without a defined result is unknown.
ARITHMETIC: dict[str, Callable[[int, int], int | None]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "minimum": min,
    "maximum": max,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "divide": lambda a, b: None if b == 0 else (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1),
    "remainder": lambda a, b: None if b == 0 else (abs(a) % abs(b)) * (-1 if a < 0 else 1),
    "shift-left": lambda a, b: a << b if 0 <= b < 64 else None,
    "shift-right-logical": lambda a, b: a >> b if a >= 0 and 0 <= b < 64 else None,
}


class Frame:
    """One computation together with the values of its parameters."""

    def __init__(self, module: Module, computation: Computation, argument: Argument) -> None:
        self.module = module
        self.computation = computation
        self.argument = argument
        self._known: dict[tuple[int, Path], int | None] = {}

    def value(self, instruction_id: int, path: Path = ()) -> int | None:
        """The integer at `path` of an instruction's result, None when it cannot be known."""
        key = (instruction_id, path)
        if key not in self._known:
            self._known[key] = None  # a cycle is impossible in HLO; this only bounds a broken module
            self._known[key] = self._evaluate(self.computation.instructions[instruction_id], path)
        return self._known[key]

    def root(self, path: Path = ()) -> int | None:
        """The integer at `path` of the computation's result."""
        return self.value(self.computation.root_id, path)

    def call(self, computation_id: int, operands: tuple[int, ...]) -> Frame:
        """The frame of a computation called with these operands."""

        def argument(number: int, path: Path) -> int | None:
            return self.value(operands[number], path) if number < len(operands) else None

        return Frame(self.module, self.module.computations[computation_id], argument)

    def _evaluate(self, instruction: Instruction, path: Path) -> int | None:
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "parameter":
            return self.argument(scalar(instruction.raw, 9), path)
        if opcode == "get-tuple-element":
            return self.value(operands[0], (scalar(instruction.raw, 13), *path))
        if opcode == "tuple":
            return self.value(operands[path[0]], path[1:]) if path else None
        if opcode == "copy-start":  # (destination, source, context)
            return self.value(operands[0], path[1:]) if path and path[0] < 2 else None
        if opcode in FORWARDING:
            return self.value(operands[0], path)
        if opcode in ("fusion", "call"):
            return self.call(instruction.called[0], operands).root(path)
        if opcode == "while":
            return self._after_loop(instruction, path)
        return None if path else self._scalar(instruction)

    def _after_loop(self, instruction: Instruction, path: Path) -> int | None:
        body = self.module.computations[instruction.called[0]]
        return self.value(instruction.operands[0], path) if unchanged(self.module, body, path) else None

    def _scalar(self, instruction: Instruction) -> int | None:
        if instruction.opcode == "constant":
            return instruction.integer_literal
        shape = instruction.shape
        if any(extent != 1 for extent in shape.dims) or shape.element_type not in ELEMENT_BITS:
            return None
        values = [self.value(operand) for operand in instruction.operands]
        if instruction.opcode == "select" and len(values) == 3 and values[0] is not None:
            return values[1] if values[0] else values[2]
        known = [value for value in values if value is not None]
        if len(known) != len(values) or not known:
            return None
        return wrap(self._apply(instruction, known), shape.element_type)

    def _apply(self, instruction: Instruction, values: list[int]) -> int | None:
        opcode = instruction.opcode
        if opcode == "compare":
            return int(COMPARISONS[text(instruction.raw, 63)](values[0], values[1]))
        if opcode in ARITHMETIC:
            return ARITHMETIC[opcode](values[0], values[1])
        if opcode == "negate":
            return -values[0]
        if opcode == "not":
            return 1 - values[0] if instruction.shape.element_type == 1 else ~values[0]
        is_integer = self.computation.instructions[instruction.operands[0]].shape.element_type in UNSIGNED | {
            2,
            3,
            4,
            5,
        }
        return values[0] if opcode == "convert" and is_integer else None


def wrap(value: int | None, element_type: int) -> int | None:
    """`value` in the arithmetic of an integer type; None for any other type."""
    if value is None or element_type not in INTEGERS:
        return None
    bits = ELEMENT_BITS[element_type]
    if element_type == 1:
        return value & 1
    return value & ((1 << bits) - 1) if element_type in UNSIGNED else signed(value, bits)


def unchanged(module: Module, body: Computation, path: Path) -> bool:
    """Whether a loop body hands the element at `path` of its state on as it got it."""
    instruction, remaining = body.root, path
    while True:
        if instruction.opcode == "parameter":
            return remaining == path
        if instruction.opcode == "tuple" and remaining:
            following, remaining = instruction.operands[remaining[0]], remaining[1:]
        elif instruction.opcode == "get-tuple-element":
            remaining = (scalar(instruction.raw, 13), *remaining)
            following = instruction.operands[0]
        elif instruction.opcode in FORWARDING - {"broadcast", "reshape", "transpose"}:
            following = instruction.operands[0]
        elif instruction.opcode == "copy-start" and remaining and remaining[0] == 0:
            following, remaining = instruction.operands[0], remaining[1:]
        else:
            return False
        instruction = body.instructions[following]


class Loop:
    """A `while`: its state at the start of each iteration, its trip count."""

    def __init__(self, frame: Frame, instruction: Instruction) -> None:
        self.module = frame.module
        body, condition = instruction.called  # in this order
        self.body = frame.module.computations[body]
        self.condition = frame.module.computations[condition]
        self._initial: Argument = lambda _, path: frame.value(instruction.operands[0], path)
        self._frames: dict[int, Frame] = {}
        known = instruction.backend_config.get("known_trip_count")
        self.printed_trips = int(known["n"]) if known else None

    def state(self, iteration: int, path: Path) -> int | None:
        """The element at `path` of the loop state when `iteration` (from 0) starts."""
        if iteration == 0 or unchanged(self.module, self.body, path):
            return self._initial(0, path)
        return self.iteration(iteration - 1).root(path)

    def iteration(self, index: int) -> Frame:
        """The body in one iteration."""
        if index not in self._frames:
            self._frames.pop(index - 2, None)
            self._frames[index] = Frame(self.module, self.body, self._state_at(index))
        return self._frames[index]

    def any_iteration(self) -> Frame:
        """The body knowing only what every iteration has in common."""

        def argument(_: int, path: Path) -> int | None:
            return self._initial(0, path) if unchanged(self.module, self.body, path) else None

        return Frame(self.module, self.body, argument)

    def derived_trips(self) -> int | None:
        """The trip count by running the loop's integers, None when they are not known."""
        for trips in range(MAX_TRIPS):
            test = Frame(self.module, self.condition, self._state_at(trips)).root()
            if test is None:
                return None
            if not test:
                return trips
        return None

    def _state_at(self, iteration: int) -> Argument:
        return lambda _, path: self.state(iteration, path)
