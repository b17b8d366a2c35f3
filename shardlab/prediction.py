"""What a step takes: the analysis, the cost of each instruction and the chip's prices put on a timeline."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod

from shardlab.analysis import Attributed, CollectiveRow
from shardlab.analysis.rows import device_ranges
from shardlab.attribute.chains import Chains
from shardlab.attribute.collectives import KINDS
from shardlab.attribute.edges import CallSite, CallSites
from shardlab.attribute.members import Members, kinds_joined
from shardlab.cost.collective_time import collective_time
from shardlab.cost.compute_time import ATTENTION_KERNEL, ComputeTimes, compute_times
from shardlab.cost.gloo import uses_gloo
from shardlab.cost.hbm import Traffic
from shardlab.cost.instructions import InstructionCost, StepCost
from shardlab.cost.kernels import Work
from shardlab.cost.pieces import Pieces, in_pieces
from shardlab.cost.stages import FreeStages
from shardlab.cost.timeline import Timeline, simulate
from shardlab.cost.together import TimePart, timelines_together
from shardlab.cost.walk import COPIES, FROM_HOST, TO_HOST, Kernel, Place, Transfer
from shardlab.hardware.machine import Chip, Machine
from shardlab.hardware.measured import step_errors
from shardlab.hlo.attributes import channel_id, frontend_attributes
from shardlab.hlo.lookup import of_opcodes
from shardlab.hlo.module import Computation, Instruction, Operand
from shardlab.spec.schedule import Schedule

NOT_VALIDATED = "not validated"
RENDEZVOUS = "_xla_host_transfer_rendezvous"
# Entries of the ledger that stand for time: transfers that were not counted, and text that was not read.
_NOT_TIMED = KINDS | {"custom-call", "dcn-transfer", "host-transfer", "send", "text"}
_POINT_TO_POINT = frozenset({"send", "collective-permute"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The timeline of a step, and what its prices rest on (`ComputeTimes.basis`).

    error_class: the error measured on this kind of chip (`step_errors.csv`), `not validated` where none was.
    devices: of each of `timeline.stages`, by flattened id, as `0-3,8`. busy_s: of a step, of the products at
    the chip's peak. turns_s: how much shorter or longer the step is when gloo's ranks never or always take
    turns (`cost/gloo.py`), 0 for other libraries, None where that is not known.
    """

    timeline: Timeline
    basis: tuple[tuple[str, str], ...]
    devices: tuple[str, ...] = ()
    error_class: str = NOT_VALIDATED
    busy_s: float | None = None
    turns_s: float | None = 0.0


def predict(
    part: Attributed,
    cost: StepCost,
    machine: Machine,
    *,
    slowdown: float = 1.0,
    slow_kind: int = 0,
    attention_kernel: str = ATTENTION_KERNEL,
    in_pieces_over: str | None = None,
    free: FreeStages | None = None,
) -> Prediction | None:
    """The timeline of an analysed program on a machine; slowdown: of the compute of one device, of this kind.
    attention_kernel: what stands in for a fused call (`ComputeTimes`). in_pieces_over: a mesh axis whose
    gathers and scatters run beside their products (`cost/pieces.py`). free: where the stages of a pipeline
    are programs of their own (`free_stages_of`).

    None for emulated devices, programs without a schedule, and chips that no measurement is near.
    """
    times = None if machine.emulated or not part.module.is_scheduled else compute_times(machine.chip)
    if times is None:
        return None
    times = replace(times, attention_kernel=attention_kernel)
    found = Pieces(kernels(part, cost, times), transfers(part, machine))
    if in_pieces_over is not None:
        found = _in_pieces(part, cost, times, found, in_pieces_over)
    timeline = simulate(
        part.module,
        part.graph,
        found.kernels,
        found.transfers,
        slowdown=slowdown,
        slow_kind=slow_kind,
        unknown=[entry.name for entry in part.analysis.ledger if entry.what in _NOT_TIMED],
        free=free,
        crowds=crowds_of(part, machine),
    )
    kinds = part.graph.schedule.kinds
    devices = tuple(
        device_ranges([device for device, kind in enumerate(kinds) if kind == stage.kind])
        for stage in timeline.stages
    )
    return Prediction(
        timeline=timeline,
        basis=tuple(times.basis.items()),
        devices=devices,
        error_class=error_class(machine.chip),
        busy_s=_busy_s(cost, times),
        turns_s=turns(part, machine),
    )


