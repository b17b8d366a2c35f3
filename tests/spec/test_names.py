"""Names of strategies, derived from the rules."""

from __future__ import annotations

import pytest

from shardlab.spec.names import accumulation_notes, reduced_each, reduced_once, strategy_names
from shardlab.spec.plan import plan_from_text

DATA = "[axes]\ndata = 2\n"
FSDP = "[axes]\nfsdp = 4\n[params]\nembed = ['fsdp']\n"
HYBRID = "[axes]\ndata = 2\nfsdp = 4\n[params]\nembed = ['fsdp']\n[activations]\nbatch = ['data', 'fsdp']\n"
TENSOR = "heads = ['tensor']\nmlp = ['tensor']\n"
CONTEXT = "[axes]\nc = 8\n[activations]\nseq = ['c']\n"
CASES = [
    ("one device", "axes = {d = 1}", ["single device"]),
    ("data", DATA + "[activations]\nbatch = ['data']", ["data parallel"]),
    (
        "zero-1",
        DATA + "[activations]\nbatch = ['data']\n[optimizer]\nembed = ['data']",
        ["data parallel", "ZeRO-1"],
    ),
    (
        "zero-2",
        DATA
        + "[activations]\nbatch = ['data']\n[gradients]\nembed = ['data']\n[optimizer]\nembed = ['data']",
        ["data parallel", "ZeRO-2"],
    ),
    (
        "accumulation",
        DATA + "[activations]\nbatch = ['data']\n[method]\naccumulate = 4",
        ["data parallel", "gradient accumulation (4 microbatches)"],
    ),
    (
        "2-D tensor",
        "[axes]\nx = 4\ny = 2\n[params]\nembed = ['y']\nheads = ['x']\nmlp = ['x']\n"
        "[activations]\nembed = ['y']",
        ["2-D tensor parallel"],
    ),
    (
        "one axis of 2-D tensor is one-dimensional",
        "[axes]\nx = 4\ny = 1\n[params]\nembed = ['y']\nheads = ['x']\n[activations]\nembed = ['y']",
        ["tensor parallel"],
    ),
    ("fsdp", FSDP + "[activations]\nbatch = ['fsdp']", ["FSDP"]),
    ("hsdp", HYBRID, ["HSDP"]),
    ("hsdp and ZeRO-1 over the copies", HYBRID + "[optimizer]\nembed = ['data', 'fsdp']", ["HSDP", "ZeRO-1"]),
    ("tensor", "[axes]\ntensor = 8\n[params]\n" + TENSOR, ["tensor parallel"]),
    (
        "fsdp, tensor and sequence",
        FSDP.replace("[params]", "tensor = 8\n[params]")
        + TENSOR
        + "[activations]\nbatch = ['fsdp']\nnorm_seq = ['tensor']",
        ["FSDP", "tensor parallel", "sequence parallel (Megatron)"],
    ),
    ("context", "[axes]\nc = 8\n[activations]\nseq = ['c']", ["context parallel"]),
    ("ring", CONTEXT + "[method]\ncontext = 'ring'", ["context parallel (ring)"]),
    ("gathered keys", CONTEXT + "[method]\ncontext = 'all-gather'", ["context parallel (all-gather)"]),
    ("Ulysses", CONTEXT + "[method]\ncontext = 'ulysses'", ["context parallel (Ulysses)"]),
    (
        "ring and Ulysses",
        "[axes]\nr = 2\nu = 4\n[activations]\nseq = ['r', 'u']\n[method]\ncontext = 'ring+ulysses'",
        ["context parallel (ring x Ulysses)"],
    ),
    (
        "weights over the ring",
        CONTEXT + "[params]\nembed = ['c']\n[method]\ncontext = 'ring'",
        ["FSDP", "context parallel (ring)"],
    ),
    (
        "optimizer state over the ring",
        CONTEXT + "[optimizer]\nembed = ['c']\n[method]\ncontext = 'ring'",
        ["ZeRO-1", "context parallel (ring)"],
    ),
    (
        "expert",
        "[axes]\ne = 8\n[params]\nexpert = ['e']\n[activations]\nbatch = ['e']",
        ["data parallel", "expert parallel"],
    ),
    (
        "experts gathered for use",
        "[axes]\ne = 8\n[params]\nexpert = ['e']\n[activations]\nbatch = ['e']\nexpert = []",
        ["FSDP"],
    ),
    (
        "experts where attention is split by heads",
        "[axes]\nt = 8\n[params]\nexpert = ['t']\nheads = ['t']\n[activations]\nnorm_seq = ['t']",
        ["tensor parallel", "sequence parallel (Megatron)", "expert parallel"],
    ),
    (
        "an axis of one names nothing",
        DATA + "one = 1\n[params]\nembed = ['one']\n[activations]\nbatch = ['data', 'one']",
        ["data parallel"],
    ),
    (
        "an unused axis",
        DATA + "x = 2\n[activations]\nbatch = ['data']",
        ["data parallel", "replicated over x"],
    ),
]


ZERO2 = HYBRID + "[gradients]\nembed = ['fsdp', 'data']\n[optimizer]\nembed = ['fsdp', 'data']"


@pytest.mark.parametrize(
    ("text", "once", "each"),
    [(HYBRID, ("data",), ("fsdp",)), (ZERO2, (), ("data", "fsdp")), (DATA, (), ())],
    ids=["hsdp", "zero-2", "no batch axis"],
)
def test_when_gradients_are_reduced(text: str, once: tuple[str, ...], each: tuple[str, ...]) -> None:
    plan = plan_from_text(text + "\n[method]\naccumulate = 2")
    assert (reduced_once(plan), reduced_each(plan)) == (once, each)
    notes = accumulation_notes(plan)
    assert len(notes) == (1 if once or each else 0)
    assert all(f"once per step over {', '.join(once)}" in note for note in notes if once)
    assert all(f"once per microbatch over {', '.join(each)}" in note for note in notes if each)
    assert accumulation_notes(plan_from_text(text)) == ()


@pytest.mark.parametrize(("text", "names"), [(t, n) for _, t, n in CASES], ids=[name for name, _, _ in CASES])
def test_names(text: str, names: list[str]) -> None:
    assert strategy_names(plan_from_text(text)) == tuple(names)
