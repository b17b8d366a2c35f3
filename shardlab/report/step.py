"""The predicted step in facts and a table: what it takes, and what it waits for."""

from __future__ import annotations

from shardlab.case_report import CaseReport
from shardlab.report.figures import axes_text, percent
from shardlab.report.page import Column, Line, Table, cell, code
from shardlab.units import format_count, format_seconds

_CAPTION = "all executions of an instruction together; the entries of the whole path add up to the step"


def step_facts(report: CaseReport) -> tuple[tuple[str, str], ...]:
    """The step time with its error class, what it is made of, and what the prices rest on."""
    predicted = report.predicted
    if predicted is None or predicted.timeline.step_time_s is None:
        return ()
    line = predicted.timeline
    parts = [
        f"compute {format_seconds(line.compute_s or 0.0)}",
        f"communication {format_seconds(line.communication_s or 0.0)}",
        f"of which exposed {format_seconds(line.exposed_communication_s or 0.0)}",
    ]
    if line.root.waited_s:
        parts.append(f"waiting for other stages {format_seconds(line.root.waited_s)}")
    used = [f"MFU {percent(report.mfu)}"] if report.mfu is not None else []
    if report.tokens_per_s_per_device is not None:
        used.append(f"{report.tokens_per_s_per_device:,.0f} tokens/s per device")
    prices = "; ".join(f"{part} {basis}" for part, basis in predicted.basis)
    return (
        ("step time", f"{format_seconds(line.step_time_s)} predicted, {predicted.error_class}"),
        *_turn_facts(predicted.turns_s),
        ("step is", ", ".join(parts)),
        *_free_facts(report),
        *((("use", ", ".join(used)),) if used else ()),
        *energy_facts(report),
        ("prices", prices),
    )


def _turn_facts(turns_s: float | None) -> tuple[tuple[str, str], ...]:
    """What a step over gloo leaves open."""
    if turns_s == 0:
        return ()
    less = "unknown how much" if turns_s is None else format_seconds(turns_s)
    taken = "half of gloo's collectives are taken as going in turn, but for those between stages, which do"
    return (("turns", f"{less} less or more when none or all go in turn; {taken}"),)


def _free_facts(report: CaseReport) -> tuple[tuple[str, str], ...]:
    """What a pipeline would gain as a program per stage."""
    free_s, step_s = report.free_step_s, report.step_time_s
    if free_s is None or not step_s:
        return ()
    saved = percent(1 - free_s / step_s)
    return (("stages apart", f"{format_seconds(free_s)} as a program each, {saved} less"),)


def energy_facts(report: CaseReport) -> tuple[tuple[str, str], ...]:
    """Joules and money of a step, where the machine has figures for them."""
    energy, parts = report.energy, []
    if energy is not None and energy.energy_j is not None and energy.node_power_w is not None:
        parts.append(f"{format_count(energy.energy_j, 'J')} per step")
        if energy.joules_per_token is not None:
            parts.append(f"{energy.joules_per_token:.3g} J per token")
        parts.append(f"{format_count(energy.node_power_w, 'W')} per host")
    if energy is not None and energy.usd_per_million_tokens is not None:
        parts.append(f"${energy.usd_per_million_tokens:.3g} per million tokens")
    return (("energy", ", ".join(parts)),) if parts else ()


def path_tables(report: CaseReport, top: int) -> tuple[Table, ...]:
    """The `top` entries of the critical path; none without a step time."""
    predicted = report.predicted
    if predicted is None or not predicted.timeline.step_time_s:
        return ()
    step_s, path = predicted.timeline.step_time_s, predicted.timeline.critical_path
    rest = sum(entry.time_s for entry in path[top:])
    left_out = f"{len(path) - top} smaller ones not shown, {format_seconds(rest)} together; " if rest else ""
    rows = tuple(
        (
            cell(format_seconds(entry.time_s), "strong"),
            cell(percent(entry.time_s / step_s)),
            (Line(entry.kind), *code(entry.name)),
            cell(entry.stream),
            cell(axes_text(entry.axes) if entry.axes is not None else ""),
            code(entry.layer),
        )
        for entry in path[:top]
    )
    columns = (
        Column("time", "right"),
        Column("share", "right"),
        Column("instruction", keep=False),
        Column("stream", keep=False),
        Column("axes", keep=False),
        Column("layer", keep=False),
    )
    return (Table(title="Critical path", columns=columns, rows=rows, caption=left_out + _CAPTION),)
