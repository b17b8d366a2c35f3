"""The Finding record, and what every rule gets: collectives joined to their rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction

from shardlab.analysis import Attributed, ByteRange, CollectiveRow, Range
from shardlab.attribute.calls import CallGraph
from shardlab.attribute.chains import DONE, Chains
from shardlab.attribute.collectives import Collective
from shardlab.attribute.opaque import target_of
from shardlab.audit.flow import Flow, Place, Use, Value
from shardlab.hardware.machine import Machine
from shardlab.hlo.attributes import computation_names, metadata
from shardlab.hlo.lookup import of_opcodes
from shardlab.hlo.module import Module, Shape
from shardlab.hlo.shape import array_bytes
from shardlab.program import Program


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Traffic or memory that could be saved, found by `rule` at `instruction`.

    wire_bytes: what is at stake, per device and step, as (min, max); a max of None is unknown, and None means
        that nothing is known of it, or that it is memory: memory_bytes, per device.
    axes, source: of the collective, or the axes that an array is not split over. evidence, remedy: a
        sentence each. module: only where several were audited.
    """

    rule: str
    instruction: str
    axes: tuple[str, ...] | None
    wire_bytes: ByteRange | None
    source: str
    evidence: str
    remedy: str
    memory_bytes: int | None = None
    module: str | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """One array of a collective (a combined one has several).

    value: its result. wire_bytes: its part of what one execution sends.
    """

    operand: Value
    value: Value
    shape: Shape
    wire_bytes: Fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class Audited:
    """A module as the rules see it; `items` in printed order, callers first. machine: None where unknown."""

    part: Attributed
    flow: Flow
    items: tuple[tuple[Collective, CollectiveRow], ...]
    chains: Chains
    machine: Machine | None = None

    @property
    def module(self) -> Module:
        """The compiled module."""
        return self.part.module

    @property
    def program(self) -> Program | None:
        """The saved program that the module came in."""
        return self.part.program

    @property
    def graph(self) -> CallGraph:
        """What runs what, how often."""
        return self.part.graph

    @property
    def backend(self) -> str:
        """What the module was compiled for."""
        return self.part.analysis.modules[0].backend

    def of_kind(self, kind: str) -> Iterator[tuple[Collective, CollectiveRow]]:
        """The collectives of one kind that move something and that the text holds as such (not sends to the
        megascale runtime).
        """
        for collective, row in self.items:
            printed = collective.instruction.opcode.removesuffix("-start")
            if collective.kind == printed == kind and row.group_size > 1:
                yield collective, row

    def runs(self, place: Place) -> Range:
        """How often a place runs per step."""
        while place.parent is not None:
            place = place.parent
        return self.graph.times[place.computation.name]

    def parts(self, collective: Collective, row: CollectiveRow) -> Iterator[Part]:
        """The arrays of a collective; none when a size is unknown."""
        place = self.flow.home(collective.computation)
        instruction = collective.instruction
        operands = [Value(place, operand.name, operand.index) for operand in instruction.operands]
        shapes = [self.flow.shape(operand) for operand in operands]
        sizes = [array_bytes(shape) for shape in shapes if shape is not None]
        total = sum(size for size in sizes if size is not None)
        if None in sizes or len(sizes) < len(operands) or not total:
            return
        single = len(operands) == 1 and (
            instruction.opcode.endswith("-start") or instruction.shape.dtype != "tuple"
        )
        for position, (operand, shape, size) in enumerate(zip(operands, shapes, sizes, strict=True)):
            if shape is not None and size is not None:
                value = Value(place, instruction.name, () if single else (position,))
                ended = self._ended(collective) if single else None
                yield Part(operand, ended or value, shape, row.wire_bytes * Fraction(size, total))

    def uses(self, collective: Collective, part: Part) -> list[Use]:
        """What takes an array of a collective: of one that XLA:CPU widened, what takes it after XLA's own
        convert back."""
        found = list(self.flow.uses(part.value))
        if collective.logical is None:
            return found
        return [after for use in found for after in self._narrowed(use)]

    def _narrowed(self, use: Use) -> Iterable[Use]:
        back = use.instruction.opcode == "convert" and not metadata(use.instruction).op_name
        return self.flow.uses(Value(use.place, use.instruction.name)) if back else (use,)

    def _ended(self, collective: Collective) -> Value | None:
        """What the last fusion of a TPU chain makes of a transfer that the first one started; None for no
        chain."""
        outermost = self.module.computations[collective.outermost]
        end = self.chains.end(outermost, collective.instruction)
        names = computation_names(end, "calls") if end is not None else ()
        for name in self.module.computations.keys() & names:
            for instruction in of_opcodes(self.module.computations[name].instructions, ("custom-call",)):
                if target_of(instruction) == DONE:
                    return Value(self.flow.home(name), instruction.name)
        return None


def finding(rule: str, row: CollectiveRow, saved_bytes: Fraction, *, evidence: str, remedy: str) -> Finding:
    """What a rule found at the collective of `row`. saved_bytes: what the remedy saves of one execution."""
    return Finding(
        rule=rule,
        instruction=row.name,
        axes=row.axes,
        wire_bytes=per_step(row, saved_bytes),
        source=row.source,
        evidence=evidence,
        remedy=remedy,
    )


def per_step(row: CollectiveRow, each: Fraction) -> ByteRange:
    """Bytes of one execution to bytes of a step."""
    low, high = row.executions
    return low * each, None if high is None else high * each


def together(ranges: Iterable[ByteRange]) -> ByteRange:
    """The sum of several ranges; a maximum that is unknown makes the sum's unknown."""
    low, high = Fraction(0), Fraction(0)
    known = True
    for least, most in ranges:
        low += least
        high += most or 0
        known = known and most is not None
    return low, high if known else None


def finding_json(finding: Finding) -> dict[str, object]:
    """The finding as a member of the `audit` list; what is not known is null; `module` absent
    when alone, `memory_bytes` where no memory is at stake."""
    at_stake = finding.wire_bytes
    document: dict[str, object] = {
        "rule": finding.rule,
        "instruction": finding.instruction,
        "axes": None if finding.axes is None else list(finding.axes),
        "wire_bytes": None if at_stake is None else [_number(at_stake[0]), _number(at_stake[1])],
        "source": finding.source,
        "evidence": finding.evidence,
        "remedy": finding.remedy,
    }
    more = {"memory_bytes": finding.memory_bytes, "module": finding.module}
    return document | {key: value for key, value in more.items() if value is not None}


def _number(value: Fraction | None) -> int | float | None:
    if value is None:
        return None
    return value.numerator if value.denominator == 1 else float(value)
