"""One step as the backend runs it: a compute stream, communication streams, and who waits for whom.

The scheduled program is walked in its own order. A synchronous collective holds up the compute stream; an
asynchronous one runs beside it from its start to its done, on its stream: of a GPU one for NCCL collectives
and one for point-to-point transfers; of a TPU one for each set of mesh axes and one for DCN. Copies that are
started and awaited (DMA) have a stream too. Transfers that share a tier share its rate (`cost/flows.py`).
A loop is one iteration from a quiet start, as often as it runs; what is under way when it begins goes on
beside it. What a computation leaves under way is awaited at its end.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field

from shardlab.attribute.calls import CallGraph
from shardlab.attribute.edges import CallSite
from shardlab.cost.blocks import Block, Event, Issued, PathEntry, made_block
from shardlab.cost.flows import Flow, Flows
from shardlab.hlo.module import Computation, Instruction, Module

Place = tuple[str, str]  # computation and instruction
COMPUTE, COPIES = "compute", "copies"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """What the compute stream does for one instruction. time_s: None where it cannot be known."""

    name: str
    kind: str
    layer: str
    phase: str
    time_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """A collective of the scheduled program.

    time_s: alone; None where it cannot be known. tier_s: how long it keeps each tier busy. done: the
    instruction that awaits it where that is no `-done` of its own (a TPU chain of fusions).
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """One step of one device. Seconds.

    step_time_s: None where a part is unknown, whose names `unknown` lists. communication_s: while at least
    one collective is under way; exposed_communication_s: the part of it in which nothing is computed.
    critical_path: what the step waits for, largest first; it adds up to the step. root: the events.
    """

    step_time_s: float | None
    compute_s: float | None
    communication_s: float | None
    exposed_communication_s: float | None
    critical_path: tuple[PathEntry, ...]
    root: Block
    unknown: tuple[str, ...] = ()


def simulate(
    module: Module,
    graph: CallGraph,
    kernels: Mapping[Place, Kernel],
    transfers: Mapping[Place, tuple[Transfer, ...]],
    *,
    slowdown: float = 1.0,
    device_kind: int = 0,
) -> Timeline:
    """The timeline of a scheduled module.

    kernels, transfers: by the computation and the instruction that the schedule has. slowdown: of the compute
    of this device, the straggler that all others wait for. device_kind: of `graph.schedule.kinds`.
    Raises ValueError for a module without a schedule.
    """
    if not module.is_scheduled:
        raise ValueError(f"module {module.name} is not scheduled")
    walk = _Walk(module, graph, kernels, transfers, slowdown, device_kind)
    root = walk.block(module.entry)
    unknown = tuple(dict.fromkeys(walk.unknown))
    known = not unknown
    return Timeline(
        step_time_s=root.duration_s if known else None,
        compute_s=root.compute_s if known else None,
        communication_s=root.communication_s if known else None,
        exposed_communication_s=root.exposed_s if known else None,
        critical_path=tuple(sorted(root.path, key=lambda entry: -entry.time_s)) if known else (),
        root=root,
        unknown=unknown,
    )


@dataclass(slots=True)
class _Walk:
    """Simulates each computation once."""

    module: Module
    graph: CallGraph
    kernels: Mapping[Place, Kernel]
    transfers: Mapping[Place, tuple[Transfer, ...]]
    slowdown: float
    device_kind: int
    unknown: list[str] = field(default_factory=list)
    _blocks: dict[str, Block] = field(default_factory=dict)

    def block(self, name: str) -> Block:
        """One run of a computation, callees first."""
        wanted = [name]
        while wanted:  # without recursion: calls nest as deep as a file likes
            top = wanted[-1]
            missing = [
                site.callee
                for site in self.graph.sites.by_caller[top]
                if _is_scheduled(site) and site.callee not in self._blocks
            ]
            if missing:
                wanted += missing
                continue
            wanted.pop()
            if top not in self._blocks:
                self._blocks[top] = _Run(self, self.module.computations[top]).run()
        return self._blocks[name]

    def callees(self, computation: str, instruction: Instruction) -> list[CallSite]:
        """The scheduled computations that an instruction runs."""
        return [
            site
            for site in self.graph.sites.by_caller[computation]
            if site.instruction.name == instruction.name and _is_scheduled(site)
        ]

    def nested(self, computation: str, instruction: Instruction) -> tuple[Block, float] | None:
        """What a loop, call or conditional runs, and how often; None for other instructions."""
        if instruction.opcode not in ("while", "call", "conditional"):
            return None
        sites = self.callees(computation, instruction)
        if instruction.opcode == "conditional":
            return self._branch(computation, instruction, [self._blocks[site.callee] for site in sites])
        if instruction.opcode == "call":
            return self._blocks[sites[0].callee], 1.0
        trips = self.graph.loops.get((computation, instruction.name))
        if trips is None or trips.high is None:
            self.unknown.append(instruction.name)
        body = next(self._blocks[site.callee] for site in sites if site.role == "body")
        return body, float(trips.high or 0) if trips is not None else 0.0

    def _branch(
        self, computation: str, instruction: Instruction, blocks: list[Block]
    ) -> tuple[Block, float] | None:
        """The dearest branch; where tables choose, as large a part of it as they take on average."""
        dearest = max(blocks, key=lambda block: block.duration_s)
        runs = self.graph.schedule.branches.get((computation, instruction.name))
        if runs is None or dearest.duration_s == 0:
            return dearest, 1.0
        taken = [by_kind[self.device_kind][1] or 0 for by_kind in runs]
        mean_s = sum(block.duration_s * count for block, count in zip(blocks, taken, strict=True))
        return dearest, mean_s / max(sum(taken), 1) / dearest.duration_s


def _is_scheduled(site: CallSite) -> bool:
    """Whether a callee has a schedule of its own: a loop's body, a branch, a called computation."""
    return site.role in ("body", "branch") or (site.role == "call" and site.instruction.opcode == "call")


@dataclass(slots=True)
class _Run:
    """One run of one computation, from a quiet start at 0."""

    walk: _Walk
    computation: Computation
    now_s: float = 0.0
    last: Issued | None = None
    flows: Flows = field(default_factory=Flows)
    issued: list[Issued] = field(default_factory=list)
    handles: dict[str, list[Issued]] = field(default_factory=dict)
    awaited: dict[str, list[str]] = field(default_factory=dict)

    def run(self) -> Block:
        """The block."""
        for instruction in self.computation.instructions.values():
            self._instruction(instruction)
        for name in tuple(self.handles):
            self._wait(name)
        return made_block(self.issued, self.last, self.now_s)

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
            stream=COPIES if beside else COMPUTE,
            layer=kernel.layer,
            phase=kernel.phase,
            start_s=self.now_s,
            duration_s=kernel.time_s * self.walk.slowdown,
        )
        if beside:
            self._start(instruction.name, event, {COPIES: 1.0})
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
