"""Counts the bytes that a compiled program's collectives send, from its serialized HLO module alone.

Wire bytes are those of bandwidth-optimal algorithms, per device, of the busiest device where devices differ.
A range (min, max) covers conditionals; max is None under a loop that cannot be bounded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from second_counter.groups import Axes, Groups, device_groups
from second_counter.proto import (
    Computation,
    Instruction,
    Module,
    Shape,
    decode_module,
    group,
    integers,
    message,
    scalar,
)
from second_counter.scalars import Frame, Loop

Range = tuple[Fraction, Fraction | None]
NOTHING: Range = (Fraction(0), Fraction(0))

KINDS = {
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
}
NATIVE_STARTS = {f"{kind}-start": kind for kind in ("all-reduce", "all-gather", "collective-permute")}
MEGASCALE_KINDS = {
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
DEVICES_PER_SLICE_ID = 100_000


@dataclass(frozen=True)
class Tally:
    """Wire bytes of one execution of something: ("axes", "a+b"), ("kind", "all-reduce"), ("total", "").

    Each is a figure of its own: the most that a conditional can send is not the sum of the most per kind.
    """

    cells: Mapping[tuple[str, str], Range] = field(default_factory=dict)

    def __add__(self, other: Tally) -> Tally:
        return self.merge(other, lambda a, b: (a[0] + b[0], _sum(a[1], b[1])))

    def either(self, other: Tally) -> Tally:
        """One of the two runs."""
        return self.merge(other, lambda a, b: (min(a[0], b[0]), _largest(a[1], b[1])))

    def merge(self, other: Tally, combine: Callable[[Range, Range], Range]) -> Tally:
        keys = {**self.cells, **other.cells}
        return Tally({k: combine(self.cells.get(k, NOTHING), other.cells.get(k, NOTHING)) for k in keys})

    def times(self, trips: int | None) -> Tally:
        """Repeated; None: any number of times, perhaps none."""
        if trips is None:
            return Tally(
                {k: (Fraction(0), Fraction(0) if high == 0 else None) for k, (_, high) in self.cells.items()}
            )
        return Tally({k: (low * trips, _times(high, trips)) for k, (low, high) in self.cells.items()})

    @property
    def bounded(self) -> bool:
        return all(high is not None for _, high in self.cells.values())

    def by(self, breakdown: str) -> dict[str, Range]:
        """The figures of one breakdown; what moves nothing is left out."""
        return {
            key: value for (name, key), value in self.cells.items() if name == breakdown and value != NOTHING
        }


def sent(axes: str, kind: str, wire: Fraction) -> Tally:
    """One collective's bytes."""
    return Tally(dict.fromkeys((("axes", axes), ("kind", kind), ("total", "")), (wire, wire)))


def _sum(a: Fraction | None, b: Fraction | None) -> Fraction | None:
    return None if a is None or b is None else a + b


def _times(high: Fraction | None, trips: int | None) -> Fraction | None:
    """An upper bound, repeated: nothing repeated without end, or anything repeated never, is nothing."""
    if trips == 0 or high == 0:
        return Fraction(0)
    return None if high is None or trips is None else high * trips


def _largest(a: Fraction | None, b: Fraction | None) -> Fraction | None:
    return None if a is None or b is None else max(a, b)


@dataclass(frozen=True)
class Count:
    """Wire bytes per device per step, as (min, max), by `+`-joined mesh axes and by kind of collective.

    opaque: what may communicate but cannot be counted. loops: name -> (printed trips, derived trips).
    """

    by_axes: Mapping[str, Range]
    by_kind: Mapping[str, Range]
    total: Range
    opaque: tuple[str, ...]
    loops: Mapping[str, tuple[int | None, int | None]]


def count(proto: bytes, num_devices: int, mesh: Mapping[str, int]) -> Count:
    """Count one program.

    proto: an HloModuleProto, or the HloProto of a dump file. num_devices: of the whole mesh, all slices.
    mesh: axis -> size, major to minor; HLO id p is position p (within its slice on multi-slice TPUs).
    """
    walker = Walker(decode_module(proto), num_devices, mesh)
    tally = walker.run()
    total = tally.by("total").get("", NOTHING)
    return Count(tally.by("axes"), tally.by("kind"), total, tuple(walker.opaque), walker.loops)


