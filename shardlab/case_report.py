"""What is known of one case: the record behind `explain` and each row of `compare` (`shardlab.report/1`).

What a stage could not know is None, and absent from the JSON; never zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from shardlab.analysis import Analysis
from shardlab.program import Program
from shardlab.spec.case import Case


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """Memory per device against the limit that really holds. Bytes."""

    argument_bytes: int | None
    temp_bytes: int | None
    peak_bytes: int | None
    limit_bytes: int | None
    limit_source: str
    deficit_bytes: int | None
    fits: Literal["yes", "tight", "no"] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseReport:
    """One case, analysed or with the reason why not.

    infeasible: the plan cannot be put on this model and machine. failure: it could not be compiled (with what to do).
    hardware_flops: per device per step, from the compiled program with trip counts; model_flops: 6·N·D plus attention
    over all devices. communication_s: Σ executions · max over tiers of bytes / bandwidth (no latency, no overlap).
    tier_s: the same per tier. emulated rows are never ranked among real ones.
    """

    case: Case
    program: Program | None = None
    analysis: Analysis | None = None
    memory: MemoryReport | None = None
    hardware_flops: int | None = None
    model_flops: int | None = None
    communication_s: float | None = None
    tier_s: Mapping[str, float] | None = None
    wire_bytes: Fraction | None = None
    infeasible: str | None = None
    failure: str | None = None
    emulated: bool = False
    notes: tuple[str, ...] = ()
