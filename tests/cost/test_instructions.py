"""What each instruction of a step costs, and that the step is their sum."""

from __future__ import annotations

from fractions import Fraction

import jax
import jax.numpy as jnp
import pytest

from shardlab.cost.flops import hardware_flops
from shardlab.cost.instructions import StepCost, step_cost
from shardlab.hlo.reader import parse

N = 64
PRODUCT, BYTES = 2 * N**3, 4 * N * N
SQUARE = jax.ShapeDtypeStruct((N, N), jnp.float32)
SCOPE = "jit(step)/transpose(jvp(layers))/while/body/checkpoint"


def compiled(function, *arguments) -> StepCost:  # type: ignore[no-untyped-def]
    (module,) = parse(jax.jit(function).lower(*arguments).compile().as_text())
    cost = step_cost(module, "cpu")
    assert cost.flops == hardware_flops(module)
    return cost


def layer(x_NxN: jax.Array, w_NxN: jax.Array) -> tuple[jax.Array, None]:
    return jnp.tanh(x_NxN @ w_NxN), None


def test_rows_of_a_loop_sum_to_the_step() -> None:
    weights = jax.ShapeDtypeStruct((10, N, N), jnp.float32)
    cost = compiled(lambda x, w: jax.lax.scan(layer, x, w)[0], SQUARE, weights)
    products = [row for row in cost.instructions if row.flops]
    assert [(row.executions, row.flops) for row in products] == [((10, 10), PRODUCT)]
    assert products[0].hbm_bytes == 3 * BYTES
    assert products[0].intensity == Fraction(PRODUCT, 3 * BYTES)
    rows = [row for row in cost.instructions if row.traffic is not None]
    assert cost.read_bytes == sum(r.executions[0] * r.traffic.read_bytes for r in rows if r.traffic)
    assert cost.written_bytes == sum(r.executions[0] * r.traffic.written_bytes for r in rows if r.traffic)


@pytest.mark.parametrize(
    ("wrap", "again"), [(lambda body: body, 0), (jax.checkpoint, 1)], ids=["none", "remat"]
)
def test_recomputation_is_told_from_first_use(wrap, again) -> None:  # type: ignore[no-untyped-def]
    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(wrap(layer), x, w)[0].sum()

    weights = jax.ShapeDtypeStruct((6, N, N), jnp.float32)
    cost = compiled(jax.grad(loss, argnums=(0, 1)), SQUARE, weights)
    assert cost.flops.matmul == 6 * (3 + again) * PRODUCT
    assert cost.recompute_flops == 6 * again * PRODUCT


def program(product: str, user: str) -> StepCost:
    """A product with the metadata `product`, inside a fusion without any, used by one with `user`."""
    text = f"""HloModule m, is_scheduled=true

fused {{
  a = f32[{N},{N}] parameter(0)
  ROOT dot = f32[{N},{N}] dot(a, a), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}{product}
}}

ENTRY main {{
  x = f32[{N},{N}] parameter(0)
  f = f32[{N},{N}] fusion(x), kind=kOutput, calls=fused
  c = f32[{N},{N}] copy(f)
  ROOT n = f32[{N},{N}] negate(c){user}
}}
"""
    (module,) = parse(text)
    return step_cost(module, "tpu")


def named(op_name: str) -> str:
    return f', metadata={{op_name="{op_name}"}}'


@pytest.mark.parametrize(
    ("product", "user", "again"),
    [
        (named(f"{SCOPE}/rematted_computation/mlp/up/dot_general"), "", PRODUCT),
        (named(f"{SCOPE}/mlp/up/dot_general"), named(f"{SCOPE}/rematted_computation/mlp/up/tanh"), 0),
        ("", named(f"{SCOPE}/rematted_computation/mlp/up/tanh"), PRODUCT),
        ("", named(f"{SCOPE}/mlp/up/mul"), 0),
    ],
    ids=["own-remat", "own-backward", "users-remat", "users-backward"],
)
def test_a_product_without_a_name_takes_that_of_its_user(product: str, user: str, again: int) -> None:
    cost = program(product, user)
    assert cost.flops.matmul == PRODUCT
    assert cost.recompute_flops == again
    (row,) = (row for row in cost.instructions if row.flops)
    assert (row.name, row.kind, row.layer) == ("f", "fusion", "layers/mlp/up")


def test_xlas_own_rematerialization_is_recomputation() -> None:
    text = f"""HloModule m

ENTRY main {{
  x = f32[{N},{N}] parameter(0)
  d = f32[{N},{N}] dot(x, x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  d.remat2 = f32[{N},{N}] dot(x, x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT s = f32[{N},{N}] add(d, d.remat2)
}}
"""
    (module,) = parse(text)
    cost = step_cost(module, "tpu")
    assert (cost.flops.matmul, cost.recompute_flops) == (2 * PRODUCT, PRODUCT)


def test_a_conditional_counts_its_dearest_branch_and_a_loop_without_bound_is_unknown() -> None:
    branches = [lambda x, w: x, lambda x, w: x @ w, lambda x, w: (x @ w) @ w]
    index = jax.ShapeDtypeStruct((), jnp.int32)
    cost = compiled(lambda i, x, w: jax.lax.switch(i, branches, x, w), index, SQUARE, SQUARE)
    assert cost.flops.matmul == 2 * PRODUCT
    assert {row.executions for row in cost.instructions if row.flops} == {(0, 1)}

    def run(x: jax.Array, steps: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda s: s[0] < steps, lambda s: (s[0] + 1, s[1] @ s[1]), (0, x))[1]

    unbounded = compiled(run, SQUARE, index)
    assert unbounded.flops.total is None and unbounded.read_bytes is None
