"""What published training runs use, compiled for real targets: offloaded activations and fp8 products.

Closed forms from the dimensions alone, exact. Nothing here imports from hlo, attribute or cost but what it
measures.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fractions import Fraction
from functools import cache

import pytest
from compiled_plans import compiled_case, scheduled_case

from shardlab.analysis import CollectiveRow, analyze
from shardlab.cost.instructions import StepCost, step_cost
from shardlab.errors import Infeasible
from shardlab.hlo.reader import parse
from shardlab.program import Program
from shardlab.spec.case import make_case
from shardlab.spec.models import find_model
from shardlab.spec.plan import plan_from_text

LAYERS, EMBED, HEADS, HEAD_DIM, MLP, VOCAB = 4, 512, 8, 64, 2_048, 1_024
MODEL = replace(
    find_model("llama3-8b"),
    name="small-llama",
    layers=LAYERS,
    embed=EMBED,
    heads=HEADS,
    kv_heads=HEADS,
    head_dim=HEAD_DIM,
    mlp=MLP,
    vocab=VOCAB,
)
BATCH, SEQ, SHARDS = 16, 2_048, 8
TOKENS = BATCH * SEQ // SHARDS  # per device
BF16_BYTES = 2
PLAN = """\
on = "{machine}"
[axes]
fsdp = 8
[params]
embed = ["fsdp"]
[activations]
batch = ["fsdp"]
[method]
{method}
"""
GPU = pytest.param("h100:1x8", marks=pytest.mark.gpu)
TPU = pytest.param("v5e:2x4", marks=[pytest.mark.tpu, pytest.mark.full])


@cache
def compiled(machine: str, method: str, window: int = 0, chunk: int = 0, every: int = 0) -> Program:
    plan = plan_from_text(PLAN.format(machine=machine, method=method))
    model = replace(MODEL, window=window, attention_chunk=chunk, global_every=every)
    return compiled_case(make_case(plan, model, batch=BATCH, seq=SEQ))[0]


def cost_of(program: Program) -> StepCost:
    (module,) = parse(program.hlo_text)
    return step_cost(module, program.backend)


def offloaded_bytes() -> int:
    """Results of products with weights that the backward pass needs: query, key, value, attention's output
    projection, gate and up. That of down only enters a sum. (MaxText's `minimal_offloaded`.)"""
    return LAYERS * TOKENS * (3 * HEADS * HEAD_DIM + EMBED + 2 * MLP) * BF16_BYTES


@pytest.mark.matrix
@pytest.mark.parametrize("machine", [GPU, TPU])
def test_offload_moves_activations_to_the_host_and_back(machine: str) -> None:
    program = compiled(machine, 'remat = "offload"')
    assert cost_of(program).host_bytes == 2 * offloaded_bytes()


@pytest.mark.full
@pytest.mark.tpu
def test_named_activations_move_to_the_host_and_back() -> None:
    """What attention gives has a row sum per head with it, in f32."""
    program = compiled("v5e:2x4", 'remat = {keep = ["up"], offload = ["input", "query", "attention"]}')
    per_token = (EMBED + 2 * HEADS * HEAD_DIM) * BF16_BYTES + HEADS * 4
    assert cost_of(program).host_bytes == 2 * LAYERS * TOKENS * per_token


@pytest.mark.full
@pytest.mark.parametrize("machine", [GPU, TPU])
def test_offload_frees_at_least_what_it_moves(machine: str) -> None:
    kept, offloaded = (compiled(machine, f'remat = "{remat}"').memory for remat in ("none", "offload"))
    assert kept is not None and offloaded is not None
    assert kept.temp_bytes is not None and offloaded.temp_bytes is not None
    assert kept.temp_bytes - offloaded.temp_bytes >= offloaded_bytes()
    assert (kept.host_bytes, offloaded.host_bytes) == (0, offloaded_bytes())


def kernels() -> int:
    """Elements of a layer's kernels, without norms."""
    return 4 * EMBED * HEADS * HEAD_DIM + 3 * EMBED * MLP


def gathered(rows: list[CollectiveRow]) -> Fraction:
    """Bytes per step that layers gather."""
    chosen = [row for row in rows if row.kind == "all-gather" and row.layer.startswith("layers")]
    assert all(row.executions[0] == row.executions[1] for row in chosen)
    return sum((row.wire_bytes * row.executions[0] for row in chosen), Fraction(0))


@pytest.mark.matrix
@pytest.mark.parametrize("machine", [GPU, TPU])
def test_fp8_products_gather_one_byte_per_weight(machine: str) -> None:
    """FSDP gathers each layer's kernels twice (forward and backward), in e4m3; and norms, in f32, twice: on a
    TPU these are summed, padded with zeros (`strategy_volumes.SummedWhole`)."""
    program = compiled(machine, 'products = "fp8"')
    norms = 0 if machine.startswith("v5e") else 2 * EMBED * 4
    expected = Fraction(SHARDS - 1, SHARDS) * LAYERS * 2 * (kernels() + norms)
    assert gathered(list(analyze(program).collectives)) == expected


TENSOR_PLAN = """\
on = "h100:1x8"
[axes]
fsdp = 2
tensor = 4
[params]
embed = ["fsdp"]
heads = ["tensor"]
kv_heads = ["tensor"]
mlp = ["tensor"]
[activations]
batch = ["fsdp"]
norm_seq = ["tensor"]
[method]
products = "{products}"
"""


@pytest.mark.full
@pytest.mark.gpu
@pytest.mark.parametrize(("products", "gathered_bytes"), [("fp8", 1), ("fp8-rowwise", 2)])
def test_fp8_partial_sums_add_up_before_they_are_scattered(products: str, gathered_bytes: int) -> None:
    """Megatron's sequence parallelism under full remat: a layer gathers tokens before its two halves, forward
    and again, and the gradients of the two results; it scatters the two results, one of them again (the
    other only enters a sum), and the gradients of the two inputs, each the sum of two or three products'.
    torchao gathers what is scaled per tensor in 8 bits, and what is scaled per row in 16. Rows of what is
    summed over shards, 2 results, 1 again and 5 gradients, need the maxima of all shards, and so do as many
    kernels' columns; scalars, of a scale per tensor, are not counted."""
    plan = plan_from_text(TENSOR_PLAN.format(products=products))
    program = scheduled_case(make_case(plan, MODEL, batch=BATCH, seq=SEQ))
    sent: Counter[str] = Counter()
    for row in analyze(program).collectives:
        if row.axes == ("tensor",) and row.layer.startswith("layers") and row.dtypes != ("f32",):
            assert row.executions[0] == row.executions[1]
            sent[row.kind] += row.wire_bytes * row.executions[0]  # type: ignore[assignment]
    tokens = BATCH // 2 * SEQ
    once = LAYERS * Fraction(3, 4) * tokens * EMBED
    expected = {"all-gather": 6 * once * gathered_bytes, "reduce-scatter": 5 * once * BF16_BYTES}
    if products == "fp8-rowwise":
        expected["all-reduce"] = LAYERS * 8 * 2 * Fraction(3, 4) * (tokens + EMBED) * BF16_BYTES
    assert sent == expected


@pytest.mark.full
@pytest.mark.tpu
def test_gradients_are_scattered_through_windows() -> None:
    """XLA:TPU computes a gradient shard by shard, while the sums go around the ring both ways: n / 4 trips of
    four permutes, which realize a scatter, and one that brings the two sums together (XLA,
    spmd/dot_handler.cc, bidirectional windowed einsum). Of a shard each: (n + 1) / n of the gradients, where
    a reduce-scatter sends (n - 1) / n."""
    rows = analyze(compiled("v5e:2x4", 'products = "fp8"')).collectives
    windows = [row for row in rows if row.kind == "collective-permute" and row.layer.startswith("layers")]
    assert all(row.executions[0] == row.executions[1] and row.axes == ("fsdp",) for row in windows)
    sent: Counter[str | None] = Counter()
    for row in windows:
        sent[row.realizes] += row.wire_bytes * row.executions[0]  # type: ignore[assignment]
    gradients = LAYERS * kernels() * BF16_BYTES
    assert sent == {"reduce-scatter": gradients, None: Fraction(gradients, SHARDS)}
    assert not [row for row in rows if row.kind == "reduce-scatter" and row.layer.startswith("layers")]


@pytest.mark.matrix
@pytest.mark.gpu
def test_an_h100_multiplies_in_fp8() -> None:
    """6 FLOPs per weight and token, and 2 again under full remat but for down, whose result only enters a
    sum. e4m3 alone forward; of a product with gradients the second operand is e5m2, and both are 8 bits."""
    by_dtype = cost_of(compiled("h100:1x8", 'products = "fp8"')).flops.by_dtype
    once = 2 * LAYERS * TOKENS * kernels()
    again = once - 2 * LAYERS * TOKENS * EMBED * MLP
    in_fp8 = sum(flops or 0 for dtype, flops in by_dtype.items() if dtype.startswith("f8"))
    assert in_fp8 == 3 * once + again


@pytest.mark.full
@pytest.mark.gpu
def test_cudnn_attention_that_is_kept_is_not_run_again() -> None:
    """2 products forward, 5 backward; its row sums are kept with its result."""
    flops = cost_of(compiled("h100:1x8", 'remat = {keep = ["attention"]}')).flops
    assert flops.attention == LAYERS * (2 + 5) * 2 * BATCH // SHARDS * HEADS * HEAD_DIM * triangle(SEQ)


@pytest.mark.matrix
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("loss", "arrays"), [pytest.param("auto", 0, marks=pytest.mark.full), ("unfused", 4)]
)
def test_an_unfused_loss_has_its_f32_arrays_in_memory(loss: str, arrays: int) -> None:
    """Logits, their log-probabilities, and the gradients of both."""
    rows = cost_of(compiled("h100:1x8", f'loss = "{loss}"')).instructions
    large = [row for row in rows if row.traffic and row.traffic.written_bytes >= 4 * TOKENS * VOCAB]
    assert sum(row.layer in ("head", "loss") for row in large) == arrays


