"""The integer arithmetic of an HLO program, followed symbolically through tuples, fusions and calls.

A loop's counter is reached through get-tuple-elements, copies between memories, fusions and calls. `Slice`
follows it and leaves a flat list of `Node`: constants, elements of a loop's state, entries of constant
tables, the device's number, arithmetic on them, or `unknown` with the reason. No recursion: programs nest as
deep as they like. What takes more steps than the module may (`effort.Effort`) becomes unknown.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from shardlab.attribute.arithmetic import BITS
from shardlab.attribute.arrays import READ_FROM_ARRAYS, element
from shardlab.attribute.edges import CallSite, CallSites, sites_of
from shardlab.attribute.effort import STEPS_SPENT, Effort
from shardlab.attribute.nodes import (
    DEVICE_NUMBERS,
    ELEMENTWISE,
    SAME_VALUE,
    Frame,
    LoopKey,
    Node,
    Nodes,
    Path,
    Ref,
    Steps,
    element_shape,
    is_array,
    oddity,
    operand_ref,
    operand_shape,
)
from shardlab.hlo.attributes import first_operand, instruction_error, parameter_number, tuple_index
from shardlab.hlo.module import Computation, Instruction, Module, Operand, Shape

MAX_PATH = 64
"""Elements of elements: a circle of get-tuple-elements through a loop's state would add one at every turn."""

_TUPLE_ALIASES = frozenset({"opt-barrier", "copy"})
_INLINED = frozenset({"fusion", "call"})

Key = tuple[int, str, Path, tuple[int, ...]]


