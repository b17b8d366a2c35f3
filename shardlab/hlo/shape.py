"""Shapes: their text and their size in bytes.

Sizes follow XLA's `ShapeUtil::ByteSizeOfElements`; they are logical bytes, before any padding to tiles.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache

from shardlab.errors import ParseError
from shardlab.hlo.module import Shape

DTYPE_BITS = {
    "pred": 8, "s1": 1, "s2": 2, "s4": 4, "s8": 8, "s16": 16, "s32": 32, "s64": 64,
    "u1": 1, "u2": 2, "u4": 4, "u8": 8, "u16": 16, "u32": 32, "u64": 64,
    "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
    "f8e5m2": 8, "f8e4m3": 8, "f8e4m3fn": 8, "f8e4m3b11fnuz": 8, "f8e3m4": 8, "f8e5m2fnuz": 8,
    "f8e4m3fnuz": 8, "f8e8m0fnu": 8, "f4e2m1fn": 4, "f6e2m3fn": 6, "f6e3m2fn": 6,
}  # fmt: skip
"""Bits of one element by type name; pred is stored as one byte."""

_UNSIZED = ("token", "opaque")
_BLANK = re.compile(r"(?:\s++|/\*(?:[^*]++|\*(?!/))*+\*/)*+", re.ASCII)
_DIM = r"\s*+(?:(?:<=)?+[0-9]{1,20}|\?)\s*+"
_ARRAY = re.compile(rf"([a-z][a-z0-9]*+)\[((?:{_DIM}(?:,{_DIM})*+|\s*+))\]\s*+", re.ASCII)
_LAYOUT = re.compile(r"\{(?:[^{}]++|\{[^{}]*+\})*+\}")
_PACKED = re.compile(r"(?<![A-Za-z])E\((\d{1,3})\)", re.ASCII)
_SPACE = re.compile(r"(?<![A-Za-z])S\((\d{1,9})\)", re.ASCII)


@lru_cache(maxsize=1 << 13)
def parse_shape(text: str) -> Shape:
    """Read `bf16[8,128]{1,0:T(8,128)S(1)}`, `(f32[], token[])`, `b(f32[8])`.

    Raises ParseError (column within `text`) on anything else. Nesting is not limited.
    """
    pending: list[list[Shape]] = [[]]
    closers: list[str] = []
    offset = _skip(text, 0)
    while True:
        offset = _open(text, offset, pending, closers)
        offset = _close(text, offset, pending, closers)
        if not closers:
            break
    if offset != len(text):
        raise _error(text, offset, "more text after the shape")
    return pending[0][0]


def _skip(text: str, offset: int) -> int:
    match = _BLANK.match(text, offset)
    return match.end() if match else offset


def _error(text: str, offset: int, message: str) -> ParseError:
    return ParseError(f"{message} in shape {text[:80]!r}", line=1, column=offset + 1)


def _open(text: str, offset: int, pending: list[list[Shape]], closers: list[str]) -> int:
    """Read opening brackets, then one array if there is one; arrays go to the innermost pending tuple."""
    while text.startswith(("(", "b("), offset):
        closers.append("tuple" if text[offset] == "(" else "buffer")
        pending.append([])
        offset = _skip(text, offset + (1 if text[offset] == "(" else 2))
    if text.startswith(")", offset) and closers and not pending[-1]:
        return offset
    match = _ARRAY.match(text, offset)
    if not match:
        raise _error(text, offset, "expected an array or a tuple")
    offset = match.end()
    layout = _LAYOUT.match(text, offset) if text.startswith("{", offset) else None
    if text.startswith("{", offset) and not layout:
        raise _error(text, offset, "unbalanced layout")
    pending[-1].append(_array(match.group(1), match.group(2), layout.group() if layout else ""))
    return _skip(text, layout.end() if layout else offset)


def _close(text: str, offset: int, pending: list[list[Shape]], closers: list[str]) -> int:
    """Close every tuple that ends here, then pass the comma before the next element."""
    while closers and text.startswith(")", offset):
        leaves = tuple(pending.pop())
        kind = closers.pop()
        if kind == "buffer" and len(leaves) != 1:
            raise _error(text, offset, "a buffer holds one shape")
        pending[-1].append(leaves[0] if kind == "buffer" else Shape("tuple", leaves=leaves))
        offset = _skip(text, offset + 1)
    if not closers:
        return offset
    if not text.startswith(",", offset):
        raise _error(text, offset, "expected ',' or ')'")
    return _skip(text, offset + 1)


@lru_cache(maxsize=1 << 13)
def _array(dtype: str, dims_text: str, layout: str) -> Shape:
    dims = dims_text.replace("<=", "").split(",") if dims_text.strip() else []
    suffix = layout.split("P(", 1)[0]
    packed, space = _PACKED.search(suffix), _SPACE.search(suffix)
    return Shape(
        dtype=dtype,
        dims=tuple(None if dim.strip() == "?" else int(dim) for dim in dims),
        element_bits=int(packed.group(1)) if packed else 0,
        bounded="<=" in dims_text,
        memory_space=int(space.group(1)) if space else 0,
    )


def array_leaves(shape: Shape) -> list[Shape]:
    """The arrays, tokens and opaques of a shape, in order; a shape that is no tuple is its own leaf."""
    leaves, stack = [], [shape]
    while stack:
        top = stack.pop()
        if top.dtype == "tuple":
            stack.extend(reversed(top.leaves))
        else:
            leaves.append(top)
    return leaves


@lru_cache(maxsize=1 << 12)
def array_bytes(shape: Shape) -> int | None:
    """Bytes of one array: ceil(elements * E / 8) where the layout packs, else elements * ceil(bits / 8).

    None when it cannot be known: an unbounded extent or a type shardlab has no size for. Bounds count as
    extents.
    """
    if shape.dtype in _UNSIZED:
        return 0
    bits = DTYPE_BITS.get(shape.dtype)
    if bits is None or None in shape.dims:
        return None
    elements = math.prod(dim for dim in shape.dims if dim is not None)
    return -(-elements * shape.element_bits // 8) if shape.element_bits else elements * -(-bits // 8)


def try_shape_bytes(shape: Shape) -> int | None:
    """Bytes of a shape, leaves summed, or None when a size is unknown (`?` extent, unknown type)."""
    if shape.dtype != "tuple":
        return array_bytes(shape)
    sizes = [array_bytes(leaf) for leaf in array_leaves(shape)]
    return None if None in sizes else sum(size for size in sizes if size is not None)


def shape_bytes(shape: Shape) -> int:
    """Bytes of a shape, a tuple's leaves summed; tokens and opaques are 0, bounded extents count their bound.

    Raises ParseError when it is unknown (`?` extent, unknown type): use `try_shape_bytes` to get None
    instead.
    """
    size = try_shape_bytes(shape)
    if size is None:
        raise ParseError(f"the size of {format_shape(shape)[:80]} is unknown")
    return size


def is_bounded(shape: Shape) -> bool:
    """Whether `shape_bytes` is an upper bound: some extent is a bound (`<=128`)."""
    return any(leaf.bounded for leaf in array_leaves(shape))


def format_shape(shape: Shape) -> str:
    """The shape as HLO text without dimension order and tiles; `parse_shape` reads it back.

    Which of several extents is the bound is not kept in the record: all of them are then printed with `<=`.
    """
    pieces: list[str] = []
    stack: list[Shape | str] = [shape]
    while stack:
        top = stack.pop()
        if isinstance(top, str):
            pieces.append(top)
        elif top.dtype == "tuple":
            between: list[Shape | str] = [")"]
            for leaf in reversed(top.leaves):
                between += [leaf, ", "]
            stack += [*(between[:-1] if top.leaves else between), "("]
        else:
            pieces.append(_format_array(top))
    return "".join(pieces)


def _format_array(shape: Shape) -> str:
    bound = "<=" if shape.bounded else ""
    dims = ",".join("?" if dim is None else f"{bound}{dim}" for dim in shape.dims)
    packed = f"E({shape.element_bits})" if shape.element_bits else ""
    space = f"S({shape.memory_space})" if shape.memory_space else ""
    return f"{shape.dtype}[{dims}]" + (f"{{:{packed}{space}}}" if packed or space else "")
