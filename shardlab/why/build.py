"""From the name of a collective to a Why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from shardlab.analysis import Attributed, CollectiveRow
from shardlab.attribute.collectives import Collective
from shardlab.audit import Finding, audit, finding_json
from shardlab.errors import Problem, UserError
from shardlab.hardware.machine import Machine
from shardlab.hlo.attributes import metadata
from shardlab.program import CompilerWarning
from shardlab.spec.models import ModelConfig
from shardlab.spec.plan import Plan
from shardlab.why.arrays import change_of, shapes, text_of
from shardlab.why.records import Why
from shardlab.why.rules import parameters_of, remedies, rules_behind

NEAR = 5


def why(
    parts: Sequence[Attributed],
    name: str,
    *,
    plan: Plan | None = None,
    model: ModelConfig | None = None,
    machine: Machine | None = None,
) -> tuple[Why, ...]:
    """Why the collective called `name` is there; several where several modules have one.

    plan, model: what the program was made from, None where that is not known. Raises UserError with near
    names when there is no such collective.
    """
    found = tuple(
        _why(part, collective, _of_module(row, part, len(parts)), plan, model, machine)
        for part in parts
        for collective, row in zip(part.collectives, part.per_step.collectives, strict=True)
        if row.name == name
    )
    if not found:
        raise UserError(_unknown(name, [row.name for part in parts for row in part.analysis.collectives]))
    return found


def _of_module(row: CollectiveRow, part: Attributed, modules: int) -> CollectiveRow:
    return replace(row, module=part.module.name) if modules > 1 else row


def _unknown(name: str, known: list[str]) -> Problem:
    from difflib import get_close_matches

    near = get_close_matches(name, known, n=NEAR, cutoff=0.3) or known[:NEAR]
    fix = f"near names: {', '.join(near)}" if near else "the program has no collectives"
    return Problem("--why", f"no collective is called {name[:80]!r}", fix)


def _why(
    part: Attributed,
    collective: Collective,
    row: CollectiveRow,
    plan: Plan | None,
    model: ModelConfig | None,
    machine: Machine | None,
) -> Why:
    pairs = shapes(part.module, collective)
    per_array = []
    for given, got in pairs:
        whole = got if row.kind == "all-gather" else given
        per_array.append(parameters_of(row, whole, plan, model))
    specs = tuple(dict.fromkeys(spec for found in per_array for spec in found))
    rules, reason = rules_behind(row, specs, plan, model)
    findings = tuple(one for one in audit(part, machine) if one.instruction == row.name)
    return Why(
        row=row,
        text=text_of(collective, pairs),
        line=collective.instruction.line,
        changes=tuple(
            change_of(part.module, collective, row, pair, tuple(spec.path for spec in found))
            for pair, found in zip(pairs, per_array, strict=True)
        ),
        rules=tuple(rule.text for rule in rules),
        rules_reason=reason,
        model_known=plan is not None and model is not None,
        warnings=_warnings(part, collective, row, findings),
        findings=findings,
        remedies=(*(one.remedy for one in findings), *remedies(row, specs, plan)),
    )


def _warnings(
    part: Attributed, collective: Collective, row: CollectiveRow, findings: Sequence[Finding]
) -> tuple[str, ...]:
    """The compiler's warnings that name its operation."""
    given: Sequence[CompilerWarning] = part.program.warnings if part.program is not None else ()
    op_name = metadata(collective.instruction).op_name or row.op_name
    named = [one for one in given if row.name in one.names or (op_name and op_name in one.names)]
    return tuple(f"{one.kind}: {', '.join(one.names) or one.text}" for one in named)


def why_json(found: Sequence[Why] | None) -> dict[str, Any]:
    """The `why` member of `--json`: a list, of one unless several modules have a collective of this name;
    without a question no member."""
    return {} if found is None else {"why": [_json(one) for one in found]}


def _json(one: Why) -> dict[str, Any]:
    return {
        "name": one.row.name,
        "module": one.row.module,
        "text": one.text,
        "line": one.line or None,
        "op_name": one.row.op_name,
        "layer": one.row.layer,
        "source": one.row.source,
        "arrays": [
            {
                "before": {"shape": change.before_shape, "sharding": change.before},
                "after": {"shape": change.after_shape, "sharding": change.after},
                "parameters": list(change.arrays),
            }
            for change in one.changes
        ],
        "rules": list(one.rules),
        "rules_reason": one.rules_reason,
        "warnings": list(one.warnings),
        "findings": [finding_json(finding) for finding in one.findings],
        "remedies": list(one.remedies),
    }
