"""What is known of one case: the record behind `explain` and each row of `compare`.

What a stage could not know is None; never zero. `case_document` writes it as JSON.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from shardlab.analysis import Analysis, Attributed, attribute, merge
from shardlab.audit import Finding, audit_parts
from shardlab.cost.compute_time import ATTENTION_KERNEL
from shardlab.cost.energy import Energy, step_energy
from shardlab.cost.flops import Flops, hardware_flops, model_flops
from shardlab.cost.generation import Generation, generation
from shardlab.cost.instructions import StepCost, step_cost
from shardlab.cost.liveness import temporaries_at_peak
from shardlab.cost.memory import MemoryFit, memory_report
from shardlab.cost.network import communication
from shardlab.cost.owners import Owners, memory_band, memory_owners
from shardlab.cost.together import CostPart, costs_together, flops_together
from shardlab.hardware.catalog import load_machine
from shardlab.hardware.data_files import load_gpu_target
from shardlab.hardware.machine import Machine
from shardlab.prediction import Prediction, free_stages_of, predict, predictions_together
from shardlab.program import Argument, Program, Refusal
from shardlab.spec.pipeline import schedule_of, stage_axis
from shardlab.spec.step import AnyCase, StepCase

EMULATED_NOTE = (
    "emulated devices show what the partitioner does, not what a backend does: "
    "bf16 collectives run in f32 and gradients are all-reduced"
)
NOT_AUTOTUNED_NOTE = "compiled ahead of time, not autotuned: temporary memory may differ in a real run"

SEVERAL_NOTE = (
    "several programs: memory is that of the one that needs most, without what others keep meanwhile; "
    "they run one after another, with nothing between them"
)


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
    tier_s: the same per tier. predicted: the timeline of a step. free_step_s: of a pipeline, the step where
    each stage is a program of its own and waits for nothing but what it needs. mfu: model FLOPs over what all
    devices could do in that step at their bf16 peak. findings: of the audit. emulated: never ranked among
    real ones.
    """

    case: AnyCase
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
    free_step_s: float | None = None
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
        tokens = self.tokens
        if self.analysis is None or self.case.workload != "decode" or tokens is None:
            return None
        moved = None if self.cost is None else (self.cost.read_bytes, self.cost.written_bytes)
        return generation(tokens, moved, self.analysis.totals.wire_bytes[1])

    @property
    def tokens(self) -> int | None:
        """Of the global batch; of a decode step one per sequence. None for a step function that did not ask
        for both batch and seq."""
        batch, seq = self.case.batch, self.case.seq
        if isinstance(self.case, StepCase):
            given = self.program.given if self.program is not None else {}
            batch, seq = (
                value if name in given else None for name, value in (("batch", batch), ("seq", seq))
            )
        if batch is None or (seq is None and self.case.workload != "decode"):
            return None
        return batch if self.case.workload == "decode" else batch * (seq or 0)

    @property
    def tokens_per_s_per_device(self) -> float | None:
        """Tokens of the global batch per second and device; of a decode step one per sequence."""
        if not self.step_time_s or self.tokens is None:
            return None
        return self.tokens / self.step_time_s / math.prod(self.case.plan.axes.values())


def report_case(
    case: AnyCase, program: Program, machine: Machine, *, attention_kernel: str = ATTENTION_KERNEL
) -> CaseReport:
    """What the compiled program of a case costs on `machine`. A refused program has a memory verdict and no
    analysis; of several programs the memory is that of the one that needs most. attention_kernel: as in
    `predict`. Raises ParseError when the compiled program cannot be read.
    """
    known = _before_reading(case, program, machine)
    if program.refusal is not None:
        return known
    parts = tuple(attribute(program, machine=machine))
    analysis = merge([part.per_step for part in parts])
    costs = [step_cost(part.module, program.backend) for part in parts]
    cost = costs_together(
        [CostPart(part.module.name, part.runs_per_step, one) for part, one in zip(parts, costs, strict=True)]
    )
    fullest = _fullest(program, machine)
    full = parts[program.programs.index(fullest)]
    peak = temporaries_at_peak(full.module, full.graph, program.backend)
    time = communication(analysis, machine)
    predicted = _predicted(parts, costs, machine, attention_kernel)
    reported = replace(
        known,
        analysis=analysis,
        owners=memory_owners(_arguments(case, fullest), case.workload, peak, fullest.memory),
        hardware_flops=cost.flops.total,
        cost=cost,
        communication_s=time.communication_s,
        tier_s=time.tier_s or None,
        predicted=predicted,
        free_step_s=_free_step_s(case, parts, costs, machine, attention_kernel),
        mfu=_mfu(known.model_flops, predicted, machine),
        findings=audit_parts(parts, machine),
        notes=(*known.notes, *_flops_notes(cost.flops), *_prediction_notes(predicted)),
    )
    return replace(reported, energy=_energy(reported.tokens, predicted, machine))


