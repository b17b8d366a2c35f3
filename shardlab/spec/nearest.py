"""The nearest size of a mesh axis that works for every array that the axis splits, not only for the first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import gcd

from shardlab.spec.sharding import nearest_divisor, num_ways

# Counted in sequences or tokens: what does not divide is answered with another batch or sequence. KV heads
# are replicated where they do not divide.
_CHOSEN = ("batch", "seq", "norm_seq", "hop_seq", "kv_seq", "cache")

# Shape, logical axis of each dimension, rules, name.
Array = tuple[tuple[int, ...], tuple[str | None, ...], Mapping[str, tuple[str, ...]], str]


def nearest_size(array: Array, arrays: Sequence[Array], mesh: Mapping[str, int]) -> str | None:
    """What would work in place of the first dimension of `array` that does not divide: for messages.

    arrays: all of the case, of which the sequence stays as it is; the batch may follow. None where the answer
    is another batch or sequence.
    """
    for size, axis, split in _split(array):
        if size % num_ways(split, mesh) and axis != "kv_heads":
            if axis in _CHOSEN:
                return None
            sizes = {name: nearest_divisor(_common(name, arrays, mesh), mesh[name]) for name in split}
            name = min(split, key=lambda name: (abs(sizes[name] - mesh[name]), split.index(name)))
            wanted = str(sizes[name]) if len(split) == 1 else f"{name} = {sizes[name]}"
            return f"nearest size that divides: {wanted}"
    return None


def _common(name: str, arrays: Sequence[Array], mesh: Mapping[str, int]) -> int:
    """What the size of a mesh axis must divide, while the others stay as they are."""
    common = 0
    for size, axis, split in (dimension for array in arrays for dimension in _split(array)):
        if name in split and axis not in ("batch", "kv_heads"):
            others = num_ways(split, mesh) // mesh[name]
            common = gcd(common, size // others if size % others == 0 else 1)
    return common


def _split(array: Array) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """Size, logical axis and mesh axes of each dimension that is split."""
    shape, axes, rules, _ = array
    for size, axis in zip(shape, axes, strict=True):
        if axis is not None and rules.get(axis):
            yield size, axis, tuple(rules[axis])
