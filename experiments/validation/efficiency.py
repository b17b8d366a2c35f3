"""One constant per chip: the share of its datasheet peak at which it really computes, from one row each;
and for an eager framework how long it takes to launch one run of a layer.

A chip that holds 500 W, or whose clock sags, reaches less than what microbenchmarks of a few seconds do. The
constant multiplies the chip's peak; memory and links keep their measured rates. The row that it is taken
from is not scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

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
T = TypeVar("T")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Eager:
    """A step whose kernels were launched one by one. Seconds; predicted_s: of the GPU's work alone.

    layer_s: of that, of one run of a layer. runs: how often a device ran a layer, bubbles included.
    """

    predicted_s: float
    layer_s: float
    runs: int

    def at(self, launch_s: float) -> float:
        """The step where launching the kernels of one run of a layer takes `launch_s`: a run takes the longer
        of launching and working."""
        return self.predicted_s + self.runs * max(0.0, launch_s - self.layer_s)

    def launch_s(self, measured_s: float) -> float:
        """The launch overhead that makes the step the measured one."""
        return self.layer_s + (measured_s - self.predicted_s) / self.runs


def fitted_on(rows: Sequence[T]) -> list[T]:
    """The rows that the launch overhead is taken from: every n-th, at most 20, and no more than a quarter."""
    step = max(4, -(-len(rows) // MAX_LAUNCH_ROWS))
    return list(rows[::step])


def fitted_launch_s(rows: Sequence[tuple[float, Eager]]) -> float:
    """Seconds per run of a layer with the least mean error of (measured, step), among what one row says."""

    def error(launch_s: float) -> float:
        return sum(abs(eager.at(launch_s) / measured - 1) for measured, eager in rows)

    return min((max(0.0, eager.launch_s(measured)) for measured, eager in rows), key=error)
