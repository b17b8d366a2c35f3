"""Pipelines on eight emulated devices: every schedule trains as one device, in the memory it promises."""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import pytest
from compilers import otherwise_in_jax_0_10
from emulated import (
    FSDP,
    SMALL,
    TENSOR,
    Rules,
    case_of,
    check_equal,
    mesh_of,
    plan,
    step_of,
)
from jax.extend.core import ClosedJaxpr, Jaxpr

from shardlab.errors import Infeasible
from shardlab.parallel.pipeline import from_stages, to_stages
from shardlab.parallel.step import build_step
from shardlab.spec.case import make_case
from shardlab.spec.pipeline import schedule_of
from shardlab.spec.plan import Plan
from shardlab.spec.schedule import published_bubble

STAGE: Rules = {"stage": ("stage",)}
DATA: Rules = {"batch": ("data",)}
SIX = replace(SMALL, layers=6)  # not a multiple of four stages
GPT2 = replace(
    SMALL,
    name="gpt2",
    layers=4,
    norm="layernorm",
    activation="gelu",
    positions="learned",
    tied_embeddings=True,
    bias=True,
)
SCHEDULES: dict[str, dict[str, Any]] = {
    "gpipe": {"pipeline": "gpipe", "microbatches": 4},
    "1f1b": {"pipeline": "1f1b", "microbatches": 8},
    "interleaved": {"pipeline": "interleaved", "microbatches": 4, "virtual_stages": 2},
    "zb-h1": {"pipeline": "zb-h1", "microbatches": 4},
}
GRIDS: dict[str, tuple[dict[str, int], Rules, Rules, Rules | None]] = {
    "stages": ({"stage": 2}, STAGE, {}, None),
    "data": ({"stage": 4, "data": 2}, STAGE, DATA, None),
    "data-zero1": ({"data": 2, "stage": 2}, STAGE, DATA, {"embed": ("data",)}),
    "tensor": ({"stage": 2, "tensor": 4}, STAGE | TENSOR, {}, None),
    "fsdp": ({"stage": 2, "fsdp": 4}, STAGE | FSDP, {"batch": ("fsdp",)}, None),
    "zero1-tensor-sequence": (
        {"data": 2, "stage": 2, "tensor": 2},
        STAGE | TENSOR,
        {**DATA, "norm_seq": ("tensor",)},
        {"embed": ("data",)},
    ),
    "fsdp-tensor": (
        {"stage": 2, "fsdp": 2, "tensor": 2},
        STAGE | FSDP | TENSOR,
        {"batch": ("fsdp",), "norm_seq": ("tensor",)},
        None,
    ),
    "hybrid-zero1": (
        {"data": 2, "stage": 2, "fsdp": 2},
        STAGE | FSDP,
        {"batch": ("data", "fsdp")},
        {"embed": ("fsdp", "data")},
    ),
}
HOPS: Rules = {"hop_seq": ("tensor",)}  # what passes between stages is split on the way
MARKS = {
    ("1f1b", "zero1-tensor-sequence"): (),
    ("zb-h1", "hybrid-zero1"): pytest.mark.matrix,
    ("gpipe", "fsdp-tensor"): pytest.mark.matrix,
}


def piped(schedule: str, grid: str, **method: Any) -> Plan:
    axes, params, activations, optimizer = GRIDS[grid]
    return plan(axes, params, activations, optimizer, **{**SCHEDULES[schedule], **method})


@pytest.mark.parametrize(
    ("schedule", "grid"),
    [
        pytest.param(s, g, id=f"{s}-{g}", marks=MARKS.get((s, g), pytest.mark.full))
        for s in SCHEDULES
        for g in GRIDS
        if not (s == "interleaved" and g == "data")  # eight chunks of six layers
    ],
)
def test_every_schedule_trains_as_one_device(schedule: str, grid: str) -> None:
    # Four microbatches of 16 sequences where four devices share a batch.
    fewer = {"microbatches": 4} if grid in ("fsdp", "hybrid-zero1") else {}
    check_equal(case_of(piped(schedule, grid, **fewer), SIX))


COPIES = "copies the stash on CPU devices"
NAMED = {"keep": ["query", "attention", "up"]}


@pytest.mark.parametrize(
    ("schedule", "grid", "remat"),
    [
        pytest.param("1f1b", "zero1-tensor-sequence", "selective", marks=pytest.mark.matrix),
        pytest.param("zb-h1", "data", "selective", marks=pytest.mark.full),
        pytest.param("interleaved", "fsdp-tensor", "selective", marks=pytest.mark.full),
        pytest.param("1f1b", "fsdp", "none", marks=pytest.mark.full),
        pytest.param("zb-h1", "hybrid-zero1", "none", marks=pytest.mark.full),
        pytest.param("gpipe", "tensor", "matmuls", marks=pytest.mark.full),
        pytest.param("zb-h1", "fsdp-tensor", "matmuls", marks=pytest.mark.full),
        pytest.param("1f1b", "data", NAMED, marks=pytest.mark.full, id="names"),
    ],
)
def test_whatever_stages_keep_they_train_as_one_device(schedule: str, grid: str, remat: Any) -> None:
    fewer = {"microbatches": 4} if grid in ("fsdp", "hybrid-zero1") else {}
    check_equal(case_of(piped(schedule, grid, remat=remat, **fewer), SIX))


