"""A plan's committed baseline: what its step moves, holds and computes, small enough to read in a diff.

`plan.baseline.json` (`shardlab.baseline/1`) holds per device and step: bytes sent per set of mesh axes,
traffic per link, memory, FLOPs; and per kind and axes how often collectives run, for the reader.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from shardlab.analysis import Analysis, ByteRange, axes_key
from shardlab.errors import Problem, UserError
from shardlab.review.flows import flows_of
from shardlab.review.records import Side

SCHEMA = "shardlab.baseline/1"
SUFFIX = ".baseline.json"
CASE = ("step", "model", "machine", "batch", "seq", "workload")
TOTAL = "wire_bytes.total"
MEMORY = "memory.peak"
FLOPS = "compute.flops"
FIGURES = ("wire_bytes", "traffic", "memory", "compute")

# worse and better: beyond the tolerance. lost: known before, not now.
Outcome = Literal["same", "worse", "better", "lost"]
Figure = int | float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """figures: `wire_bytes.fsdp`, `traffic.nvlink`, `memory.peak` (bytes that a run needs), `compute.flops`,
    each the upper end per device and step; None where there is no bound. collectives: `all-gather over fsdp`
    -> executions per step. case, versions: what it was made from.
    """

    figures: Mapping[str, Figure]
    collectives: Mapping[str, list[int | None]]
    case: Mapping[str, object]
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One figure against its baseline; None where no bound is known, or it is not there."""

    name: str
    before: Figure
    after: Figure
    outcome: Outcome


def baseline_path(mesh_path: str | Path) -> Path:
    """`plan.toml` -> `plan.baseline.json` beside it."""
    path = Path(mesh_path)
    return path.with_name(path.name.removesuffix(".toml") + SUFFIX)


def baseline_of(side: Side) -> Baseline:
    """The baseline of a side that has an analysis. Raises ValueError for one that has none."""
    if side.analysis is None:
        raise ValueError(side.why_not)
    return Baseline(
        figures=dict(_figures(side, side.analysis)),
        collectives=_collectives(side.analysis),
        case={member: side.case[member] for member in CASE if member in side.case},
        versions=dict(sorted(side.versions.items())),
    )


def against(baseline: Baseline, now: Baseline, tolerance: Fraction) -> tuple[Line, ...]:
    """Every figure of either, in order. tolerance: a share of the baseline's figure, 1/100 for one percent.

    Axes and links that one of them does not have carry nothing there; other figures that are missing are
    unknown, and unknown is not better than known.
    """
    names = sorted({*baseline.figures, *now.figures}, key=_order)
    return tuple(_line(name, baseline.figures, now.figures, tolerance) for name in names)


def write_text(baseline: Baseline) -> str:
    """The file's text: sorted, one figure a line."""
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "case": dict(baseline.case),
        "versions": dict(baseline.versions),
    }
    for name in sorted(baseline.figures, key=_order):
        group, _, member = name.partition(".")
        document.setdefault(group, {})[member] = baseline.figures[name]
    runs = {key: json.dumps(value) for key, value in sorted(baseline.collectives.items())}
    text = json.dumps(document | {"collectives": runs}, indent=2, ensure_ascii=False, allow_nan=False)
    for value in set(runs.values()):  # a range on one line
        text = text.replace(json.dumps(value), value)
    return text + "\n"


def read_baseline(path: Path) -> Baseline:
    """Raises UserError when the file is missing, or no baseline."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(Problem(str(path), "there is no baseline", "write it with --update")) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(Problem(str(path), f"cannot be read ({error})", "write it with --update")) from None
    try:
        if document["schema"] != SCHEMA:
            raise ValueError(f"its schema is {str(document['schema'])[:60]!r}")
        figures = {
            f"{group}.{member}": _figure(value)
            for group in FIGURES
            for member, value in document.get(group, {}).items()
        }
        return Baseline(
            figures=figures,
            collectives=dict(document["collectives"]),
            case=dict(document["case"]),
            versions=dict(document["versions"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = Problem(str(path), f"not a baseline ({error})", "write it with --update")
        raise UserError(problem) from None


def _figure(value: object) -> Figure:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise ValueError(f"{str(value)[:60]!r} is not a number")


def _figures(side: Side, analysis: Analysis) -> Iterator[tuple[str, Figure]]:
    totals = analysis.totals
    yield TOTAL, _upper(totals.wire_bytes)
    for key, measures in totals.by_axes.items():
        if key != "none":  # groups of one move nothing
            yield f"wire_bytes.{key}", _upper(measures["wire_bytes"])
    for tier, amount in totals.traffic.items():
        yield f"traffic.{tier}", _upper(amount)
    if side.memory_bytes is not None:
        yield MEMORY, side.memory_bytes
    if side.flops is not None:
        yield FLOPS, side.flops


def _upper(amount: ByteRange) -> Figure:
    high = amount[1]
    return None if high is None else high.numerator if high.denominator == 1 else float(high)


def _collectives(analysis: Analysis) -> dict[str, list[int | None]]:
    found: dict[str, list[int | None]] = {}
    for flow in flows_of(analysis):
        so_far = found.setdefault(f"{flow.kind} over {axes_key(flow.axes)}", [0, 0])
        for end, more in enumerate(flow.executions):
            known = so_far[end]
            so_far[end] = None if known is None or more is None else known + more
    return found


def _line(name: str, old: Mapping[str, Figure], new: Mapping[str, Figure], tolerance: Fraction) -> Line:
    absent: Figure = 0 if name.startswith(("wire_bytes.", "traffic.")) else None
    before, after = old.get(name, absent), new.get(name, absent)
    return Line(name=name, before=before, after=after, outcome=_outcome(before, after, tolerance))


def _outcome(before: Figure, after: Figure, tolerance: Fraction) -> Outcome:
    if before is None or after is None:
        return "same" if before is after is None else "lost" if after is None else "better"
    change, allowed = Fraction(after) - Fraction(before), tolerance * Fraction(before)
    return "worse" if change > allowed else "better" if -change > allowed else "same"


def _order(name: str) -> tuple[int, bool, str]:
    """By group, the total first."""
    group = name.partition(".")[0]
    return FIGURES.index(group) if group in FIGURES else len(FIGURES), name != TOTAL, name
