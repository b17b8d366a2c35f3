"""Every strategy, alone and together, trains as one device does: one table of combinations.

Another strategy is a few rules in `emulated.asked` and rows in the table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import hypothesis.strategies as st
import pytest
from emulated import GROUPED, SMALL, asked, case_of, check_equal
from hypothesis import given, settings

from shardlab.spec.models import ModelConfig
from shardlab.spec.names import reduced_once, strategy_names
from shardlab.spec.plan import Plan

FOUR = replace(SMALL, name="four-layers", layers=4)
GPT2 = replace(
    SMALL,
    name="gpt2",
    norm="layernorm",
    activation="gelu",
    positions="learned",
    tied_embeddings=True,
    bias=True,
)


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
        Row(asked(D8, "zero1"), "data parallel, ZeRO-1"),
        Row(asked(D8, "zero2"), "data parallel, ZeRO-2"),
        Row(asked(F8), "FSDP"),
        Row(asked(F8, remat="none"), "FSDP"),
        Row(asked(F8, remat="selective"), "FSDP", "matrix"),
        Row(asked(FT, "seq", remat="selective"), "FSDP, tensor parallel, sequence parallel (Megatron)"),
        Row(asked(F8, remat="offload"), "FSDP", "matrix"),
        Row(asked(FT, "seq", remat="offload"), "FSDP, tensor parallel, sequence parallel (Megatron)"),
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
        Row(asked(D8, "zero1", accumulate=2), "data parallel, ZeRO-1", "default"),
        Row(asked(D8, "zero2", accumulate=2), "data parallel, ZeRO-2", "default"),
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
            "matrix",
            FOUR,
        ),
        Row(
            asked(SDT, "seq zero1", **ONE_F_ONE_B),
            "data parallel, ZeRO-1, tensor parallel, sequence parallel (Megatron), pipeline parallel (1F1B)",
            model=FOUR,
        ),
    ]


MARKS: dict[str, Any] = {"default": (), "matrix": pytest.mark.matrix, "full": pytest.mark.full}


def test_the_table_is_as_long_as_it_says() -> None:
    plans = {(row.plan.model_dump_json(), row.model.name) for row in rows()}
    assert len(plans) == len(rows()) >= 30
    assert sum(row.when == "default" for row in rows()) == 4


@pytest.mark.parametrize(
    "row", [pytest.param(r, id=f"{r.id}-{r.model.name}", marks=MARKS[r.when]) for r in rows()]
)
def test_trains_as_one_device(row: Row) -> None:
    found = [name for name in strategy_names(row.plan) if not name.startswith("gradient accumulation")]
    assert ", ".join(found) == row.names
    check_equal(case_of(row.plan, row.model))


@st.composite
def meshes(draw: st.DrawFn) -> Plan:
    """Any grid of at most eight devices, with what it can carry."""
    axes: dict[str, int] = {}
    for name in draw(st.permutations(["data", "fsdp", "tensor", "y"])):
        left = 8 // prod(axes.values())
        size = draw(st.sampled_from([n for n in (1, 2, 4, 8) if n <= left]))
        if size > 1 or draw(st.booleans()):  # an axis of one device must do nothing
            axes[name] = size
    axes = axes or {"data": 1}
    features = [draw(st.sampled_from(["", "zero1", "zero2"]))] if "data" in axes else []
    if "tensor" in axes:
        features.append(draw(st.sampled_from(["", "seq", "vocab"])))
    shards = axes.get("data", 1) * axes.get("fsdp", 1)
    accumulate = draw(st.sampled_from([n for n in (1, 2, 4) if n * shards <= 16]))
    return asked(axes, " ".join(features), accumulate=accumulate)


@settings(max_examples=2, deadline=None, derandomize=True)
@given(meshes())
def test_any_mesh_trains_as_one_device(asked: Plan) -> None:
    check_equal(case_of(asked))


@pytest.mark.full
@settings(max_examples=20, deadline=None, derandomize=True)
@given(meshes())
def test_more_meshes_train_as_one_device(asked: Plan) -> None:
    check_equal(case_of(asked))


def test_what_is_reduced_once_per_step() -> None:
    once = {
        name: reduced_once(asked({"data": 2, "fsdp": 2, "tensor": 2}, name)) for name in ("zero1", "zero2")
    }
    assert once == {"zero1": ("data",), "zero2": ()}
