"""The largest batch that fits, by asking the compiler."""

from __future__ import annotations

import math
from collections.abc import Callable

from shardlab.spec.case import Case

MAX_TRIES = 6


def batch_unit(case: Case) -> int:
    """The least global batch (sequences) that the plan can split: batch shards x accumulation x
    microbatches.
    """
    shards = math.prod(case.plan.axes[axis] for axis in case.plan.activations.get("batch", ()))
    return shards * case.plan.method.accumulate * (case.plan.method.microbatches or 1)


def largest_batch(
    unit: int, refused: int, fits: Callable[[int], bool], max_tries: int = MAX_TRIES
) -> int | None:
    """The largest multiple of `unit` below `refused` for which `fits`, by bisection; None when none was
    found.

    Assumes that a smaller batch needs no more memory. Asks at most `max_tries` times: the first for one unit,
    since often not even that fits; with many units the answer is the largest that was tried and fitted.
    """
    if refused <= unit or max_tries < 1 or not fits(unit):
        return None
    low, high = 1, -(-refused // unit)  # in units: low fits, high does not
    for _ in range(max_tries - 1):
        if high - low <= 1:
            break
        middle = (low + high) // 2
        if fits(middle * unit):
            low = middle
        else:
            high = middle
    return low * unit
