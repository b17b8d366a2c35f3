"""The page of `shardlab explain`: one plan on one machine, what it costs and why."""

from __future__ import annotations

from fractions import Fraction

from shardlab.case_document import PATH_ENTRIES
from shardlab.case_report import EMULATED_NOTE, CaseReport
from shardlab.compare import refusal_reason
from shardlab.report.breakdown import TIME_MEANS, TOP, audit_tables, mesh_text, traffic_tables
from shardlab.report.comparison import time_text
from shardlab.report.cost import cost_facts, cost_tables, token_text
from shardlab.report.figures import shares
from shardlab.report.page import Column, Page, Table, cell, code
from shardlab.report.step import path_tables, step_facts
from shardlab.spec.names import strategy_names
from shardlab.spec.step import StepCase
from shardlab.units import format_bytes, format_count


def explain_page(report: CaseReport, top: int = TOP) -> Page:
    """One case: what it is, whether it fits, what it moves and why. `top`: rows of the collectives table."""
    case = report.case
    title = f"{case.plan.name} on {case.machine}: {case.subject}, {case.workload}"
    notes = (*((EMULATED_NOTE,) if report.emulated else ()), *report.notes)
    if report.analysis is None:
        return Page(title=title, facts=(*_case_facts(report), ("no analysis", _why(report))), notes=notes)
    facts = (*_case_facts(report), *_figure_facts(report))
    tables = (
        *owner_tables(report),
        *path_tables(report, PATH_ENTRIES),
        *traffic_tables(report.analysis, top, report.tier_s or {}),
        *(cost_tables(report.cost, top) if report.cost is not None else ()),
        *audit_tables(report.findings),
        *warning_tables(report),
    )
    return Page(title=title, facts=facts, tables=tables, notes=notes)


def _why(report: CaseReport) -> str:
    if report.infeasible is not None:
        return f"infeasible: {report.infeasible}"
    return report.failure or refusal_reason(report) or "not analysed"


def _case_facts(report: CaseReport) -> tuple[tuple[str, str], ...]:
    case = report.case
    described = (("plan", case.plan.description),) if case.plan.description else ()
    mesh = ("mesh", mesh_text(case.plan.axes))
    if isinstance(case, StepCase):
        return (*described, mesh, *_step_facts(report))
    work = f"{case.workload}, batch {case.batch} sequences of {case.seq} tokens"
    return (*described, ("strategy", ", ".join(strategy_names(case.plan))), mesh, ("workload", work))


def _step_facts(report: CaseReport) -> tuple[tuple[str, str], ...]:
    """What the user's step function was given, and the programs that it returned."""
    program = report.program
    if program is None:
        return ()
    given = ", ".join(f"{name} {value}" for name, value in program.given.items())
    names = ", ".join(f"{one.runs_per_step} × {one.name}" for one in program.programs)
    return (*((("given", given),) if given else ()), ("programs", names))


def _figure_facts(report: CaseReport) -> tuple[tuple[str, str], ...]:
    analysis = report.analysis
    facts = [("memory", _memory_text(report))] if report.memory is not None else []
    if report.hardware_flops is not None:
        facts.append(("FLOPs", f"{format_count(report.hardware_flops)} per device and step, as compiled"))
    if report.model_flops is not None:
        facts.append(("model FLOPs", f"{format_count(report.model_flops)} per step, all devices"))
    facts += cost_facts(report)
    if analysis is not None:
        facts.append(("sent", f"{format_bytes(analysis.totals.wire_bytes)} per device and step"))
    if (text := token_text(report)) is not None:
        facts.append(("per token", f"{text}, per device; a step generates {report.tokens}"))
    if report.communication_s is not None:
        facts.append(("comm. time", f"{time_text(report)} {TIME_MEANS}"))
    return (*facts, *step_facts(report))


def _memory_text(report: CaseReport) -> str:
    memory = report.memory
    if memory is None or memory.needed_bytes is None or memory.peak_bytes is None:
        return "unknown"
    parts = [
        f"{format_bytes(memory.needed_bytes)} reserved",
        f"{format_bytes(memory.peak_bytes)} at the compiler's peak",
    ]
    if memory.argument_bytes is not None:
        parts.append(f"arguments {format_bytes(memory.argument_bytes)}")
    if memory.temp_bytes is not None:
        parts.append(f"temporaries {format_bytes(memory.temp_bytes)}")
    if memory.host_bytes is not None:
        parts.append(f"{format_bytes(memory.host_bytes)} in the host's memory beside it")
    if memory.limit_bytes is not None:
        parts.append(f"limit {format_bytes(memory.limit_bytes)} ({memory.limit_source})")
    if report.memory_band is not None:
        low, high = report.memory_band
        parts.append(f"a run, autotuned, between {format_bytes(low)} and {format_bytes(high)}")
    if memory.fits is not None:
        parts.append({"yes": "fits", "tight": "tight", "no": "does not fit"}[memory.fits])
    return ", ".join(parts)


def owner_tables(report: CaseReport) -> tuple[Table, ...]:
    """Who holds the memory at the step's fullest moment, and what of the reserved is not explained by it."""
    owners = report.owners
    if owners is None:
        return ()
    sizes = [(name, Fraction(size)) for name, size in owners.by_owner.items()]
    portions = shares((size, size) for _, size in sizes)
    rows = tuple(
        (cell(name), cell(format_bytes(size)), cell(portion))
        for (name, size), portion in zip(sizes, portions, strict=True)
    )
    rest = owners.unexplained_bytes
    what = "more reserved, for padding and gaps" if rest >= 0 else "counted twice that the compiler shares"
    columns = (Column("held by"), Column("bytes", "right"), Column("share", "right"))
    caption = f"at the step's fullest moment; {format_bytes(abs(rest))} {what}"
    return (Table(title="Memory", columns=columns, rows=rows, caption=caption),)


def warning_tables(report: CaseReport) -> tuple[Table, ...]:
    """What the compiler warned of, and the flags that it rejected."""
    program = report.program
    if program is None:
        return ()
    warned = tuple((cell(w.kind, "warn"), code(", ".join(w.names) or w.text)) for w in program.warnings)
    rejected = tuple((code(flag), cell(why, "warn")) for flag, why in program.flags.rejected)
    tables = (
        Table(
            title="The compiler warned",
            columns=(Column("what", keep=False), Column("names", keep=False)),
            rows=warned,
        ),
        Table(
            title="Flags rejected",
            columns=(Column("flag", keep=False), Column("why", keep=False)),
            rows=rejected,
        ),
    )
    return tuple(table for table in tables if table.rows)