@pytest.mark.parametrize(
    ("schedule", "remat"),
    [
        pytest.param("interleaved", "selective", marks=pytest.mark.matrix),
        pytest.param("1f1b", "full", marks=pytest.mark.full),
        pytest.param("zb-h1", "none", marks=pytest.mark.full),
    ],
)
def test_layers_that_are_written_out_train_as_one_device(schedule: str, remat: str) -> None:
    """Each with arrays of its own, and each chunk with branches of its own; and hops that are split."""
    asked = piped(schedule, "tensor", remat=remat)
    case = case_of(asked.model_copy(update={"activations": asked.activations | HOPS}), SIX, scan_layers=False)
    check_equal(case)


@pytest.mark.matrix
@pytest.mark.parametrize("schedule", ["1f1b", pytest.param("zb-h1", marks=pytest.mark.full)])
def test_tied_embeddings_and_biases_train_as_on_one_device(schedule: str) -> None:
    """The table's gradient has a part from the first stage and one from the last."""
    check_equal(case_of(piped(schedule, "data"), GPT2))


@pytest.mark.full
def test_fewer_microbatches_than_stages_train_too() -> None:
    check_equal(case_of(piped("1f1b", "data", microbatches=2), SIX))


def test_parameters_go_to_stages_and_back() -> None:
    case = case_of(piped("interleaved", "stages"), replace(SMALL, layers=7))
    params = {"layers/x": jax.numpy.arange(1, 15).reshape(7, 2), "head": jax.numpy.ones(3)}
    stacked = to_stages(params, case)
    # Links of 2, 2, 2 and 1 layers; chunk c of stage s is link 2 c + s.
    assert stacked["layers/x"][:, :, 0].tolist() == [[1, 3, 9, 11], [5, 7, 13, 0]]
    back = from_stages(stacked, case)
    assert all((back[path] == params[path]).all() for path in params)


