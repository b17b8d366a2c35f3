"""A rule about where devices sit: traffic on a slow link that another device order puts on a faster one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction

from shardlab.analysis import ByteRange, CollectiveRow
from shardlab.attribute.members import Members
from shardlab.audit.findings import Audited, Finding, per_step, together
from shardlab.cost.traffic import traffic_of
from shardlab.hardware.machine import Machine
from shardlab.order import OrderResult, best_orders
from shardlab.units import format_bytes, format_seconds

# A fifth of what `--order` spends: about 0.4 s on one core.
MAX_LOOKUPS = 100_000
SPELLED_OUT = 64


def slow_tier_by_order(audited: Audited) -> Iterator[Finding]:
    """Collectives on a slower tier than in the best device order found, by axes.

    Only where that order is better for the whole step. Programs of several slices are not judged: each slice
    runs a program of its own.
    """
    part, machine = audited.part, audited.machine
    tiers = [domain.tier for domain in machine.domains] if machine else []
    if machine is None or part.analysis.mesh is None or not _could_be_faster(audited, machine):
        return
    orders = best_orders((part,), machine, max_lookups=MAX_LOOKUPS)
    best = orders.results[0]
    moved: dict[tuple[str, ...] | None, list[tuple[CollectiveRow, Fraction]]] = {}
    for row, members in zip(part.analysis.collectives, part.members, strict=True):
        if row.tier in tiers[1:]:
            slow_bytes, fast = _elsewhere(row, members, machine, best, row.tier)
            if fast is not None and tiers.index(fast) < tiers.index(row.tier):
                moved.setdefault(row.axes, []).append((row, slow_bytes))
    for axes, rows in moved.items():
        yield _finding(axes, rows, orders.own, best)


def _could_be_faster(audited: Audited, machine: Machine) -> bool:
    """Whether some group on a slower tier is small enough for the tier within it."""
    inner = {
        domain.tier: within.size for within, domain in zip(machine.domains, machine.domains[1:], strict=False)
    }
    rows = audited.part.analysis.collectives
    return any(row.group_size <= inner.get(row.tier or "", 0) for row in rows)


def _elsewhere(
    row: CollectiveRow, members: Members, machine: Machine, order: OrderResult, tier: str
) -> tuple[Fraction, str | None]:
    """Bytes of one execution that another order takes off `tier`, and the slowest tier there."""
    there = traffic_of(
        kind=row.kind,
        payload_bytes=row.payload_bytes,
        wire_bytes=row.wire_bytes,
        groups=members.groups,
        pairs=members.pairs,
        machine=machine,
        device_ids=order.device_ids,
    )
    here: Mapping[str, Fraction] = row.traffic or {}
    return here.get(tier, Fraction(0)) - there.tiers.get(tier, Fraction(0)), there.tier


def _finding(
    axes: tuple[str, ...] | None,
    rows: list[tuple[CollectiveRow, Fraction]],
    own: OrderResult,
    best: OrderResult,
) -> Finding:
    """rows: with the bytes of one execution that the best order takes off the slow tier."""
    at_stake: ByteRange = together(per_step(row, saved_bytes) for row, saved_bytes in rows)
    first = max(rows, key=lambda item: item[1] * item[0].executions[0])[0]
    several = f"{first.name} and {len(rows) - 1} more" if len(rows) > 1 else first.name
    time = ""
    if own.communication_s is not None and best.communication_s is not None:
        seconds = [format_seconds(one.communication_s) for one in (best, own)]
        time = f": the step's communication takes {seconds[0]} instead of {seconds[1]}"
    return Finding(
        rule="slow-tier-by-order",
        instruction=first.name,
        axes=axes,
        wire_bytes=at_stake,
        source=first.source,
        evidence=f"{format_bytes(at_stake)} per step of {several} go over {first.tier}; the device order "
        f"{best.name} keeps them on faster links{time}.",
        remedy=_remedy(best),
    )


def _remedy(best: OrderResult) -> str:
    listed = ", ".join(map(str, best.device_ids))
    if len(best.device_ids) > SPELLED_OUT:
        return f"Write {best.how}; --order --json lists them. It is called {best.name}."
    how = best.how.replace("[its device_ids]", f"[{listed}]")
    return f"Write {how}."
