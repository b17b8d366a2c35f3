"""The audit: every rule over one module, in a fixed order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Final

from shardlab.analysis import Attributed, ByteRange
from shardlab.attribute.chains import Chains
from shardlab.attribute.collectives import Collective, find_collectives
from shardlab.audit.findings import Audited, Finding, together
from shardlab.audit.flow import Flow
from shardlab.audit.gathers import gathered_every_trip, gathered_then_sliced, gathered_twice, gathered_wide
from shardlab.audit.placed import slow_tier_by_order
from shardlab.audit.reductions import gathered_by_reduction, reduced_then_sliced
from shardlab.audit.state import replicated
from shardlab.audit.warned import rematerialized
from shardlab.hardware.machine import Machine

Rule = Callable[[Audited], Iterator[Finding]]

RULES: Final[tuple[Rule, ...]] = (
    gathered_wide,
    gathered_twice,
    gathered_then_sliced,
    gathered_every_trip,
    gathered_by_reduction,
    reduced_then_sliced,
    rematerialized,
    replicated,
    slow_tier_by_order,
)
"""In the order in which findings are listed. A rule that cannot be decided from the program says nothing."""


def audit(part: Attributed, machine: Machine | None = None) -> tuple[Finding, ...]:
    """What could be saved in one module. machine: what it was attributed for, None without one.

    A Program adds the compiler's warnings and how the arguments are split.
    """
    found = find_collectives(part.module, part.graph.sites, part.analysis.modules[0].backend)
    collectives = [one for one in found if isinstance(one, Collective)]
    audited = Audited(
        part=part,
        flow=Flow(part.module, part.graph.sites),
        items=tuple(zip(collectives, part.analysis.collectives, strict=True)),
        chains=Chains(part.module),
        machine=machine,
    )
    return tuple(finding for rule in RULES for finding in _one_per_collective(rule(audited)))


def _one_per_collective(findings: Iterable[Finding]) -> Iterator[Finding]:
    """What one rule found, arrays of a combined collective together: the first one's evidence, all bytes."""
    alike: dict[tuple[str, str], list[Finding]] = {}
    for one in findings:
        alike.setdefault((one.instruction, one.remedy), []).append(one)
    for first, *others in alike.values():
        known = [one.wire_bytes for one in (first, *others) if one.wire_bytes is not None]
        if not others or len(known) <= len(others):  # bytes that are not known are not summed
            yield from (first, *others)
            continue
        arrays = f"So with {len(others)} more of its arrays."
        yield replace(first, wire_bytes=together(known), evidence=f"{first.evidence} {arrays}")


def audit_parts(parts: Sequence[Attributed], machine: Machine | None = None) -> tuple[Finding, ...]:
    """The findings of every module, per step; where there are several, each finding names its own."""
    return tuple(
        replace(
            one,
            module=part.module.name if len(parts) > 1 else None,
            wire_bytes=_times(one.wire_bytes, part.runs_per_step),
        )
        for part in parts
        for one in audit(part, machine)
    )


def _times(amount: ByteRange | None, runs: int) -> ByteRange | None:
    if amount is None:
        return None
    low, high = amount
    return low * runs, None if high is None else high * runs
