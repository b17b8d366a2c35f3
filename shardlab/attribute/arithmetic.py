"""The integers of HLO: their types, and what each scalar opcode does to them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping

BITS = {"pred": 1} | {f"{sign}{bits}": bits for sign in "su" for bits in (1, 2, 4, 8, 16, 32, 64)}


def wrap(value: int, dtype: str) -> int:
    """`value` as two's complement (or unsigned, or a truth value) of `dtype` holds it."""
    bits = BITS[dtype]
    value &= (1 << bits) - 1
    return value - (1 << bits) if dtype[0] == "s" and value >> (bits - 1) else value


def limits(dtype: str) -> tuple[int, int]:
    """The least and the greatest value of an integer `dtype`."""
    bits = BITS[dtype]
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if dtype[0] == "s" else (0, (1 << bits) - 1)


def undefined(*_: int) -> int:
    """What an unknown comparison does: raise ValueError."""
    raise ValueError("a comparison without a known direction")


def _distance(by: int) -> int:
    if not 0 <= by < 64:
        raise ValueError("shift out of range")
    return by


def _unsigned(value: int) -> int:
    if value < 0:
        raise ValueError("a logical shift of a negative number")
    return value


def _quotient(a: int, b: int) -> int:
    """Division that rounds towards zero, as HLO's does."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


OPERAND_COUNTS = {"convert": 1, "not": 1, "negate": 1, "abs": 1, "sign": 1, "select": 3, "clamp": 3}
"""How many operands an operation takes, where that is not two."""
COMPARISONS: Mapping[str, Callable[[int, int], bool]] = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}
OPERATIONS: Mapping[str, Callable[..., int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "divide": _quotient,
    "remainder": lambda a, b: a - b * _quotient(a, b),
    "minimum": min,
    "maximum": max,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": operator.invert,
    "negate": operator.neg,
    "abs": abs,
    "sign": lambda a: (a > 0) - (a < 0),
    "select": lambda test, a, b: a if test else b,
    "clamp": lambda low, a, high: min(max(low, a), high),
    "shift-left": lambda a, by: a << _distance(by),
    "shift-right-logical": lambda a, by: _unsigned(a) >> _distance(by),
    "shift-right-arithmetic": lambda a, by: a >> _distance(by),
}
"""By opcode, before the result is wrapped to its type."""
