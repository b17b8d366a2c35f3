"""From the collectives of an analysis to its flows: what means the same is one, however it is called."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction

from shardlab.analysis import Analysis, ByteRange, CollectiveRow, Range
from shardlab.review.records import NOTHING, Amounts, Flow, total

Rename = Callable[[str], str]


def flows_of(analysis: Analysis, rename: Rename = str) -> tuple[Flow, ...]:
    """The flows of an analysis, in the order of their keys. rename: what a mesh axis is called here.

    What moves nothing (groups of one) is left out.
    """
    together: dict[tuple[object, ...], list[CollectiveRow]] = {}
    for row in analysis.collectives:
        if row.wire_bytes or row.payload_bytes:
            key = (row.kind, _renamed(row.axes, rename), _dtypes(row), row.phase, row.layer)
            together.setdefault(key, []).append(row)
    flows = [_flow(rows, rename) for rows in together.values()]
    return tuple(sorted(flows, key=lambda flow: flow.key))


def amounts_of(row: CollectiveRow) -> Amounts:
    """What one collective moves in a step: executions x bytes, seconds at the upper end."""
    traffic = {tier: _scaled(row.executions, each) for tier, each in (row.traffic or {}).items()}
    return Amounts(
        payload_bytes=_scaled(row.executions, Fraction(row.payload_bytes)),
        wire_bytes=_scaled(row.executions, row.wire_bytes),
        traffic=traffic,
        time_s=_time_s(row),
    )


def whole_step(analysis: Analysis, flows: Sequence[Flow]) -> Amounts:
    """What the whole program moves: the analysis' totals, exactly.

    A saved analysis holds decimals: where its totals are those of the flows as far as decimals go, they are
    the flows' own. They are not where a conditional runs one branch, or devices differ.
    """
    sums, totals = total(flow.amounts for flow in flows), analysis.totals
    tiers = {*sums.traffic, *totals.traffic}
    traffic = {
        tier: _exact(totals.traffic.get(tier, NOTHING), sums.traffic.get(tier, NOTHING)) for tier in tiers
    }
    return Amounts(
        payload_bytes=_exact(totals.payload_bytes, sums.payload_bytes),
        wire_bytes=_exact(totals.wire_bytes, sums.wire_bytes),
        traffic=dict(sorted(traffic.items())),
        time_s=sums.time_s,
    )


def renamed_axes(base: Mapping[str, int] | None, head: Mapping[str, int] | None) -> dict[str, str]:
    """Axes of the base whose name is gone, with the head's new name for the same place in the same grid.

    Names are labels: which devices a group joins depends on places and sizes alone.
    """
    if base is None or head is None or list(base.values()) != list(head.values()):
        return {}
    pairs = zip(base, head, strict=True)
    return {old: new for old, new in pairs if old not in head and new not in base}


def _flow(rows: Sequence[CollectiveRow], rename: Rename) -> Flow:
    first = rows[0]
    return Flow(
        kind=first.kind,
        axes=_renamed(first.axes, rename),
        dtypes=_dtypes(first),
        phase=first.phase,
        layer=first.layer,
        tiers=tuple(sorted({row.tier for row in rows if row.tier is not None})),
        group_sizes=tuple(sorted({row.group_size for row in rows})),
        executions=_summed(row.executions for row in rows),
        names=tuple(sorted({row.name for row in rows})),
        sources=_sources(rows),
        amounts=total(map(amounts_of, rows)),
    )


def _sources(rows: Iterable[CollectiveRow]) -> tuple[str, ...]:
    sent: dict[str, Fraction] = {}
    for row in rows:
        each = row.wire_bytes * (row.executions[1] or row.executions[0])
        sent[row.source] = sent.get(row.source, Fraction(0)) + each
    return tuple(sorted((source for source in sent if source), key=lambda source: (-sent[source], source)))


def _dtypes(row: CollectiveRow) -> tuple[str, ...]:
    """Each once: combining lists a dtype per array, or not."""
    return tuple(sorted(set(row.dtypes)))


def _renamed(axes: tuple[str, ...] | None, rename: Rename) -> tuple[str, ...] | None:
    """Also of sub-axes: the name before the `:` of `fsdp:(8)8`."""
    if axes is None:
        return None
    return tuple(re.sub(r"^[^:]*", lambda name: rename(name[0]), axis, count=1) for axis in axes)


def _scaled(executions: Range, each: Fraction) -> ByteRange:
    low, high = executions
    if not each:
        return NOTHING  # however often
    return low * each, None if high is None else high * each


def _summed(executions: Iterable[Range]) -> Range:
    low, high = 0, 0
    unknown = False
    for least, most in executions:
        low, unknown = low + least, unknown or most is None
        high += most or 0
    return low, None if unknown else high


def _time_s(row: CollectiveRow) -> Fraction | None:
    high = row.executions[1]
    if high == 0 or not row.wire_bytes:
        return Fraction(0)
    return None if high is None or row.time_s is None else high * Fraction(row.time_s)


def _exact(told: ByteRange, summed: ByteRange) -> ByteRange:
    return summed if _decimals(told) == _decimals(summed) else told


def _decimals(value: ByteRange) -> tuple[float, float | None]:
    return float(value[0]), None if value[1] is None else float(value[1])
