"""Shape text and its size. Expected sizes are hand arithmetic after XLA's `ShapeUtil::ByteSizeOfElements`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardlab.errors import ParseError
from shardlab.hlo.module import Shape
from shardlab.hlo.shape import (
    DTYPE_BITS,
    array_leaves,
    format_shape,
    is_bounded,
    parse_shape,
    shape_bytes,
    try_shape_bytes,
)

SIZES = [
    ("f32[]", 4),
    ("f32[]{:T(128)}", 4),
    ("f32[8,16]{1,0}", 512),
    ("bf16[4,512,1024]{2,1,0:T(8,128)(2,1)S(1)}", 4 * 512 * 1024 * 2),
    ("pred[100]{0}", 100),
    ("c64[2]", 16),
    ("c128[3]", 48),
    ("s4[15]{0}", 15),
    ("s4[15]{0:E(4)}", 8),
    ("u2[9]{0:E(2)}", 3),
    ("u1[9]{0:E(1)}", 2),
    ("s1[9]", 9),
    ("f6e2m3fn[64]{0}", 64),
    ("f6e3m2fn[64]{0:E(6)}", 48),
    ("f4e2m1fn[64,64]{1,0:T(8,128)E(4)S(1)}", 2048),
    ("f8e4m3b11fnuz[7]", 7),
    ("f8e8m0fnu[7]", 7),
    ("f32[0,5]", 0),
    ("f32[<=128,16]{1,0}", 8192),
    ("token[]", 0),
    ("opaque[]", 0),
    ("()", 0),
    ("((), (f32[2], /*index=5*/s8[3]), token[])", 11),
    ("b(f32[8])", 32),
    ("(b(bf16[8]{0}), u32[]{:S(2)})", 20),
    ("f32[61]{0:T(1)L(128)S(11)SC(0:100,200)}", 244),
    ("f32[8]{0:T(8)#(u32)*(u32)P((f32[99]{0:E(4)S(7)}))}", 32),
    ("s32[1000000000,1000000000]", 4 * 10**18),
    (" f32[ 2 , 3 ] { 1,0 } ", 24),
]


@pytest.mark.parametrize(("text", "size"), SIZES, ids=[text for text, _ in SIZES])
def test_size(text: str, size: int) -> None:
    assert shape_bytes(parse_shape(text.strip())) == size


@pytest.mark.parametrize(
    ("text", "space"),
    [
        ("f32[8]{0}", 0),
        ("f32[8]{0:S(5)}", 5),
        ("f32[8]{0:T(8,128)E(4)S(11)SC(0:4)}", 11),
        ("f32[8]{0:P(f32[8]{0:S(3)})}", 0),
    ],
)
def test_memory_space(text: str, space: int) -> None:
    assert parse_shape(text).memory_space == space


def test_unbounded_is_unknown_and_never_zero() -> None:
    shape = parse_shape("(f32[8], f32[?,16])")
    assert try_shape_bytes(shape) is None
    with pytest.raises(ParseError, match=r"f32\[\?,16\]"):
        shape_bytes(shape)


def test_unknown_type_is_unknown_and_never_zero() -> None:
    assert try_shape_bytes(parse_shape("f128[8]")) is None


def test_bound_is_marked_through_tuples() -> None:
    assert is_bounded(parse_shape("(f32[8], (s32[<=4]))"))
    assert not is_bounded(parse_shape("(f32[8], (s32[4]))"))


@pytest.mark.parametrize(
    "text",
    ["", "f32", "f32[", "f32[8", "f32[8]{0", "f32[8,]", "f32[-1]", "f32[8] f32[8]", "(f32[8]", "(f32[8],)",
     "f32[8])",
     "(f32[8] f32[8])", "f32[8}{", "b()", "b(f32[8], f32[8])", "F32[8]", "f32[1x2]",
     "f32[99999999999999999999999]"],
)  # fmt: skip
def test_broken_text_is_refused(text: str) -> None:
    with pytest.raises(ParseError) as caught:
        parse_shape(text)
    assert caught.value.line == 1
    assert 1 <= caught.value.column <= len(text) + 1


def test_deep_nesting_needs_no_stack() -> None:
    depth = 20_000
    shape = parse_shape("(" * depth + "f32[3]" + ")" * depth)
    assert shape_bytes(shape) == 12
    assert len(array_leaves(shape)) == 1
    assert format_shape(shape).count("(") == depth


ARRAYS = st.builds(
    lambda dtype, dims, bits, space, bounded: Shape(
        dtype, tuple(dims), element_bits=bits, memory_space=space, bounded=bounded and bool(dims)
    ),
    st.sampled_from(sorted(DTYPE_BITS)),
    st.lists(st.integers(0, 10**12), max_size=4),
    st.sampled_from([0, 1, 2, 4, 6]),
    st.integers(0, 9),
    st.booleans(),
)
SHAPES = st.recursive(
    ARRAYS, lambda inner: st.lists(inner, max_size=4).map(lambda leaves: Shape("tuple", leaves=tuple(leaves)))
)


@given(SHAPES)
def test_printed_shapes_read_back(shape: Shape) -> None:
    assert parse_shape(format_shape(shape)) == shape


@given(ARRAYS)
def test_size_against_counting_bits(shape: Shape) -> None:
    elements = 1
    for dim in shape.dims:
        elements *= dim or 0
    bits = shape.element_bits * elements if shape.element_bits else max(DTYPE_BITS[shape.dtype], 8) * elements
    assert shape_bytes(shape) == (bits + 7) // 8
