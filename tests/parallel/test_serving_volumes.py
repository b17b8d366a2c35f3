"""What decode and prefill steps send against closed forms, and that a decode step's cache is never moved.

In f32 on emulated devices, in bf16 ahead of time for GPUs and TPUs. The forms are Megatron's without a
backward pass, and Flash-Decoding's: per query a greatest score, a sum of weights and a sum of values, in f32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import pytest
from compiled_plans import scheduled_case
from emulated import SMALL, TENSOR, asked, case_of, plan, step_of
from strategy_volumes import F32, Volumes, all_reduce, gather, together

from shardlab.analysis import CollectiveRow, analyze
from shardlab.spec.case import Case
from shardlab.spec.plan import Plan

# Large enough for compilers to treat arrays as they treat large ones; 2 KV heads for 8 query heads.
MODEL = replace(
    SMALL, name="served", kv_heads=2, embed=512, head_dim=64, mlp=1_024, vocab=2_048, context=4_096
)
BATCH, SEQ = 16, 2_048
MACHINES = {"cpu": "cpu:8", "gpu": "h100:1x8", "tpu": "v5e:2x4"}
WIDE = {axis: ("tensor", "x") for axis in ("heads", "mlp", "vocab")} | {"kv_heads": ("tensor",)}


@dataclass(frozen=True)
class Figures:
    """What the closed forms need of a case on a target."""

    case: Case
    target: str

    @property
    def element(self) -> int:
        """Bytes of an activation or a weight in use."""
        return F32 if self.target == "cpu" else 2

    def stream(self, batch: int = BATCH) -> int:
        """Bytes of the residual stream."""
        return batch * MODEL.embed * self.element

    def megatron(self, axes: str, ways: int, batch: int = BATCH) -> Volumes:
        """Forward: a layer all-reduces the residual stream after attention and after the MLP, and the
        vocabulary-parallel embedding once (arXiv:1909.08053, section 3)."""
        return {(axes, "all-reduce"): (2 * MODEL.layers + 1) * all_reduce(ways, self.stream(batch))}

    def merged(self, axes: str, ways: int, heads: int, batch: int = BATCH) -> Volumes:
        """Flash-Decoding's merge of partial softmaxes (Milakov and Gimelshein, arXiv:1805.02867, section
        3.1): head_dim + 2 numbers for each query head."""
        size = F32 * batch * heads * (MODEL.head_dim + 2)
        return {(axes, "all-reduce"): MODEL.layers * all_reduce(ways, size)}


def heads(f: Figures) -> Volumes:
    return f.megatron("tensor", 2)


def positions(f: Figures) -> Volumes:
    return f.merged("x", 8, MODEL.heads)


def all_three(f: Figures) -> Volumes:
    one = BATCH // 2
    return together([f.megatron("tensor", 2, one), f.merged("x", 2, MODEL.heads // 2, one)])


def heads_positions(f: Figures) -> Volumes:
    """Queries are gathered over x; a device gets the sums of its own heads, and the greatest of all."""
    head_rows = BATCH * MODEL.heads // 2
    per_layer = {
        ("x", "all-gather"): gather(4, head_rows * MODEL.head_dim * f.element),
        ("x", "all-reduce"): all_reduce(4, F32 * head_rows),
        ("x", "reduce-scatter"): gather(4, F32 * head_rows * (MODEL.head_dim + 1)),
    }
    if f.target == "tpu":  # XLA:TPU all-reduces small arrays that it was told to scatter: twice the bytes
        per_layer[("x", "reduce-scatter")] -= gather(4, F32 * head_rows)
        per_layer[("x", "all-reduce")] += all_reduce(4, F32 * head_rows)
    layers = {key: MODEL.layers * size for key, size in per_layer.items()}
    return together([f.megatron("tensor+x", 8), layers])


def slots(f: Figures) -> Volumes:
    """FSDP's gathers of the forward pass: every weight once, in the type that it is stored in.

    In int8 and fp8 a kernel's number is a byte, and the f32 scales of outputs that are embed are gathered
    too. Norms are used in f32; XLA:GPU gathers them as they are stored. XLA:TPU all-reduces norms and scales,
    small as they are.
    """
    kernels, others, norms = (
        sum(p.size for p in f.case.parameters() if kind(p.path) == which)
        for which in ("kernel", "table", "norm")
    )
    weights = f.case.plan.method.weights
    scales = 0 if weights == "bf16" else 2 * MODEL.layers * MODEL.embed * F32
    small = f.element if weights == "bf16" else CPU_WIDENS.get((f.target, weights), 1)
    gathered, reduced = kernels * small + others * f.element, 0
    if f.target == "tpu":
        reduced = norms * F32 + scales
    else:
        gathered += norms * f.element + scales
    return {("data", "all-gather"): gather(8, gathered), ("data", "all-reduce"): all_reduce(8, reduced)}


# Bytes of a number that XLA:CPU gathers in a larger type.
CPU_WIDENS = {("cpu", "fp8"): 2}


def kind(path: str) -> str:
    return "norm" if "norm" in path else path.rsplit("/")[-1]


CASES: dict[str, tuple[Plan, Callable[[Figures], Volumes]]] = {
    "heads": (
        plan({"data": 4, "tensor": 2}, TENSOR, {"batch": ("data",)}),
        lambda f: f.megatron("tensor", 2, 4),
    ),
    "positions": (plan({"x": 8}, {}, {"cache": ("x",)}), positions),
    "all-three": (
        plan({"data": 2, "tensor": 2, "x": 2}, TENSOR, {"batch": ("data",), "cache": ("x",)}),
        all_three,
    ),
    "heads-positions": (plan({"tensor": 2, "x": 4}, WIDE, {"cache": ("x",)}), heads_positions),
    **{
        f"batch-{weights}": (
            plan({"data": 8}, {"embed": ("data",)}, {"batch": ("data",)}, weights=weights),
            slots,
        )
        for weights in ("bf16", "int8", "fp8")
    },
}


def compiled(name: str, target: str) -> tuple[Figures, list[CollectiveRow]]:
    plan, _ = CASES[name]
    case = case_of(plan, MODEL, machine=MACHINES[target], batch=BATCH, seq=SEQ, workload="decode")
    if target != "cpu":
        return Figures(case, target), list(analyze(scheduled_case(case)).collectives)
    step = step_of(case)
    text = step.function.lower(*step.arguments).compile().as_text()
    return Figures(case, target), list(analyze(text, axes=dict(plan.axes)).collectives)


def sent(rows: list[CollectiveRow]) -> Volumes:
    """Bytes per device per step by axes and kind."""
    total: Counter[tuple[str, str]] = Counter()
    for row in rows:
        low, high = row.executions
        assert low == high and row.axes is not None
        total["+".join(row.axes), row.kind] += row.wire_bytes * low  # type: ignore[assignment]
    return {key: Fraction(value) for key, value in total.items() if value}


def check(name: str, target: str) -> None:
    figures, rows = compiled(name, target)
    assert sent(rows) == {k: v for k, v in CASES[name][1](figures).items() if v}
    # Nothing in attention is as large as what a device holds of one layer's keys: the cache stays.
    held = BATCH * SEQ * MODEL.kv_heads * MODEL.head_dim * figures.element // 8
    kernel = [row for row in rows if "attention/kernel" in (row.op_name or "")]
    assert all(row.payload_bytes < held for row in kernel)
    assert bool(kernel) == ("positions" in name or name == "all-three")


@pytest.mark.parametrize("name", CASES)
def test_bytes_on_emulated_devices(name: str) -> None:
    check(name, "cpu")


# Ahead of time the case with every kind of collective, and the others in the full set.
AHEAD_OF_TIME = pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            n, marks=pytest.mark.matrix if n in ("heads-positions", "batch-int8") else pytest.mark.full
        )
        for n in CASES
    ],
)


@pytest.mark.gpu
@AHEAD_OF_TIME
def test_bytes_on_gpus(name: str) -> None:
    check(name, "gpu")


@pytest.mark.tpu
@AHEAD_OF_TIME
def test_bytes_on_tpus(name: str) -> None:
    check(name, "tpu")


PROMPT = 512
KV_HEADS = 4  # Ulysses splits them by four
CONTEXTS = {
    "all-gather": {"data": 2, "context": 4},
    "ring": {"context": 8},
    "ulysses": {"data": 2, "context": 4},
    "ring+ulysses": {"ring": 2, "ulysses": 4},
}


def prefill(method: str, axes: dict[str, int]) -> Volumes:
    """Context parallelism's forward pass, and what prefill adds.

    Keys and values are gathered (arXiv:2407.21783, section 3.3.2) or go around a ring (arXiv:2310.01889,
    section 3), n - 1 shards of them; Ulysses exchanges queries, keys, values and output (arXiv:2309.14509,
    section 3.2), (n - 1) / n each. Added: one token of each sequence, summed over the devices of its
    sequence, and zig-zag's cache put in order, which each device passes on whole.
    """
    split = [name for name in axes if name != "data"]
    tokens = BATCH * PROMPT // 8
    one_head = tokens * MODEL.head_dim * F32 * MODEL.layers
    keys_values = Fraction(2 * KV_HEADS * one_head)
    inner, ways = split[-1], axes[split[-1]]
    exchanged = gather(ways, 2 * (KV_HEADS + MODEL.heads) * one_head)
    attention: dict[str, Volumes] = {
        "all-gather": {(inner, "all-gather"): (ways - 1) * keys_values},
        "ring": {(inner, "collective-permute"): (ways - 1) * keys_values},
        "ulysses": {(inner, "all-to-all"): exchanged},
        "ring+ulysses": {("ring", "collective-permute"): keys_values, (inner, "all-to-all"): exchanged},
    }
    every, all_ways = "+".join(split), 8 // axes.get("data", 1)
    last = F32 * BATCH // axes.get("data", 1) * MODEL.embed
    rest: Volumes = {(every, "all-reduce"): all_reduce(all_ways, last)}
    if method != "ulysses":
        rest[every, "collective-permute"] = keys_values
    return together([attention[method], rest])


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=pytest.mark.matrix if "+" in m else pytest.mark.full) for m in CONTEXTS],
)
def test_a_prompt_that_is_split(method: str) -> None:
    """On emulated devices. Its cache stays split as its tokens are: nothing gathers it."""
    axes = CONTEXTS[method]
    plan = asked(axes, context=method)
    cache = plan.activations | {"cache": plan.activations["seq"]}
    plan = plan.model_copy(update={"activations": cache})
    model = replace(MODEL, kv_heads=KV_HEADS)
    step = step_of(case_of(plan, model, batch=BATCH, seq=PROMPT, workload="prefill"))
    text = step.function.lower(*step.arguments).compile().as_text()
    assert sent(list(analyze(text, axes=axes).collectives)) == prefill(method, axes)
