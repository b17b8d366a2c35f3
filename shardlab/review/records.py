"""The Diff record and what it is made of: pure values. All figures are per device and step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from shardlab.analysis import Analysis, ByteRange, LedgerEntry, Range, axes_key

NOTHING: ByteRange = (Fraction(0), Fraction(0))

# regrouped: the same bytes under other layers, combined, split or renamed. changed: equal bytes sent, but not
# over the same links.
What = Literal["same", "regrouped", "added", "removed", "grew", "shrank", "moved", "changed"]
UNCHANGED = ("same", "regrouped")


@dataclass(frozen=True, slots=True, kw_only=True)
class Amounts:
    """Sums of executions x bytes of some collectives, as [min, max]; a maximum of None is unknown.

    traffic: bytes per tier, empty without a machine. time_s: Σ executions · time of one alone on its links,
    upper end, exact; None where a part is unknown.
    """

    payload_bytes: ByteRange = NOTHING
    wire_bytes: ByteRange = NOTHING
    traffic: Mapping[str, ByteRange] = field(default_factory=dict)
    time_s: Fraction | None = Fraction(0)

    def bytes_equal(self, other: Amounts) -> bool:
        """Whether both move the same bytes over the same links. Time is left out: combining changes it."""
        return (self.payload_bytes, self.wire_bytes, _moving(self.traffic)) == (
            other.payload_bytes,
            other.wire_bytes,
            _moving(other.traffic),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """All collectives of one program that mean the same: of one kind, axes, dtypes, phase and layer.

    tiers: the slowest links that they span, none without a machine. executions: summed. sources: the lines
    that they come from, those that send most first.
    """

    kind: str
    axes: tuple[str, ...] | None
    dtypes: tuple[str, ...]
    phase: str
    layer: str
    tiers: tuple[str, ...]
    group_sizes: tuple[int, ...]
    executions: Range
    names: tuple[str, ...]
    sources: tuple[str, ...]
    amounts: Amounts

    @property
    def key(self) -> tuple[str, ...]:
        """What it means, as text: the same for both programs whatever their instructions are called."""
        return (self.kind, axes_key(self.axes), "+".join(self.dtypes), self.phase, self.layer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a diff: flows of the base and what became of them in the head; () where there are none.

    moved: what is not the same of a flow that is still there: kind, axes, dtypes, phase, tier.
    Every flow of both programs stands in exactly one row, so rows sum to the programs.
    """

    what: What
    base: tuple[Flow, ...] = ()
    head: tuple[Flow, ...] = ()
    moved: tuple[str, ...] = ()

    @property
    def before(self) -> Amounts:
        """What the base moves."""
        return total(flow.amounts for flow in self.base)

    @property
    def after(self) -> Amounts:
        """What the head moves."""
        return total(flow.amounts for flow in self.head)


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two that are compared; None is unknown.

    analysis: None where there is no program to read, and then `why_not` says why. memory_bytes: what a run
    holds, with its limit and whether it fits. flops, step_time_s: as `explain` has them. case: what was
    compiled (plan, model, machine, batch, …), empty for a dump. versions: of the compiler and what called it.
    absent: there is no such plan on this side.
    """

    name: str
    analysis: Analysis | None
    memory_bytes: int | None = None
    limit_bytes: int | None = None
    fits: str | None = None
    flops: int | None = None
    step_time_s: float | None = None
    case: Mapping[str, object] = field(default_factory=dict)
    why_not: str = ""
    notes: tuple[str, ...] = ()
    absent: bool = False

    @property
    def versions(self) -> Mapping[str, str]:
        """Of what made the program, as far as it is known."""
        found = self.analysis.made_by.get("versions") if self.analysis is not None else None
        return found if isinstance(found, Mapping) else {}

    @property
    def ledger(self) -> tuple[LedgerEntry, ...]:
        """What was not counted."""
        return self.analysis.ledger if self.analysis is not None else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Diff:
    """What a change does to a step.

    rows: every collective of both, largest change first; those that did not change too. renamed: mesh axes of
    the base by another name in the head, all else being equal. before, after: what the whole programs move
    (a conditional counts once, not each of its branches); None without an analysis. notes: what a reader must
    know of the comparison.
    """

    base: Side
    head: Side
    rows: tuple[Row, ...]
    before: Amounts | None
    after: Amounts | None
    renamed: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def changes(self) -> tuple[Row, ...]:
        """The rows in which something did change."""
        return tuple(row for row in self.rows if row.what not in UNCHANGED)

    @property
    def unchanged(self) -> tuple[Row, ...]:
        """The other rows."""
        return tuple(row for row in self.rows if row.what in UNCHANGED)

    def _repr_html_(self) -> str:
        """For notebooks."""
        from shardlab.review.notebook import diff_html

        return diff_html(self)


def version_changes(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """`jax 0.10.2 → 0.12.0, jaxlib …` of what both name and is not the same; "" when nothing changed."""
    known = sorted(old.keys() & new.keys())
    return ", ".join(f"{name} {old[name]} → {new[name]}" for name in known if old[name] != new[name])


def total(amounts: Iterable[Amounts]) -> Amounts:
    """Their sum; unknown in one is unknown in the sum."""
    payload = wire = NOTHING
    traffic: dict[str, ByteRange] = {}
    time_s: Fraction | None = Fraction(0)
    for one in amounts:
        payload, wire = plus(payload, one.payload_bytes), plus(wire, one.wire_bytes)
        for tier, amount in one.traffic.items():
            traffic[tier] = plus(traffic.get(tier, NOTHING), amount)
        time_s = None if time_s is None or one.time_s is None else time_s + one.time_s
    return Amounts(payload_bytes=payload, wire_bytes=wire, traffic=traffic, time_s=time_s)


def plus(one: ByteRange, other: ByteRange) -> ByteRange:
    """End by end; an unknown maximum stays unknown."""
    return one[0] + other[0], None if one[1] is None or other[1] is None else one[1] + other[1]


def minus(head: ByteRange, base: ByteRange) -> ByteRange:
    """What each end of the range changed by; None where one is unknown."""
    return head[0] - base[0], None if head[1] is None or base[1] is None else head[1] - base[1]


def _moving(traffic: Mapping[str, ByteRange]) -> dict[str, ByteRange]:
    return {tier: amount for tier, amount in traffic.items() if amount != NOTHING}
