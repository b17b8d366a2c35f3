"""One plan on several families of targets: what each sends, by kind and axes, and why they differ.

A difference is explained only where the figures prove it: then the explanation adds up to the byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from shardlab.analysis import ByteRange, CollectiveRow, Range, axes_key
from shardlab.attribute.schedule import add
from shardlab.case_document import Json
from shardlab.case_report import CaseReport
from shardlab.units import format_bytes

Key = tuple[str, str]  # kind (what permutes realize, where they do), key of the axes
ZERO = Fraction(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgreementRow:
    """One kind of collective over one set of axes, on each target.

    wire_bytes: per device and step, Σ executions x bytes, in the order of the targets; (0, 0) where the
    target has none. collectives: how many run per step, likewise. agree: all the same bytes. why: what is
    known of the difference, one sentence each, and whether that is all; where bytes agree, of combining.
    """

    kind: str
    axes: str
    wire_bytes: tuple[ByteRange, ...]
    collectives: tuple[Range, ...]
    agree: bool
    why: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Where the targets of one plan agree. targets: machines, in the order of each row's figures."""

    targets: tuple[str, ...]
    rows: tuple[AgreementRow, ...]


@dataclass(slots=True)
class _Sent:
    """What one target sends in one kind over one set of axes. source: as the source wrote it, before the
    backend widened types. runs: executions per step. each: times a step -> source
    bytes of one execution, of all collectives that run so often.
    """

    low: Fraction = ZERO
    high: Fraction | None = ZERO
    runs: Range = (0, 0)
    each: dict[int, Fraction] = field(default_factory=dict)
    source: Fraction = ZERO
    widened: bool = False
    by_permutes: bool = False

    def add(self, row: CollectiveRow) -> None:
        """One more collective of the step."""
        low, high = row.executions
        self.low += low * row.wire_bytes
        self.high = None if self.high is None or high is None else self.high + high * row.wire_bytes
        self.runs = add(self.runs, row.executions)
        logical = row.logical_wire_bytes
        source = row.wire_bytes if logical is None else logical
        self.source += low * source
        self.each[low] = self.each.get(low, ZERO) + source
        self.widened = self.widened or logical not in (None, row.wire_bytes)
        self.by_permutes = self.by_permutes or row.realizes is not None

    @property
    def exact(self) -> bool:
        """Whether every collective runs a known number of times."""
        return self.low == self.high


Target = dict[Key, _Sent]


def agreement(reports: Sequence[CaseReport]) -> Agreement | None:
    """The agreement of one plan on targets of at least two backends; None for anything else."""
    analysed = [report for report in reports if report.analysis is not None]
    backends = {_backend(report) for report in analysed}
    if len({(report.case.plan.name, report.case.plan.path) for report in reports}) != 1 or len(backends) < 2:
        return None
    targets = {report.case.machine: _sent(report) for report in analysed}
    keys = dict.fromkeys(key for sent in targets.values() for key in sent)
    rows = [_row(key, targets) for key in keys]
    moving = [row for row in rows if any(high != 0 for _, high in row.wire_bytes)]
    moving.sort(key=lambda row: (row.axes, row.kind))
    return Agreement(targets=tuple(targets), rows=tuple(moving))


def _backend(report: CaseReport) -> str:
    return report.analysis.modules[0].backend if report.analysis is not None else ""


def _sent(report: CaseReport) -> Target:
    sent: Target = {}
    for row in report.analysis.collectives if report.analysis is not None else ():
        sent.setdefault((row.realizes or row.kind, axes_key(row.axes)), _Sent()).add(row)
    return sent


def _row(key: Key, targets: dict[str, Target]) -> AgreementRow:
    cells = {name: sent.get(key, _Sent()) for name, sent in targets.items()}
    figures = tuple((cell.low, cell.high) for cell in cells.values())
    agree = len(set(figures)) == 1 and all(cell.exact for cell in cells.values())
    why = tuple(_combined(cells)) if agree else _why(key, cells, targets)
    runs = tuple(cell.runs for cell in cells.values())
    return AgreementRow(kind=key[0], axes=key[1], wire_bytes=figures, collectives=runs, agree=agree, why=why)


