"""Rules to shardings: what is split over what, what cannot be, and what is replicated instead."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardlab.errors import Infeasible, UserError
from shardlab.spec.sharding import (
    array_sharding,
    nearest_divisor,
    replicated_kv_heads,
    split_groups,
)

MESH = {"data": 2, "fsdp": 4, "tensor": 8}
RULES = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
}


@pytest.mark.parametrize(
    ("shape", "axes", "split"),
    [
        pytest.param((64, 16, 128), ("embed", "heads", "head_dim"), (("fsdp",), ("tensor",), ()), id="query"),
        pytest.param((16, 64), ("batch", "seq"), (("data", "fsdp"), ()), id="two axes on one dimension"),
        pytest.param((7, 64), (None, "embed"), ((), ("fsdp",)), id="no logical axis"),
        pytest.param((7,), ("stage",), ((),), id="no rule is replicated"),
        pytest.param(
            (64, 8, 128), ("embed", "kv_heads", "head_dim"), (("fsdp",), ("tensor",), ()), id="8 KV heads"
        ),
        pytest.param((64, 2, 128), ("embed", "kv_heads", "head_dim"), (("fsdp",), (), ()), id="2 KV heads"),
        pytest.param((12,), ("kv_heads",), ((),), id="12 KV heads over 8"),
        pytest.param((), (), (), id="scalar"),
    ],
)
def test_split(
    shape: tuple[int, ...], axes: tuple[str | None, ...], split: tuple[tuple[str, ...], ...]
) -> None:
    assert array_sharding(shape, axes, RULES, MESH) == split


@pytest.mark.parametrize(
    ("shape", "axes", "message"),
    [
        pytest.param(
            (6,), ("heads",), "6 heads over 8 devices (tensor); nearest size that divides: 6", id="6 heads"
        ),
        pytest.param(
            (12,), ("heads",), "12 heads over 8 devices (tensor); nearest size that divides: 6", id="12 heads"
        ),
        pytest.param(
            (25,), ("heads",), "25 heads over 8 devices (tensor); nearest size that divides: 5", id="25 heads"
        ),
        pytest.param(
            (10, 3),
            ("embed", "seq"),
            "embed of 10 over 4 devices (fsdp); nearest size that divides: 5",
            id="embed",
        ),
        pytest.param(
            (20,),
            ("batch",),
            "20 sequences over 8 devices (data x fsdp); nearest batch that divides: 16 or 24",
            id="batch",
        ),
        pytest.param(
            (1,),
            ("batch",),
            "1 sequences over 8 devices (data x fsdp); nearest batch that divides: 8",
            id="small batch",
        ),
    ],
)
def test_what_does_not_divide_is_infeasible(
    shape: tuple[int, ...], axes: tuple[str, ...], message: str
) -> None:
    with pytest.raises(Infeasible) as caught:
        array_sharding(shape, axes, RULES, MESH)
    assert str(caught.value) == message


def test_the_array_is_named() -> None:
    with pytest.raises(Infeasible, match=r"^6 heads over 8 devices \(tensor\) in layers/query; "):
        array_sharding((6,), ("heads",), RULES, MESH, what="layers/query")


def test_one_mesh_axis_cannot_split_two_dimensions() -> None:
    with pytest.raises(UserError) as caught:
        array_sharding((64, 64), ("heads", "mlp"), RULES, MESH, what="odd")
    assert str(caught.value) == (
        "odd: mesh axis 'tensor' would split both 'heads' and 'mlp' of the odd; "
        "take 'tensor' out of one of the two rules"
    )


def test_a_rule_must_name_axes_of_the_mesh() -> None:
    with pytest.raises(
        UserError, match=r"^rules: 'embed' names no mesh axis 'model'; mesh axes: data, fsdp, tensor$"
    ):
        array_sharding((64,), ("embed",), {"embed": ("model",)}, MESH)


def test_replicated_kv_heads_are_told() -> None:
    assert replicated_kv_heads(8, RULES, MESH) is None
    assert (
        replicated_kv_heads(2, RULES, MESH)
        == "2 KV heads over 8 devices (tensor): the KV heads are replicated"
    )


@pytest.mark.parametrize(
    ("heads", "kv_heads", "proper"),
    [
        pytest.param(64, 8, True, id="one KV head a device"),
        pytest.param(64, 16, True, id="two KV heads a device"),
        pytest.param(64, 4, True, id="a KV head for two devices"),
        pytest.param(24, 12, False, id="three query heads a device, in groups of two"),
    ],
)
def test_query_heads_group_properly(heads: int, kv_heads: int, proper: bool) -> None:
    # By counting: the query heads of each device, head // group size, must be whole groups or within one
    # group.
    group, per_device = heads // kv_heads, heads // 8
    groups = [{head // group for head in range(d * per_device, (d + 1) * per_device)} for d in range(8)]
    whole = all(len(g) == 1 or len(g) * group == per_device for g in groups)
    assert whole == proper
    assert (split_groups(heads, kv_heads, RULES, MESH) is None) == proper


@given(st.integers(1, 5_000), st.integers(1, 600))
def test_the_nearest_divisor_is_a_divisor_and_none_is_nearer(size: int, ways: int) -> None:
    best = nearest_divisor(size, ways)
    assert size % best == 0
    assert all(abs(d - ways) >= abs(best - ways) for d in range(1, size + 1) if size % d == 0)


@given(
    st.lists(st.sampled_from(["batch", "embed", "heads", "kv_heads", None, "seq"]), max_size=4),
    st.lists(st.integers(1, 64), min_size=4, max_size=4),
)
def test_a_sharding_splits_evenly_and_never_twice(axes: list[str | None], sizes: list[int]) -> None:
    shape = tuple(sizes[: len(axes)])
    try:
        split = array_sharding(shape, axes, RULES, MESH)
    except (Infeasible, UserError):
        return
    used = [name for names in split for name in names]
    assert len(used) == len(set(used))
    assert all(
        size % math.prod(MESH[n] for n in names) == 0 for size, names in zip(shape, split, strict=True)
    )
