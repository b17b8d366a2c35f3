"""How well predictions agree with measurements: errors, and whether they would have chosen alike."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Pair = tuple[float, float]  # measured, predicted


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Of the pairs of one source. mean, worst: |predicted / measured - 1|; bias: the mean with its sign.
    spearman: rank correlation; None for fewer than three pairs.
    """

    pairs: int
    mean: float
    worst: float
    bias: float
    spearman: float | None


def score(pairs: Sequence[Pair]) -> Score | None:
    """None without pairs."""
    if not pairs:
        return None
    errors = [predicted / measured - 1 for measured, predicted in pairs]
    return Score(
        pairs=len(pairs),
        mean=statistics.fmean(map(abs, errors)),
        worst=max(errors, key=abs),
        bias=statistics.fmean(errors),
        spearman=spearman(pairs) if len(pairs) > 2 else None,
    )


def spearman(pairs: Sequence[Pair]) -> float:
    """Rank correlation: Pearson's, of the ranks, ties at their mean rank. 0 where one side is all ties."""
    measured = ranks([measured for measured, _ in pairs])
    predicted = ranks([predicted for _, predicted in pairs])
    middle = (len(pairs) + 1) / 2
    both = sum((m - middle) * (p - middle) for m, p in zip(measured, predicted, strict=True))
    scale = math.prod(math.sqrt(sum((rank - middle) ** 2 for rank in side)) for side in (measured, predicted))
    return both / scale if scale else 0.0


def ranks(values: Sequence[float]) -> list[float]:
    """From 1, the smallest first; equal values share the mean of their ranks."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) + 1) / 2 for value in values]


def top1_regret(pairs: Iterable[Pair]) -> float:
    """How much longer the row that is predicted fastest takes than the fastest: measured, as a share."""
    pairs = list(pairs)
    chosen, _ = min(pairs, key=lambda pair: pair[1])
    return chosen / min(measured for measured, _ in pairs) - 1
