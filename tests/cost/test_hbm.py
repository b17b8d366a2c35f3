"""HBM traffic of single instructions: by hand, and against XLA's own `bytes accessed` where the two agree."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from shardlab.cost.hbm import Traffic
from shardlab.cost.instructions import StepCost, step_cost
from shardlab.hlo.reader import parse

N = 256
SQUARE = jax.ShapeDtypeStruct((N, N), jnp.float32)
NARROW = jax.ShapeDtypeStruct((N, N), jnp.bfloat16)
VECTOR = jax.ShapeDtypeStruct((N,), jnp.float32)
ROWS = jax.ShapeDtypeStruct((8, N), jnp.float32)
INDEX, INDICES = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((8,), jnp.int32)
WHOLE, PART = 4 * N * N, 4 * 8 * N  # bytes of SQUARE and of ROWS


def cost_of(text: str, backend: str = "tpu") -> StepCost:
    (module,) = parse(text)
    return step_cost(module, backend)


def cost_compiled(function: Callable[..., jax.Array], *arguments: object) -> tuple[StepCost, float]:
    """Our cost on CPU and XLA's bytes. What is updated in place must be donated, or it is copied first."""
    donated = (0,) if function in (updated, accumulated) else ()
    compiled = jax.jit(function, donate_argnums=donated).lower(*arguments).compile()
    return cost_of(compiled.as_text(), "cpu"), compiled.cost_analysis()["bytes accessed"]


def total(cost: StepCost) -> int:
    assert cost.read_bytes is not None and cost.written_bytes is not None
    return cost.read_bytes + cost.written_bytes


