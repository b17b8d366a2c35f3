"""Rules to PartitionSpecs, and what the placed weight and lookup do to values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated import FSDP, PLANS, TENSOR, mesh_of, plan
from jax.sharding import PartitionSpec as P

from shardlab.model.runtime import take_rows
from shardlab.parallel.embedding import mesh_lookup
from shardlab.parallel.shardings import Shardings, shardings_of
from shardlab.spec.params import ParamSpec
from shardlab.spec.plan import Plan

QUERY = ParamSpec("layers/attention/query/kernel", (2, 32, 8, 8), ("layers", "embed", "heads", "head_dim"))
MIXED = PLANS["data-fsdp-tensor"]


def shardings(plan: Plan) -> Shardings:
    return shardings_of(plan, mesh_of(plan))


def test_one_parameter_through_every_table() -> None:
    """Stored over fsdp and tensor, used over tensor alone: FSDP gathers, tensor parallelism does not."""
    placed = shardings(MIXED)
    assert placed.param(QUERY).spec == P(None, ("fsdp",), ("tensor",), None)
    assert placed.weight_in_use(QUERY.shape[1:], QUERY.axes[1:]).spec == P(None, ("tensor",), None)
    zero1 = shardings(PLANS["zero1"])
    assert zero1.param(QUERY).spec == P(None, None, None, None)
    assert zero1.optimizer_state(QUERY).spec == P(None, ("data",), None, None)


@pytest.mark.parametrize(
    ("name", "gathers"),
    [("data", False), ("zero1", False), ("tensor", False), ("fsdp", True), ("data-fsdp-tensor", True)],
)
def test_whether_weights_are_gathered(name: str, gathers: bool) -> None:
    assert shardings(PLANS[name]).gathers == gathers


@pytest.mark.parametrize(
    ("shape", "axes", "spec"),
    [
        ((16, 16, 32), ("batch", "norm_seq", "embed"), P(("data", "fsdp"), ("tensor",), None)),
        ((16, 16, 32), ("batch", "seq", "embed"), P(("data", "fsdp"), None, None)),
        ((16, 1, 32), ("batch", "norm_seq", "embed"), P(("data", "fsdp"), None, None)),
        ((16, 16, 2, 8), ("batch", "kv_seq", "kv_heads", None), P(("data", "fsdp"), None, ("tensor",), None)),
        ((16, 16, 3, 8), ("batch", "kv_seq", "kv_heads", None), P(("data", "fsdp"), None, None, None)),
    ],
    ids=["residual", "products", "one-token-is-not-split", "kv-heads", "odd-kv-heads-are-replicated"],
)
def test_activations(shape: tuple[int, ...], axes: tuple[str | None, ...], spec: P) -> None:
    assert shardings(MIXED).activation(shape, axes).spec == spec


def test_norm_seq_follows_seq() -> None:
    split = plan({"seq": 8}, {}, {"seq": ("seq",)})
    assert shardings(split).activation((8, 16, 32), ("batch", "norm_seq", "embed")).spec == P(
        None, ("seq",), None
    )


def test_a_placed_weight_moves_but_does_not_change() -> None:
    """Forward it is gathered over fsdp, its gradient is split again; values are those without a mesh."""
    placed = shardings(MIXED)
    weight = jnp.arange(32 * 8 * 8, dtype=jnp.float32).reshape(QUERY.shape[1:])

    def squares(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        used = placed.place_weight(weight, QUERY.axes[1:])
        return jnp.sum(used**2), used

    gradient, used = jax.jit(jax.grad(squares, has_aux=True))(weight)
    np.testing.assert_array_equal(used, weight)
    np.testing.assert_array_equal(gradient, 2 * weight)
    assert used.sharding.is_equivalent_to(placed.weight_in_use(used.shape, QUERY.axes[1:]), 3)
    stored = shardings(MIXED).param(ParamSpec("", gradient.shape, QUERY.axes[1:]))
    assert gradient.sharding.is_equivalent_to(stored, 3)


LOOKUPS = {
    **PLANS,
    "vocab-over-two-axes": plan({"a": 2, "b": 4}, {"vocab": ("a", "b")}, {"norm_seq": ("a", "b")}),
    "split-sequence": plan({"seq": 4, "tensor": 2}, TENSOR, {"seq": ("seq",)}),
    "embed-in-use": plan(
        {"data": 2, "tensor": 4}, FSDP | {"embed": ("tensor",)}, {"batch": ("data",), "embed": ("tensor",)}
    ),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_lookup_on_a_mesh_equals_indexing(name: str) -> None:
    """Rows, their gradient, and where the rows end up."""
    placed = shardings(LOOKUPS[name])
    random = np.random.default_rng(0)
    table = jnp.asarray(random.normal(size=(128, 32)), dtype=jnp.float32)
    tokens = jnp.asarray(random.integers(100, size=(16, 16)))
    weights = jnp.asarray(random.normal(size=(16, 16, 32)), dtype=jnp.float32)

    def weighed(table: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = mesh_lookup(placed)(table, tokens)
        return jnp.sum(rows * weights), rows

    def plainly(table: jax.Array) -> jax.Array:
        return jnp.sum(take_rows(table, tokens) * weights)

    gradient, rows = jax.jit(jax.grad(weighed, has_aux=True))(table)
    np.testing.assert_array_equal(rows, take_rows(table, tokens))
    np.testing.assert_allclose(gradient, jax.grad(plainly)(table), rtol=1e-5, atol=1e-5)
