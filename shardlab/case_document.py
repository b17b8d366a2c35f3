"""A case report as JSON (`shardlab.report/1`): what is not known is absent, never zero."""

from __future__ import annotations

from dataclasses import asdict

from shardlab.audit import finding_json
from shardlab.case_report import CaseReport
from shardlab.cost.instructions import InstructionCost
from shardlab.spec.names import strategy_names
from shardlab.spec.step import StepCase

SCHEMA = "shardlab.report/1"
PATH_ENTRIES = 12  # of the critical path in the JSON and on the page

Json = dict[str, object]


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
        free_stages_step_time_s=report.free_step_s,
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
    if predicted.turns_s != 0:  # of gloo alone
        members["turns_s"] = predicted.turns_s
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
    document: Json = {
        "plan": plan.name,
        "path": plan.path,
        "strategies": list(strategy_names(plan)),
        "axes": dict(plan.axes),
        "order": plan.order if isinstance(plan.order, str) else list(plan.order),
        "method": plan.method.model_dump(exclude_none=True),
        "flags": list(plan.flags),
        "machine": case.machine,
        "workload": case.workload,
        "emulated": report.emulated,
    }
    if isinstance(case, StepCase):
        for member in ("strategies", "method"):  # of rules that the step may follow or not
            del document[member]
        return document | {"step": case.step} | _step_json(report)
    return document | {"model": case.model.name, "batch": case.batch, "seq": case.seq}


def _step_json(report: CaseReport) -> Json:
    """What the step function was given, and the programs that it returned."""
    program = report.program
    if program is None:
        return {}
    names = [{"name": one.name, "runs_per_step": one.runs_per_step} for one in program.programs]
    return {**program.given, "programs": names}


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
