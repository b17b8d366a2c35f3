"""The Analysis as JSON, `shardlab.analysis/1`, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from fractions import Fraction
from typing import Any

from shardlab.analysis.records import (
    Analysis,
    ByteRange,
    CollectiveRow,
    DeviceRuns,
    LedgerEntry,
    ModuleFacts,
    Totals,
)
from shardlab.analysis.totals import TABLES
from shardlab.errors import Problem, UserError

SCHEMA = "shardlab.analysis/1"


def analysis_to_json(analysis: Analysis) -> dict[str, Any]:
    """The document of `analyze --json`: `shardlab.analysis/1`, whole numbers as integers."""
    document: dict[str, Any] = {"schema": SCHEMA}
    described = [_module_json(facts) for facts in analysis.modules]
    document.update({"module": described[0]} if len(described) == 1 else {"modules": described})
    document["mesh"] = None if analysis.mesh is None else dict(analysis.mesh)
    if analysis.machine is not None:
        document["machine"] = analysis.machine
    document["collectives"] = [_row_json(row) for row in analysis.collectives]
    document["totals"] = _totals_json(analysis.totals)
    document["ledger"] = [{"what": e.what, "name": e.name, "why": e.why} for e in analysis.ledger]
    document["made_by"] = dict(analysis.made_by)
    return document


def _number(value: Fraction | int) -> int | float:
    return int(value) if isinstance(value, int) or value.denominator == 1 else float(value)


def _range(amount: tuple[Fraction | int, Fraction | int | None]) -> list[int | float | None]:
    low, high = amount
    return [_number(low), None if high is None else _number(high)]


def _module_json(facts: ModuleFacts) -> dict[str, Any]:
    once = facts.runs_per_step == 1
    return {f.name: getattr(facts, f.name) for f in fields(facts) if not (once and f.name == "runs_per_step")}


# Members that are there only when there is something to say; all others always are.
_OPTIONAL = {
    "axes_reason", "by_device", "logical_payload_bytes", "logical_wire_bytes", "traffic", "tier_s",
    "algorithm", "bound", "realizes", "recompute", "latency_s", "time_s", "module",
}  # fmt: skip


def _row_json(row: CollectiveRow) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for member in fields(row):
        value = getattr(row, member.name)
        if member.name in _OPTIONAL and (value is None or value is False):
            continue
        if member.name == "by_device":
            value = [{"executions": list(part.executions), "devices": part.devices} for part in value]
        elif isinstance(value, Fraction):
            value = _number(value)
        elif isinstance(value, Mapping):
            value = {k: _number(v) if isinstance(v, Fraction) else v for k, v in value.items()}
        elif isinstance(value, tuple):
            value = list(value)
        document[member.name] = value
    return document


def _totals_json(totals: Totals) -> dict[str, Any]:
    document: dict[str, Any] = {
        "payload_bytes": _range(totals.payload_bytes),
        "wire_bytes": _range(totals.wire_bytes),
    }
    for table in TABLES:
        document[table] = {
            key: {measure: _range(amount) for measure, amount in measures.items()}
            for key, measures in getattr(totals, table).items()
        }
    if totals.traffic:
        document["traffic"] = {tier: _range(amount) for tier, amount in totals.traffic.items()}
    return document


def analysis_from_json(document: Mapping[str, Any]) -> Analysis:
    """The Analysis that `to_json` wrote. Raises UserError when the document is something else."""
    try:
        if document.get("schema") != SCHEMA:
            raise ValueError(f"its schema is {document.get('schema')!r}, not {SCHEMA!r}")
        described = document["modules"] if "modules" in document else [document["module"]]
        return Analysis(
            modules=tuple(ModuleFacts(**facts) for facts in described),
            mesh=document["mesh"],
            machine=document.get("machine"),
            collectives=tuple(_row_from(row) for row in document["collectives"]),
            totals=_totals_from(document["totals"]),
            ledger=tuple(LedgerEntry(**entry) for entry in document["ledger"]),
            made_by=document.get("made_by", {}),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = Problem(
            "analysis", f"not an analysis ({error})", "make one with: shardlab analyze PATH --json"
        )
        raise UserError(problem) from None


def _exact(value: float) -> Fraction:
    """A byte count as it was: bytes divide by group sizes, so the denominator is small."""
    simple = Fraction(value).limit_denominator(1 << 20)
    return simple if float(simple) == value else Fraction(value)


def _row_from(document: Mapping[str, Any]) -> CollectiveRow:
    row = dict(document)
    for name in ("wire_bytes", "fabric_bytes", "logical_wire_bytes"):
        if row.get(name) is not None:
            row[name] = _exact(row[name])
    for name in ("axes", "executions", "dtypes"):
        row[name] = None if row[name] is None else tuple(row[name])
    if row.get("by_device") is not None:
        row["by_device"] = tuple(
            DeviceRuns(executions=tuple(part["executions"]), devices=part["devices"])
            for part in row["by_device"]
        )
    if row.get("traffic") is not None:
        row["traffic"] = {tier: _exact(amount) for tier, amount in row["traffic"].items()}
    return CollectiveRow(**row)


def _totals_from(document: Mapping[str, Any]) -> Totals:
    def amount(pair: Sequence[float | None]) -> ByteRange:
        low, high = pair
        return _exact(low or 0), None if high is None else _exact(high)

    tables = {
        table: {
            key: {m: amount(pair) for m, pair in measures.items()}
            for key, measures in document[table].items()
        }
        for table in TABLES
    }
    return Totals(
        payload_bytes=amount(document["payload_bytes"]),
        wire_bytes=amount(document["wire_bytes"]),
        traffic={tier: amount(pair) for tier, pair in document.get("traffic", {}).items()},
        **tables,
    )
