"""Two sides -> Diff."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

from shardlab.analysis import Analysis
from shardlab.review.flows import flows_of, renamed_axes, whole_step
from shardlab.review.matching import match
from shardlab.review.records import UNCHANGED, Diff, Flow, Row, Side, version_changes
from shardlab.review.sides import Source, side_of

LEDGER_ENTRIES = 5  # of one side in a note
SAME_CASE = ("model", "machine", "batch", "seq", "workload")


def diff(base: Source, head: Source) -> Diff:
    """What became of a step: its collectives matched by what they mean, and what changed in total.

    base, head: JSON documents of `analyze` or `explain` or their paths, Analyses, saved Programs, HLO dumps.
    Bytes and seconds are per device and step. Raises UserError or ParseError when one cannot be read.
    """
    before, after = side_of(base), side_of(head)
    if before.analysis is None or after.analysis is None:
        notes = tuple(_notes(before, after))
        return Diff(base=before, head=after, rows=(), before=None, after=None, notes=notes)
    renamed = renamed_axes(before.analysis.mesh, after.analysis.mesh)
    rows = _rows(before.analysis, after.analysis, renamed)
    if renamed and not _explains(rows):
        renamed = {}
        rows = _rows(before.analysis, after.analysis, renamed)
    return Diff(
        base=before,
        head=after,
        rows=rows,
        before=whole_step(before.analysis, [flow for row in rows for flow in row.base]),
        after=whole_step(after.analysis, [flow for row in rows for flow in row.head]),
        renamed=renamed,
        notes=tuple(_notes(before, after)),
    )


def _rows(base: Analysis, head: Analysis, renamed: Mapping[str, str]) -> tuple[Row, ...]:
    """Flows matched under one name for a renamed axis, whichever side is the base, so that the diff back is
    the mirror image. Rows have the head's name."""
    shared = {name: min(pair) for pair in renamed.items() for name in pair}
    old, new = (flows_of(side, lambda axis: shared.get(axis, axis)) for side in (base, head))
    shown = {shared[name]: name for name in renamed.values()}
    return tuple(_named(row, shown) for row in match(old, new))


def _explains(rows: Sequence[Row]) -> bool:
    """Whether at least half of what either side sends is unchanged under new names. Else they are other axes,
    which happen to have the place and size of the old ones."""
    known = sum((row.before.wire_bytes[0] for row in rows if row.what in UNCHANGED), Fraction(0))
    before = sum((row.before.wire_bytes[0] for row in rows), Fraction(0))
    after = sum((row.after.wire_bytes[0] for row in rows), Fraction(0))
    return 2 * known >= max(before, after)


def _named(row: Row, shown: Mapping[str, str]) -> Row:
    """With the head's names of mesh axes."""
    if not shown:
        return row

    def flow_named(flow: Flow) -> Flow:
        axes = flow.axes
        return flow if axes is None else replace(flow, axes=tuple(_axis_named(axis, shown) for axis in axes))

    return replace(row, base=tuple(map(flow_named, row.base)), head=tuple(map(flow_named, row.head)))


def _axis_named(axis: str, shown: Mapping[str, str]) -> str:
    name, colon, part = axis.partition(":")
    return shown.get(name, name) + colon + part


def _notes(base: Side, head: Side) -> Iterator[str]:
    for member in SAME_CASE:
        was, now = base.case.get(member), head.case.get(member)
        if was is not None and now is not None and was != now:
            yield f"{member}: {was} in the base, {now} in the head; the figures are of two different cases"
    if changed := version_changes(base.versions, head.versions):
        yield f"versions changed too: {changed}"
    if base.analysis is not None and head.analysis is not None:
        yield from _analysis_notes(base.analysis, head.analysis)
    if base.case.get("emulated") or head.case.get("emulated"):
        yield "emulated devices show what the partitioner does, not what a backend does"


def _analysis_notes(base: Analysis, head: Analysis) -> Iterator[str]:
    if (base.machine is None) != (head.machine is None):
        yield "only one of the two was priced on a machine: links are not compared"
    if base.mesh is None or head.mesh is None:
        yield "mesh axes are unknown: give --axes"
    for side, other, what in ((base, head, "base"), (head, base, "head")):
        new = {entry.why for entry in side.ledger} - {entry.why for entry in other.ledger}
        if new:
            yield f"only in the {what} not counted exactly: {'; '.join(sorted(new)[:LEDGER_ENTRIES])}"
    flags = base.made_by.get("flags"), head.made_by.get("flags")
    if None not in flags and flags[0] != flags[1]:
        yield "compiler flags differ"
