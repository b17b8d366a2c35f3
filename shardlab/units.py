"""Honest formatting of bytes, seconds and counts for people. Imports nothing of shardlab.

A figure never looks rounder than it is: an exact value is printed short (`2 GB`), a rounded one with three
significant digits (`2.00 GB`), and nothing that is not zero is printed as zero. Prefixes are decimal (1 GB
= 10^9 bytes).
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

Quantity = int | float | Fraction
QuantityRange = tuple[Quantity, Quantity | None]

UNKNOWN = "unknown"
_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
_SMALL_TIMES = ((1, "s"), (1_000, "ms"), (1_000_000, "µs"), (1_000_000_000, "ns"))
_LONG_TIMES = ((7_200, 3_600, "h"), (120, 60, "min"))
_BYTES_TEXT = re.compile(r"\s*([0-9][0-9_,]*(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", re.ASCII)
_BYTE_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{suffix}b".lower(): base**power
    for power, prefix in enumerate("kMGTPE", start=1)
    for suffix, base in (("", 1000), ("i", 1024))
}


def format_bytes(value: Quantity | QuantityRange | None) -> str:
    """Bytes for people: `40 B`, `57.8 MB`, `1 GB – 2.5 GB`, `at least 1 GB`, `unknown`.

    A pair is a range `(min, max)`; a max of None is unknown.
    """
    return _range(value, "B")


def format_count(value: Quantity | QuantityRange | None, unit: str = "FLOP") -> str:
    """A count with a decimal prefix: 2.2e14 is `220 TFLOP`. Ranges and None as in `format_bytes`."""
    return _range(value, unit)


def format_seconds(value: Quantity | None) -> str:
    """Seconds for people: `12.5 ms`, `3 µs`, `1.5 s`, `20.5 min`, `unknown`."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    seconds = Fraction(value)
    for least, scale, unit in _LONG_TIMES:
        if abs(seconds) >= least:
            return f"{_digits(seconds / scale)} {unit}"
    for scale, unit in _SMALL_TIMES:
        if seconds == 0 or abs(_rounded(seconds * scale)[0]) >= 1:
            return f"{_digits(seconds * scale)} {unit}"
    return f"{float(seconds):.3g} s"


def parse_bytes(text: str) -> int:
    """Bytes from `20 GB`, `1.5GiB`, `40`. Raises ValueError when the text is not a whole number of bytes."""
    match = _BYTES_TEXT.fullmatch(text) if len(text) <= 64 else None
    scale = _BYTE_UNITS.get(match.group(2).lower()) if match else None
    if match is None or scale is None:
        raise ValueError(f"{text[:64]!r} is not an amount of bytes such as '20 GB' or '512 MiB'")
    size = Fraction(match.group(1).replace(",", "").replace("_", "")) * scale
    if size.denominator != 1:
        raise ValueError(f"{text!r} is not a whole number of bytes")
    return int(size)


def _range(value: Quantity | QuantityRange | None, unit: str) -> str:
    if value is None:
        return UNKNOWN
    if not isinstance(value, tuple):
        return _prefixed(value, unit)
    least, most = value
    if most is None:
        return f"at least {_prefixed(least, unit)}" if least else UNKNOWN
    if least == most:
        return _prefixed(least, unit)
    return f"{_prefixed(least, unit)} – {_prefixed(most, unit)}"


def _prefixed(value: Quantity, unit: str) -> str:
    if not math.isfinite(value):
        return UNKNOWN
    exact = Fraction(value)
    power = 0
    while abs(_rounded(exact / 1000**power)[0]) >= 1000 and power < len(_PREFIXES) - 1:
        power += 1
    return f"{_digits(exact / 1000**power)} {_PREFIXES[power]}{unit}"


def _rounded(value: Fraction) -> tuple[Fraction, int]:
    """The value with three significant digits (more only before the point), and its number of decimals."""
    decimals = 0
    while decimals < 12 and value and abs(value) * 10**decimals < 100:
        decimals += 1
    rounded = round(value, decimals)
    if decimals and abs(rounded) * 10**decimals >= 1000:  # 9.996 became 10.00: one digit too many
        decimals -= 1
    return rounded, decimals


def _digits(value: Fraction) -> str:
    """The value in three significant digits; without trailing zeros only when that is the exact value."""
    rounded, decimals = _rounded(value)
    if not rounded and value:
        return f"{float(value):.3g}"
    text = f"{float(rounded):,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if rounded == value and decimals else text