def _why(key: Key, cells: dict[str, _Sent], targets: dict[str, Target]) -> tuple[str, ...]:
    """Reasons, and whether they leave something open."""
    instead = {name: tuple(_instead(key, name, targets)) for name in targets}
    moved = tuple(_moved(cells))
    reasons = tuple(
        dict.fromkeys(
            (
                *_reasons(cells),
                *(why for whys in instead.values() for why in whys),
                *(why for _, why in moved),
                *_combined(cells),
            )
        )
    )
    explained = {
        cell.source
        for name, cell in cells.items()
        if name not in dict(moved) and not any(" all-reduces what " in why for why in instead[name])
    }
    if len(explained) == 1 or not all(cell.exact for cell in cells.values()):
        return reasons
    return (*reasons, "the rest is not known" if reasons else "not known")


def _combined(cells: dict[str, _Sent]) -> Iterable[str]:
    """Targets that send the bytes of another in fewer collectives: XLA's combiners join those that are ready
    at once. What permutes carry out is not counted in collectives."""
    counted = {name: cell for name, cell in cells.items() if cell.exact and not cell.by_permutes}
    for name, cell in counted.items():
        same = [(other, there) for other, there in counted.items() if there.source == cell.source]
        other, there = max(same, key=lambda item: item[1].runs[0])
        if cell.runs[0] < there.runs[0]:
            yield f"{name}: combined, {cell.runs[0]} a step for {there.runs[0]} on {other}"


def _moved(cells: dict[str, _Sent]) -> Iterable[tuple[str, str]]:
    """(target, why) where it sends on each trip of a loop what another sends once, before or after it.

    Proved when the two differ in nothing but that the same bytes run t times as often here.
    """
    for name, cell in cells.items():
        for other, there in cells.items():
            more = {
                times: cell.each.get(times, ZERO) - there.each.get(times, ZERO)
                for times in cell.each | there.each
            }
            differing = sorted((times, more_bytes) for times, more_bytes in more.items() if more_bytes)
            if not (cell.exact and there.exact and len(differing) == 2):
                continue
            (few, less_bytes), (many, more_bytes) = differing
            if more_bytes == -less_bytes > 0 < few and many % few == 0:
                yield name, f"{other}: moved out of a loop, {few}x a step for {many}x on {name}"


def _reasons(cells: dict[str, _Sent]) -> Iterable[str]:
    for name, cell in cells.items():
        if not cell.exact:
            yield f"{name}: not exact, a branch or a loop that could not be bounded"
        if cell.by_permutes:
            yield f"{name}: carried out by collective-permutes"
        if cell.widened and cell.exact:
            same = [other for other, there in cells.items() if there.exact and there.low == cell.source]
            as_on = f", as on {', '.join(same)}" if same else ""
            yield f"{name}: in wider types than the source's, where it is {format_bytes(cell.source)}{as_on}"


def _instead(key: Key, name: str, targets: dict[str, Target]) -> Iterable[str]:
    """An all-reduce where another target reduce-scatters: proved when what it sends more than the other is
    twice the reduce-scatter, 2 (n-1)/n · S for (n-1)/n · S.
    """
    kind, axes = key
    here = targets[name]
    if kind not in ("all-reduce", "reduce-scatter") or ("reduce-scatter", axes) in here:
        return
    reduced = here.get(("all-reduce", axes), _Sent())
    for other, there in targets.items():
        scattered = there.get(("reduce-scatter", axes))
        if scattered is None or other == name:
            continue
        kept = there.get(("all-reduce", axes), _Sent())
        exact = reduced.exact and scattered.exact and kept.exact
        if exact and reduced.source - kept.source == 2 * scattered.source != 0:
            yield f"{name}: all-reduces what {other} reduce-scatters"
        elif kind == "reduce-scatter":
            yield f"{name}: no reduce-scatter over {axes}"


def agreement_json(found: Agreement) -> Json:
    """The `agreement` member of `compare --json`: wire bytes by target, [min, max]."""
    rows = [
        {
            "kind": row.kind,
            "axes": row.axes,
            "wire_bytes": {
                target: [_number(end) for end in figure]
                for target, figure in zip(found.targets, row.wire_bytes, strict=True)
            },
            "collectives": {
                target: list(runs) for target, runs in zip(found.targets, row.collectives, strict=True)
            },
            "agree": row.agree,
            "why": list(row.why),
        }
        for row in found.rows
    ]
    return {"targets": list(found.targets), "rows": rows}


def _number(value: Fraction | None) -> int | float | None:
    if value is None:
        return None
    return value.numerator if value.denominator == 1 else float(value)
