"""What holds a step's memory at its peak: a walk over the scheduled program that says which values are alive.

A value is alive from the instruction that makes it to its last use. Loops work in place on what they carry;
`tuple`, `bitcast` and the like name values without making any; a `dynamic-update-slice` changes its operand
(XLA's `HloDataflowAnalysis`). Where one dies in the instruction that makes another of the same size, they
share memory, as XLA's assignment lets elementwise fusions do. Sizes are logical: neither tiles' padding
nor gaps are in them, so the sum is a little less than what the compiler reserves; the report says how much.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from shardlab.attribute.calls import CallGraph
from shardlab.attribute.neighbours import enclosing_op_name
from shardlab.attribute.origin import is_training, phase_of
from shardlab.cost.fused import in_place_operands
from shardlab.cost.hbm import fused_computations, is_hbm
from shardlab.hlo.attributes import computation_names, metadata, tuple_index
from shardlab.hlo.module import Instruction, Module, Shape
from shardlab.hlo.shape import array_bytes, array_leaves

OWNERS = ("activations", "gradients", "collectives", "temporaries")

# Results that are their operands, under another name or in another form.
_ALIASES = frozenset({"bitcast", "opt-barrier", "add-dependency", "domain", "get-tuple-element", "tuple"})
_IN_PLACE = frozenset({"dynamic-update-slice", "scatter", "while"})
_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-",
)
_PHASES = ("other", "forward", "backward", "optimizer")


@dataclass(slots=True)
class _Value:
    """One array in memory. made: the phase of what fills it; used: the last phase that reads it.

    start, last: positions in its computation where it is made and last used. changed: whether something
    wrote into it in place, after the instruction that gave it its memory. room: its bytes where it came from
    the caller, who counts it: once it is dead, another may have its memory.
    """

    size: int
    made: str
    used: str = "other"
    start: int = 0
    last: int = 0
    collective: bool = False
    changed: bool = False
    room: int = 0

    def change(self, phase: str) -> None:
        """What is first written into the memory says what it holds: a loop fills what a broadcast cleared."""
        if not self.changed:
            self.made, self.changed = phase, True

    @property
    def owner(self) -> str:
        """Why it is kept: from forward to backward, from backward to the optimizer, or not for long."""
        if self.made == "forward" and self.used in ("backward", "optimizer"):
            return "activations"
        if self.made == "backward" and self.used == "optimizer":
            return "gradients"
        return "collectives" if self.collective else "temporaries"


@dataclass(frozen=True, slots=True)
class Peak:
    """Temporaries alive at the fullest moment, bytes by owner (`OWNERS`), and in what instruction that is.

    carried: of a loop's body, the arrays (positions among the leaves) that it hands on as they came.
    """

    by_owner: Mapping[str, int] = field(default_factory=dict)
    instruction: str = ""
    carried: frozenset[int] = frozenset()

    @property
    def total_bytes(self) -> int:
        """Of all owners."""
        return sum(self.by_owner.values())


def temporaries_at_peak(module: Module, graph: CallGraph, backend: str) -> Peak | None:
    """What is alive in HBM besides the program's arguments and results when most is, on one device.

    None: the text is not in the order in which it runs, or an array's size is not known. Of a conditional the
    fullest branch counts. Raises ParseError for metadata that cannot be read.
    """
    peaks = peaks_by_computation(module, graph, backend)
    return None if peaks is None else peaks[module.entry]


def peaks_by_computation(module: Module, graph: CallGraph, backend: str) -> dict[str, Peak] | None:
    """Of each computation that is not fused, what lives in it and in what it calls and nowhere outside: of a
    loop's body the temporaries of one turn. None and errors as of `temporaries_at_peak`."""
    if not module.is_scheduled:
        return None
    inside = fused_computations(graph.sites)
    training = is_training(module, graph.sites.order)
    peaks: dict[str, Peak] = {}
    for name in reversed(graph.sites.order):  # callees first
        if name in inside:
            continue
        try:
            peaks[name] = _Walk(module, graph, name, training, backend).peak(peaks)
        except _UnknownSizeError:
            return None
    return peaks


class _UnknownSizeError(Exception):
    """An array whose size nothing says."""


