"""Layouts as published: a small twin moves what the paper says, and what the paper says is too large does not
fit.

Whether each published layout fits at its full size is asked by tests/test_shipped_plans.py, which compiles
them all.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
from compiled_plans import MESHES, compiled_case
from second_counter import count
from second_counter.literature import (
    REMAT_SEQUENCE_GATHERS,
    REMAT_SEQUENCE_SCATTERS,
    activation_all_reduce,
)

from shardlab.analysis import analyze
from shardlab.compile import compile_case
from shardlab.cost.memory import memory_report
from shardlab.spec.case import Case, make_case
from shardlab.spec.models import find_model
from shardlab.spec.params import parameter_table
from shardlab.spec.plan import load_plan, plan_from_text

pytestmark = pytest.mark.gpu

F32_BYTES = 4
STAGES, CHUNKS, TENSOR, MICROBATCHES, SEQ = 4, 3, 2, 8, 128
LAYERS = STAGES * CHUNKS
SMALL = 2_048  # bytes per step: the loss, and the norm of the gradients


def twin() -> Case:
    """Megatron 175B's mesh file with fewer stages, a narrower host and a small GPT of one layer per chunk."""
    plan = load_plan(MESHES / "a100x64-stage8-tensor8-megatron-175b.toml")
    assert plan.method.virtual_stages == CHUNKS
    method = plan.method.model_copy(update={"microbatches": MICROBATCHES})
    axes = {"stage": STAGES, "tensor": TENSOR}
    model = replace(
        find_model("megatron-175b"),
        name="megatron-twin",
        layers=LAYERS,
        embed=128,
        heads=8,
        kv_heads=8,
        head_dim=16,
        mlp=512,
        vocab=512,
        context=SEQ,
    )
    plan = plan.model_copy(update={"axes": axes, "method": method, "on": "a100:1x8"})
    return make_case(plan, model, batch=MICROBATCHES, seq=SEQ)


@pytest.mark.matrix
def test_a_twin_of_megatron_175b_moves_what_the_papers_say() -> None:
    """Interleaved stages with tensor and sequence parallelism, as compiled for eight A100.

    Over tensor, of the least busy stage: per layer and microbatch the gathers and scatters of sequence
    parallelism with full recomputation (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2), and the
    all-reduced gradients of two norms, each a scale and a bias that see a part of the sequence. (The biases
    of the projections into the residual stream are added before the scatter: their gradients are sums of
    cotangents that are gathered anyway.) The second counter's range holds all axes.
    """
    case = twin()
    program, proto = compiled_case(case)
    assert program.mesh is not None
    assert memory_report(program.memory, program.refusal, case.load_machine()).fits == "yes"
    axes = analyze(program).totals.by_axes
    low, _ = axes["tensor"]["wire_bytes"]
    one = activation_all_reduce(1, SEQ, case.model.embed, TENSOR)
    norms = 4 * case.model.embed * F32_BYTES * Fraction(2 * (TENSOR - 1), TENSOR)
    layer = (REMAT_SEQUENCE_GATHERS + REMAT_SEQUENCE_SCATTERS) * one / 2 + norms
    assert 0 <= low - MICROBATCHES * CHUNKS * layer <= SMALL
    counted = count(proto, program.num_devices, program.mesh)
    for name, figures in axes.items():
        if figures["wire_bytes"] != (0, 0):
            least, most = counted.by_axes[name]
            assert most is not None
            assert least <= figures["wire_bytes"][0] <= (figures["wire_bytes"][1] or 0) <= most


BASELINE = """\
[axes]
tensor = 8
[params]
heads = ["tensor"]
kv_heads = ["tensor"]
mlp = ["tensor"]
vocab = ["tensor"]
[method]
remat = "none"
attention = "reference"
"""
GIB = 1 << 30


@pytest.mark.full
@pytest.mark.parametrize(
    ("model", "layers", "sequences", "activations_gib"),
    [
        ("megatron-22b", 48, 4, 59.25),
        ("megatron-175b", 12, 10, 66.84),
        ("megatron-530b", 3, 46, 114.02),
        ("megatron-1t", 2, 64, 131.25),
    ],
)
def test_tensor_parallelism_alone_does_not_fit(
    model: str, layers: int, sequences: int, activations_gib: float
) -> None:
    """Without sequence parallelism and recomputation, none of the four models fits in 80 GB.

    Korthikanti et al. 2022, arXiv:2205.05198, figure 1 (values as in calculon-ai/calculon
    calculon/llm/validation.py @caa4b11). Our pipelines always recompute, so of a model with stages this is
    its first stage alone, with as many sequences as it holds at once: p (1 + (p - 1) / (p m)) for p stages of
    m chunks (section 4.2.3), and with a small vocabulary, for that stage has no head.
    """
    config = find_model(model)
    if layers != config.layers:
        config = replace(config, name=f"{model}-stage", layers=layers, vocab=1_024)
    case = make_case(plan_from_text(BASELINE), config, "a100:1x8", sequences, 2_048)
    program = compile_case(case, find_largest_batch=False)
    fit = memory_report(program.memory, program.refusal, case.load_machine())
    card = case.load_machine().chip.memory_bytes
    assert fit.fits == "no"
    assert fit.needed_bytes is not None
    assert fit.needed_bytes > card, "not even the whole card would do"
    state = 3 * F32_BYTES * sum(p.size for p in parameter_table(config)) // 8
    assert fit.needed_bytes - state > activations_gib * GIB
