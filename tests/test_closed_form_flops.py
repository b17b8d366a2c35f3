"""Compiled training steps do the FLOPs that the closed form says: 6·N·D plus attention, on every backend.

N counts the weights in matrix products: the head, not the embedding lookup, norms or biases. D is tokens.
Attention is as executed: the reference (CPU) does the whole square of pairs, cuDNN (GPU) the pairs with
key <= query, splash (TPU) the tiles that hold one. The closed form is written here and imports nothing of
`shardlab.cost`. The models have their real dimensions and two layers; the full set compiles all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from fractions import Fraction

import pytest
from compiled_plans import MESHES, Remat, scheduled_case

from shardlab.cost.instructions import StepCost, step_cost
from shardlab.hlo.reader import parse
from shardlab.spec.case import make_case
from shardlab.spec.models import find_model
from shardlab.spec.plan import load_plan, plan_from_text

BATCH, LAYERS, DEVICES = 8, 2, 8
SPLASH_TILE = 512  # positions; shardlab's kernel takes the largest that divides the sequence
MACHINES = {"cpu": "cpu:8", "gpu": "h100:1x8", "tpu": "v5p:2x2x2"}


@dataclasses.dataclass(frozen=True)
class Dims:
    """Dimensions from the papers: Radford et al. 2019 table 2; arXiv:2407.21783 table 3.

    vocab: padded to a multiple of 128, as stored. mlp_matrices: of [embed, mlp], 3 for gated ones. window: of
    all layers but the second of every two. post_norms: the MLP's result is normed, and so used by a gradient.
    """

    embed: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    mlp_matrices: int
    seq: int = 1024
    window: int = 0
    post_norms: bool = False


DIMS = {
    "tiny": Dims(128, 8, 8, 16, 512, 512, 3, seq=256),
    "gpt2-124m": Dims(768, 12, 12, 64, 3_072, 50_304, 2),
    "gpt2-1.5b": Dims(1_600, 25, 25, 64, 6_400, 50_304, 2),
    "llama3-8b": Dims(4_096, 32, 8, 128, 14_336, 128_256, 3),
    "llama3-70b": Dims(8_192, 64, 8, 128, 28_672, 128_256, 3),
    "tiny-gemma3": Dims(128, 8, 8, 16, 512, 512, 3, seq=2048, window=64, post_norms=True),
    "llama3-405b": Dims(16_384, 128, 8, 128, 53_248, 128_256, 3),
}


def layer_weights(dims: Dims) -> int:
    """Query and output, key and value, and the MLP."""
    query, kv = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    return dims.embed * (2 * query + 2 * kv + dims.mlp_matrices * dims.mlp)


def product_flops(dims: Dims) -> int:
    """6·N·D: per weight and token a multiply-add forward, and two backward."""
    return 6 * (LAYERS * layer_weights(dims) + dims.embed * dims.vocab) * BATCH * dims.seq


def pairs(dims: Dims, target: str, window: int = 0) -> int:
    """Pairs of query and key that the target's kernel computes, of one head and sequence."""
    if target == "cpu":
        return dims.seq**2
    if target == "gpu":
        return sum(min(query + 1, window or dims.seq) for query in range(dims.seq))
    tiles = -(-dims.seq // SPLASH_TILE)
    tile = dims.seq // tiles
    before = -(-(window - 1) // tile) if window else tiles  # tiles that a window reaches into
    return tile**2 * sum(min(row, before) + 1 for row in range(tiles))


def pairs_of_layers(dims: Dims, target: str) -> int:
    windows = (dims.window, 0) if dims.window else (0,)
    return LAYERS * sum(pairs(dims, target, window) for window in windows) // len(windows)


def attention_flops(dims: Dims, target: str, products: int) -> int:
    """Each product is 2 · head_dim per pair."""
    return 2 * products * BATCH * dims.heads * dims.head_dim * pairs_of_layers(dims, target)


# q·k and p·v; backward dv, dp, dq, dk. Flash attention does q·k again, splash q·k and dp in both its kernels.
FORWARD = 2
BACKWARD = {"cpu": 4, "gpu": 5, "tpu": 7}


def remat_flops(dims: Dims, target: str) -> int:
    """Layers forward again, but for the last product where nobody uses its result, so XLA drops it."""
    again = layer_weights(dims) - (0 if dims.post_norms else dims.embed * dims.mlp)
    return 2 * LAYERS * again * BATCH * dims.seq + attention_flops(dims, target, FORWARD)


@functools.lru_cache(maxsize=4)
def compiled_cost(target: str, model: str, remat: Remat, mesh: str = "h100x8-fsdp8") -> StepCost:
    """The step's cost per device."""
    plan = load_plan(MESHES / f"{mesh}.toml")
    plan = plan.model_copy(update={"method": plan.method.model_copy(update={"remat": remat})})
    config = dataclasses.replace(find_model(model), layers=LAYERS)
    case = make_case(plan, model=config, machine=MACHINES[target], batch=BATCH, seq=DIMS[model].seq)
    program = scheduled_case(case)
    (module,) = parse(program.hlo_text)
    return step_cost(module, program.backend)


def check(cost: StepCost, target: str, model: str, remat: Remat) -> None:
    """Exact, so within 1 % too; the instructions' shares sum to it, and what is done again is known."""
    dims = DIMS[model]
    again = remat_flops(dims, target) if remat == "full" else 0
    products = product_flops(dims)
    expected = products + attention_flops(dims, target, FORWARD + BACKWARD[target]) + again
    assert cost.flops.total is not None and cost.recompute_flops is not None
    assert cost.flops.total * DEVICES == expected
    assert cost.recompute_flops * DEVICES == again
    assert cost.flops.unknown == cost.not_counted == ()
    assert sum(row.flops * row.executions[0] for row in cost.instructions) == cost.flops.total
    if remat == "none" and target != "cpu":  # there the scores are plain products
        assert cost.flops.matmul is not None
        assert cost.flops.matmul * DEVICES == products


ALWAYS = {("cpu", "llama3-8b", "none"), ("tpu", "tiny", "none")}
SUBSET = {("gpu", "tiny", "none")}


def marks_of(target: str, model: str, remat: str) -> list[pytest.MarkDecorator]:
    """What the target needs, and how often the case is tried."""
    needs = {"cpu": [], "gpu": [pytest.mark.gpu], "tpu": [pytest.mark.tpu]}[target]
    if (target, model, remat) in ALWAYS:
        return needs
    return [*needs, pytest.mark.matrix if (target, model, remat) in SUBSET else pytest.mark.full]


CASES = [
    pytest.param(*case, marks=marks_of(*case), id="-".join(case))
    for case in itertools.product(MACHINES, DIMS, ("none", "full"))
]


@pytest.mark.parametrize(("target", "model", "remat"), CASES)
def test_a_compiled_step_does_what_the_closed_form_says(target: str, model: str, remat: Remat) -> None:
    check(compiled_cost(target, model, remat), target, model, remat)


PIPELINE = """\
[axes]
data = 4
stage = 2
[params]
stage = ["stage"]
[activations]
batch = ["data"]
[method]
pipeline = "1f1b"
microbatches = 2
remat = "{remat}"
"""


@pytest.mark.matrix
@pytest.mark.parametrize(
    "remat", ["selective", *(pytest.param(remat, marks=pytest.mark.full) for remat in ("none", "full"))]
)
def test_a_stage_does_again_what_its_remat_says(remat: str) -> None:
    """The last of two stages, with half of the layers and the head, is the busiest. Selective: the scores
    again, and no projection (Korthikanti et al., arXiv:2205.05198, section 5); PyTorch would also run the
    product with the values again, whose result nobody uses. What a custom rule runs again has no name that
    tells it from first use."""
    dims = DIMS["tiny"]
    config = dataclasses.replace(find_model("tiny"), layers=2 * LAYERS)
    plan = plan_from_text(PIPELINE.format(remat=remat))
    program = scheduled_case(make_case(plan, config, MACHINES["cpu"], BATCH, dims.seq))
    cost = step_cost(parse(program.hlo_text)[0], program.backend)
    scores = attention_flops(dims, "cpu", 1)
    again = {"none": 0, "selective": scores, "full": remat_flops(dims, "cpu")}[remat]
    expected = product_flops(dims) + attention_flops(dims, "cpu", FORWARD + BACKWARD["cpu"]) + again
    assert cost.flops.total is not None and cost.recompute_flops is not None
    assert cost.flops.total * DEVICES == 2 * expected
    assert cost.recompute_flops * DEVICES == (2 * again if remat == "full" else 0)
    assert cost.flops.unknown == ()


@pytest.mark.matrix
def test_tensor_parallel_devices_share_the_work() -> None:
    check(compiled_cost("cpu", "tiny", "full", "cpu8-fsdp2-tensor4-seq"), "cpu", "tiny", "full")


def test_the_closed_form_is_what_the_literature_says() -> None:
    """Full attention is 12·L·d·S per token (PaLM, appendix B); 6·N is 72·d² for each of GPT's layers."""
    gpt = DIMS["gpt2-124m"]
    tokens = BATCH * gpt.seq
    assert (
        attention_flops(gpt, "cpu", FORWARD + BACKWARD["cpu"]) == 12 * LAYERS * gpt.embed * gpt.seq * tokens
    )
    head = 6 * gpt.embed * gpt.vocab * tokens
    assert product_flops(gpt) - head == 72 * LAYERS * gpt.embed**2 * tokens
    assert Fraction(remat_flops(gpt, "cpu"), product_flops(gpt)) < Fraction(1, 3)  # a forward at most