@cache
def compiled(schedule: str, microbatches: int, remat: str = "full", layers: int = SMALL.layers) -> Any:
    """A step on two stages, two sequences per microbatch."""
    asked = piped(schedule, "stages", microbatches=microbatches, remat=remat)
    model = replace(SMALL, layers=layers)
    step = step_of(case_of(asked, model, batch=2 * microbatches, seq=TOKENS // 2))
    return step.function.lower(*step.arguments).compile()


TOKENS = 64  # of a microbatch


def temporary_bytes(*asked: Any) -> int:
    return int(compiled(*asked).memory_analysis().temp_size_in_bytes)


@pytest.mark.matrix
@pytest.mark.parametrize("counts", [(2, 16), pytest.param((2, 4, 8, 16), marks=pytest.mark.full)])
def test_temporary_memory_over_microbatches(counts: tuple[int, ...]) -> None:
    """p, 2p, 4p, 8p microbatches. GPipe stashes every microbatch on a stage; 1F1B only p.

    Beside the stash there is, per microbatch, its share of tokens, targets and the table of ticks.
    """
    temp = {name: [temporary_bytes(name, m) for m in counts] for name in ("gpipe", "1f1b")}
    x = TOKENS * SMALL.embed * 4  # bytes of one microbatch's activation, B · L · E in f32
    # One layer per stage: its input and, on the last stage, the gradient of its output.
    small = 2_048
    for i in range(1, len(counts)):
        more = counts[i] - counts[i - 1]
        assert temp["gpipe"][i] - temp["gpipe"][i - 1] >= 2 * x * more
        assert temp["1f1b"][i] - temp["1f1b"][i - 1] < small * more
    assert temp["1f1b"][-1] < temp["gpipe"][-1]


@pytest.mark.full
@otherwise_in_jax_0_10(COPIES)
def test_selective_keeps_what_goes_into_products_and_attention() -> None:
    """Of each layer and microbatch in flight: its input and attention's output (E numbers per token each),
    queries, keys, values and what attention gives, and the MLP's two results before its activation. In
    16 bits and with GELU's single result that is 20 of the 34 bytes per token and embedding of Korthikanti
    et al. (arXiv:2205.05198, table 2): 2 are masks of dropout, 12 are elementwise results, found again.
    """
    layers, more = 3, 14
    grown = {
        remat: temporary_bytes("gpipe", 16, remat, 2 * layers)
        - temporary_bytes("gpipe", 2, remat, 2 * layers)
        for remat in ("selective", "full")
    }
    kept = 2 * SMALL.embed + 4 * SMALL.heads * SMALL.head_dim + 2 * SMALL.mlp
    difference = 4 * TOKENS * layers * more * (kept - SMALL.embed)
    assert grown["selective"] - grown["full"] == pytest.approx(difference, rel=1e-3)


@otherwise_in_jax_0_10(COPIES)
@pytest.mark.parametrize(
    ("remat", "stash"),
    [
        pytest.param("full", f"f32[2,3,2,32,{SMALL.embed}]", marks=pytest.mark.matrix),
        pytest.param("selective", f"f32[2,3,2,32,{SMALL.mlp}]", marks=pytest.mark.matrix),
    ],
)
def test_the_stash_is_never_copied(remat: str, stash: str) -> None:
    """A buffer written in and outside of branches would be copied whole at every tick; so would one that a
    branch reads and returns. (XLA:CPU, not GPU, does that where a chunk has a single layer.)"""
    in_loops, _, once = compiled("1f1b", 16, remat, 6).as_text().partition("\nENTRY ")
    assert stash in in_loops and once
    assert not re.search(rf"= {re.escape(stash)}\S* copy\(", in_loops)


def jaxprs_in(jaxpr: Jaxpr) -> Iterator[Jaxpr]:
    """It and all that its equations have."""
    yield jaxpr
    for value in (value for one in jaxpr.eqns for value in one.params.values()):
        for inner in value if isinstance(value, tuple | list) else (value,):
            if isinstance(inner, ClosedJaxpr | Jaxpr):
                yield from jaxprs_in(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)


def test_the_stash_of_a_lone_layer_is_taken_out_once() -> None:
    """What a chunk of one written-out layer reads of its stash goes through a barrier before it is used.
    Without it XLA for GPUs keeps the stash to read from and returns a copy: 530B of `meshes`, fully
    recomputed, was 93 % longer. (Compiling for one shows it in minutes; the barrier itself in a trace.)"""
    asked = piped("1f1b", "stages", microbatches=4)
    step = step_of(case_of(asked, SMALL, batch=8, seq=TOKENS // 2, scan_layers=False))
    behind_barriers = 0
    for jaxpr in jaxprs_in(jax.make_jaxpr(step.function)(*step.arguments).jaxpr):
        made = {str(out): one.primitive.name for one in jaxpr.eqns for out in one.outvars}
        behind_barriers += sum(
            made.get(str(one.invars[0])) in ("reshape", "squeeze", "dynamic_slice")
            for one in jaxpr.eqns
            if one.primitive.name == "optimization_barrier"
        )
    assert behind_barriers


def test_only_neighbours_pass_activations_and_only_at_the_end_of_a_tick() -> None:
    """In the branches, which stages take at different times, nothing may need another stage.

    Groups of the permuting kinds span all devices in XLA's runtimes: one of them in a branch would hang.
    """
    case = case_of(piped("1f1b", "zero1-tensor-sequence"), SIX)
    step = step_of(case)
    text = step.function.lower(*step.arguments).compile().as_text()
    permutes = [line for line in text.splitlines() if " collective-permute(" in line]
    assert permutes
    assert all("/pipeline/" in line for line in permutes)
    assert " all-to-all(" not in text


def test_the_bubble_of_the_executed_table() -> None:
    asked = piped("1f1b", "data")
    assert schedule_of(asked).bubble == published_bubble("1f1b", 4, 8)


@pytest.mark.parametrize(
    ("axes", "method", "workload", "reason", "nearest"),
    [
        pytest.param(
            {"stage": 8}, SCHEDULES["1f1b"], "train", "6 layers over 8 stages", "at most 6", id="stages"
        ),
        pytest.param(
            {"stage": 4},
            SCHEDULES["interleaved"],
            "train",
            "6 layers over 4 stages of 2 virtual stages",
            "pipeline = '1f1b', without virtual_stages",
            id="virtual-stages",
        ),
        pytest.param(
            {"stage": 2},
            {"pipeline": "gpipe"},
            "train",
            "without microbatches",
            "microbatches = 2 or more",
            id="no-microbatches",
        ),
        pytest.param(
            {"stage": 2},
            {**SCHEDULES["interleaved"], "microbatches": 5},
            "train",
            "5 microbatches interleaved over 2 stages",
            "4 or 6",
            id="uneven-groups",
        ),
        pytest.param(
            {"stage": 2},
            {"pipeline": "interleaved", "microbatches": 4},
            "train",
            "one chunk per stage",
            "virtual_stages at most 3",
            id="no-virtual-stages",
        ),
        pytest.param({"stage": 2}, SCHEDULES["1f1b"], "decode", "for decode", "pipelines train", id="decode"),
        pytest.param(
            {"stage": 2},
            {"pipeline": "1f1b", "microbatches": 3},
            "train",
            "16 sequences in 3 microbatches",
            "15 or 18",
            id="batch",
        ),
    ],
)
def test_what_cannot_be_is_answered_with_the_nearest(
    axes: dict[str, int], method: dict[str, Any], workload: Any, reason: str, nearest: str
) -> None:
    asked = plan(axes, STAGE, {}, **method)
    with pytest.raises(Infeasible) as caught:
        make_case(asked, SIX, f"cpu:{axes['stage']}", 16, 16, workload)
    assert reason in caught.value.reason
    assert nearest in caught.value.nearest


def test_the_step_refuses_what_the_case_did_not_check() -> None:
    asked = plan({"stage": 8}, STAGE, {}, **SCHEDULES["1f1b"])
    with pytest.raises(Infeasible, match="6 layers over 8 stages"):
        build_step(case_of(asked, SIX), mesh_of(asked), target="cpu")
