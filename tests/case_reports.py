"""Case reports made by hand, with figures whose sums can be seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction

from shardlab.analysis import Analysis, CollectiveRow, ModuleFacts, Totals
from shardlab.case_report import CaseReport
from shardlab.cost.memory import MemoryFit
from shardlab.program import Program, Refusal
from shardlab.spec.case import Case
from shardlab.spec.models import ModelConfig
from shardlab.spec.plan import Plan

GB = 10**9
MODEL = ModelConfig(
    name="tiny", layers=2, embed=64, heads=8, kv_heads=8, head_dim=8, mlp=256, vocab=256, context=128
)


def plan(name: str, axes: Mapping[str, int] | None = None) -> Plan:
    """A plan with FSDP rules over its first axis, unchecked."""
    axes = dict(axes or {"fsdp": 8})
    first = next(iter(axes))
    rules = {"embed": (first,)}
    return Plan(name=name, axes=axes, params=rules, optimizer=rules, activations={"batch": (first,)})


def case(name: str = "fsdp8", machine: str = "h100:1x8") -> Case:
    """One training case of eight sequences."""
    return Case(plan=plan(name), model=MODEL, machine=machine, batch=8, seq=128)


def collective(name: str = "all-gather.1", **changes: object) -> CollectiveRow:
    """An all-gather of 8 GB over 8 devices: (8-1)/8 · 8 GB = 7 GB on the wire, twice a step."""
    row = CollectiveRow(
        name=name,
        kind="all-gather",
        axes=("fsdp",),
        tier="nvlink",
        group_size=8,
        num_groups=1,
        executions=(2, 2),
        asynchronous=True,
        dtypes=("bf16",),
        payload_bytes=8 * GB,
        wire_bytes=Fraction(7 * GB),
        fabric_bytes=Fraction(56 * GB),
        traffic={"nvlink": Fraction(7 * GB)},
        tier_s={"nvlink": 0.02},
        time_s=0.02,
        phase="forward",
        layer="layers/mlp/gate",
        source="transformer.py:112",
    )
    return replace(row, **changes)  # type: ignore[arg-type]


def analysis(*rows: CollectiveRow) -> Analysis:
    """The analysis of rows with exact executions, totals by hand: sums of executions x bytes."""
    rows = rows or (collective(),)
    sent = sum((row.executions[0] * row.wire_bytes for row in rows), Fraction(0))
    payload = Fraction(sum(row.executions[0] * row.payload_bytes for row in rows))
    entry = {"payload_bytes": (payload, payload), "wire_bytes": (sent, sent)}
    return Analysis(
        modules=(ModuleFacts(name="jit_step", backend="gpu", num_devices=8, scheduled=True),),
        mesh={"fsdp": 8},
        machine="h100:1x8",
        collectives=rows,
        totals=Totals(
            payload_bytes=(payload, payload),
            wire_bytes=(sent, sent),
            by_kind={rows[0].kind: entry},
            by_axes={"fsdp": entry},
            by_phase={"forward": entry},
            by_layer={"layers/mlp/gate": entry},
            traffic={"nvlink": (sent, sent)},
        ),
        ledger=(),
    )


def memory(peak_gb: int = 60, limit_gb: int = 80) -> MemoryFit:
    """Peak against limit, in GB; what is over is the deficit."""
    over = max(0, peak_gb - limit_gb) * GB
    return MemoryFit(
        argument_bytes=40 * GB,
        temp_bytes=(peak_gb - 40) * GB,
        peak_bytes=peak_gb * GB,
        needed_bytes=peak_gb * GB,
        limit_bytes=limit_gb * GB,
        limit_source="by hand",
        deficit_bytes=over,
        fits="no" if over else "yes",
    )


def report(name: str = "fsdp8", seconds: float | None = 0.5, **changes: object) -> CaseReport:
    """An analysed case that fits and communicates for `seconds`."""
    made = CaseReport(
        case=case(name),
        analysis=analysis(),
        memory=memory(),
        hardware_flops=2 * 10**14,
        model_flops=16 * 10**14,
        communication_s=seconds,
        tier_s=None if seconds is None else {"nvlink": seconds},
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def emulated(name: str, wire_gb: int) -> CaseReport:
    """A case on eight emulated devices that sends so many GB."""
    wire_bytes = Fraction(wire_gb * GB)
    sent = analysis(collective(executions=(1, 1), wire_bytes=wire_bytes, tier_s=None, time_s=None))
    return report(name, None, case=case(name, "cpu:8"), analysis=sent, emulated=True)


def refused(name: str, needed_gb: int, limit_gb: int, largest_batch: int | None) -> CaseReport:
    """A case that the compiler refused for want of memory."""
    refusal = Refusal(needed_bytes=needed_gb * GB, limit_bytes=limit_gb * GB, largest_batch=largest_batch)
    program = Program(name=name, backend="tpu", hlo_text="", num_devices=8, refusal=refusal)
    return CaseReport(case=case(name), program=program)


def infeasible_report(reason: str) -> CaseReport:
    """A plan that cannot be put on its model or machine."""
    return CaseReport(case=case(), infeasible=reason)
