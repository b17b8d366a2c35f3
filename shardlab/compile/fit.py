"""The largest batch that fits, by asking the compiler."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from shardlab.spec.case import Case
from shardlab.spec.pipeline import num_microbatches

MAX_TRIES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Try:
    """One compile: global batch (sequences), whether it compiled, and the bytes per device that it needs."""

    batch: int
    fits: bool
    needed_bytes: int


def batch_unit(case: Case) -> int:
    """The least global batch (sequences) the plan can split: batch shards x accumulation x microbatches."""
    shards = math.prod(case.plan.axes[axis] for axis in case.plan.activations.get("batch", ()))
    return shards * num_microbatches(case.plan)


def largest_batch(
    unit: int, refused: Try, limit_bytes: int, attempt: Callable[[int], Try], max_tries: int = MAX_TRIES
) -> int | None:
    """The largest multiple of `unit` below the refused batch that compiled; None when none did.

    Assumes that a smaller batch needs no more memory. The first try is one unit, since often not even that
    fits; the next ones stand where a line through the best fit and the least refusal meets the limit.
    A compile is dear, so there are at most `max_tries`: what lies between the last two is not known then.
    """
    if refused.batch <= unit or max_tries < 1:
        return None
    low, high = attempt(unit), refused
    if not low.fits:
        return None
    for _ in range(max_tries - 1):
        batch = _between(low, high, unit, limit_bytes)
        if batch is None:
            break
        tried = attempt(batch)
        low, high = (tried, high) if tried.fits else (low, tried)
    return low.batch


def _between(low: Try, high: Try, unit: int, limit_bytes: int) -> int | None:
    """The next batch to try, strictly between the two, in whole units; None when there is none."""
    first, last = low.batch // unit + 1, -(-high.batch // unit) - 1
    if first > last:
        return None
    if high.needed_bytes <= low.needed_bytes:  # no line to follow
        return (first + last) // 2 * unit
    share = (limit_bytes - low.needed_bytes) * (high.batch - low.batch)
    guess = (low.batch + share // (high.needed_bytes - low.needed_bytes)) // unit
    return min(max(guess, first), last) * unit
