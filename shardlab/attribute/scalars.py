"""The integer arithmetic of an HLO program, followed symbolically through tuples, fusions and calls.

A loop's counter is reached through get-tuple-elements, copies between memories, fusions and calls. `Slice`
follows it and leaves a flat list of `Node`: constants, elements of a loop's state, arithmetic on them, or
`unknown` with the reason. No recursion: programs nest as deep as they like. What grows beyond `MAX_NODES`
becomes unknown.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field

from shardlab.attribute.edges import CallSite, CallSites, sites_of
from shardlab.hlo.attributes import first_operand, instruction_error, parameter_number, tuple_index
from shardlab.hlo.module import Computation, Instruction, Module, Operand, Shape

MAX_NODES = 50_000

Path = tuple[int, ...]
LoopKey = tuple[str, str]  # computation and name of a while

_BITS = {"pred": 1} | {f"{sign}{bits}": bits for sign in "su" for bits in (1, 2, 4, 8, 16, 32, 64)}
_TUPLE_ALIASES = frozenset({"opt-barrier", "copy"})
_SAME_VALUE = frozenset({"copy", "bitcast", "reshape", "broadcast", "transpose", "opt-barrier", "convert"})
_INLINED = frozenset({"fusion", "call"})


@dataclass(frozen=True, slots=True)
class Node:
    """One scalar. op: `constant`, `state`, `unknown`, or the HLO opcode applied to `args` (earlier nodes).

    value: of a constant. loop, path: of a state, which element of which loop's tuple. note: a comparison's
    direction, or why a node is unknown.
    """

    op: str
    dtype: str
    args: tuple[int, ...] = ()
    value: int = 0
    loop: LoopKey | None = None
    path: Path = ()
    note: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """A computation in a context: what its parameters stand for.

    loop: parameters are this loop's state. site with caller: parameters are the operands of that call.
    Neither: parameters are looked up at the computation's own call sites.
    """

    computation: Computation
    caller: Frame | None = None
    operands: tuple[Operand, ...] = ()
    loop: LoopKey | None = None


@dataclass(frozen=True, slots=True)
class Ref:
    """Element `path` of the value of instruction `name`, seen in `frame`."""

    frame: Frame
    name: str
    path: Path = ()


Key = tuple[int, str, Path]
Steps = Generator[Ref, int, int]


@dataclass(slots=True)
class Slice:
    """Nodes found so far, and the ones already known by place."""

    module: Module
    sites: CallSites
    nodes: list[Node] = field(default_factory=list)
    _known: dict[Key, int] = field(default_factory=dict)
    _states: dict[tuple[LoopKey, Path], int] = field(default_factory=dict)
    _frames: dict[tuple[object, ...], Frame] = field(default_factory=dict)

    def frame(
        self,
        computation: str,
        *,
        caller: Frame | None = None,
        site: str = "",
        operands: tuple[Operand, ...] = (),
        loop: LoopKey | None = None,
    ) -> Frame:
        """The frame of `computation`, one object per context."""
        key = (computation, id(caller), site, loop)
        if key not in self._frames:
            self._frames[key] = Frame(self.module.computations[computation], caller, operands, loop)
        return self._frames[key]

    def node(self, ref: Ref) -> int:
        """Index of the node of `ref`. Raises ParseError on instructions that use each other in a circle."""
        result = self._known.get(_key(ref))
        if result is not None:
            return result
        stack: list[tuple[Key, Steps]] = [(_key(ref), self._steps(ref))]
        open_ = {stack[0][0]}
        answer: int | None = None
        while stack:
            key, steps = stack[-1]
            try:
                wanted = steps.send(answer) if answer is not None else next(steps)
            except StopIteration as stop:
                stack.pop()
                open_.discard(key)
                answer = self._known[key] = stop.value
                continue
            wanted_key = _key(wanted)
            answer = self._known.get(wanted_key)
            if answer is None:
                if wanted_key in open_:
                    circle = wanted.frame.computation.instructions[wanted.name]
                    raise instruction_error(circle, "instructions use each other in a circle")
                open_.add(wanted_key)
                stack.append((wanted_key, self._steps(wanted)))
        assert answer is not None
        return answer

    def _add(self, node: Node) -> int:
        self.nodes.append(node)
        return len(self.nodes) - 1

    def _unknown(self, why: str) -> int:
        return self._add(Node("unknown", "", note=why))

    def _steps(self, ref: Ref) -> Steps:
        """What one instruction's element needs, and the node it makes."""
        instruction = ref.frame.computation.instructions.get(ref.name)
        if instruction is None:
            return self._unknown(f"%{ref.name} is not defined")
        if len(self.nodes) > MAX_NODES:
            return self._unknown("the arithmetic is too large to follow")
        opcode = instruction.opcode
        if opcode == "parameter":
            return (yield from self._parameter(ref, instruction))
        if opcode in ("get-tuple-element", "tuple") or (opcode in _TUPLE_ALIASES and ref.path):
            return (yield from self._element(ref, instruction))
        if opcode == "while":
            return (yield from self._invariant(ref, instruction))
        if opcode in _INLINED or opcode.endswith(("-done", "-start")):
            return (yield from self._through(ref, instruction))
        if ref.path:
            return self._unknown(f"element of {opcode} %{ref.name}")
        return (yield from self._scalar(ref, instruction))

    def _parameter(self, ref: Ref, instruction: Instruction) -> Steps:
        frame = ref.frame
        if frame.loop is not None:
            return self._state(frame.loop, ref.path, instruction.shape)
        number = parameter_number(instruction)
        if frame.caller is not None:
            if number >= len(frame.operands):
                return self._unknown(f"parameter {number} of {frame.computation.name} is bound later")
            return (yield _operand(frame.caller, frame.operands[number], ref.path))
        sites = self.sites.by_callee.get(frame.computation.name, ())
        if not sites:
            return self._unknown(f"%{instruction.name} is an input of the program")
        found = []
        for site in sites:
            found.append((yield from self._argument(site, number, ref.path)))
        first = self.nodes[found[0]]
        if any(self.nodes[other] != first for other in found[1:]):
            return self._unknown(
                f"parameter {number} of {frame.computation.name} differs between its callers"
            )
        return found[0]

    def _argument(self, site: CallSite, number: int, path: Path) -> Steps:
        """What the call `site` passes as parameter `number`."""
        outer = self.frame(site.caller)
        loop = site.instruction
        if site.role in ("body", "condition"):
            return (yield from self._invariant(Ref(outer, loop.name, path), loop))
        position = site.position + 1 if site.role == "branch" else number
        if position >= len(loop.operands):
            return self._unknown(f"parameter {number} of {site.callee} is bound later")
        return (yield _operand(outer, loop.operands[position], path))

    def _invariant(self, ref: Ref, loop: Instruction) -> Steps:
        """An element of a loop's state that the body hands on unchanged: its first value."""
        key = (ref.frame.computation.name, loop.name)
        body = self.sites.by_caller.get(key[0], ())
        names = [site.callee for site in body if site.instruction is loop and site.role == "body"]
        if not names:
            return self._unknown(f"the body of %{loop.name} is not known")
        frame = self.frame(names[0], loop=key)
        after = self.nodes[(yield Ref(frame, frame.computation.root, ref.path))]
        if after.op != "state" or (after.loop, after.path) != (key, ref.path):
            return self._unknown(f"a value that loop %{loop.name} changes")
        return (yield _operand(ref.frame, first_operand(loop), ref.path))

    def _element(self, ref: Ref, instruction: Instruction) -> Steps:
        """Through tuples: towards the one element that is wanted."""
        if instruction.opcode == "get-tuple-element":
            index = tuple_index(instruction)
            return (yield _operand(ref.frame, first_operand(instruction), (index, *ref.path)))
        if instruction.opcode == "tuple":
            if not ref.path or ref.path[0] >= len(instruction.operands):
                return self._unknown(f"%{ref.name} is a tuple")
            return (yield _operand(ref.frame, instruction.operands[ref.path[0]], ref.path[1:]))
        return (yield _operand(ref.frame, first_operand(instruction), ref.path))

    def _through(self, ref: Ref, instruction: Instruction) -> Steps:
        """Into a fusion, a call, or an async pair of one; across an on-chip copy."""
        start = _start_of(ref.frame.computation, instruction)
        if start.opcode == "copy-start" and instruction.opcode == "copy-done":
            return (yield _operand(ref.frame, first_operand(start), ref.path))
        callees = [
            site.callee
            for site in sites_of(ref.frame.computation.name, start)
            if site.role in ("call", "async")
        ]
        if len(callees) != 1 or instruction.opcode.endswith("-start"):
            return self._unknown(f"{instruction.opcode} %{ref.name}")
        inner = self.frame(callees[0], caller=ref.frame, site=start.name, operands=start.operands)
        return (yield Ref(inner, inner.computation.root, ref.path))

    def _state(self, loop: LoopKey, path: Path, parameter: Shape) -> int:
        shape = parameter
        for index in path:
            if index >= len(shape.leaves):
                return self._unknown("no such element in the loop's state")
            shape = shape.leaves[index]
        key = (loop, path)
        if key not in self._states:
            # Not a scalar integer: still a state, so that invariance can be seen; arithmetic on it is
            # refused.
            self._states[key] = self._add(
                Node("state", shape.dtype, loop=loop, path=path, note=_oddity(shape))
            )
        return self._states[key]

    def _scalar(self, ref: Ref, instruction: Instruction) -> Steps:
        opcode, dtype = instruction.opcode, instruction.shape.dtype
        if opcode == "constant":
            return self._constant(instruction)
        if opcode in _SAME_VALUE and dtype == self._operand_dtype(ref.frame, instruction):
            return (yield _operand(ref.frame, first_operand(instruction)))
        known = opcode in OPERATIONS or opcode in ("convert", "compare")
        if not known or dtype not in _BITS:
            return self._unknown(f"{opcode} %{ref.name} ({dtype})")
        args = []
        for operand in instruction.operands:
            args.append((yield _operand(ref.frame, operand)))
        return self._apply(opcode, dtype, tuple(args), instruction.attributes.get("direction", ""))

    def _operand_dtype(self, frame: Frame, instruction: Instruction) -> str:
        operand = first_operand(instruction)
        source = frame.computation.instructions.get(operand.name)
        shape = source.shape if source else instruction.shape
        for index in operand.index:
            shape = shape.leaves[index] if index < len(shape.leaves) else Shape("")
        return shape.dtype

    def _constant(self, instruction: Instruction) -> int:
        value = _integer(instruction.literal or "")
        dtype = instruction.shape.dtype
        if value is None or dtype not in _BITS:
            return self._unknown(f"constant %{instruction.name} is not one integer")
        return self._add(Node("constant", dtype, value=wrap(value, dtype)))

    def _apply(self, opcode: str, dtype: str, args: tuple[int, ...], direction: str) -> int:
        nodes = [self.nodes[arg] for arg in args]
        if len(args) != _OPERANDS.get(opcode, 2):
            return self._unknown(f"{opcode} of {len(args)} operands")
        odd = next((n.note for n in nodes if n.op == "unknown" or (n.op == "state" and n.note)), None)
        if odd is not None and opcode != "and":
            return self._unknown(odd)
        if all(node.op == "constant" for node in nodes):
            try:
                node = Node(opcode, dtype, tuple(range(len(nodes))), note=direction)
                value = operation(node)({index: node.value for index, node in enumerate(nodes)})
            except (ZeroDivisionError, ValueError, TypeError) as error:
                return self._unknown(f"{opcode}: {error}")
            return self._add(Node("constant", dtype, value=value))
        return self._add(Node(opcode, dtype, args, note=direction))


