"""What is known of one case: the record behind `explain` and each row of `compare` (`shardlab.report/1`).

What a stage could not know is None, and absent from the JSON; never zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from shardlab.analysis import Analysis, attribute
from shardlab.audit import Finding, audit, finding_json
from shardlab.cost.compute_time import ATTENTION_KERNEL
from shardlab.cost.energy import Energy, step_energy
from shardlab.cost.flops import Flops, hardware_flops, model_flops
from shardlab.cost.generation import Generation, generation
from shardlab.cost.instructions import InstructionCost, StepCost, step_cost
from shardlab.cost.liveness import temporaries_at_peak
from shardlab.cost.memory import MemoryFit, memory_report
from shardlab.cost.network import communication
from shardlab.cost.owners import Owners, memory_band, memory_owners
from shardlab.hardware.catalog import load_machine
from shardlab.hardware.data_files import load_gpu_target
from shardlab.hardware.machine import Machine
from shardlab.prediction import Prediction, predict
from shardlab.program import Program, Refusal
from shardlab.spec.case import Case
from shardlab.spec.names import strategy_names

SCHEMA = "shardlab.report/1"
PATH_ENTRIES = 12  # of the critical path in the JSON and on the page
EMULATED_NOTE = (
    "emulated devices show what the partitioner does, not what a backend does: "
    "bf16 collectives run in f32 and gradients are all-reduced"
)
NOT_AUTOTUNED_NOTE = "compiled ahead of time, not autotuned: temporary memory may differ in a real run"

Json = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseReport:
    """One case, analysed or with the reason why not.

    owners: what holds the memory. memory_band: bytes between which a run lies of a program not autotuned.
    infeasible: the plan cannot be put on this model and machine. failure: it could not be compiled (with
    what to do).
    hardware_flops: per device per step, from the compiled program with trip counts; model_flops: 6·N·D plus
    attention over all devices. cost: FLOPs and HBM traffic, per instruction.
    communication_s: Σ executions · max over tiers of bytes / bandwidth (no
    latency, no overlap).
    tier_s: the same per tier. predicted: the timeline of a step. mfu: model FLOPs over what all devices could
    do in that step at their bf16 peak. findings: of the audit. emulated: never ranked among real ones.
    """

    case: Case
    program: Program | None = None
    analysis: Analysis | None = None
    memory: MemoryFit | None = None
    owners: Owners | None = None
    memory_band: tuple[int, int] | None = None
    hardware_flops: int | None = None
    model_flops: int | None = None
    cost: StepCost | None = None
    communication_s: float | None = None
    tier_s: Mapping[str, float] | None = None
    predicted: Prediction | None = None
    mfu: float | None = None
    energy: Energy | None = None
    findings: tuple[Finding, ...] = ()
    infeasible: str | None = None
    failure: str | None = None
    emulated: bool = False
    notes: tuple[str, ...] = ()

    @property
    def refusal(self) -> Refusal | None:
        """What the compiler said when the program did not fit, None when it compiled or was never tried."""
        return self.program.refusal if self.program is not None else None

    @property
    def step_time_s(self) -> float | None:
        """The predicted step time; None where a part of it is unknown."""
        return self.predicted.timeline.step_time_s if self.predicted is not None else None

    @property
    def generation(self) -> Generation | None:
        """What one generated token costs; None unless this is a decode step that was analysed."""
        if self.analysis is None or self.case.workload != "decode":
            return None
        moved = None if self.cost is None else (self.cost.read_bytes, self.cost.written_bytes)
        return generation(self.case.batch, moved, self.analysis.totals.wire_bytes[1])

    @property
    def tokens_per_s_per_device(self) -> float | None:
        """Tokens of the global batch per second and device; of a decode step one per sequence."""
        if not self.step_time_s:
            return None
        return _tokens(self.case) / self.step_time_s / math.prod(self.case.plan.axes.values())


def report_case(
    case: Case, program: Program, machine: Machine, *, attention_kernel: str = ATTENTION_KERNEL
) -> CaseReport:
    """What the compiled program of a case costs on `machine`. A refused program has a memory verdict and no
    analysis. attention_kernel: as in `predict`. Raises ParseError when the compiled program cannot be read.
    """
    known = _before_reading(case, program, machine)
    if program.refusal is not None:
        return known
    (part,) = attribute(program, machine=machine)
    analysis = part.analysis
    cost = step_cost(part.module, program.backend)
    peak = temporaries_at_peak(part.module, part.graph, program.backend)
    time = communication(analysis, machine)
    predicted = predict(part, cost, machine, attention_kernel=attention_kernel)
    return replace(
        known,
        analysis=analysis,
        owners=memory_owners(program.arguments, case.workload, peak, program.memory),
        hardware_flops=cost.flops.total,
        cost=cost,
        communication_s=time.communication_s,
        tier_s=time.tier_s or None,
        predicted=predicted,
        mfu=_mfu(known.model_flops, predicted, machine),
        energy=_energy(case, predicted, machine),
        findings=audit(part, machine),
        notes=(*known.notes, *_flops_notes(cost.flops), *_prediction_notes(predicted)),
    )


def figures_of_case(case: Case, program: Program, machine: Machine) -> CaseReport:
    """What a baseline holds, in a fraction of the time of `report_case`: no timeline, audit or owners."""
    known = _before_reading(case, program, machine)
    if program.refusal is not None:
        return known
    (part,) = attribute(program, machine=machine)
    work = hardware_flops(part.module)
    notes = (*known.notes, *_flops_notes(work))
    return replace(known, analysis=part.analysis, hardware_flops=work.total, notes=notes)


def _before_reading(case: Case, program: Program, machine: Machine) -> CaseReport:
    """What is known of a case without its program's text."""
    fit = memory_report(program.memory, program.refusal, machine)
    return CaseReport(
        case=case,
        program=program,
        memory=fit if fit.peak_bytes is not None else None,
        memory_band=memory_band(program.memory, program.autotuned, _compute_major(machine)),
        model_flops=model_flops(
            case.model,
            case.batch,
            case.seq,
            case.workload,
            chunk=case.plan.method.chunk,
            frozen=case.plan.method.lora is not None,
        ),
        emulated=machine.emulated,
        notes=_notes(case, program, fit),
    )