@pytest.mark.full
@pytest.mark.gpu
def test_cudnn_attends_within_the_window() -> None:
    """Flash attention: 2 products forward and again under full remat, 5 backward, of the pairs that meet."""
    window = 300
    pairs = window * (window + 1) // 2 + (SEQ - window) * window
    flops = cost_of(compiled("h100:1x8", "", window)).flops
    assert flops.attention == LAYERS * (2 + 2 + 5) * 2 * BATCH // SHARDS * HEADS * HEAD_DIM * pairs
    assert not flops.unknown


@pytest.mark.full
@pytest.mark.gpu
def test_cudnn_attends_within_chunks_but_in_the_last_layer_of_four() -> None:
    """Two chunks of 768 and a rest of 512, each a causal triangle; every layer's products are whole."""
    local, whole = 2 * triangle(768) + triangle(512), triangle(SEQ)
    cost = cost_of(compiled("h100:1x8", "", chunk=768, every=LAYERS))
    pairs = (LAYERS - 1) * local + whole
    assert cost.flops.attention == (2 + 2 + 5) * 2 * BATCH // SHARDS * HEADS * HEAD_DIM * pairs
    without = cost_of(compiled("h100:1x8", "", window=300))
    assert cost.flops.matmul == without.flops.matmul
    assert not cost.flops.unknown


