"""A diff in one line: what became better, worse, or neither."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from shardlab.analysis import ByteRange
from shardlab.review.records import Diff, Side
from shardlab.units import format_bytes, format_count, format_seconds

Judgement = Literal["same", "better", "worse", "mixed", "unknown", "added", "deleted"]
_TIME_NOISE = 1e-9  # of a step: floating-point sums in another order are not a change


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One figure of a step, less is better. before, after: None is unknown. text: of either, for people."""

    name: str
    before: Fraction | None
    after: Fraction | None
    unit: Literal["bytes", "seconds", "flops"]

    @property
    def change(self) -> Fraction:
        """After less before; 0 where one is unknown or the difference is rounding."""
        if self.before is None or self.after is None:
            return Fraction(0)
        change = self.after - self.before
        noise = abs(self.before) * Fraction(_TIME_NOISE) if self.unit == "seconds" else 0
        return change if abs(change) > noise else Fraction(0)

    def text(self, value: Fraction | None) -> str:
        """The value with its unit."""
        if self.unit == "seconds":
            return format_seconds(value)
        return format_bytes(value) if self.unit == "bytes" else format_count(value)

    @property
    def change_text(self) -> str:
        """`+1.2 GB (+3.1 %)`; `0 B` without a change; the text of unknown where it is."""
        if self.before is None or self.after is None:
            return self.text(None)
        if not self.change:
            return "no change"
        sign = "+" if self.change > 0 else "−"
        share = f" ({sign}{share_text(abs(self.change) / abs(self.before))})" if self.before else ""
        return f"{sign}{self.text(abs(self.change))}{share}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """`what`: of the whole; `text`: one line."""

    what: Judgement
    text: str


def measures(found: Diff) -> tuple[Measure, ...]:
    """What a step is judged by, of what is known on either side: bytes sent, step or communication time,
    memory, FLOPs."""
    return tuple(one for one in _measures(found) if not (one.before is None and one.after is None))


def verdict(found: Diff) -> Verdict:
    """The diff in one line."""
    if found.base.absent:
        return Verdict(what="added", text=f"Added: {_alone(found.head)}")
    if found.head.absent:
        return Verdict(what="deleted", text=f"Deleted: {_alone(found.base)}")
    if found.before is None or found.after is None:
        return _without_analysis(found)
    if silence := _silence(found):
        return Verdict(what="worse", text=silence)
    changed = [one for one in measures(found) if one.change]
    uncertain = [one for one in measures(found) if (one.before is None) != (one.after is None)]
    if not changed and not found.changes:
        text = _nothing(found)
        if uncertain:
            text += f"; {', '.join(one.name for one in uncertain)} known on one side only"
        return Verdict(what="same", text=text)
    signs = {one.change > 0 for one in changed}
    what: Judgement = "mixed" if len(signs) != 1 else "worse" if signs == {True} else "better"
    figures = [f"{one.name} {one.change_text}" for one in changed] or ["no figure changed"]
    return Verdict(
        what=what, text=f"{what.capitalize()}: {'; '.join([*figures, *_counts(found), *_fits(found)])}"
    )


def share_text(share: Fraction) -> str:
    """A change as a share: `3.1 %`, `38 %`, `240 %`, `<0.1 %`."""
    value = float(100 * share)
    if value < 0.1:
        return "<0.1 %"
    return f"{value:.1f} %" if value < 10 else f"{value:,.0f} %"


def _measures(found: Diff) -> Iterator[Measure]:
    base, head = found.base, found.head
    if found.before is not None and found.after is not None:
        yield Measure(
            name="bytes sent",
            before=upper(found.before.wire_bytes),
            after=upper(found.after.wire_bytes),
            unit="bytes",
        )
        times = (
            ("step time", _fraction(base.step_time_s), _fraction(head.step_time_s)),
            ("communication", found.before.time_s, found.after.time_s),
        )
        known = next((one for one in times if one[1] is not None and one[2] is not None), times[1])
        if found.before.traffic or found.after.traffic:
            yield Measure(name=known[0], before=known[1], after=known[2], unit="seconds")
    yield Measure(
        name="memory", before=_fraction(base.memory_bytes), after=_fraction(head.memory_bytes), unit="bytes"
    )
    yield Measure(name="FLOPs", before=_fraction(base.flops), after=_fraction(head.flops), unit="flops")


def upper(amount: ByteRange) -> Fraction | None:
    """At most; None where that is unknown."""
    return amount[1]


def _fraction(value: float | None) -> Fraction | None:
    return None if value is None else Fraction(value)


def _nothing(found: Diff) -> str:
    names = sum(len(flow.names) for row in found.rows for flow in row.head)
    if not names:
        return "No change: neither communicates"
    renamed = ", ".join(f"{old} is now called {new}" for old, new in found.renamed.items())
    sent = format_bytes(found.after.wire_bytes) if found.after is not None else ""
    ending = f" (mesh axis {renamed})" if renamed else ""
    return f"No change: {_many(names, 'collective')} send the same {sent}{ending}"


def _counts(found: Diff) -> Iterator[str]:
    counted = Counter(row.what for row in found.changes)
    for what in ("added", "removed", "grew", "shrank", "moved", "changed"):
        if counted[what]:
            yield f"{counted[what]} {what}"


def _fits(found: Diff) -> Iterator[str]:
    if "no" in (found.base.fits, found.head.fits) and found.base.fits != found.head.fits:
        yield "no longer fits in memory" if found.head.fits == "no" else "fits in memory now"


def _alone(side: Side) -> str:
    """The figures of a plan that has nothing to be compared with."""
    if side.analysis is None:
        return f"it cannot run: {side.why_not}"
    sent = upper(side.analysis.totals.wire_bytes)
    figures = (
        Measure(name="bytes sent", before=None, after=sent, unit="bytes"),
        Measure(name="step time", before=None, after=_fraction(side.step_time_s), unit="seconds"),
        Measure(name="memory", before=None, after=_fraction(side.memory_bytes), unit="bytes"),
        Measure(name="FLOPs", before=None, after=_fraction(side.flops), unit="flops"),
    )
    known = (one for one in figures if one.after is not None or one.name == "bytes sent")
    return "; ".join(f"{one.name} {one.text(one.after)}" for one in known)


def _silence(found: Diff) -> str:
    """A training step on several devices sums at least its loss: one that sends nothing was not read, or is
    not split any more."""
    head = found.head.analysis
    devices = max((module.num_devices for module in head.modules), default=1) if head is not None else 1
    training = found.head.case.get("workload") == "train"
    if not training or devices < 2 or any(row.head for row in found.rows):
        return ""
    if not any(row.base for row in found.rows):
        return ""
    what = f"no collective was found in a training step on {devices} devices, and the base has some"
    return f"Worse, or cannot be: {what}; look with: shardlab explain"


def _without_analysis(found: Diff) -> Verdict:
    base, head = found.base.why_not, found.head.why_not
    if base and head:
        return Verdict(what="unknown", text=f"Neither can run. Base: {base}. Head: {head}")
    if head:
        return Verdict(what="worse", text=f"Worse: the head cannot run: {head}")
    return Verdict(what="better", text=f"Better: the base could not run ({base}), the head can")


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
