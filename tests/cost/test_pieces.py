"""Collectives in pieces beside their products, against what can be worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from shardlab.cost.kernels import Work
from shardlab.cost.pieces import in_pieces
from shardlab.cost.products import MatmulShape
from shardlab.cost.walk import Kernel, Place, Transfer
from shardlab.hlo.reader import parse

WAYS = 8
TOKENS, FEATURES, OUT = 2_048, 64, 32
LAUNCH_S = 1.0  # of every product here, and as many seconds as tokens beside it, by a thousand

HEAD = """HloModule step, is_scheduled=true, num_partitions=8

ENTRY main {
  p = bf16[2,128,64]{2,1,0} parameter(0)
  w = bf16[64,32]{1,0} parameter(1)
  d = bf16[2048,32]{1,0} parameter(2)
  scale = f32[] parameter(3)
"""
GATHER = """
  c = (bf16[2,128,64]{2,1,0}, bf16[2,1024,64]{2,1,0}) all-gather-start(p), dimensions={1}
  done = bf16[2,1024,64]{2,1,0} all-gather-done(c)
  rows = bf16[2048,64]{1,0} bitcast(done)
"""
BY_TOKEN = "  a = bf16[2048,32]{1,0} dot(rows, w), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n"
OVER_TOKENS = "  a = bf16[64,32]{1,0} dot(rows, d), lhs_contracting_dims={0}, rhs_contracting_dims={0}\n"
PRODUCTS = """
  x = bf16[2048,64]{1,0} parameter(4)
  a = bf16[2048,32]{1,0} dot(x, w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  b = bf16[2048,32]{1,0} dot(x, w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
"""
SCALED = "  s = bf16[2048,32]{1,0} fusion(a, scale), kind=kLoop, calls=f\n"
BY_ROW = """
  r = f32[2048]{0} parameter(5)
  s = bf16[2048,32]{1,0} fusion(r, a), kind=kLoop, calls=f
"""
SUM = "  s = bf16[2048,32]{1,0} fusion(a, b), kind=kLoop, calls=f\n"
SCATTER = "  c = bf16[256,32]{1,0} reduce-scatter(%s), dimensions={0}, to_apply=f\n"

TOKEN_SHAPE = MatmulShape(1, TOKENS, OUT, FEATURES, "bf16")
GRADIENT_SHAPE = MatmulShape(1, FEATURES, OUT, TOKENS, "bf16")
IN_PIECES_S = WAYS * LAUNCH_S + TOKENS / 1e3  # 10.048, for 3.048 in one


def product_s(shape: MatmulShape) -> float:
    return LAUNCH_S + max(shape.m, shape.n) / 1e3


def pieces(body: str, kind: str, time_s: float, shapes: Mapping[str, MatmulShape]) -> tuple[float, float]:
    """Seconds of the collective, and of the product `a`."""
    (module,) = parse(HEAD + body + "}\n")
    place: Place = ("main", "c")
    transfer = Transfer(
        name="c",
        kind=kind,
        axes=("tensor",),
        layer="",
        phase="",
        stream="collectives",
        time_s=time_s,
        tier_s={"nvlink": time_s / 2},
        asynchronous=True,
    )
    products = {("main", name): [Work("matmul", 0, shape=shape)] for name, shape in shapes.items()}
    kernels = {
        ("main", name): Kernel(name=name, kind="dot", layer="", phase="", time_s=product_s(shape))
        for name, shape in shapes.items()
    }
    found = in_pieces(module, products, kernels, {place: (transfer,)}, {place: WAYS}, product_s)
    (left,) = found.transfers[place]
    assert left.time_s is not None
    assert left.tier_s == {"nvlink": pytest.approx(left.time_s / 2)}
    a_s = found.kernels["main", "a"].time_s
    assert a_s is not None
    return left.time_s, a_s


HIDDEN = {
    "a gather": (GATHER + BY_TOKEN, "all-gather", {"a": TOKEN_SHAPE}),
    "a scatter": (PRODUCTS + SCATTER % "a", "reduce-scatter", {"a": TOKEN_SHAPE, "b": TOKEN_SHAPE}),
    "a scatter of what is scaled": (
        PRODUCTS + SCALED + SCATTER % "s",
        "reduce-scatter",
        {"a": TOKEN_SHAPE, "b": TOKEN_SHAPE},
    ),
    "a scatter of what is scaled by rows": (
        PRODUCTS + BY_ROW + SCATTER % "s",
        "reduce-scatter",
        {"a": TOKEN_SHAPE, "b": TOKEN_SHAPE},
    ),
}
WAITED_FOR = {
    "a gather that is summed over": (GATHER + OVER_TOKENS, "all-gather", {"a": GRADIENT_SHAPE}),
    "a scatter of a sum": (
        PRODUCTS + SUM + SCATTER % "s",
        "reduce-scatter",
        {"a": TOKEN_SHAPE, "b": TOKEN_SHAPE},
    ),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_a_short_collective_leaves_one_piece(name: str) -> None:
    body, kind, shapes = HIDDEN[name]
    left_s, product_in_pieces_s = pieces(body, kind, 8.0, shapes)
    assert left_s == pytest.approx(1.0)
    assert product_in_pieces_s == pytest.approx(IN_PIECES_S)


@pytest.mark.parametrize("name", HIDDEN)
def test_a_long_collective_leaves_what_the_products_do_not_cover(name: str) -> None:
    """Seven pieces of eight run while products run: 7/8 of their time is hidden."""
    body, kind, shapes = HIDDEN[name]
    assert pieces(body, kind, 100.0, shapes)[0] == pytest.approx(100 - IN_PIECES_S * 7 / 8)


@pytest.mark.parametrize("name", WAITED_FOR)
def test_what_needs_all_of_a_collective_waits_for_it(name: str) -> None:
    body, kind, shapes = WAITED_FOR[name]
    left_s, whole_s = pieces(body, kind, 8.0, shapes)
    assert left_s == 8.0
    assert whole_s == product_s(shapes["a"])
