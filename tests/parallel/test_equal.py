"""Every strategy, alone and together, trains as one device does: one table of combinations.

Another strategy is a few rules in `emulated.asked` and rows in the table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import hypothesis.strategies as st
import pytest
from emulated import GROUPED, MIXTURE, SMALL, asked, case_of, check_equal
from hypothesis import given, settings

from shardlab.spec.models import MODELS, ModelConfig, Rope
from shardlab.spec.names import CONTEXTS, SCHEDULES, reduced_once, strategy_names
from shardlab.spec.plan import Plan

FOUR = replace(SMALL, name="four-layers", layers=4)
GROUPED4 = replace(GROUPED, name="four-layers-grouped", layers=4)
EXPERTS4 = replace(MIXTURE, name="mixture-four-layers", layers=4)
WINDOW = replace(SMALL, name="window", window=5)
PATTERN = replace(GROUPED, name="pattern", layers=5, window=5, global_every=2)
CHUNKS = replace(SMALL, name="chunks", layers=3, attention_chunk=6, global_every=3)
GEMMA = replace(
    MODELS["tiny-gemma3"],
    name="gemma",
    layers=4,
    embed=32,
    kv_heads=2,
    head_dim=8,
    mlp=64,
    vocab=100,
    context=32,
    window=5,
    global_rope=Rope(100.0, scaling=4.0),
    query_scalar=12,
)
GPT2 = replace(
    SMALL,
    name="gpt2",
    norm="layernorm",
    activation="gelu",
    positions="learned",
    tied_embeddings=True,
    bias=True,
)


NAMED = {"keep": ["query", "gate", "attention"], "offload": ["input", "key", "value", "output"]}


@dataclass(frozen=True)
class Row:
    """One combination. when: the set that runs it (default, matrix, full)."""

    plan: Plan
    names: str
    when: str = "full"
    model: ModelConfig = SMALL

    @property
    def id(self) -> str:
        """Its axes and names."""
        said = self.plan.method.model_dump(exclude_defaults=True)
        return "-".join(
            [self.plan.name, *(f"{k}={v}" for k, v in said.items()), self.names.replace(" ", "_")]
        )


def rows() -> list[Row]:
    D8, F8, T8 = {"data": 8}, {"fsdp": 8}, {"tensor": 8}
    DF, DT, FT = {"data": 2, "fsdp": 4}, {"data": 2, "tensor": 4}, {"fsdp": 2, "tensor": 4}
    DFT, TY = {"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 4, "y": 2}
    DTY, FTY = {"data": 2, "tensor": 2, "y": 2}, {"fsdp": 2, "tensor": 2, "y": 2}
    SD, SDT = {"stage": 2, "data": 4}, {"data": 2, "stage": 2, "tensor": 2}
    ONE_F_ONE_B = {"pipeline": "1f1b", "microbatches": 4}
    return [
        Row(asked(D8), "data parallel"),
        Row(asked(D8, lookup="one-hot"), "data parallel"),
        Row(asked(T8, "vocab", lookup="one-hot"), "tensor parallel", "matrix"),
        Row(asked(D8, "zero1"), "data parallel, ZeRO-1"),
        Row(asked(D8, "zero2"), "data parallel, ZeRO-2"),
        Row(asked(F8), "FSDP"),
        Row(asked(F8, remat="none"), "FSDP"),
        Row(
            asked(FT, "seq", loss_parts=4),
            "FSDP, tensor parallel, sequence parallel (Megatron)",
            "matrix",
            GEMMA,
        ),
        Row(asked(TY, loss_parts=2), "2-D tensor parallel"),
        Row(
            asked({"data": 2, "ring": 2, "ulysses": 2}, context="ring+ulysses", loss_parts=2),
            "data parallel, " + CONTEXTS["ring+ulysses"],
        ),
        Row(asked(FT, "seq"), "FSDP, tensor parallel, sequence parallel (Megatron)", model=WINDOW),
        Row(asked(DF, remat="selective"), "HSDP", model=GEMMA),
        Row(asked(TY), "2-D tensor parallel", model=GEMMA),
        Row(
            asked(DFT, "seq zero1", accumulate=2),
            "HSDP, ZeRO-1, tensor parallel, sequence parallel (Megatron)",
            model=GEMMA,
        ),
        Row(asked(F8, remat="selective"), "FSDP", "matrix"),
        Row(asked(FT, "seq", remat="selective"), "FSDP, tensor parallel, sequence parallel (Megatron)"),
        Row(asked(F8, remat="offload"), "FSDP"),
        Row(asked(FT, "seq", remat="offload"), "FSDP, tensor parallel, sequence parallel (Megatron)"),
        Row(asked(FT, "seq", remat=NAMED), "FSDP, tensor parallel, sequence parallel (Megatron)", "matrix"),
        Row(asked(F8, attention="blockwise"), "FSDP", model=GROUPED),
        Row(
            asked(FT, "seq", attention="unfused", remat="selective"),
            "FSDP, tensor parallel, sequence parallel (Megatron)",
            "matrix",
            GROUPED,
        ),
        Row(asked(DF, attention="blockwise"), "HSDP", model=PATTERN),
        Row(
            asked(FT, "seq", remat="selective"),
            "FSDP, tensor parallel, sequence parallel (Megatron)",
            model=CHUNKS,
        ),
        Row(asked(DF), "HSDP"),
        Row(asked(DF, "zero1"), "HSDP, ZeRO-1"),
        Row(asked(DF, "zero2"), "HSDP, ZeRO-2", "matrix"),
        Row(asked(T8), "tensor parallel"),
        Row(asked(T8, "vocab"), "tensor parallel"),
        Row(asked(T8, "seq"), "tensor parallel, sequence parallel (Megatron)", "matrix"),
        Row(asked(DT), "data parallel, tensor parallel"),
        Row(asked(DT), "data parallel, tensor parallel", model=GROUPED),
        Row(asked(DT, "seq zero1"), "data parallel, ZeRO-1, tensor parallel, sequence parallel (Megatron)"),
        Row(asked(DT, "seq zero2"), "data parallel, ZeRO-2, tensor parallel, sequence parallel (Megatron)"),
        Row(asked(FT), "FSDP, tensor parallel"),
        Row(asked(FT, "seq"), "FSDP, tensor parallel, sequence parallel (Megatron)"),
        Row(asked(DFT, "vocab"), "HSDP, tensor parallel"),
        Row(asked(DFT, "seq zero1"), "HSDP, ZeRO-1, tensor parallel, sequence parallel (Megatron)"),
        Row(asked(TY), "2-D tensor parallel", "default"),
        Row(asked({"tensor": 2, "y": 4}), "2-D tensor parallel"),
        Row(asked(TY), "2-D tensor parallel", model=GPT2),
        Row(asked(DTY), "data parallel, 2-D tensor parallel"),
        Row(asked(DTY, "zero1"), "data parallel, ZeRO-1, 2-D tensor parallel"),
        Row(asked(FTY), "FSDP, 2-D tensor parallel", "matrix"),
        Row(asked(D8, accumulate=2), "data parallel"),
        Row(asked(D8, accumulate=2), "data parallel", model=GPT2),
        Row(asked(D8, "zero1", accumulate=2), "data parallel, ZeRO-1"),
        Row(asked(D8, "zero2", accumulate=2), "data parallel, ZeRO-2", "matrix"),
        Row(asked(F8, accumulate=2), "FSDP"),
        Row(asked(DF, accumulate=2), "HSDP"),
        Row(asked(DF, "zero1", accumulate=2), "HSDP, ZeRO-1", "matrix"),
        Row(asked(DF, "zero2", accumulate=2), "HSDP, ZeRO-2"),
        Row(asked(T8, accumulate=4), "tensor parallel"),
        Row(
            asked(DT, "seq zero2", accumulate=4),
            "data parallel, ZeRO-2, tensor parallel, sequence parallel (Megatron)",
        ),
        Row(
            asked(DFT, "seq zero1", accumulate=4),
            "HSDP, ZeRO-1, tensor parallel, sequence parallel (Megatron)",
            "default",
        ),
        Row(asked(DTY, "zero1", accumulate=2), "data parallel, ZeRO-1, 2-D tensor parallel", "matrix"),
        Row(asked(FTY, accumulate=2), "FSDP, 2-D tensor parallel"),
        Row(asked(SD, **ONE_F_ONE_B), "data parallel, pipeline parallel (1F1B)", model=FOUR),
        Row(
            asked(SD, "zero2", **ONE_F_ONE_B),
            "data parallel, ZeRO-2, pipeline parallel (1F1B)",
            model=FOUR,
        ),
        Row(
            asked(SDT, "seq zero1", **ONE_F_ONE_B),
            "data parallel, ZeRO-1, tensor parallel, sequence parallel (Megatron), pipeline parallel (1F1B)",
            model=FOUR,
        ),
    ]


def context_rows() -> list[Row]:
    """Context parallelism beside the others; in zig-zag order all but Ulysses."""
    C8, DC, FC = {"context": 8}, {"data": 2, "context": 4}, {"fsdp": 2, "context": 4}
    CT, DCT = {"context": 4, "tensor": 2}, {"data": 2, "context": 2, "tensor": 2}
    RU, RUT, DRU = (
        {"ring": 2, "ulysses": 4},
        {"ring": 2, "ulysses": 2, "tensor": 2},
        {"data": 2, "ring": 2, "ulysses": 2},
    )
    RING, GATHER, ULYSSES, BOTH = (CONTEXTS[k] for k in ("ring", "all-gather", "ulysses", "ring+ulysses"))
    MEGATRON = "tensor parallel, sequence parallel (Megatron)"
    return [
        Row(asked(C8, context="ring"), RING, model=GROUPED),
        Row(asked(C8, context="all-gather", attention="blockwise"), GATHER),
        Row(asked(DC, "zero1", context="ring"), f"data parallel, ZeRO-1, {RING}"),
        Row(asked(FC, context="ulysses", remat="none"), f"FSDP, {ULYSSES}"),
        Row(asked(CT, "seq", context="ring"), f"{MEGATRON}, {RING}"),
        Row(asked(CT, "seq", context="all-gather"), f"{MEGATRON}, {GATHER}"),
        Row(asked(DCT, "seq zero1", context="ulysses"), f"data parallel, ZeRO-1, {MEGATRON}, {ULYSSES}"),
        Row(asked(FC, context="ulysses"), f"FSDP, {ULYSSES}", model=CHUNKS),
        Row(asked(FC, context="ulysses", loss_parts=2), f"FSDP, {ULYSSES}", model=GEMMA),
        Row(asked(RU, context="ring+ulysses"), BOTH),
        Row(asked(RUT, "seq", context="ring+ulysses"), f"{MEGATRON}, {BOTH}"),
        Row(asked({"context": 2, "tensor": 2, "y": 2}, context="ring"), f"2-D tensor parallel, {RING}"),
        Row(asked({"context": 2, "tensor": 2, "y": 2}, context="ulysses"), f"2-D tensor parallel, {ULYSSES}"),
        Row(asked(DC, context="ring", accumulate=4), f"data parallel, {RING}"),
        Row(asked(FC, context="all-gather", accumulate=2), f"FSDP, {GATHER}"),
        Row(asked(DRU, "zero2", context="ring+ulysses", accumulate=2), f"data parallel, ZeRO-2, {BOTH}"),
    ]


def expert_rows() -> list[Row]:
    """Experts beside the others."""
    X8, DX, XT = {"expert": 8}, {"data": 2, "expert": 4}, {"expert": 4, "tensor": 2}
    FXT, XC = {"fsdp": 2, "expert": 2, "tensor": 2}, {"expert": 4, "context": 2}
    TIGHT = "capacity 0.75"  # of an even load: tokens are dropped
    found = [
        Row(asked(X8), "data parallel, expert parallel"),
        Row(asked(DX, "zero1", experts=TIGHT), "data parallel, ZeRO-1, expert parallel"),
        Row(asked(XT, experts=TIGHT), "data parallel, tensor parallel, expert parallel"),
        Row(asked(FXT, "seq"), "HSDP, tensor parallel, sequence parallel (Megatron), expert parallel"),
        Row(asked(XC, context="ring"), "data parallel, context parallel (ring), expert parallel"),
        Row(
            asked(XC, context="ulysses", experts=TIGHT),
            "data parallel, context parallel (Ulysses), expert parallel",
        ),
    ]
    return [replace(row, model=MIXTURE) for row in found]


def pipeline_rows() -> list[Row]:
    """Every schedule beside FSDP, tensor parallelism, context parallelism and experts."""
    SF, ST = {"stage": 2, "fsdp": 4}, {"stage": 2, "tensor": 4}
    SDC, SCT = {"stage": 2, "data": 2, "context": 2}, {"stage": 2, "context": 2, "tensor": 2}
    SX, SXT = {"stage": 2, "expert": 4}, {"stage": 2, "expert": 2, "tensor": 2}
    SDX, SXC = {"stage": 2, "data": 2, "expert": 2}, {"stage": 2, "expert": 2, "context": 2}
    MEGATRON = "tensor parallel, sequence parallel (Megatron)"
    GATHER, ULYSSES = "context parallel (all-gather)", "context parallel (Ulysses)"
    found: list[Row] = []
    for name, when in (("gpipe", "full"), ("1f1b", "matrix"), ("interleaved", "full"), ("zb-h1", "full")):
        method: dict[str, Any] = {"pipeline": name, "microbatches": 4}
        method |= {"virtual_stages": 2} if name == "interleaved" else {}
        called = f"pipeline parallel ({SCHEDULES[name]})"
        found += [
            Row(asked(SF, **method), f"FSDP, {called}", model=FOUR),
            Row(asked(ST, "seq", **method), f"{MEGATRON}, {called}", model=FOUR),
            Row(
                asked(SDC, "zero1", context="ulysses", **method),
                f"data parallel, ZeRO-1, {ULYSSES}, {called}",
                model=FOUR,
            ),
            Row(
                asked(SCT, "seq", context="all-gather", **method),
                f"{MEGATRON}, {GATHER}, {called}",
                when,
                FOUR,
            ),
            Row(asked(SX, **method), f"data parallel, expert parallel, {called}", model=EXPERTS4),
            Row(
                asked(SXT, "seq", **method),
                f"data parallel, {MEGATRON}, expert parallel, {called}",
                when,
                EXPERTS4,
            ),
        ]
    one = {"pipeline": "1f1b", "microbatches": 4}
    return [
        *found,
        Row(
            asked({"stage": 2, "tensor": 2, "y": 2}, **one),
            "2-D tensor parallel, pipeline parallel (1F1B)",
            model=FOUR,
        ),
        # Two microbatches: which tokens drop can hang on rounding. With four the first gradients differ
        # by 1.3e-6 of the largest, and the norm by 8e-6 at the second step and 4e-5 at the fifth.
        Row(
            asked(SDX, experts="capacity 0.75", **{**one, "microbatches": 2}),
            "data parallel, expert parallel, pipeline parallel (1F1B)",
            model=EXPERTS4,
        ),
        Row(
            asked(SXC, context="all-gather", **one),
            f"data parallel, {GATHER}, expert parallel, pipeline parallel (1F1B)",
            model=EXPERTS4,
        ),
    ]


def all_rows() -> list[Row]:
    return [*rows(), *context_rows(), *expert_rows(), *pipeline_rows()]


MARKS: dict[str, Any] = {"default": (), "matrix": pytest.mark.matrix, "full": pytest.mark.full}


def test_the_table_is_as_long_as_it_says() -> None:
    plans = {(row.plan.model_dump_json(), row.model.name) for row in all_rows()}
    assert len(plans) == len(all_rows()) >= 80
    assert sum(row.when == "default" for row in all_rows()) == 2


@pytest.mark.parametrize(
    "row", [pytest.param(r, id=f"{r.id}-{r.model.name}", marks=MARKS[r.when]) for r in all_rows()]
)
def test_trains_as_one_device(row: Row) -> None:
    found = [name for name in strategy_names(row.plan) if not name.startswith("gradient accumulation")]
    assert ", ".join(found) == row.names
    check_equal(case_of(row.plan, row.model))


SIZES = (1, 2, 4, 8)
CONTEXT_FORMS = ("all-gather", "ring", "ulysses", "ring+ulysses")


@st.composite
def grids(draw: st.DrawFn) -> dict[str, int]:
    """At most eight devices; an axis of one device must do nothing."""
    axes: dict[str, int] = {}
    second = draw(st.sampled_from(["y", "expert"]))  # not together: tokens travel whole to their experts
    for name in draw(st.permutations(["data", "fsdp", "tensor", second, "context", "stage"])):
        left = 8 // prod(axes.values())
        most = min(left, 4 if name == "stage" else 8)  # of four layers
        size = draw(st.sampled_from([n for n in SIZES if n <= most]))
        if size > 1 or draw(st.integers(0, 3)) == 0:
            axes[name] = size
    return axes or {"data": 1}


@st.composite
def meshes(draw: st.DrawFn) -> tuple[Plan, ModelConfig]:
    """Any grid with what it can carry, and a model for it."""
    axes = draw(grids())
    features = [draw(st.sampled_from(["", "zero1", "zero2"]))] if "data" in axes else []
    if "tensor" in axes:
        features.append(draw(st.sampled_from(["", "seq", "vocab"])))
    method: dict[str, Any] = {}
    shards = prod(axes.get(name, 1) for name in ("data", "fsdp", "expert"))
    counts = [n for n in (1, 2, 4) if n * shards <= 16]
    if "stage" in axes:
        method |= draw(pipelines(axes["stage"], counts))
    elif "expert" not in axes:
        method["accumulate"] = draw(st.sampled_from(counts))
    if "context" in axes:
        axes, method["context"] = draw(contexts(axes, within_stages="stage" in axes))
    model = EXPERTS4 if "expert" in axes else draw(st.sampled_from([FOUR, GROUPED4]))
    return asked(axes, " ".join(features), **method), model


@st.composite
def pipelines(draw: st.DrawFn, stages: int, counts: list[int]) -> dict[str, Any]:
    """A schedule of four layers. counts: of microbatches."""
    name = draw(st.sampled_from(["gpipe", "1f1b", "zb-h1", *(["interleaved"] if stages <= 2 else [])]))
    if name != "interleaved":
        return {"pipeline": name, "microbatches": draw(st.sampled_from(counts))}
    whole = [count for count in counts if count % stages == 0]
    if not whole:
        return {"pipeline": "1f1b", "microbatches": counts[-1]}
    return {"pipeline": name, "microbatches": draw(st.sampled_from(whole)), "virtual_stages": 2}


@st.composite
def contexts(draw: st.DrawFn, axes: dict[str, int], *, within_stages: bool) -> tuple[dict[str, int], str]:
    """How the context axis is used: where it is a ring of Ulysses groups, it becomes two."""
    kind = draw(st.sampled_from(["all-gather", "ulysses"] if within_stages else CONTEXT_FORMS))
    if kind != "ring+ulysses":
        return axes, kind
    size = axes["context"]
    inner = draw(st.sampled_from([n for n in SIZES if n <= size]))
    split: dict[str, int] = {}
    for name, ways in axes.items():
        split |= {"ring": size // inner, "ulysses": inner} if name == "context" else {name: ways}
    return split, kind


@pytest.mark.matrix
@settings(max_examples=2, deadline=None, derandomize=True)
@given(meshes())
def test_any_mesh_trains_as_one_device(asked: tuple[Plan, ModelConfig]) -> None:
    check_equal(case_of(*asked))


@pytest.mark.full
@settings(max_examples=20, deadline=None, derandomize=True)
@given(meshes())
def test_more_meshes_train_as_one_device(asked: tuple[Plan, ModelConfig]) -> None:
    check_equal(case_of(*asked))


def test_what_is_reduced_once_per_step() -> None:
    once = {
        name: reduced_once(asked({"data": 2, "fsdp": 2, "tensor": 2}, name)) for name in ("zero1", "zero2")
    }
    assert once == {"zero1": ("data",), "zero2": ()}
