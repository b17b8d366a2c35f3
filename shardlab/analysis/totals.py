"""Totals over the step from rows, and sums of totals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction

from shardlab.analysis.records import ByteRange, CollectiveRow, Totals, axes_key
from shardlab.attribute.calls import CallGraph, step_totals

TABLES = ("by_kind", "by_axes", "by_phase", "by_layer")

_Key = tuple[str, str, str]  # table, key, measure


def totals_of(graph: CallGraph, rows: Iterable[tuple[str, CollectiveRow]]) -> Totals:
    """Totals of (computation, row) pairs."""
    sums: dict[str, dict[_Key, int | Fraction]] = {}
    for computation, row in rows:
        here = sums.setdefault(computation, {})
        for key, amount in _amounts(row):
            here[key] = here.get(key, 0) + amount
    amounts = {name: {key: Fraction(amount) for key, amount in here.items()} for name, here in sums.items()}
    return _as_totals(step_totals(graph, amounts))


def sum_totals(totals: Sequence[Totals]) -> Totals:
    """Key by key, the sum; unknown in one is unknown in the sum."""
    sums: dict[_Key, ByteRange] = {}
    for part in totals:
        for key, (low, high) in _entries(part):
            low_so_far, high_so_far = sums.get(key, (Fraction(0), Fraction(0)))
            together = None if high is None or high_so_far is None else high + high_so_far
            sums[key] = (low + low_so_far, together)
    return _as_totals(sums)


def totals_times(totals: Totals, runs: int) -> Totals:
    """The totals of so many runs."""
    scaled = {
        key: (low * runs, None if high is None else high * runs) for key, (low, high) in _entries(totals)
    }
    return _as_totals(scaled)


def _entries(totals: Totals) -> Iterator[tuple[_Key, ByteRange]]:
    yield ("", "", "payload_bytes"), totals.payload_bytes
    yield ("", "", "wire_bytes"), totals.wire_bytes
    for table in TABLES:
        for key, measures in getattr(totals, table).items():
            for measure, amount in measures.items():
                yield (table, key, measure), amount
    for tier, amount in totals.traffic.items():
        yield ("traffic", tier, "bytes"), amount


def _amounts(row: CollectiveRow) -> Iterator[tuple[_Key, int | Fraction]]:
    """What one execution of a row adds to each total; whole numbers as integers, which add up faster."""
    wire_bytes = _whole(row.wire_bytes)
    keys = (("", ""), ("by_kind", row.kind), ("by_axes", axes_key(row.axes)), ("by_phase", row.phase))
    for table, key in (*keys, ("by_layer", row.layer or "other")):
        yield (table, key, "payload_bytes"), row.payload_bytes
        yield (table, key, "wire_bytes"), wire_bytes
    for tier, amount in (row.traffic or {}).items():
        yield ("traffic", tier, "bytes"), _whole(amount)


def _whole(amount: Fraction) -> int | Fraction:
    return amount.numerator if amount.denominator == 1 else amount


def _as_totals(sums: Mapping[_Key, ByteRange]) -> Totals:
    nothing = (Fraction(0), Fraction(0))
    tables: dict[str, dict[str, dict[str, ByteRange]]] = {table: {} for table in TABLES}
    for (table, key, measure), amount in sums.items():
        if table in tables:
            tables[table].setdefault(key, {})[measure] = amount
    return Totals(
        payload_bytes=sums.get(("", "", "payload_bytes"), nothing),
        wire_bytes=sums.get(("", "", "wire_bytes"), nothing),
        traffic={key: amount for (table, key, _), amount in sums.items() if table == "traffic"},
        **tables,
    )