def operation(node: Node) -> Callable[[Mapping[int, int]], int]:
    """What computes `node` from the values of its arguments, wrapped to its type.

    Calling it raises ZeroDivisionError, ValueError or TypeError where the arithmetic is not defined.
    """
    if node.op == "compare":
        compute: Callable[..., int | bool] = COMPARISONS.get(node.note, _undefined)
    elif node.op in _SAME_VALUE:
        compute = int
    else:
        compute = OPERATIONS[node.op]
    dtype = node.dtype
    if len(node.args) == 2:
        left, right = node.args
        return lambda values: wrap(compute(values[left], values[right]), dtype)
    return lambda values: wrap(compute(*(values[arg] for arg in node.args)), dtype)


def wrap(value: int, dtype: str) -> int:
    """`value` as two's complement (or unsigned, or a truth value) of `dtype` holds it."""
    bits = _BITS[dtype]
    value &= (1 << bits) - 1
    return value - (1 << bits) if dtype[0] == "s" and value >> (bits - 1) else value


def limits(dtype: str) -> tuple[int, int]:
    """The least and the greatest value of an integer `dtype`."""
    bits = _BITS[dtype]
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if dtype[0] == "s" else (0, (1 << bits) - 1)


def _key(ref: Ref) -> Key:
    return id(ref.frame), ref.name, ref.path