def _mfu(model: int | None, predicted: Prediction | None, machine: Machine) -> float | None:
    peak = machine.chip.bf16_flops_per_s
    if model is None or predicted is None or not predicted.timeline.step_time_s or peak is None:
        return None
    return model / (predicted.timeline.step_time_s * peak * machine.num_devices)


def _tokens(case: Case) -> int:
    """Of the global batch; of a decode step one per sequence."""
    return case.batch * (1 if case.workload == "decode" else case.seq)


def _energy(case: Case, predicted: Prediction | None, machine: Machine) -> Energy | None:
    """None without a step time."""
    step_time_s = predicted.timeline.step_time_s if predicted is not None else None
    if predicted is None or not step_time_s or predicted.busy_s is None:
        return None
    return step_energy(machine, step_time_s, predicted.busy_s / step_time_s, _tokens(case))


def unanswered(case: Case, *, infeasible: str | None = None, failure: str | None = None) -> CaseReport:
    """The report of a case that was not compiled, and why. Raises UserError for an unknown machine."""
    emulated = load_machine(case.machine).emulated
    return CaseReport(case=case, infeasible=infeasible, failure=failure, emulated=emulated)


def _notes(case: Case, program: Program, fit: MemoryFit) -> tuple[str, ...]:
    notes = (
        *case.notes(),
        *program.notes,
        fit.note,
        NOT_AUTOTUNED_NOTE if program.autotuned is False else "",
    )
    return tuple(note for note in notes if note)


def _compute_major(machine: Machine) -> int | None:
    """Of the GPU's compute capability; None for other chips."""
    name = machine.chip.compile_as if machine.chip.family == "gpu" else None
    return None if name is None else load_gpu_target(name).compute_major


def _flops_notes(work: Flops) -> tuple[str, ...]:
    names = ", ".join(dict.fromkeys(one.what for one in work.unknown))
    missing = (f"FLOPs of {names} are not counted: {work.unknown[0].why}",) if work.unknown else ()
    return (*work.notes, *missing)


def _prediction_notes(predicted: Prediction | None) -> tuple[str, ...]:
    """What keeps the step time from being known."""
    unknown = predicted.timeline.unknown if predicted is not None else ()
    more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
    names = ", ".join(unknown[:3]) + more
    return (f"no step time: how long {names} takes is not known",) if unknown else ()


def to_json(report: CaseReport, *, instructions: bool = False) -> Json:
    """The report as a document of schema `shardlab.report/1`: what is not known is absent, never zero.

    instructions: with FLOPs and HBM traffic of every instruction, and what of these was not counted.
    """
    document: Json = {"schema": SCHEMA, "case": case_json(report), "notes": list(report.notes)}
    if report.infeasible is not None:
        document["infeasible"] = report.infeasible
    if report.failure is not None:
        document["failure"] = report.failure
    if report.analysis is not None:
        document["analysis"] = report.analysis.to_json()
        document["audit"] = [finding_json(finding) for finding in report.findings]
    members: Json = {
        "memory": _memory_json(report),
        "compute": _compute_json(report),
        "prediction": _prediction_json(report),
        "generation": _known(**asdict(report.generation)) if report.generation is not None else {},
    }
    if instructions and report.cost is not None:
        missing = (*report.cost.flops.unknown, *report.cost.not_counted)
        members |= {
            "instructions": [_instruction_json(row) for row in report.cost.instructions],
            "not_counted": [asdict(one) for one in dict.fromkeys(missing)],
        }
    return document | {key: value for key, value in members.items() if value}


