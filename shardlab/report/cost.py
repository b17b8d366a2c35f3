"""FLOPs and HBM traffic of a step, in facts and tables: what the report of one case says of its compute."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

from shardlab.analysis import ByteRange
from shardlab.case_report import CaseReport
from shardlab.cost.instructions import InstructionCost, StepCost
from shardlab.report.figures import NONE, most, percent, scaled, times
from shardlab.report.page import Cell, Column, Line, Table, cell, code
from shardlab.units import format_bytes, format_count

Amount = Callable[[InstructionCost], int | None]
Format = Callable[[ByteRange | Fraction], str]

_FLOPS_CAPTION = "of a conditional the dearest branch counts; intensity is FLOPs per byte of HBM traffic"
_BYTES_CAPTION = (
    "each operand read and each result written once, slices as far as they go; kernels that read again, "
    "and collectives, move more"
)


def cost_facts(report: CaseReport) -> list[tuple[str, str]]:
    """What the FLOPs are made of, how many of them the model asks for, and the bytes that go with them."""
    cost = report.cost
    if cost is None:
        return []
    flops = cost.flops
    parts = [
        ("matrix products", flops.matmul),
        ("attention", flops.attention),
        ("recomputed", cost.recompute_flops),
    ]
    facts = [("FLOPs of", ", ".join(f"{name} {format_count(value)}" for name, value in parts if value != 0))]
    devices = math.prod(report.case.plan.axes.values())
    if flops.total and report.model_flops:
        share = percent(report.model_flops / (flops.total * devices))
        facts.append(("model share", f"{share} of the FLOPs as compiled are the model's"))
    moved = f"{format_bytes(cost.read_bytes)} read, {format_bytes(cost.written_bytes)} written"
    other = f"; {format_bytes(cost.other_bytes)} in other memory" if cost.other_bytes != 0 else ""
    facts.append(("HBM traffic", f"{moved} per device and step{other}"))
    return [fact for fact in facts if fact[1]]  # a program without products has no parts


def cost_tables(cost: StepCost, top: int) -> tuple[Table, ...]:
    """The instructions with most FLOPs and with most traffic, and those that are not counted."""
    rows = cost.instructions
    tables = (
        _heaviest("Products", "FLOPs", rows, lambda row: row.flops, format_count, _FLOPS_CAPTION, top),
        _heaviest(
            "Memory traffic", "HBM", rows, lambda row: row.hbm_bytes, format_bytes, _BYTES_CAPTION, top
        ),
        _not_counted(cost),
    )
    return tuple(table for table in tables if table.rows)


def _heaviest(
    title: str,
    header: str,
    rows: Sequence[InstructionCost],
    amount: Amount,
    text: Format,
    caption: str,
    top: int,
) -> Table:
    """The `top` rows by amount times executions; the caption says what the others come to."""
    sums = {id(row): scaled(row.executions, Fraction(amount(row) or 0)) for row in rows if amount(row)}
    ordered = sorted(
        (row for row in rows if id(row) in sums), key=lambda row: (-most(sums[id(row)]), row.name)
    )
    rest = sum((most(sums[id(row)]) for row in ordered[top:]), Fraction(0))
    left_out = f"{len(ordered) - top} smaller ones not shown, {text(rest)} together; " if rest else ""
    return Table(
        title=title,
        columns=(
            Column(header, "right"),
            Column("instruction", keep=False),
            Column("FLOP/B", "right"),
            Column("where", keep=False),
        ),
        rows=tuple(_row(row, sums[id(row)], amount, text) for row in ordered[:top]),
        caption=left_out + caption,
    )


def _row(row: InstructionCost, total: ByteRange, amount: Amount, text: Format) -> tuple[Cell, ...]:
    each = text(Fraction(amount(row) or 0))
    phase = row.phase + (", recompute" if row.recompute else "")
    return (
        (Line(text(total), "strong"), Line(f"{times(row.executions)} {each}", "dim")),
        (Line(row.kind), *code(row.name)),
        cell(_intensity_text(row)),
        (Line(phase), *code(row.layer), *code(row.source)),
    )


def _intensity_text(row: InstructionCost) -> str:
    if row.intensity is None:
        return "unknown" if row.traffic is None else NONE  # nothing in HBM: all operands are in VMEM
    return format_count(row.intensity, "").rstrip()


def _not_counted(cost: StepCost) -> Table:
    missing = dict.fromkeys((*cost.flops.unknown, *cost.not_counted))
    columns = (Column("what"), Column("name", keep=False), Column("why", keep=False))
    rows = tuple((code(one.what), code(one.name), cell(one.why)) for one in missing)
    return Table(title="FLOPs or traffic not counted", columns=columns, rows=rows)


def token_text(report: CaseReport) -> str | None:
    """`2.1 GB of HBM and 1.3 MB sent`, per generated token and device; None unless tokens are generated."""
    one = report.generation
    if one is None:
        return None
    hbm, sent = (
        "unknown" if value is None else format_bytes(round(value))
        for value in (one.hbm_bytes_per_token_per_device, one.wire_bytes_per_token_per_device)
    )
    return f"{hbm} of HBM and {sent} sent"
