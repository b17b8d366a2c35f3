"""How the reports word figures: executions, axes, shares. No figure is rounder than the truth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fractions import Fraction

from shardlab.analysis import ByteRange, Range

NONE = "–"


def times(executions: Range) -> str:
    """`×80`, `×0–80`, or `×1 at least`."""
    low, high = executions
    if high is None:
        return f"×{low} at least"
    return f"×{low}" if low == high else f"×{low}–{high}"


def scaled(executions: Range, each: Fraction) -> ByteRange:
    """Executions x bytes."""
    low, high = executions
    return (low * each, None if high is None else high * each)


def most(value: ByteRange) -> Fraction:
    """The upper end of a range; the lower end where the upper one is unknown."""
    low, high = value
    return low if high is None else high


def axes_text(axes: tuple[str, ...] | None) -> str:
    """`data+model` as in the totals' keys; `one device` for groups of one, `unknown` where nothing fits."""
    if axes is None:
        return "unknown"
    return "+".join(axes) if axes else "one device"


def key_text(key: str) -> str:
    """A key of `by_axes`, where `none` stands for groups of one."""
    return "one device" if key == "none" else key


def percent(part: float) -> str:
    """A share from 0 to 1: `38 %`, `0.4 %`; `<0.1 %` is not 0, `>99.9 %` is not 100."""
    value = 100 * part
    if value in (0, 100):
        return f"{value:.0f} %"
    if value < 0.1:
        return "<0.1 %"
    if value > 99.9:
        return ">99.9 %"
    return f"{value:.1f} %" if value < 10 or value > 99 else f"{value:.0f} %"


def largest_first(table: Mapping[str, ByteRange]) -> list[tuple[str, ByteRange]]:
    """Entries by size, the largest first, names where they are equal."""
    return sorted(table.items(), key=lambda item: (-most(item[1]), item[0]))


def shares(values: Iterable[ByteRange]) -> list[str]:
    """Each value's part of their sum as `38 %`; dashes when nothing moves or a maximum is unknown."""
    values = list(values)
    total = sum((most(value) for value in values), Fraction(0))
    if not total or any(high is None for _, high in values):
        return [NONE] * len(values)
    return [percent(float(most(value) / total)) for value in values]