class _Walk:
    """One computation: its values, then a sweep over their births and deaths."""

    def __init__(self, module: Module, graph: CallGraph, name: str, training: bool, backend: str) -> None:
        self.module, self.graph, self.training, self.backend = module, graph, training, backend
        self.computation = module.computations[name]
        self.around = enclosing_op_name(graph.sites, name)
        self.values: dict[str, tuple[_Value, ...]] = {}
        self.made: list[_Value] = []

    def peak(self, peaks: Mapping[str, Peak]) -> Peak:
        """The fullest moment, with what called computations hold while they run."""
        instructions = list(self.computation.instructions.values())
        for position, instruction in enumerate(instructions):
            phase = self._phase(instruction)
            self._use(instruction, position, phase)
            self.values[instruction.name] = tuple(self._results(instruction, position, phase, peaks))
        self._keep_results(len(instructions))
        return replace(self._fullest(instructions, peaks), carried=self._carried())

    def _carried(self) -> frozenset[int]:
        parameters = [one for one in self.computation.instructions.values() if one.opcode == "parameter"]
        if len(parameters) != 1:
            return frozenset()
        pairs = zip(self.values[parameters[0].name], self.values.get(self.computation.root, ()), strict=False)
        return frozenset(i for i, (one, two) in enumerate(pairs) if one is two and not one.changed)

    def _phase(self, instruction: Instruction) -> str:
        op_name = metadata(instruction).op_name
        return phase_of(op_name if "/" in op_name else self.around, self.training)[0]

    def _use(self, instruction: Instruction, position: int, phase: str) -> None:
        if instruction.opcode in _ALIASES:
            return
        for operand in instruction.operands:
            for value in self.values.get(operand.name, ()):
                value.last = position
                value.used = max(value.used, phase, key=_PHASES.index)

    def _results(
        self, instruction: Instruction, position: int, phase: str, peaks: Mapping[str, Peak]
    ) -> Iterator[_Value]:
        opcode = instruction.opcode
        of = [self.values.get(operand.name, ()) for operand in instruction.operands]
        if opcode == "get-tuple-element":
            yield from self._element(instruction, of[0] if of else ())
            return
        if opcode in _ALIASES or opcode.endswith(("-done", "-update")):
            yield from self._alias(instruction, of)
            return
        same = self._operands_kept(instruction, of)
        carried = self._untouched(instruction, peaks)
        for index, leaf in enumerate(array_leaves(instruction.shape)):
            if index in same:
                if index not in carried:
                    same[index].change(phase)
                yield same[index]
            else:
                yield self._new(instruction, leaf, position, phase)

    def _untouched(self, instruction: Instruction, peaks: Mapping[str, Peak]) -> frozenset[int]:
        """Arrays of the result that the instruction only hands on."""
        if instruction.opcode == "while":
            bodies = computation_names(instruction, "body")
            return peaks[bodies[0]].carried if bodies and bodies[0] in peaks else frozenset()
        if instruction.opcode.endswith("-start"):  # the operands, which stand in its result
            operands = instruction.shape.leaves[:1]
            return frozenset(range(sum(len(array_leaves(one)) for one in operands)))
        return frozenset()

    def _element(self, instruction: Instruction, values: Sequence[_Value]) -> Iterator[_Value]:
        source = self.computation.instructions.get(instruction.operands[0].name)
        if source is None:
            return
        index = tuple_index(instruction)
        before = sum(len(array_leaves(leaf)) for leaf in source.shape.leaves[:index])
        yield from values[before : before + len(array_leaves(instruction.shape))]

    def _alias(self, instruction: Instruction, of: Sequence[Sequence[_Value]]) -> Iterator[_Value]:
        leaves = array_leaves(instruction.shape)
        found = [value for values in of for value in values]
        if instruction.opcode.endswith(("-done", "-update")) and of:
            found = self._done(instruction, list(of[0]), len(leaves))
        yield from found[: len(leaves)]

    def _done(self, instruction: Instruction, started: list[_Value], count: int) -> list[_Value]:
        """The results among what a start made: in (operands, results, contexts) the second member."""
        source = self.computation.instructions.get(instruction.operands[0].name)
        if source is None or instruction.opcode.endswith("-update") or len(started) == count:
            return started
        if source.opcode == "copy-start":
            return started[:count]
        if source.shape.leaves:
            skip = len(array_leaves(source.shape.leaves[0]))
            return started[skip : skip + count]
        return started

    def _operands_kept(self, instruction: Instruction, of: Sequence[Sequence[_Value]]) -> dict[int, _Value]:
        """Array of the result -> the operand's value that it is, changed in place or carried along."""
        opcode = instruction.opcode
        if opcode == "while":
            return dict(enumerate(of[0])) if of else {}
        if opcode in _IN_PLACE:
            return dict(enumerate(of[0][:1])) if of else {}
        if opcode == "fusion":
            return self._kept_by_fusion(instruction, of, 0)
        if opcode.endswith("-start") and instruction.shape.leaves and opcode != "all-reduce-start":
            operands = [value for values in of for value in values]
            first = 1 if opcode == "copy-start" else 0
            started = {first + i: value for i, value in enumerate(operands)}
            return started | self._kept_by_fusion(instruction, of, len(operands))
        return {}

    def _kept_by_fusion(
        self, instruction: Instruction, of: Sequence[Sequence[_Value]], first: int
    ) -> dict[int, _Value]:
        """first: where the results stand among the arrays of the instruction."""
        callees = computation_names(instruction, "calls")
        inner = self.module.computations.get(callees[0]) if callees else None
        kept = in_place_operands(inner) if inner is not None else {}
        return {first + i: of[p][0] for i, p in kept.items() if p < len(of) and len(of[p]) == 1}

    def _new(self, instruction: Instruction, leaf: Shape, position: int, phase: str) -> _Value:
        size = array_bytes(leaf)
        if size is None:
            raise _UnknownSizeError
        outside = instruction.opcode in ("parameter", "constant") or not is_hbm(leaf, self.backend)
        collective = instruction.opcode.startswith(_COLLECTIVES)
        value = _Value(0 if outside else size, phase, start=position, last=position, collective=collective)
        if instruction.opcode == "parameter" and self.computation.name != self.module.entry:
            value.room = size if is_hbm(leaf, self.backend) else 0
        self.made.append(value)
        return value

    def _keep_results(self, end: int) -> None:
        """What the root holds lives to the end; of ENTRY it is the program's result, not a temporary."""
        for value in self.values.get(self.computation.root, ()):
            value.last = end
            if self.computation.name == self.module.entry:
                value.size = 0

    def _fullest(self, instructions: Sequence[Instruction], peaks: Mapping[str, Peak]) -> Peak:
        births: dict[int, list[_Value]] = {}
        deaths: dict[int, list[_Value]] = {}
        for value in self.made:
            if value.size or value.room:
                births.setdefault(value.start, []).append(value)
                deaths.setdefault(value.last, []).append(value)
        alive = dict.fromkeys(OWNERS, 0)
        best, called = Peak(), self._called(peaks)
        for position, instruction in enumerate(instructions):
            born, dying = births.get(position, []), deaths.get(position, [])
            # What a branch returns lives to its end: it is counted inside, as long as the branch runs.
            inner = called.get(instruction.name, Peak())
            best = max(best, _with(alive, inner, instruction.name), key=lambda one: one.total_bytes)
            for value in born:
                alive[value.owner] += value.size
            for new, old in _shared(born, dying, position):
                alive[old.owner] -= old.size
                dying.remove(old)
                if old.room:  # the caller counts it
                    alive[new.owner] -= new.size
                    new.size, new.room = 0, old.room
            best = max(best, _with(alive, Peak(), instruction.name), key=lambda one: one.total_bytes)
            for value in dying:
                alive[value.owner] -= value.size
        return best

    def _called(self, peaks: Mapping[str, Peak]) -> dict[str, Peak]:
        """Of each instruction the fullest computation that it runs."""
        found: dict[str, Peak] = {}
        for site in self.graph.sites.by_caller[self.computation.name]:
            peak = peaks.get(site.callee, Peak())
            name = site.instruction.name
            found[name] = max(found.get(name, Peak()), peak, key=lambda one: one.total_bytes)
        return found


def _with(alive: Mapping[str, int], inner: Peak, name: str) -> Peak:
    """What is alive at the instruction of that name while it runs `inner`."""
    now = {owner: alive[owner] + inner.by_owner.get(owner, 0) for owner in OWNERS}
    return Peak(now, inner.instruction or name)


def _shared(
    born: Sequence[_Value], dying: Sequence[_Value], position: int
) -> Iterator[tuple[_Value, _Value]]:
    """New values, each with a dying one of the same size whose memory it takes over."""
    free = [value for value in dying if value.start != position]
    for value in born:
        match = next((one for one in free if value.size and (one.size or one.room) == value.size), None)
        if match is not None:
            free.remove(match)
            yield value, match