def crowds_of(part: Attributed, machine: Machine) -> Mapping[int, Sequence[int]]:
    """The kinds of all devices on the core of each kind of device (of its first), where hosts share cores."""
    if machine.shared_cores is None:
        return {}
    ids = part.device_ids or range(machine.num_devices)
    per_host = machine.num_devices // machine.hosts
    by_core = defaultdict[int, list[int]](list)
    crowds: dict[int, list[int]] = {}
    for kind, device in zip(part.graph.schedule.kinds, ids, strict=False):
        core = by_core[device // per_host % machine.shared_cores]
        core.append(kind)
        crowds.setdefault(kind, core)
    return crowds


def turns(part: Attributed, machine: Machine) -> float | None:
    """Seconds by which a step is shorter when no collective goes in turn, and longer when all do; of gloo,
    whose collectives nothing runs beside. None where that is not known."""
    if not uses_gloo(machine):
        return 0.0
    total_s = 0.0
    for row, joined in zip(part.analysis.collectives, part.members, strict=True):
        if kinds_joined(joined, part.graph.schedule.kinds):
            continue  # always
        turn_s = _turn_s(row, joined, part, machine)
        if turn_s is None or row.executions[1] is None:
            return None
        total_s += row.executions[1] * turn_s / 2
    return total_s


def _turn_s(row: CollectiveRow, joined: Members, part: Attributed, machine: Machine) -> float | None:
    """How much longer a collective takes in turn: what the one that came first does not wait for."""
    always, never = (
        collective_time(row, joined, machine, part.device_ids, Fraction(share)) for share in (1, 0)
    )
    return None if always is None or never is None else always.total_s - never.total_s


def free_stages_of(part: Attributed, schedule: Schedule, axis: str) -> FreeStages | None:
    """The stages of a program that runs this schedule along a mesh axis, as programs of their own. None where
    they do not each have a table of their own.
    """
    mesh, kinds = part.analysis.mesh or {}, part.graph.schedule.kinds
    if mesh.get(axis) != schedule.stages or len(kinds) != prod(mesh.values()):
        return None
    inner = prod(size for at, size in enumerate(mesh.values()) if at > list(mesh).index(axis))
    found = {(device // inner % schedule.stages, kind) for device, kind in enumerate(kinds)}
    stages = tuple(kind for _, kind in sorted(found))
    return FreeStages(schedule, stages) if len(set(stages)) == len(stages) == schedule.stages else None


def predictions_together(parts: Sequence[tuple[str, int, Prediction | None]]) -> Prediction | None:
    """A step of several programs: name, runs per step and prediction of each; None where one has none."""
    known = [(name, runs, one) for name, runs, one in parts if one is not None]
    if len(known) < len(parts):
        return None
    if len(known) == 1 and known[0][1] == 1:
        return known[0][2]
    return Prediction(
        timeline=timelines_together([TimePart(name, runs, one.timeline) for name, runs, one in known]),
        basis=tuple({key: basis for _, _, one in known for key, basis in one.basis}.items()),
        error_class=known[0][2].error_class,
        busy_s=_of_all([(runs, one.busy_s) for _, runs, one in known]),
        turns_s=_of_all([(runs, one.turns_s) for _, runs, one in known]),
    )


def _of_all(parts: Sequence[tuple[int, float | None]]) -> float | None:
    """Runs and seconds of each, put together; None where one is not known."""
    known = [runs * time_s for runs, time_s in parts if time_s is not None]
    return sum(known) if len(known) == len(parts) else None


def error_class(chip: Chip) -> str:
    """How far off predicted steps were on this kind of chip: the mean error of published runs."""
    found = step_errors().get(chip.compile_as or chip.name)
    if found is None:
        return NOT_VALIDATED
    return f"±{found.mean_error_pct:.0f} % on this kind of machine, n = {found.rows}"


def _busy_s(cost: StepCost, times: ComputeTimes) -> float | None:
    """Of one device, of a conditional the dearest branch; None in a loop that cannot be bounded, or where
    work is not counted."""
    by_dtype = {dtype: flops for dtype, flops in cost.flops.by_dtype.items() if flops is not None}
    if cost.flops.unknown or len(by_dtype) < len(cost.flops.by_dtype):
        return None
    return times.peak_s(by_dtype)


def _in_pieces(part: Attributed, cost: StepCost, times: ComputeTimes, found: Pieces, axis: str) -> Pieces:
    """With those collectives in pieces that run along this axis alone."""
    sites, products = part.graph.sites, dict[Place, Sequence[Work]]()
    for row in cost.instructions:
        if row.matmul_flops and not row.attention_flops:
            products[scheduled_place(sites, row.computation, row.name)] = row.products
    ways: dict[Place, int] = {}
    for one, collective in zip(part.analysis.collectives, part.collectives, strict=True):
        place = scheduled_place(sites, collective.computation, collective.instruction.name)
        cut = one.kind in ("all-gather", "reduce-scatter") and one.axes == (axis,)
        if cut and one.group_size and len(found.transfers[place]) == 1:
            ways[place] = one.group_size
    return in_pieces(part.module, products, found.kernels, found.transfers, ways, times.matmul.time_s)


def kernels(part: Attributed, cost: StepCost, times: ComputeTimes) -> dict[Place, Kernel]:
    """What the compute stream does, by the scheduled instruction."""
    found: dict[Place, Kernel] = {}
    for row in cost.instructions:
        if row.kind == "recv":  # what arrives is its send's transfer
            continue
        place = scheduled_place(part.graph.sites, row.computation, row.name)
        kernel = _kernel(row, times.instruction_s(row))
        found[place] = _together(found[place], kernel) if place in found else kernel
    for computation, name in cost.unpriced:
        place = scheduled_place(part.graph.sites, computation, name)
        found[place] = Kernel(name=place[1], kind="unknown", layer="", phase="other", time_s=None)
    return found


def _kernel(row: InstructionCost, time_s: float | None) -> Kernel:
    return Kernel(
        name=row.name,
        kind=row.kind,
        layer=row.layer,
        phase=row.phase,
        time_s=time_s,
        beside=_copies_on(row.traffic),
    )


def _copies_on(traffic: Traffic | None) -> str:
    """A chip copies to its host over the link one way while it copies from it, and while it fills its own
    fast memory."""
    if traffic is None or not traffic.host_bytes:
        return COPIES
    return FROM_HOST if traffic.written_bytes > traffic.read_bytes else TO_HOST


def _together(one: Kernel, other: Kernel) -> Kernel:
    """Two that one instruction runs: an asynchronous computation of several."""
    known = one.time_s is not None and other.time_s is not None
    return replace(one, time_s=(one.time_s or 0.0) + (other.time_s or 0.0) if known else None)


def transfers(part: Attributed, machine: Machine) -> dict[Place, tuple[Transfer, ...]]:
    """The collectives, by the scheduled instruction that starts them."""
    chains, sites, on_gloo = Chains(part.module), part.graph.sites, uses_gloo(machine)
    found: dict[Place, tuple[Transfer, ...]] = {}
    rows = zip(part.analysis.collectives, part.collectives, part.members, strict=True)
    for row, collective, joined in rows:
        place = scheduled_place(sites, collective.computation, collective.instruction.name)
        where = part.module.computations[place[0]]
        done = chains.end(where, collective.instruction) or received(where, collective.instruction)
        joins = kinds_joined(joined, part.graph.schedule.kinds)
        transfer = Transfer(
            name=row.name,
            kind=row.kind,
            axes=row.axes,
            layer=row.layer,
            phase=row.phase,
            stream=stream_of(row, machine.family),
            time_s=0.0 if not row.wire_bytes else row.time_s,
            tier_s=row.tier_s or {},
            asynchronous=row.asynchronous,
            done=done.name if done is not None and row.asynchronous else None,
            joins=joins,
            lead_s=(_turn_s(row, joined, part, machine) or 0.0) if joins and on_gloo else 0.0,
        )
        found[place] = (*found.get(place, ()), transfer)
    return found


def received(where: Computation, send: Instruction) -> Instruction | None:
    """The recv-done that awaits what this send's peer sends: a recv of the same channel or rendezvous."""
    if send.opcode != "send":
        return None
    meeting = frontend_attributes(send).get(RENDEZVOUS)
    for recv in of_opcodes(where.instructions, ("recv",)):
        if meeting is not None:
            same = frontend_attributes(recv).get(RENDEZVOUS) == meeting
        else:
            same = channel_id(recv) is not None and channel_id(recv) == channel_id(send)
        if same:
            dones = of_opcodes(where.instructions, ("recv-done",))
            return next((done for done in dones if done.operands[:1] == (Operand(recv.name),)), None)
    return None


def stream_of(row: CollectiveRow, family: str) -> str:
    """The stream that a collective runs on. XLA:GPU has one for collectives and one for point-to-point
    transfers (`AsyncStreamKind`); XLA:CPU waits for each; a TPU's links work side by side, those of one set
    of axes one by one.
    """
    if family == "cpu":
        return "collectives"
    if family == "gpu":
        return "p2p" if row.kind in _POINT_TO_POINT else "collectives"
    if row.tier == "dcn":
        return "dcn"
    return "ici " + ("+".join(row.axes) if row.axes else "other")


def scheduled_place(sites: CallSites, computation: str, instruction: str) -> Place:
    """The instruction of a scheduled computation that runs this one: around fusions and async wrappers."""
    place = (computation, instruction)
    for site in _around(sites, computation):
        place = (site.caller, site.instruction.name)
    return place


def _around(sites: CallSites, computation: str) -> Iterator[CallSite]:
    """The one call site of each computation that is no schedule of its own, from the inside out."""
    while True:
        callers = sites.by_callee.get(computation, ())
        if len(callers) != 1 or callers[0].role not in ("call", "async"):
            return
        if callers[0].instruction.opcode == "call":
            return
        yield callers[0]
        computation = callers[0].caller