def _operand(frame: Frame, operand: Operand, path: Path = ()) -> Ref:
    return Ref(frame, operand.name, (*operand.index, *path))


def _start_of(computation: Computation, instruction: Instruction) -> Instruction:
    """The -start of a chain of -update and -done; the instruction itself otherwise."""
    seen = 0
    while instruction.opcode.endswith(("-done", "-update")) and instruction.operands and seen < 8:
        instruction = computation.instructions.get(instruction.operands[0].name, instruction)
        seen += 1
    return instruction


def _oddity(shape: Shape) -> str:
    """Why a state element cannot be computed with, or nothing."""
    if shape.dtype not in _BITS:
        return f"the loop's counter is {shape.dtype}"
    size = 1
    for extent in shape.dims:
        size *= extent if extent is not None else 2
    return "" if size == 1 else "the loop's state is an array"


def _integer(literal: str) -> int | None:
    text = literal.strip(" {}\n\t")
    if text in ("true", "false"):
        return int(text == "true")
    try:
        return int(text)
    except ValueError:
        return None


def _undefined(*_: int) -> int:
    raise ValueError("a comparison without a known direction")


def _shift(value: int, by: int) -> int:
    if not 0 <= by < 64:
        raise ValueError("shift out of range")
    return value << by


def _quotient(a: int, b: int) -> int:
    """Division that rounds towards zero, as HLO's does."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


_OPERANDS = {"convert": 1, "not": 1, "negate": 1, "abs": 1, "sign": 1, "select": 3, "clamp": 3}  # others: 2
COMPARISONS: Mapping[str, Callable[[int, int], bool]] = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}
OPERATIONS: Mapping[str, Callable[..., int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "divide": _quotient,
    "remainder": lambda a, b: a - b * _quotient(a, b),
    "minimum": min,
    "maximum": max,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": operator.invert,
    "negate": operator.neg,
    "abs": abs,
    "sign": lambda a: (a > 0) - (a < 0),
    "select": lambda test, a, b: a if test else b,
    "clamp": lambda low, a, high: min(max(low, a), high),
    "shift-left": _shift,
}