def _prediction_json(report: CaseReport) -> Json:
    """Seconds of one step. communication_s: while at least one collective is under way; without a timeline
    the sum of all, each over its slowest link.
    """
    predicted = report.predicted
    line = predicted.timeline if predicted is not None else None
    known = line is not None and line.communication_s is not None
    members = _known(
        step_time_s=report.step_time_s,
        compute_s=line.compute_s if line is not None else None,
        communication_s=line.communication_s if line is not None and known else report.communication_s,
        exposed_communication_s=line.exposed_communication_s if line is not None else None,
        mfu=report.mfu,
        tokens_per_s_per_device=report.tokens_per_s_per_device,
        communication_by_tier_s=dict(report.tier_s) if report.tier_s else None,
        **(asdict(report.energy) if report.energy is not None else {}),
    )
    if predicted is None or line is None:
        return members
    path = [
        _known(**asdict(entry) | {"axes": None if entry.axes is None else list(entry.axes)})
        for entry in line.critical_path[:PATH_ENTRIES]
    ]
    if line.stages:
        members["stages"] = [
            {"devices": devices} | {key: value for key, value in asdict(stage).items() if key != "kind"}
            for devices, stage in zip(predicted.devices, line.stages, strict=True)
        ]
    members |= {"error_class": predicted.error_class, "basis": dict(predicted.basis)}
    return members | ({"critical_path": path} if path else {"unknown": list(line.unknown)})


def _compute_json(report: CaseReport) -> Json:
    """Per device and step, but for `model_flops`, which is of all devices."""
    members = _known(flops=report.hardware_flops, model_flops=report.model_flops)
    cost = report.cost
    if cost is None:
        return members
    return members | _known(
        matmul_flops=cost.flops.matmul,
        attention_flops=cost.flops.attention,
        recompute_flops=cost.recompute_flops,
        hbm_read_bytes=cost.read_bytes,
        hbm_written_bytes=cost.written_bytes,
        other_memory_bytes=cost.other_bytes,
        host_bytes=cost.host_bytes or None,
        flops_by_dtype=dict(cost.flops.by_dtype) or None,
    )


def _instruction_json(row: InstructionCost) -> Json:
    """FLOPs and bytes per execution; `flops_per_byte` is the arithmetic intensity."""
    traffic = row.traffic
    return {
        "name": row.name,
        "computation": row.computation,
        "kind": row.kind,
        "executions": list(row.executions),
        "matmul_flops": row.matmul_flops,
        "attention_flops": row.attention_flops,
        "recompute": row.recompute,
        **_known(
            hbm_read_bytes=traffic.read_bytes if traffic else None,
            hbm_written_bytes=traffic.written_bytes if traffic else None,
            other_memory_bytes=traffic.other_bytes if traffic else None,
            flops_per_byte=None if row.intensity is None else float(row.intensity),
        ),
        "phase": row.phase,
        "layer": row.layer,
        "op_name": row.op_name,
        "source": row.source,
    }


def case_json(report: CaseReport) -> Json:
    """The `case` member: what was compiled, for which machine, with the names the plan's rules amount to."""
    case, plan = report.case, report.case.plan
    return {
        "plan": plan.name,
        "path": plan.path,
        "strategies": list(strategy_names(plan)),
        "axes": dict(plan.axes),
        "order": plan.order if isinstance(plan.order, str) else list(plan.order),
        "method": plan.method.model_dump(exclude_none=True),
        "flags": list(plan.flags),
        "model": case.model.name,
        "machine": case.machine,
        "batch": case.batch,
        "seq": case.seq,
        "workload": case.workload,
        "emulated": report.emulated,
    }


def _memory_json(report: CaseReport) -> Json:
    memory = _known(**asdict(report.memory)) if report.memory is not None else {}
    if not memory.get("note"):
        memory.pop("note", None)
    if report.memory_band is not None:
        memory["band_bytes"] = list(report.memory_band)
    if report.owners is not None:
        memory["owners"] = dict(report.owners.by_owner)
        memory["unexplained_bytes"] = report.owners.unexplained_bytes
    refusal = report.refusal
    if refusal is not None:
        memory |= _known(needed_bytes=refusal.needed_bytes, largest_batch=refusal.largest_batch)
    return memory


def _known(**members: object) -> Json:
    return {key: value for key, value in members.items() if value is not None}
