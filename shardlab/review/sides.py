"""One side of a diff, from whatever holds a step: an analysis, a report, a saved document, a program."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardlab.analysis import Analysis, Attributed, analysis_from_json, attribute, merge
from shardlab.analysis.document import SCHEMA as ANALYSIS
from shardlab.case_document import SCHEMA as REPORT
from shardlab.case_document import case_json
from shardlab.case_report import CaseReport
from shardlab.compare import SCHEMA as COMPARISON
from shardlab.compare import refusal_reason
from shardlab.cost.instructions import step_cost
from shardlab.cost.memory import MemoryFit, memory_report, peak_bytes, reserved_bytes
from shardlab.cost.together import flops_together
from shardlab.errors import Problem, UserError
from shardlab.hardware.machine import Machine
from shardlab.prediction import predict, predictions_together
from shardlab.program import Memory, Program
from shardlab.review.records import Side

Source = Side | Analysis | CaseReport | Program | Mapping[str, Any] | bytes | str | Path
MAX_DOCUMENT_BYTES = 1 << 30


def side_of(
    source: Source, name: str = "", *, axes: Mapping[str, int] | None = None, machine: Machine | None = None
) -> Side:
    """What is known of one side.

    source: a JSON document of `analyze` or `explain` (or its path), an Analysis, a CaseReport, a Program, or
    HLO as `analyze` takes it. axes, machine: as for `analyze`; what is analysed already keeps its own.
    Raises UserError or ParseError when the source is none of these, and UserError for a case that failed.
    """
    if isinstance(source, Side):
        return source
    if isinstance(source, Analysis):
        return Side(name=name or _module_names(source), analysis=source)
    if isinstance(source, CaseReport):
        return side_of_report(source, name)
    if isinstance(source, Mapping):
        return _side_of_document(source, name or "document")
    document = _document(source)
    if document is not None:
        return _side_of_document(document, name or str(source))
    return _side_of_hlo(source, name, axes, machine)


def side_of_report(report: CaseReport, name: str = "") -> Side:
    """A compiled case. Infeasible and too large are known as such. Raises UserError for one that failed."""
    name = name or f"{report.case.plan.name} on {report.case.machine}"
    if report.failure is not None:
        raise UserError(Problem(name, report.failure, "compile it by itself with: shardlab explain"))
    why_not = refusal_reason(report) if report.analysis is None else ""
    if report.infeasible is not None:
        why_not = f"infeasible: {report.infeasible}"
    return _with_memory(
        report.memory,
        name=name,
        analysis=report.analysis,
        flops=report.hardware_flops,
        step_time_s=report.step_time_s,
        case=case_json(report),
        why_not=why_not or "",
        notes=report.notes,
    )


def _side_of_hlo(source: Any, name: str, axes: Mapping[str, int] | None, machine: Machine | None) -> Side:
    parts = tuple(attribute(source, axes, None, machine))
    analysis = merge([part.per_step for part in parts])
    costs = [step_cost(part.module, part.analysis.modules[0].backend) for part in parts]
    work = flops_together([(cost.flops, part.runs_per_step) for part, cost in zip(parts, costs, strict=True)])
    known: dict[str, Any] = {
        "name": name or (_module_names(analysis) if not isinstance(source, str | Path) else _short(source)),
        "analysis": analysis,
        "flops": work.total,
        "notes": tuple(f"FLOPs of {one.what} are not counted" for one in work.unknown),
    }
    if len(parts) > 1 and any(part.program is None for part in parts):
        return Side(**known)  # dumps side by side: whether they are one step nobody says
    predicted = None
    if machine is not None:
        predicted = predictions_together(
            [
                (part.module.name, part.runs_per_step, predict(part, cost, machine))
                for part, cost in zip(parts, costs, strict=True)
            ]
        )
    known["step_time_s"] = predicted.timeline.step_time_s if predicted is not None else None
    return _with_memory(_memory(parts, machine), **known)


def _memory(parts: Sequence[Attributed], machine: Machine | None) -> MemoryFit | None:
    """Of a saved step that program's which needs most; None where one does not say, as a dump does not."""
    found = []
    for part in parts:
        if part.program is None or part.program.memory is None:
            return None
        memory = part.program.memory
        found.append(memory_report(memory, None, machine) if machine is not None else _unjudged(memory))
    return max(found, key=lambda fit: fit.needed_bytes or 0)