def rows(a: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice(a, (i, 0), (8, N))


def updated(a: jax.Array, u: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(a, u * 2, (i, 0))


def accumulated(a: jax.Array, u: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(a, u + rows(a, i), (i, 0))


# function, arguments, bytes by hand
AGREED = {
    "product": (lambda a, b: a @ b, (SQUARE, SQUARE), 3 * WHOLE),
    "concatenate-bf16": (lambda a, b: jnp.concatenate([a, b]), (NARROW, NARROW), 2 * WHOLE),
    "chain-is-fused": (lambda a: jnp.sqrt(a * 2) + 1, (SQUARE,), 2 * WHOLE),
    "used-twice-read-once": (lambda a: a + a * 2, (SQUARE,), 2 * WHOLE),
    "slices": (lambda a: a[:8] + a[8:16], (SQUARE,), 3 * PART),
    "dynamic-slice": (lambda a, i: 1 + rows(a, i), (SQUARE, INDEX), 2 * PART + 4),
    "update-in-place": (updated, (SQUARE, ROWS, INDEX), 2 * PART + 4),
    "accumulate-in-place": (accumulated, (SQUARE, ROWS, INDEX), 3 * PART + 4),
    "reduce": (lambda a: a.sum(0), (SQUARE,), WHOLE + 4 * N),
    "broadcast": (lambda a: jnp.broadcast_to(a, (8, N)), (VECTOR,), PART + 4 * N),
    "concatenate": (lambda a, b: jnp.concatenate([a, b]), (SQUARE, SQUARE), 4 * WHOLE),
    "transpose": (lambda a: a.T + 1, (SQUARE,), 2 * WHOLE),
}  # fmt: skip


@pytest.mark.parametrize(("function", "arguments", "by_hand"), AGREED.values(), ids=AGREED)
def test_bytes_are_xlas_and_those_by_hand(
    function: Callable[..., jax.Array], arguments: tuple[object, ...], by_hand: int
) -> None:
    cost, xla = cost_compiled(function, *arguments)
    assert cost.not_counted == ()
    assert total(cost) == xla == by_hand


def test_a_gradient_without_loops_has_xlas_bytes() -> None:
    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum((jnp.tanh(x @ w) @ w) ** 2)

    cost, xla = cost_compiled(jax.grad(loss), SQUARE, SQUARE)
    assert total(cost) == xla


# Where we differ from XLA on purpose: function, arguments, ours by hand.
DIFFERENT = {
    # XLA takes the table as read whole.
    "gather": (lambda a, i: a[i], (SQUARE, INDICES), 2 * PART + 4 * 8),
    # XLA follows slices to parameters only; the negation of the rest is never computed.
    "slice-of-a-result": (
        lambda a, i: 1 + rows(-a, i),
        (SQUARE, INDEX),
        2 * PART + 4,
    ),
}


@pytest.mark.parametrize(("function", "arguments", "by_hand"), DIFFERENT.values(), ids=DIFFERENT)
def test_only_what_is_used_is_read(
    function: Callable[..., jax.Array], arguments: tuple[object, ...], by_hand: int
) -> None:
    cost, xla = cost_compiled(function, *arguments)
    assert total(cost) == by_hand
    assert xla > by_hand


def entry(*lines: str, before: str = "") -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule m, is_scheduled=true\n\n{before}ENTRY main {{\n{body}\n}}\n"


X = "x = f32[64,16]{1,0} parameter(0)"  # 4,096 bytes
B = 4096
CASES = {
    "names-are-free": (("b = f32[1024]{0} bitcast(x)", "ROOT t = (f32[1024]) tuple(b)"), None),
    "copy-reads-and-writes": (("ROOT c = f32[64,16]{0,1} copy(x)",), Traffic(B, B)),
    "prefetch-to-vmem": (
        (
            "s = (f32[64,16]{1,0:S(1)}, f32[64,16]{1,0}, u32[]{:S(2)}) copy-start(x)",
            "ROOT d = f32[64,16]{1,0:S(1)} copy-done(s)",
        ),
        Traffic(B, 0, B),
    ),
    "offload-to-host": (
        (
            "s = (f32[64,16]{1,0:S(5)}, f32[64,16]{1,0}, u32[]{:S(2)}) copy-start(x)",
            "ROOT d = f32[64,16]{1,0:S(5)} copy-done(s)",
        ),
        Traffic(B, 0, B, B),
    ),
    "back-from-the-host-a-slice-at-a-time": (
        (
            "h = f32[4,64,16]{2,1,0:S(5)} custom-call(), custom_call_target=\"AllocateBuffer\"",
            "i = s32[] constant(1)",
            "s = ((f32[4,64,16]{2,1,0:S(5)}, s32[], s32[], s32[]), f32[1,64,16]{2,1,0}, u32[]{:S(2)}) "
            "dynamic-slice-start(h, i, i, i), dynamic_slice_sizes={1,64,16}",
            "ROOT d = f32[1,64,16]{2,1,0} dynamic-slice-done(s)",
        ),
        Traffic(3 * 4, B, B, B),
    ),
    "asynchronous-gather-counts-once": (
        (
            "s = (f32[64,16]{1,0}, f32[256,16]{1,0}) all-gather-start(x), channel_id=1, dimensions={0}, "
            "replica_groups={{0,1,2,3}}, use_global_device_ids=true",
            "ROOT d = f32[256,16]{1,0} all-gather-done(s)",
        ),
        Traffic(B, 4 * B),
    ),
    "all-reduce-start-is-its-result": (
        (
            "s = f32[64,16]{1,0} all-reduce-start(x), channel_id=1, replica_groups={{0,1}}, to_apply=add",
            "ROOT d = f32[64,16]{1,0} all-reduce-done(s)",
        ),
        Traffic(B, B),
    ),
    "send-reads": (
        (
            "t = token[] after-all()",
            "ROOT s = (f32[64,16]{1,0}, u32[], token[]) send(x, t), channel_id=1",
        ),
        Traffic(B, 0),
    ),
    "receive-writes": (
        ("t = token[] after-all()", "ROOT r = (f32[64,16]{1,0}, u32[], token[]) recv(t), channel_id=1"),
        Traffic(0, B),
    ),
    "broadcast-writes": (("z = f32[] constant(0)", "ROOT b = f32[64,16]{1,0} broadcast(z)"), Traffic(4, B)),
    "update-in-place": (
        (
            "u = f32[2,16]{1,0} parameter(1)",
            "i = s32[] parameter(2)",
            "ROOT d = f32[64,16]{1,0} dynamic-update-slice(x, u, i, i)",
        ),
        Traffic(128 + 8, 128),
    ),
    # The rows that are there, the updates and their indices are read; the rows are written.
    "scatter-in-place": (
        (
            "i = s32[2,1]{1,0} parameter(1)",
            "u = f32[2,16]{1,0} parameter(2)",
            "ROOT d = f32[64,16]{1,0} scatter(x, i, u), update_window_dims={1}, inserted_window_dims={0}, "
            "scatter_dims_to_operand_dims={0}, index_vector_dim=1, to_apply=add",
        ),
        Traffic(128 + 8 + 128, 128),
    ),
    "packed-int4": (
        ("p = s4[64,16]{1,0:E(4)} parameter(1)", "ROOT c = s4[64,16]{0,1:E(4)} copy(p)"),
        Traffic(512, 512),
    ),
    "cublas-without-its-workspace": (
        (
            "w = f32[16,32]{1,0} parameter(1)",
            "ROOT g = (f32[64,32]{1,0}, s8[4194304]{0}) custom-call(x, w), "
            'custom_call_target="__cublas$gemm", '
            'backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
            '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}',
        ),
        Traffic(B + 16 * 32 * 4, 64 * 32 * 4),
    ),
}  # fmt: skip
ADD = "add {\n  a = f32[] parameter(0)\n  b = f32[] parameter(1)\n  ROOT s = f32[] add(a, b)\n}\n\n"


@pytest.mark.parametrize(("lines", "expected"), CASES.values(), ids=CASES)
def test_instructions_by_hand(lines: tuple[str, ...], expected: Traffic | None) -> None:
    cost = cost_of(entry(X, *lines, before=ADD))
    assert cost.not_counted == ()
    assert [row.traffic for row in cost.instructions] == ([] if expected is None else [expected])


def test_memory_spaces_of_a_gpu_are_hbm_but_for_the_host() -> None:
    lines = ("c = f32[64,16]{1,0:S(1)} copy(x)", "ROOT h = f32[64,16]{1,0:S(5)} copy(c)")
    rows = cost_of(entry(X, *lines), "gpu").instructions
    assert [row.traffic for row in rows] == [Traffic(B, B), Traffic(B, 0, B, B)]
    rows = cost_of(entry(X, *lines), "tpu").instructions
    assert [row.traffic for row in rows] == [Traffic(B, 0, B), Traffic(0, 0, 2 * B, B)]


FUSED = """fused {
  p = f32[8,64,16]{2,1,0} parameter(0)
  q = f32[64,16]{1,0} parameter(1)
  i = s32[] parameter(2)
  slice = f32[1,64,16]{2,1,0} dynamic-slice(p, i, i, i), dynamic_slice_sizes={1,64,16}
  one = f32[64,16]{1,0} bitcast(slice)
  sum = f32[64,16]{1,0} add(one, q)
  part = f32[1,64,16]{2,1,0} bitcast(sum)
  put = f32[8,64,16]{2,1,0} dynamic-update-slice(p, part, i, i, i)
  unused = f32[64,16]{1,0} parameter(3)
  dead = f32[64,16]{1,0} negate(unused)
  ROOT out = (f32[8,64,16]{2,1,0}, f32[64,16]{1,0}) tuple(put, sum)
}

"""
CALL = "f = (f32[8,64,16]{2,1,0}, f32[64,16]{1,0}) fusion(p, x, i, x), kind=kLoop, calls=fused"


def test_a_fusion_with_several_results_and_an_operand_updated_in_place() -> None:
    """The slice, x and the index are read; the part and the sum are written; nobody asks for `unused`."""
    lines = (X, "p = f32[8,64,16]{2,1,0} parameter(1)", "i = s32[] parameter(2)", f"ROOT {CALL}")
    (row,) = cost_of(entry(*lines, before=FUSED)).instructions
    assert row.traffic == Traffic(2 * B + 4, 2 * B)


def test_two_updates_of_one_operand_are_both_in_place() -> None:
    before = """twice {
  p = f32[64,16]{1,0} parameter(0)
  u = f32[2,16]{1,0} parameter(1)
  v = f32[4,16]{1,0} parameter(2)
  i = s32[] parameter(3)
  first = f32[64,16]{1,0} dynamic-update-slice(p, u, i, i)
  same = f32[64,16]{1,0} bitcast(first)
  ROOT second = f32[64,16]{1,0} dynamic-update-slice(same, v, i, i)
}

"""
    lines = (
        X,
        "u = f32[2,16]{1,0} parameter(1)",
        "v = f32[4,16]{1,0} parameter(2)",
        "i = s32[] parameter(3)",
        "ROOT f = f32[64,16]{1,0} fusion(x, u, v, i), kind=kLoop, calls=twice",
    )
    (row,) = cost_of(entry(*lines, before=before)).instructions
    assert row.traffic == Traffic(128 + 256 + 4, 128 + 256)


def test_a_fusion_inside_a_fusion_hands_on_what_it_needs() -> None:
    nested = FUSED + (
        "outer {\n  p = f32[8,64,16]{2,1,0} parameter(0)\n  x = f32[64,16]{1,0} parameter(1)\n"
        f"  i = s32[] parameter(2)\n  {CALL}\n"
        "  ROOT sum = f32[64,16]{1,0} get-tuple-element(f), index=1\n}\n\n"
    )
    lines = (
        X,
        "p = f32[8,64,16]{2,1,0} parameter(1)",
        "i = s32[] parameter(2)",
        "ROOT o = f32[64,16]{1,0} fusion(p, x, i), kind=kLoop, calls=outer",
    )
    (row,) = cost_of(entry(*lines, before=nested)).instructions
    assert row.traffic == Traffic(2 * B + 4, B)


def test_a_mark_on_the_indices_of_a_scatter_costs_nothing() -> None:
    """XLA:TPU says so of indices that it packed itself, in the fusion of a scatter (v5e, a cache's write)."""
    line = 'ROOT k = s32[8,3]{1,0} custom-call(i), custom_call_target="GatherScatterIndicesBitpacked"'
    cost = cost_of(entry("i = s32[8,3]{1,0} parameter(0)", line))
    assert (cost.read_bytes, cost.written_bytes, cost.not_counted, cost.flops.unknown) == (0, 0, (), ())


def test_a_stack_moved_to_other_tiles_and_sliced_is_read_as_far_as_the_slice() -> None:
    """As XLA:TPU fuses int8 weights of scanned layers; XLA's own copy would read all eight."""
    nested = (
        "retiled {\n  s = f32[8,64,16]{2,1,0} parameter(0)\n"
        "  ROOT c = f32[8,64,16]{2,1,0:T(8,128)} copy(s)\n}\n\n"
        "outer {\n  p = f32[8,64,16]{2,1,0} parameter(0)\n  i = s32[] parameter(1)\n"
        "  zero = s32[] constant(0)\n"
        "  whole = f32[8,64,16]{2,1,0:T(8,128)} fusion(p), kind=kLoop, calls=retiled\n"
        "  ROOT one = f32[1,64,16]{2,1,0} dynamic-slice(whole, i, zero, zero), "
        "dynamic_slice_sizes={1,64,16}\n}\n\n"
    )
    lines = (
        "p = f32[8,64,16]{2,1,0} parameter(0)",
        "i = s32[] parameter(1)",
        "ROOT o = f32[1,64,16]{2,1,0} fusion(p, i), kind=kLoop, calls=outer",
    )
    (row,) = cost_of(entry(*lines, before=nested)).instructions
    assert row.traffic == Traffic(B + 4, B)


def test_a_tpu_gather_split_over_fusions_counts_at_its_start() -> None:
    gather = (
        "all-gather(p), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, use_global_device_ids=true"
    )
    text = f"""HloModule m, is_scheduled=true, num_partitions=4

start {{
  p = bf16[64,16]{{1,0}} parameter(0)
  g = bf16[256,16]{{1,0}} {gather}
  ROOT c = (bf16[64,16]{{1,0}}, bf16[256,16]{{1,0}}, u32[]{{:S(2)}}) custom-call(g), custom_call_target="AsyncCollectiveStart"
}}

meanwhile {{
  p = bf16[64,16]{{1,0}} parameter(0)
  q = bf16[8,16]{{1,0}} parameter(1)
  g = bf16[256,16]{{1,0}} {gather}
  ROOT n = bf16[8,16]{{1,0}} negate(q)
}}

done {{
  p = bf16[64,16]{{1,0}} parameter(0)
  q = u32[]{{:S(2)}} parameter(1)
  g = bf16[256,16]{{1,0}} {gather}
  ROOT c = bf16[256,16]{{1,0}} custom-call(p, g, q), custom_call_target="AsyncCollectiveDone"
}}

ENTRY main {{
  w = bf16[64,16]{{1,0}} parameter(0)
  x = bf16[8,16]{{1,0}} parameter(1)
  s = (bf16[64,16]{{1,0}}, bf16[256,16]{{1,0}}, u32[]{{:S(2)}}) fusion(w), kind=kCustom, calls=start
  f = bf16[8,16]{{1,0}} fusion(w, x), kind=kOutput, calls=meanwhile
  flag = u32[]{{:S(2)}} get-tuple-element(s), index=2
  ROOT d = bf16[256,16]{{1,0}} fusion(w, flag), kind=kCustom, calls=done
}}
"""  # noqa: E501
    rows = {row.name: row.traffic for row in cost_of(text).instructions}
    assert rows == {"s": Traffic(2048, 8192), "f": Traffic(256, 256)}


def test_topk_on_a_cpu_is_one_pass() -> None:
    """A partial sort row by row reads 64 x 16 values and writes 64 x 4 of them, and as many s32 indices."""
    line = 'ROOT k = (f32[64,4]{1,0}, s32[64,4]{1,0}) custom-call(x), custom_call_target="TopK"'
    cost = cost_of(entry(X, line), "cpu")
    assert cost.not_counted == ()
    assert [row.traffic for row in cost.instructions] == [Traffic(64 * 16 * 4, 2 * 64 * 4 * 4)]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('ROOT k = f32[64,16]{1,0} custom-call(x), custom_call_target="mystery"', "mystery"),
        ('ROOT k = f32[64,4]{1,0} custom-call(x), custom_call_target="TopK"', "TopK"),
        ("ROOT k = f32[?,16]{1,0} negate(x)", "negate"),
    ],
    ids=["opaque", "many-passes", "unbounded"],
)
def test_what_cannot_be_known_is_listed_and_never_zero(line: str, what: str) -> None:
    cost = cost_of(entry(X, line))
    assert [(one.name, one.what) for one in cost.not_counted] == [("k", what)]
    assert [row for row in cost.instructions if row.traffic is not None] == []
