"""The Diff as JSON, `shardlab.diff/1`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from shardlab.analysis import ByteRange
from shardlab.review.records import Amounts, Diff, Flow, Row, Side, total
from shardlab.review.verdict import verdict

SCHEMA = "shardlab.diff/1"


def diff_json(found: Diff) -> dict[str, Any]:
    """The document of `diff --json`. What is not known is absent; an unknown maximum of a range is null.

    changes: rows in which something changed. unchanged: all others, summed; with `changes` they sum to what
    the collectives of each side move. `totals` are of the whole step, in which a conditional counts once.
    """
    judged = verdict(found)
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "verdict": {"is": judged.what, "text": judged.text},
        "base": _side_json(found.base),
        "head": _side_json(found.head),
    }
    if found.renamed:
        document["renamed_axes"] = dict(found.renamed)
    if found.before is not None and found.after is not None:
        document["totals"] = {"base": _amounts_json(found.before), "head": _amounts_json(found.after)}
    document["changes"] = [_row_json(row) for row in found.changes]
    document["unchanged"] = {
        "collectives": sum(len(flow.names) for row in found.unchanged for flow in row.head),
        "base": _amounts_json(total(row.before for row in found.unchanged)),
        "head": _amounts_json(total(row.after for row in found.unchanged)),
    }
    document["notes"] = list(found.notes)
    return document


def _side_json(side: Side) -> dict[str, Any]:
    members = {
        "case": dict(side.case) or None,
        "mesh": dict(side.analysis.mesh) if side.analysis is not None and side.analysis.mesh else None,
        "machine": side.analysis.machine if side.analysis is not None else None,
        "memory_bytes": side.memory_bytes,
        "limit_bytes": side.limit_bytes,
        "fits": side.fits,
        "flops": side.flops,
        "step_time_s": side.step_time_s,
        "versions": dict(side.versions) or None,
        "why_not": side.why_not or None,
    }
    return {"name": side.name} | {key: value for key, value in members.items() if value is not None}


def _row_json(row: Row) -> dict[str, Any]:
    document: dict[str, Any] = {"change": row.what}
    if row.moved:
        document["moved"] = list(row.moved)
    return document | {"base": _flows_json(row.base, row.before), "head": _flows_json(row.head, row.after)}


def _flows_json(flows: Sequence[Flow], amounts: Amounts) -> dict[str, Any] | None:
    """A change has one flow on a side, or none."""
    if not flows:
        return None
    (flow,) = flows
    return {
        "kind": flow.kind,
        "axes": None if flow.axes is None else list(flow.axes),
        "dtypes": list(flow.dtypes),
        "phase": flow.phase,
        "layer": flow.layer,
        "tiers": list(flow.tiers),
        "group_sizes": list(flow.group_sizes),
        "executions": list(flow.executions),
        "collectives": list(flow.names),
        "sources": list(flow.sources),
        **_amounts_json(amounts),
    }


def _amounts_json(amounts: Amounts) -> dict[str, Any]:
    document: dict[str, Any] = {
        "payload_bytes": _range(amounts.payload_bytes),
        "wire_bytes": _range(amounts.wire_bytes),
    }
    if amounts.traffic:
        document["traffic"] = _ranges(amounts.traffic)
    if amounts.time_s is not None:
        document["time_s"] = float(amounts.time_s)
    return document


def _ranges(table: Mapping[str, ByteRange]) -> dict[str, Any]:
    return {key: _range(amount) for key, amount in sorted(table.items())}


def _range(amount: ByteRange) -> list[int | float | None]:
    return [None if end is None else _number(end) for end in amount]


def _number(value: Fraction) -> int | float:
    return value.numerator if value.denominator == 1 else float(value)