def _unjudged(memory: Memory) -> MemoryFit:
    """What a run needs, on no machine that would have a limit."""
    peak, note = peak_bytes(memory)
    needed = max((size for size in (peak, reserved_bytes(memory)) if size is not None), default=None)
    return MemoryFit(
        argument_bytes=memory.argument_bytes,
        temp_bytes=memory.temp_bytes,
        peak_bytes=peak,
        needed_bytes=needed,
        limit_bytes=None,
        limit_source="",
        deficit_bytes=None,
        fits=None,
        note=note,
    )


def _with_memory(memory: MemoryFit | None, **known: Any) -> Side:
    if memory is None:
        return Side(**known)
    return Side(memory_bytes=memory.needed_bytes, limit_bytes=memory.limit_bytes, fits=memory.fits, **known)


def _module_names(analysis: Analysis) -> str:
    return ", ".join(facts.name for facts in analysis.modules)


def _short(source: str | Path) -> str:
    """A path as given; HLO text is not a name."""
    return str(source) if "\n" not in str(source) else "<hlo>"


def _document(source: Program | bytes | str | Path) -> Mapping[str, Any] | None:
    """The JSON in a file, None where it is no JSON (then it is HLO, or a mistake that its reader names)."""
    if isinstance(source, Program | bytes) or (isinstance(source, str) and "\n" in source):
        return None
    path = Path(source)
    try:
        with path.open("rb") as file:
            if file.read(1) != b"{":
                return None
            text = b"{" + file.read(MAX_DOCUMENT_BYTES)
        document = json.loads(text)
    except OSError:
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(Problem(str(path), f"not JSON ({error})", "make it with --json > FILE")) from None
    return document if isinstance(document, dict) else None


def _side_of_document(document: Mapping[str, Any], name: str) -> Side:
    schema = document.get("schema")
    if schema == ANALYSIS:
        return Side(name=name, analysis=_analysis(document, name))
    if schema == COMPARISON and len(document.get("reports") or ()) == 1:
        return _side_of_document(document["reports"][0], name)
    if schema != REPORT:
        what = f"its schema is {str(schema)[:60]!r}"
        raise UserError(Problem(name, what, f"give a document of {ANALYSIS} or {REPORT}"))
    try:
        return _side_of_saved_report(document, name)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(Problem(name, f"not a report ({error})", "make it with: explain --json")) from None


def _side_of_saved_report(document: Mapping[str, Any], name: str) -> Side:
    if "failure" in document:
        raise UserError(Problem(name, f"holds a failure: {document['failure']}", "compile it again"))
    memory, found = document.get("memory", {}), document.get("analysis")
    why_not = "" if found is not None else "the compiler refused it: it does not fit in memory"
    if "infeasible" in document:
        why_not = f"infeasible: {document['infeasible']}"
    return Side(
        name=name,
        analysis=None if found is None else _analysis(found, name),
        memory_bytes=memory.get("needed_bytes"),
        limit_bytes=memory.get("limit_bytes"),
        fits=memory.get("fits"),
        flops=document.get("compute", {}).get("flops"),
        step_time_s=document.get("prediction", {}).get("step_time_s"),
        case=document.get("case", {}),
        why_not=why_not,
        notes=tuple(document.get("notes", ())),
    )


def _analysis(document: Mapping[str, Any], name: str) -> Analysis:
    try:
        return analysis_from_json(document)
    except UserError as error:
        raise UserError(*(Problem(name, one.what, one.fix) for one in error.problems)) from None