def _model_flops(case: AnyCase) -> int | None:
    """Nobody knows what the user's own step needs."""
    if isinstance(case, StepCase):
        return None
    frozen = case.plan.method.lora is not None
    chunk = case.plan.method.chunk
    return model_flops(case.model, case.batch, case.seq, case.workload, chunk=chunk, frozen=frozen)


def _arguments(case: AnyCase, program: Program) -> tuple[Argument, ...] | None:
    """Those whose meaning is known: nobody says which of a user's arguments are parameters."""
    return None if isinstance(case, StepCase) else program.arguments


def _predicted(
    parts: tuple[Attributed, ...], costs: list[StepCost], machine: Machine, kernel: str
) -> Prediction | None:
    return predictions_together(
        [
            (part.module.name, part.runs_per_step, predict(part, cost, machine, attention_kernel=kernel))
            for part, cost in zip(parts, costs, strict=True)
        ]
    )


def _free_step_s(
    case: AnyCase, parts: tuple[Attributed, ...], costs: list[StepCost], machine: Machine, kernel: str
) -> float | None:
    """None where there is no pipeline, or no step time."""
    axis = None if isinstance(case, StepCase) else stage_axis(case.plan)
    if axis is None or len(parts) != 1:
        return None
    free = free_stages_of(parts[0], schedule_of(case.plan), axis)
    found = predict(parts[0], costs[0], machine, attention_kernel=kernel, free=free) if free else None
    return found.timeline.step_time_s if found is not None else None


def figures_of_case(case: AnyCase, program: Program, machine: Machine) -> CaseReport:
    """What a baseline holds, in a fraction of the time of `report_case`: no timeline, audit or owners."""
    known = _before_reading(case, program, machine)
    if program.refusal is not None:
        return known
    parts = tuple(attribute(program, machine=machine))
    work = flops_together([(hardware_flops(part.module), part.runs_per_step) for part in parts])
    analysis = merge([part.per_step for part in parts])
    notes = (*known.notes, *_flops_notes(work))
    return replace(known, analysis=analysis, hardware_flops=work.total, notes=notes)


def _before_reading(case: AnyCase, program: Program, machine: Machine) -> CaseReport:
    """What is known of a case without its program's text."""
    fullest = _fullest(program, machine)
    fit = memory_report(fullest.memory, program.refusal, machine)
    return CaseReport(
        case=case,
        program=program,
        memory=fit if fit.peak_bytes is not None else None,
        memory_band=memory_band(fullest.memory, program.autotuned, _compute_major(machine)),
        model_flops=_model_flops(case),
        emulated=machine.emulated,
        notes=_notes(case, program, fit),
    )


def _fullest(program: Program, machine: Machine) -> Program:
    """Of a step's programs the one that needs most memory."""

    def needed(one: Program) -> int:
        return memory_report(one.memory, one.refusal, machine).needed_bytes or 0

    return max(program.programs, key=needed)


def _mfu(model: int | None, predicted: Prediction | None, machine: Machine) -> float | None:
    peak = machine.chip.bf16_flops_per_s
    if model is None or predicted is None or not predicted.timeline.step_time_s or peak is None:
        return None
    return model / (predicted.timeline.step_time_s * peak * machine.num_devices)


def _energy(tokens: int | None, predicted: Prediction | None, machine: Machine) -> Energy | None:
    """None without a step time."""
    step_time_s = predicted.timeline.step_time_s if predicted is not None else None
    if predicted is None or not step_time_s or predicted.busy_s is None:
        return None
    return step_energy(machine, step_time_s, predicted.busy_s / step_time_s, tokens)


def unanswered(case: AnyCase, *, infeasible: str | None = None, failure: str | None = None) -> CaseReport:
    """The report of a case that was not compiled, and why. Raises UserError for an unknown machine."""
    emulated = load_machine(case.machine).emulated
    return CaseReport(case=case, infeasible=infeasible, failure=failure, emulated=emulated)


def _notes(case: AnyCase, program: Program, fit: MemoryFit) -> tuple[str, ...]:
    notes = (
        *(() if isinstance(case, StepCase) else case.notes()),
        *program.notes,
        SEVERAL_NOTE if program.then else "",
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
