"""Buffers that a loop over ticks reads and writes in place: stacks, or tuples, of arrays."""

from __future__ import annotations

from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp

Index: TypeAlias = jax.Array | int
Buffer = TypeVar("Buffer")  # an array, or a tuple of arrays with the same leading dimensions


def keep(buffer: Buffer, value: Buffer, slot: jax.Array) -> Buffer:
    """`write`, unless the slot is -1: then nothing has arrived."""
    at = jnp.maximum(slot, 0)
    kept = jax.tree.map(lambda new, old: jnp.where(slot >= 0, new, old), value, read(buffer, at))
    return write(buffer, kept, at)


def first(buffer: Buffer) -> Buffer:
    """Its first entry."""
    return jax.tree.map(lambda a: a[0], buffer)


def read(buffer: Buffer, *index: Index) -> Buffer:
    """buffer[index], one entry of the leading dimensions."""

    def read(array: jax.Array) -> jax.Array:
        sizes = (1,) * len(index) + array.shape[len(index) :]
        start = (*index, *(jnp.int32(0),) * (array.ndim - len(index)))
        found = jax.lax.dynamic_slice(array, start, sizes, allow_negative_indices=False)
        return found.reshape(array.shape[len(index) :])

    return jax.tree.map(read, buffer)


def write(buffer: Buffer, value: Buffer, *index: Index) -> Buffer:
    """The buffer with one entry of the leading dimensions replaced."""

    def write(array: jax.Array, entry: jax.Array) -> jax.Array:
        start = (*index, *(jnp.int32(0),) * entry.ndim)
        entry = entry.astype(array.dtype).reshape((1,) * len(index) + entry.shape)
        return jax.lax.dynamic_update_slice(array, entry, start, allow_negative_indices=False)

    return jax.tree.map(write, buffer, value)


def of_slot(arrays: jax.Array | tuple[jax.Array, ...], slot: Index) -> jax.Array:
    """One of a stack, or of a tuple."""
    if isinstance(arrays, tuple):
        assert isinstance(slot, int)
        return arrays[slot]
    return read(arrays, slot)


def add(sums: Any, array: jax.Array, index: Index) -> Any:
    """sums with sums[index] + array, in the sums' type: in place.

    XLA reads, adds and writes in one fusion only if nothing is between what it reads and the sum, not even a
    reshape (`ShouldFuseInPlaceOp`); else it copies the slice out first.
    """
    if isinstance(sums, tuple):
        return tuple(a + array.astype(a.dtype) if at == index else a for at, a in enumerate(sums))
    start = (index, *(jnp.int32(0),) * array.ndim)
    old = jax.lax.dynamic_slice(sums, start, (1, *array.shape), allow_negative_indices=False)
    new = old + array.astype(sums.dtype)[None]
    return jax.lax.dynamic_update_slice(sums, new, start, allow_negative_indices=False)
