"""What fits on a machine: the record behind `shardlab fit`. `lab/fit.py` makes it."""

from __future__ import annotations

from dataclasses import dataclass

from shardlab.case_report import CaseReport


@dataclass(frozen=True, slots=True, kw_only=True)
class FitRow:
    """One case tried. change: what differs from the first. saved_bytes: memory that it needs less than the
    first, per device; None where one of the two is not known."""

    change: str
    report: CaseReport
    saved_bytes: int | None = None

    @property
    def needed_bytes(self) -> int | None:
        """Per device; None when the case was not compiled."""
        return needed_bytes(self.report)

    @property
    def fits(self) -> bool | None:
        """None when it is not known."""
        memory = self.report.memory
        return None if memory is None or memory.fits is None else memory.fits != "no"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What was tried, the base first. largest_batch: global, in sequences, with `remat`; longest_seq:
    in tokens, at the least batch; None where nothing that was tried fits. advice: what would make it fit."""

    rows: tuple[FitRow, ...]
    remat: str | None
    largest_batch: int | None
    longest_seq: int | None
    advice: tuple[str, ...]


def needed_bytes(report: CaseReport) -> int | None:
    """What a case needs, as compiled or as the compiler said when it refused; None where neither is known."""
    return report.memory.needed_bytes if report.memory is not None else None