def triangle(tokens: int) -> int:
    """Pairs at or below the diagonal."""
    return tokens * (tokens + 1) // 2


@pytest.mark.full
@pytest.mark.tpu
def test_splash_attends_within_the_window_but_in_the_last_layer_of_four() -> None:
    """Tiles of 512, 4 x 4: a window of 600 reaches into two tiles before the diagonal's, 4 + 3 + 2; causal
    are ten. Products forward and again 2, in the two backward kernels 3 and 4."""
    local, whole = (4 + 3 + 2) * 512**2, 10 * 512**2
    flops = cost_of(compiled("v5e:2x4", "", window=600, every=LAYERS)).flops
    pairs = (LAYERS - 1) * local + whole
    assert flops.attention == (2 + 2 + 7) * 2 * BATCH // SHARDS * HEADS * HEAD_DIM * pairs
    assert not flops.unknown
    assert any("a window of 600" in note for note in flops.notes)


def test_windows_are_refused_where_they_are_not_built() -> None:
    plan = plan_from_text(PLAN.format(machine="cpu:8", method="").replace("fsdp = 8", "fsdp = 8\nring = 1"))
    ring = plan.model_copy(
        update={
            "method": plan.method.model_copy(update={"context": "ring"}),
            "activations": {**plan.activations, "seq": ("ring",)},
        }
    )
    model = replace(MODEL, window=300)
    with pytest.raises(Infeasible, match="window of 300") as error:
        make_case(ring, model, batch=BATCH, seq=SEQ)
    assert error.value.nearest == "seq at most 300, or context = 'ulysses'"
    make_case(ring, model, batch=BATCH, seq=300)
