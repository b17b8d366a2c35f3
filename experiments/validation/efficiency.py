"""One constant per chip: the share of its datasheet peak at which it really computes, from one row each;
and for an eager framework what it adds to each run of a layer.

A chip that holds 500 W, or whose clock sags, reaches less than what microbenchmarks of a few seconds do. The
constant multiplies the chip's peak; memory and links keep their measured rates. The row that it is taken
from is not scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median

from shardlab.hardware.machine import Machine
from validation.row import Row

# Chip -> (source, what the row's name begins with): the first row of the chip that is a program alone.
TAKEN_FROM: Mapping[str, tuple[str, str]] = {
    "a100": ("korthikanti", "22B on 8: full"),
    "h100-96": ("torchtitan", "2:"),
    "h200": ("torchtitan", "31:"),
    "v6e": ("tpu_recipes", "17:"),
    "v5p": ("tpu_recipes", "22:"),
}
MAX_LAUNCH_ROWS = 20
BOUNDS = (0.4, 2.5)
STEPS = 12  # halvings: to 0.05 %


def taken_from(row: Row) -> bool:
    """Whether the row's chip has its efficiency from this very row."""
    source, begins = TAKEN_FROM.get(row.chip, ("", ""))
    return row.source == source and row.row.startswith(begins)


def at_efficiency(machine: Machine, efficiency: float) -> Machine:
    """The machine with a chip of that share of its peak."""
    chip = machine.chip
    if chip.bf16_flops_per_s is None:
        return machine
    return replace(machine, chip=replace(chip, bf16_flops_per_s=chip.bf16_flops_per_s * efficiency))


def efficiency_of(step_s: Callable[[float], float | None], measured_s: float) -> float | None:
    """The efficiency at which the predicted step is the measured one, by bisection of a step that falls with
    it; None where none within `BOUNDS` is, or the step is not known."""
    low, high = BOUNDS
    slowest, fastest = step_s(low), step_s(high)
    if slowest is None or fastest is None or not fastest <= measured_s <= slowest:
        return None
    for _ in range(STEPS):
        middle = (low + high) / 2
        found = step_s(middle)
        assert found is not None
        low, high = (middle, high) if found > measured_s else (low, middle)
    return (low + high) / 2


def launch_rows(predicted: int) -> int:
    """How many rows the launch overhead is taken from: a quarter of those predicted, at most 20."""
    return min(MAX_LAUNCH_ROWS, predicted // 4)


def launch_s(rows: Sequence[tuple[float, float, int]]) -> float:
    """Seconds that an eager framework adds to each run of a layer: the median of what (measured, predicted,
    layer runs) lack, and never less than nothing."""
    return max(0.0, median((measured - predicted) / runs for measured, predicted, runs in rows))
