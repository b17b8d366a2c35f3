"""Collectives as the device that sends most runs them, where devices differ (stages of a pipeline).

Rows say how often some device runs a collective; their sum would count what no device does alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from shardlab.analysis import Analysis, CollectiveRow, Range
from shardlab.analysis.records import DeviceRuns
from shardlab.report.figures import most, scaled

BRANCHES = "every branch of a conditional counts here, of which a device runs one"


@dataclass(frozen=True, slots=True)
class Busiest:
    """The rows with the executions of one device, and what is to be said of them ("" for nothing)."""

    rows: tuple[CollectiveRow, ...]
    note: str

    def caption(self, text: str) -> str:
        """The text with what is to be said."""
        return "; ".join(filter(None, (text, self.note)))


def busiest(analysis: Analysis) -> Busiest:
    """The rows of the device that sends most: all of them as they are, where no device differs."""
    runs = [_Runs(row.by_device) for row in analysis.collectives]
    devices = sorted({start for one in runs for start in one.starts})
    if not devices:
        return Busiest(analysis.collectives, _note(analysis, analysis.collectives))
    sums = {device: _sent(analysis.collectives, runs, device) for device in devices}
    device = max(devices, key=lambda one: (sums[one], -one))
    rows = tuple(
        replace(row, executions=one.of(device) or row.executions)
        for row, one in zip(analysis.collectives, runs, strict=True)
    )
    return Busiest(rows, f"of device {device}, which sends most")


def _sent(rows: Sequence[CollectiveRow], runs: Sequence[_Runs], device: int) -> Fraction:
    pairs = zip(rows, runs, strict=True)
    return sum(
        (most(scaled(one.of(device) or row.executions, row.wire_bytes)) for row, one in pairs), Fraction(0)
    )


def _note(analysis: Analysis, rows: Sequence[CollectiveRow]) -> str:
    """Whether the rows sum to the totals."""
    high: Fraction | None = Fraction(0)
    for row in rows:
        each = scaled(row.executions, row.wire_bytes)[1]
        high = None if high is None or each is None else high + each
    return "" if high == analysis.totals.wire_bytes[1] else BRANCHES


class _Runs:
    """How often each device runs a collective, from `by_device`."""

    def __init__(self, by_device: Sequence[DeviceRuns] | None) -> None:
        found: list[tuple[int, Range]] = []
        for part in by_device or ():
            for span in part.devices.split(","):
                found.append((int(span.partition("-")[0]), part.executions))
        found.sort()
        self.starts = [start for start, _ in found]
        self.executions = [executions for _, executions in found]

    def of(self, device: int) -> Range | None:
        """None where all devices run it equally often."""
        return self.executions[bisect_right(self.starts, device) - 1] if self.starts else None