@dataclass(slots=True)
class Slice:
    """Nodes found so far, and the ones already known by place."""

    module: Module
    sites: CallSites
    effort: Effort = field(default_factory=Effort)
    nodes: Nodes = field(default_factory=Nodes)
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

    def _given_up(self, ref: Ref) -> str:
        """Why `ref` is followed no further, `` while it is."""
        if not self.effort.follow():
            return STEPS_SPENT
        if len(ref.path) > MAX_PATH:
            return f"%{ref.name} is taken from more than {MAX_PATH} tuples in each other"
        return ""

    def _steps(self, ref: Ref) -> Steps:
        """What one instruction's element needs, and the node it makes."""
        instruction = ref.frame.computation.instructions.get(ref.name)
        if instruction is None:
            return self.nodes.unknown(f"%{ref.name} is not defined")
        given_up = self._given_up(ref)
        if given_up:
            return self.nodes.unknown(given_up)
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
            return self.nodes.unknown(f"element of {opcode} %{ref.name}")
        if opcode in DEVICE_NUMBERS:
            return self.nodes.add(Node(opcode, "u32"))
        if opcode in READ_FROM_ARRAYS or (is_array(instruction.shape) and ref.at):
            return (yield from element(self.nodes, ref, instruction))
        return (yield from self._scalar(ref, instruction))

    def _parameter(self, ref: Ref, instruction: Instruction) -> Steps:
        frame = ref.frame
        if frame.loop is not None:
            if ref.at and is_array(element_shape(instruction.shape, ref.path)):
                outer = frame.caller or self.frame(frame.loop[0])
                loop = outer.computation.instructions[frame.loop[1]]
                return (yield from self._invariant(Ref(outer, loop.name, ref.path, ref.at), loop))
            return self._state(frame.loop, ref.path, instruction.shape)
        number = parameter_number(instruction)
        if frame.caller is not None:
            if number >= len(frame.operands):
                return self.nodes.unknown(f"parameter {number} of {frame.computation.name} is bound later")
            return (yield operand_ref(frame.caller, frame.operands[number], ref.path, ref.at))
        sites = self.sites.by_callee.get(frame.computation.name, ())
        if not sites:
            return self.nodes.unknown(f"%{instruction.name} is an input of the program")
        found = []
        for site in sites:
            found.append((yield from self._argument(site, number, ref)))
        first = self.nodes[found[0]]
        if any(self.nodes[other] != first for other in found[1:]):
            return self.nodes.unknown(
                f"parameter {number} of {frame.computation.name} differs between its callers"
            )
        return found[0]

    def _argument(self, site: CallSite, number: int, ref: Ref) -> Steps:
        """What the call `site` passes as parameter `number`."""
        outer = self.frame(site.caller)
        loop = site.instruction
        if site.role in ("body", "condition"):
            return (yield from self._invariant(Ref(outer, loop.name, ref.path, ref.at), loop))
        position = site.position + 1 if site.role == "branch" else number
        if position >= len(loop.operands):
            return self.nodes.unknown(f"parameter {number} of {site.callee} is bound later")
        return (yield operand_ref(outer, loop.operands[position], ref.path, ref.at))

    def _invariant(self, ref: Ref, loop: Instruction) -> Steps:
        """An element of a loop's state that every trip leaves as it was: its first value.

        The body hands it on, or puts another element in its place that was equal at first and that it leaves
        as it was too: XLA:TPU copies a schedule's table to fast memory anew on every trip.
        """
        key = (ref.frame.computation.name, loop.name)
        names = [site.callee for site in sites_of(key[0], loop) if site.role == "body"]
        if not names:
            return self.nodes.unknown(f"the body of %{loop.name} is not known")
        frame, path, equal = self.frame(names[0], loop=key), ref.path, dict[Path, None]()
        while path not in equal:
            equal[path] = None
            after = self.nodes[(yield Ref(frame, frame.computation.root, path))]
            if after.op != "state" or after.loop != key:
                return self.nodes.unknown(f"a value that loop %{loop.name} changes")
            path = after.path
        firsts = []
        for path in equal:
            firsts.append((yield operand_ref(ref.frame, first_operand(loop), path, ref.at)))
        if any(self.nodes[other] != self.nodes[firsts[0]] for other in firsts[1:]):
            return self.nodes.unknown(f"a value that loop %{loop.name} changes")
        return firsts[0]

    def _element(self, ref: Ref, instruction: Instruction) -> Steps:
        """Through tuples: towards the one element that is wanted."""
        if instruction.opcode == "get-tuple-element":
            index = tuple_index(instruction)
            return (yield operand_ref(ref.frame, first_operand(instruction), (index, *ref.path), ref.at))
        if instruction.opcode == "tuple":
            if not ref.path or ref.path[0] >= len(instruction.operands):
                return self.nodes.unknown(f"%{ref.name} is a tuple")
            part = instruction.operands[ref.path[0]]
            return (yield operand_ref(ref.frame, part, ref.path[1:], ref.at))
        return (yield operand_ref(ref.frame, first_operand(instruction), ref.path, ref.at))

    def _through(self, ref: Ref, instruction: Instruction) -> Steps:
        """Into a fusion, a call, or an async pair of one; across an on-chip copy."""
        start = _start_of(ref.frame.computation, instruction)
        if start.opcode == "copy-start" and instruction.opcode == "copy-done":
            return (yield operand_ref(ref.frame, first_operand(start), ref.path, ref.at))
        sites = sites_of(ref.frame.computation.name, start)
        callees = [site.callee for site in sites if site.role in ("call", "async")]
        if len(callees) != 1 or instruction.opcode.endswith("-start"):
            return self.nodes.unknown(f"{instruction.opcode} %{ref.name}")
        inner = self.frame(callees[0], caller=ref.frame, site=start.name, operands=start.operands)
        return (yield Ref(inner, inner.computation.root, ref.path, ref.at))

    def _state(self, loop: LoopKey, path: Path, parameter: Shape) -> int:
        shape = parameter
        for index in path:
            if index >= len(shape.leaves):
                return self.nodes.unknown("no such element in the loop's state")
            shape = shape.leaves[index]
        key = (loop, path)
        if key not in self._states:
            # Not a scalar integer: still a state, so that invariance can be seen; arithmetic on it is
            # refused.
            self._states[key] = self.nodes.add(
                Node("state", shape.dtype, loop=loop, path=path, note=oddity(shape))
            )
        return self._states[key]

    def _scalar(self, ref: Ref, instruction: Instruction) -> Steps:
        opcode, dtype = instruction.opcode, instruction.shape.dtype
        if is_array(instruction.shape) and opcode not in _TUPLE_ALIASES:
            return self.nodes.unknown(f"{opcode} %{ref.name} is an array")
        if opcode == "constant":
            return self._constant(instruction)
        if opcode in SAME_VALUE and dtype == operand_shape(ref.frame, instruction, 0).dtype:
            return (yield operand_ref(ref.frame, first_operand(instruction)))
        if opcode not in ELEMENTWISE or dtype not in BITS:
            return self.nodes.unknown(f"{opcode} %{ref.name} ({dtype})")
        args = []
        for operand in instruction.operands:
            args.append((yield operand_ref(ref.frame, operand)))
        return self.nodes.apply(opcode, dtype, tuple(args), instruction.attributes.get("direction", ""))

    def _constant(self, instruction: Instruction) -> int:
        value = _integer(instruction.literal or "")
        dtype = instruction.shape.dtype
        if value is None or dtype not in BITS:
            return self.nodes.unknown(f"constant %{instruction.name} is not one integer")
        return self.nodes.constant(value, dtype)


def _key(ref: Ref) -> Key:
    return id(ref.frame), ref.name, ref.path, ref.at


def _start_of(computation: Computation, instruction: Instruction) -> Instruction:
    """The -start of a chain of -update and -done; the instruction itself otherwise."""
    seen = 0
    while instruction.opcode.endswith(("-done", "-update")) and instruction.operands and seen < 8:
        instruction = computation.instructions.get(instruction.operands[0].name, instruction)
        seen += 1
    return instruction


def _integer(literal: str) -> int | None:
    text = literal.strip(" {}\n\t")
    if text in ("true", "false"):
        return int(text == "true")
    try:
        return int(text)
    except ValueError:
        return None