class Walker:
    """Walks the call graph from the entry, multiplying along loops."""

    def __init__(self, module: Module, num_devices: int, mesh: Mapping[str, int]) -> None:
        self.module = module
        self.partitions = len(module.assignment) or num_devices // module.num_replicas
        in_module = self.partitions * module.num_replicas
        self.slices = num_devices // in_module
        if self.slices * in_module != num_devices:
            raise ValueError(f"{num_devices} devices are no whole number of slices of {in_module}")
        self.axes = Axes(mesh)
        self.opaque: list[str] = []
        self.loops: dict[str, tuple[int | None, int | None]] = {}
        self._silent: dict[int, bool] = {}

    def run(self) -> Tally:
        def unknown(number: int, path: tuple[int, ...]) -> int | None:
            return None

        entry = self.module.computations[self.module.entry_id]
        return self.computation(Frame(self.module, entry, unknown))

    def computation(self, frame: Frame, scatters: bool = False) -> Tally:
        """Everything that one run of the frame's computation sends. scatters: all-reduces keep a slice."""
        result = Tally()
        if self.silent(frame.computation.id):
            return result
        for instruction in frame.computation.instructions.values():
            result = result + self.instruction(frame, instruction, scatters)
        return result

    def silent(self, computation_id: int) -> bool:
        """Whether neither the computation nor anything it calls can communicate."""
        if computation_id not in self._silent:
            instructions = self.module.computations[computation_id].instructions.values()
            self._silent[computation_id] = all(
                not self.talks(i) and all(self.silent(called) for called in i.called) for i in instructions
            )
        return self._silent[computation_id]

    def talks(self, instruction: Instruction) -> bool:
        return instruction.opcode in KINDS | NATIVE_STARTS.keys() | {"send"} or is_opaque(instruction)

    def instruction(self, frame: Frame, instruction: Instruction, scatters: bool) -> Tally:
        opcode = instruction.opcode
        if opcode == "while":
            return self.loop(frame, instruction)
        if opcode == "conditional":
            return self.branches(frame, instruction)
        if opcode in KINDS or opcode in NATIVE_STARTS:
            kind = NATIVE_STARTS.get(opcode, opcode)
            kind = "reduce-scatter" if scatters and kind == "all-reduce" else kind
            return self.collective(frame.computation, instruction, kind)
        if opcode == "send":
            return self.send(frame.computation, instruction)
        if opcode.endswith(("-done", "-update")):
            return Tally()
        if is_opaque(instruction):
            self.opaque.append(instruction.name)
        scatters = is_reduce_scatter(self.module, instruction)
        result = Tally()
        for called in instruction.called:
            result = result + self.computation(frame.call(called, instruction.operands), scatters)
        return result

    def branches(self, frame: Frame, instruction: Instruction) -> Tally:
        """Operand 0 chooses, operand i + 1 is the argument of branch i."""
        runs = [
            self.computation(frame.call(called, instruction.operands[i + 1 : i + 2]))
            for i, called in enumerate(instruction.called)
        ]
        result = runs[0]
        for run in runs[1:]:
            result = result.either(run)
        return result

    def loop(self, frame: Frame, instruction: Instruction) -> Tally:
        loop = Loop(frame, instruction)
        if self.silent(loop.body.id) and self.silent(loop.condition.id):
            return Tally()
        derived = loop.derived_trips()
        # What the compiler printed wins: after unrolling, init and step may be stale.
        trips = derived if loop.printed_trips is None else loop.printed_trips
        self.loops[instruction.name] = (loop.printed_trips, derived)
        body = self.computation(loop.any_iteration())
        if trips is None or body.bounded:
            return body.times(trips)
        # An inner loop's bounds change with the outer counter: run the iterations one by one.
        result = Tally()
        for index in range(trips):
            result = result + self.computation(loop.iteration(index))
        return result

    def collective(self, computation: Computation, instruction: Instruction, kind: str) -> Tally:
        if is_repeated_in_chain(computation, instruction):
            return Tally()
        shapes = [computation.instructions[o].shape for o in instruction.operands]
        if kind == "collective-permute":
            return self.permute(instruction, permute_bytes(instruction, shapes))
        if kind == "ragged-all-to-all":
            shapes = shapes[:1]
        if kind == "collective-broadcast" and scalar(instruction.raw, 100):
            shapes = shapes[:-1]
        operand = sum(shape.num_bytes for shape in shapes)
        groups = device_groups(instruction, kind, self.module.num_replicas, self.partitions)
        return self.charge(self.in_every_slice(groups), kind, operand)

    def charge(self, groups: Groups, kind: str, operand_bytes: int) -> Tally:
        wire = max((wire_bytes(kind, len(ids), operand_bytes) for ids in groups), default=Fraction(0))
        return sent(self.axes.name(groups), kind, wire)

    def in_every_slice(self, groups: Groups) -> Groups:
        """The same groups in each slice: a multi-slice module holds the ids of one slice."""
        step = self.partitions * self.module.num_replicas
        return tuple(tuple(s * step + i for i in ids) for s in range(self.slices) for ids in groups)

    def permute(self, instruction: Instruction, payload: int) -> Tally:
        pairs = [
            (scalar(pair, 1), scalar(pair, 2))
            for pair in (group(raw) for raw in instruction.raw.get(52, []) if isinstance(raw, bytes))
        ]
        return self.pairs(self.in_every_slice(tuple(pairs)), "collective-permute", payload)

    def pairs(self, pairs: Iterable[tuple[int, ...]], kind: str, payload: int) -> Tally:
        moving = [(source, target) for source, target in pairs if source != target]
        return sent(self.axes.spanned(moving), kind, Fraction(payload if moving else 0))

    def send(self, computation: Computation, instruction: Instruction) -> Tally:
        """A GPU send names its pairs; a TPU send to the megascale runtime is one half of a DCN collective."""
        attributes = instruction.attributes
        payload = computation.instructions[instruction.operands[0]].shape.num_bytes
        listed = attributes.get("_xla_send_recv_source_target_pairs")
        if listed is not None:
            return self.pairs(tuple(id_lists(listed)), "send", payload)
        if attributes.get("_xla_host_transfer_handler_name") == "xla_megascale_runtime":
            return self.megascale(attributes, payload)
        if not scalar(instruction.raw, 47):
            self.opaque.append(instruction.name)
        return Tally()

    def megascale(self, attributes: Mapping[str, str], payload: int) -> Tally:
        kind = MEGASCALE_KINDS[attributes["_xla_megascale_transfer_type"]]
        target = attributes["_xla_megascale_target"]
        if kind == "collective-permute":
            return self.pairs([self.positions(p) for p in id_lists(target.replace("->", ","))], kind, payload)
        if "x" not in target:
            return self.charge(tuple(self.positions(ids) for ids in id_lists(target)), kind, payload)
        slices = [int(s) - 1 for s in re.findall(r"\d+", target.partition("x")[0])]
        groups = tuple(tuple(s * self.partitions + p for s in slices) for p in range(self.partitions))
        return self.charge(groups, kind, payload)

    def positions(self, devices: tuple[int, ...]) -> tuple[int, ...]:
        """Megascale device ids, (slice + 1) * 100000 + id in the slice, as positions in the mesh."""
        return tuple(
            (device // DEVICES_PER_SLICE_ID - 1) * self.partitions
            + self.module.assignment.index(device % DEVICES_PER_SLICE_ID)
            for device in devices
        )


def id_lists(listed: str) -> list[tuple[int, ...]]:
    """`{{0,4},{1,5}}` as id tuples."""
    return [
        tuple(int(i) for i in part.split(","))
        for part in re.findall(r"\{([\d,]+)\}", listed.replace(" ", ""))
    ]


def wire_bytes(kind: str, size: int, operand_bytes: int) -> Fraction:
    """What one of `size` devices sends, by the bandwidth-optimal algorithm (as nccl-tests count)."""
    if size <= 1:
        return Fraction(0)
    factor = {
        "all-reduce": Fraction(2 * (size - 1), size),
        "all-gather": Fraction(size - 1),
        "reduce-scatter": Fraction(size - 1, size),
        "all-to-all": Fraction(size - 1, size),
    }
    return factor.get(kind, Fraction(1)) * operand_bytes


def permute_bytes(instruction: Instruction, shapes: list[Shape]) -> int:
    """All operands; or, in the in-place form (field 20 holds slice sizes), what its slices hold."""
    sizes = integers(instruction.raw.get(20, []))
    if not sizes:
        return sum(shape.num_bytes for shape in shapes)
    source = shapes[0].leaves[0] if shapes[0].leaves else shapes[0]
    rank = len(source.dims)
    slices = [tuple(sizes[i : i + rank]) for i in range(0, len(sizes), rank)]
    return sum(Shape(source.element_type, dims, source.element_bits).num_bytes for dims in slices)


def is_opaque(instruction: Instruction) -> bool:
    """A kernel that talks to other devices itself."""
    if instruction.opcode != "custom-call":
        return False
    return bool(instruction.backend_config.get("custom_call_config", {}).get("has_communication"))


def is_repeated_in_chain(computation: Computation, instruction: Instruction) -> bool:
    """A later copy of a TPU collective that runs beside matrix products."""
    targets = {message(i.raw, 28) for i in computation.instructions.values() if i.opcode == "custom-call"}
    if b"AsyncCollectiveStart" in targets:
        return False
    flags = instruction.backend_config.get("async_collective_fusion_config")
    later = flags is not None and flags.get("flag_start") != "-1"
    return later or b"AsyncCollectiveDone" in targets


def is_reduce_scatter(module: Module, instruction: Instruction) -> bool:
    """A TPU fusion of an all-reduce of which each device keeps one slice."""
    if instruction.opcode != "fusion" or message(instruction.raw, 11) != b"kCustom":
        return False
    body = module.computations[instruction.called[0]]
    opcodes = {i.opcode for i in body.instructions.values()}
    emitter = instruction.backend_config.get("collective_algorithm_config", {}).get("emitter", "")
    named = "AllReduceScatter" in emitter or body.name.startswith("all-reduce-scatter")
    return named and {"all-reduce", "dynamic-slice"} <= opcodes
