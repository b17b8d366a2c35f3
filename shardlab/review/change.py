"""What a change between two revisions does: a Diff per plan and machine, and the limits that it moved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from shardlab.review.baseline import FLOPS, Baseline, Figure, against
from shardlab.review.check import Budget
from shardlab.review.document import diff_json
from shardlab.review.records import Diff
from shardlab.units import UNKNOWN, format_bytes, format_count

SCHEMA = "shardlab.change/1"
IN_THIS_CHANGE = "in this change"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanDiff:
    """One plan on one machine. plan: its path in the repository."""

    plan: str
    machine: str
    found: Diff


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """All plans under the paths that were asked for are in `diffs`, or in `same`: their files did not change,
    nor what builds their programs. limits: budgets and baselines that the change moved, a sentence each.
    """

    base: str
    head: str
    diffs: tuple[PlanDiff, ...]
    same: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def change_json(change: Change) -> dict[str, Any]:
    """The document of `diff --json` between revisions: a `shardlab.diff/1` per plan and machine."""
    return {
        "schema": SCHEMA,
        "base": change.base,
        "head": change.head,
        "diffs": [{"plan": one.plan, "machine": one.machine} | diff_json(one.found) for one in change.diffs],
        "unchanged": list(change.same),
        "limits": list(change.limits),
        "notes": list(change.notes),
    }


def moved_budgets(base: Mapping[str, Budget], head: Mapping[str, Budget]) -> Iterator[str]:
    """A sentence per budget that is not what it was, of plans that are in both. base, head: plan -> figure
    -> most."""
    for plan in sorted(base.keys() | head.keys()):
        before, after = base.get(plan, {}), head.get(plan, {})
        for name in sorted(before.keys() | after.keys()):
            was, now = before.get(name), after.get(name)
            if was == now:
                continue
            what = f"budget for {name} of {plan}"
            if was is None:
                yield f"{what} is new: {amount_text(name, now)}"
            elif now is None:
                yield f"{what} removed {IN_THIS_CHANGE}; it was {amount_text(name, was)}"
            else:
                moved = "raised" if now > was else "lowered"
                ends = f"from {amount_text(name, was)} to {amount_text(name, now)}"
                yield f"{what} {moved} {ends} {IN_THIS_CHANGE}"


def raised_baseline(plan: str, base: Baseline, head: Baseline) -> Iterator[str]:
    """What a baseline that was written again lets pass from now on."""
    worse = [line for line in against(base, head, Fraction(0)) if line.outcome in ("worse", "lost")]
    if worse:
        figures = ", ".join(
            f"{one.name} from {amount_text(one.name, one.before)} to {amount_text(one.name, one.after)}"
            for one in worse
        )
        yield f"baseline of {plan} raised {IN_THIS_CHANGE}: {figures}"


def amount_text(name: str, value: Figure) -> str:
    """A figure of a baseline or budget with its unit."""
    if value is None:
        return UNKNOWN
    return format_count(value) if name == FLOPS else format_bytes(value)
