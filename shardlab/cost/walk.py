"""Walks the schedule of a module, computation by computation, and simulates each (`cost/timeline.py`)."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from shardlab.attribute.calls import CallGraph
from shardlab.attribute.edges import CallSite
from shardlab.cost.blocks import Block, Event, Issued, made_block
from shardlab.cost.flows import Flow, Flows
from shardlab.cost.regions import Regions, is_scheduled
from shardlab.cost.stages import FreeStages, free_stages, staged
from shardlab.hlo.module import Computation, Instruction, Module

Place = tuple[str, str]  # computation and instruction
COMPUTE, COPIES, TO_HOST, FROM_HOST = "compute", "copies", "to host", "from host"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """What the compute stream does for one instruction. time_s: None where it cannot be known. beside: the
    stream on which it runs where it is started and awaited."""

    name: str
    kind: str
    layer: str
    phase: str
    time_s: float | None
    beside: str = COPIES


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """A collective of the scheduled program.

    time_s: alone; None where it cannot be known. tier_s: how long it keeps each tier busy. done: the
    instruction that awaits it where that is no `-done` of its own (a TPU chain of fusions). joins: pairs of
    kinds of devices (`graph.schedule.kinds`) that it joins. lead_s: by how much the kind that came to it
    first is done before the others, as the first of gloo's turns is (`cost/gloo.py`).
    """

    name: str
    kind: str
    axes: tuple[str, ...] | None
    layer: str
    phase: str
    stream: str
    time_s: float | None
    tier_s: Mapping[str, float]
    asynchronous: bool
    done: str | None = None
    joins: frozenset[tuple[int, int]] = frozenset()
    lead_s: float = 0.0


@dataclass(slots=True)
class Walk:
    """Simulates each computation once, or once for each set of branches that is taken in it.

    free: how stages wait for each other where they are programs of their own. crowds: of a kind, those of all
    devices on its core, where they share one: when some wait, the others compute faster. kind, tick, share:
    for whom, when, and at how many times its time that is done now.
    """

    module: Module
    graph: CallGraph
    kernels: Mapping[Place, Kernel]
    transfers: Mapping[Place, tuple[Transfer, ...]]
    slowdown: float
    slow_kind: int
    free: FreeStages | None = None
    crowds: Mapping[int, Sequence[int]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    kind: int = 0
    tick: int | None = None
    share: float = 1.0
    regions: Regions = field(init=False)
    _blocks: dict[tuple[object, ...], Block] = field(default_factory=dict)
    _loops: dict[Place, Mapping[int, Block]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.regions = Regions(self.graph)

    @property
    def kinds(self) -> tuple[int, ...]:
        """The kinds of devices."""
        return tuple(sorted(set(self.graph.schedule.kinds))) or (0,)

    @property
    def slowed(self) -> float:
        """How many times as long compute takes."""
        return self.share * (self.slowdown if self.kind == self.slow_kind else 1.0)

    def on_kind(self, kind: int) -> Block:
        """The whole step of one kind of device."""
        self.kind = kind
        return self.block(self.module.entry)

    def block(self, name: str) -> Block:
        """One run of a computation, callees first."""
        wanted = [name]
        while wanted:  # without recursion: calls nest as deep as a file likes
            top = wanted[-1]
            missing = [
                site.callee for site in self._entered(top) if self._key(site.callee) not in self._blocks
            ]
            if missing:
                wanted += missing
                continue
            wanted.pop()
            key = self._key(top)
            if key not in self._blocks:
                self._blocks[key] = _Run(self, self.module.computations[top]).run()
        return self._blocks[self._key(name)]

    def nested(self, computation: str, instruction: Instruction) -> tuple[Block, float] | None:
        """What a loop, call or conditional runs, and how often; None for other instructions."""
        if instruction.opcode not in ("while", "call", "conditional"):
            return None
        sites = [
            site
            for site in self.graph.sites.by_caller[computation]
            if site.instruction.name == instruction.name and is_scheduled(site)
        ]
        if instruction.opcode == "conditional":
            return self._branch((computation, instruction.name), sites)
        if instruction.opcode == "call":
            return self._blocks[self._key(sites[0].callee)], 1.0
        if self.regions.ticks(sites[0]) is not None:
            return self._staged(sites[0]), 1.0
        trips = self.graph.loops.get((computation, instruction.name))
        if trips is None or trips.high is None:
            self.unknown.append(instruction.name)
        body = self._blocks[self._key(sites[0].callee)]
        return body, float(trips.high or 0) if trips is not None else 0.0

    def _key(self, name: str) -> tuple[object, ...]:
        """A computation, the branches taken in it, and the kind of device where that matters."""
        taken = tuple(self.regions.branch(key, self.kind, self.tick) for key in self.regions.met[name])
        return name, taken, self.slowed, self.kind if name in self.regions.staged else None

    def _entered(self, name: str) -> Iterator[CallSite]:
        """The call sites of a computation that are simulated as blocks: not loops over ticks, whose turn
        comes tick by tick, nor branches that are known not to be taken.
        """
        for site in self.graph.sites.by_caller[name]:
            if not is_scheduled(site) or (site.role == "body" and self.regions.ticks(site) is not None):
                continue
            if site.role == "branch":
                taken = self.regions.branch((name, site.instruction.name), self.kind, self.tick)
                if taken not in (None, site.position):
                    continue
            yield site

    def _staged(self, loop: CallSite) -> Block:
        """A loop over ticks, worked out for all kinds of devices at once."""
        place = loop.caller, loop.instruction.name
        if place not in self._loops:
            now = self.kind, self.tick, self.share
            ticks = self.regions.ticks(loop) or 0
            chosen = {each: self.regions.chosen(loop.callee, each, ticks) for each in self.kinds}
            apart = loop.callee in self.regions.staged
            known: dict[tuple[object, ...], Block] = {}

            def run(of_kind: int, at_tick: int, share: float = 1.0) -> Block:
                key = chosen[of_kind][at_tick], of_kind if apart else of_kind == self.slow_kind, share
                if key not in known:
                    self.kind, self.tick, self.share = of_kind, at_tick, share
                    known[key] = self.block(loop.callee)
                return known[key]

            def block(of_kind: int, at_tick: int) -> Block:
                alike = run(of_kind, at_tick)  # as if all on its core computed as long
                crowd = [run(other, at_tick).compute_s for other in self.crowds.get(of_kind, ())]
                if not crowd or not alike.compute_s:
                    return alike
                taken_s = sum(min(alike.compute_s, other_s) for other_s in crowd)
                return run(of_kind, at_tick, taken_s / len(crowd) / alike.compute_s)

            name = loop.instruction.name
            if self.free is not None and len(self.free.schedule.rows) == ticks:
                self._loops[place] = free_stages(name, self.free, block)
            else:
                self._loops[place] = staged(name, ticks, self.kinds, block)
            self.kind, self.tick, self.share = now
        return self._loops[place][self.kind]

    def _branch(self, conditional: Place, sites: Sequence[CallSite]) -> tuple[Block, float]:
        """The branch that is taken; the dearest where that is unknown; where tables choose for ticks that are
        not walked one by one, as large a part of it as they take on average.
        """
        taken = self.regions.branch(conditional, self.kind, self.tick)
        if taken is not None:
            return self._blocks[self._key(sites[taken].callee)], 1.0
        blocks = [self._blocks[self._key(site.callee)] for site in sites]
        dearest = max(blocks, key=lambda block: block.duration_s)
        runs = self.graph.schedule.branches.get(conditional)
        if runs is None or dearest.duration_s == 0:
            return dearest, 1.0
        counts = [by_kind[self.kind][1] or 0 for by_kind in runs]
        mean_s = sum(block.duration_s * count for block, count in zip(blocks, counts, strict=True))
        return dearest, mean_s / max(sum(counts), 1) / dearest.duration_s


@dataclass(slots=True)
class _Run:
    """One run of one computation, from a quiet start at 0."""

    walk: Walk
    computation: Computation
    now_s: float = 0.0
    last: Issued | None = None
    flows: Flows = field(default_factory=Flows)
    issued: list[Issued] = field(default_factory=list)
    handles: dict[str, list[Issued]] = field(default_factory=dict)
    awaited: dict[str, list[str]] = field(default_factory=dict)
    joins: set[tuple[int, int]] = field(default_factory=set)
    lead_s: float = 0.0

    def run(self) -> Block:
        """The block."""
        for instruction in self.computation.instructions.values():
            self._instruction(instruction)
        for name in tuple(self.handles):
            self._wait(name)
        return made_block(self.issued, self.last, self.now_s, frozenset(self.joins), self.lead_s)

    def _instruction(self, instruction: Instruction) -> None:
        place = (self.computation.name, instruction.name)
        nested = self.walk.nested(self.computation.name, instruction)
        transfers = self.walk.transfers.get(place, ())
        if nested is not None:
            self._nested(instruction, *nested)
        elif transfers:
            self._transfers(instruction, transfers)
        elif instruction.name in self.awaited:
            for start in self.awaited[instruction.name]:
                self._wait(start)
        elif instruction.opcode.endswith("-done"):
            self._wait(self._started_by(instruction))
        else:
            self._kernel(place, instruction)

    def _started_by(self, done: Instruction) -> str:
        """The start that a done belongs to, through updates and tuple accesses."""
        name = done.operands[0].name if done.operands else ""
        instructions = self.computation.instructions
        for _ in range(64):
            found = instructions.get(name)
            if name in self.handles or found is None or not found.operands:
                break
            name = found.operands[0].name
        return name

    def _kernel(self, place: Place, instruction: Instruction) -> None:
        kernel = self.walk.kernels.get(place)
        if kernel is None:
            return
        if kernel.time_s is None:
            self.walk.unknown.append(kernel.name)
            return
        beside = instruction.opcode.endswith("-start")
        event = Event(
            name=kernel.name,
            kind=kernel.kind,
            stream=kernel.beside if beside else COMPUTE,
            layer=kernel.layer,
            phase=kernel.phase,
            start_s=self.now_s,
            duration_s=kernel.time_s * self.walk.slowed,
        )
        if beside:
            self._start(instruction.name, event, {kernel.beside: 1.0})
        else:
            self._compute(event)

    def _nested(self, instruction: Instruction, block: Block, iterations: float) -> None:
        if not block.events or not iterations:
            return
        self.flows.background = block.busy
        self._compute(
            Event(
                name=instruction.name,
                kind=instruction.opcode,
                stream=COMPUTE,
                start_s=self.now_s,
                duration_s=block.duration_s * iterations,
                iterations=iterations,
                body=block,
            )
        )
        self.flows.background = {}

    def _compute(self, event: Event) -> None:
        """The compute stream does something, and the transfers go on meanwhile."""
        self.last = Issued(event, self.last)
        self.issued.append(self.last)
        self.now_s += event.duration_s
        self.flows.advance(self.now_s)

    def _transfers(self, instruction: Instruction, transfers: tuple[Transfer, ...]) -> None:
        for transfer in transfers:
            if transfer.time_s is None:
                self.walk.unknown.append(transfer.name)
                continue
            event = Event(
                name=transfer.name,
                kind=transfer.kind,
                stream=transfer.stream,
                layer=transfer.layer,
                phase=transfer.phase,
                axes=transfer.axes,
                communicates=True,
                start_s=self.now_s,
                duration_s=transfer.time_s,
            )
            self._start(instruction.name, event, dict(_needs(transfer)))
            self.joins |= transfer.joins
            self.lead_s = max(self.lead_s, transfer.lead_s)
            if transfer.done is not None:
                self.awaited.setdefault(transfer.done, []).append(instruction.name)
        if not any(transfer.asynchronous for transfer in transfers):
            self._wait(instruction.name)

    def _start(self, name: str, event: Event, needs: Mapping[Hashable, float]) -> None:
        """Something begins beside the compute stream, to be awaited by this name."""
        flow = Flow(event.stream, event.duration_s, needs, self.now_s)
        self.flows.start(flow)
        one = Issued(event, self.last, flow)
        self.issued.append(one)
        self.handles.setdefault(name, []).append(one)

    def _wait(self, name: str) -> None:
        """Go on when what `name` started has ended."""
        for one in self.handles.pop(name, ()):
            end_s = self.flows.finish(one.flow) if one.flow is not None else self.now_s
            if end_s > self.now_s:
                self.now_s, self.last = end_s, one


def _needs(transfer: Transfer) -> Iterator[tuple[Hashable, float]]:
    """The part of each link that a transfer needs while it runs. On ICI axes have links of their own."""
    if not transfer.time_s:
        return
    for tier, busy_s in transfer.tier_s.items():
        part = min(busy_s / transfer.time_s, 1.0)
        for axis in (transfer.axes or ("",)) if tier == "ici" else ("",):
            yield (tier, axis), part
