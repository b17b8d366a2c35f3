"""What the page of `explain` says of FLOPs and HBM traffic, from a step made by hand."""

from __future__ import annotations

from dataclasses import replace

from case_reports import GB, report

from shardlab.cost.flops import Flops, NotCountedWork
from shardlab.cost.hbm import Traffic
from shardlab.cost.instructions import InstructionCost, StepCost
from shardlab.report.explain import explain_page
from shardlab.report.markdown import to_markdown
from shardlab.report.page import Page

TERA = 10**12
PRODUCT = InstructionCost(
    name="fusion.1",
    computation="main",
    kind="fusion",
    executions=(2, 2),
    matmul_flops=10 * TERA,
    attention_flops=0,
    recompute=True,
    traffic=Traffic(3 * GB, GB),
    phase="backward",
    layer="layers/mlp/up",
    op_name="",
    source="layers.py:65",
)
COPY = replace(PRODUCT, name="c|1", kind="copy", executions=(0, None), matmul_flops=0, recompute=False)
KERNEL = replace(PRODUCT, name="k.1", kind="__cudnn$fmhaSoftmax", executions=(1, 1), traffic=None)
MISSING = NotCountedWork("k.1", "__cudnn$fmhaSoftmax", "nobody knows")
# 8 devices do 200 TFLOP each of which the model asks for 1,600 / 1,600 = all.
COST = StepCost(
    flops=Flops(matmul=180 * TERA, attention=20 * TERA, unknown=(MISSING,)),
    recompute_flops=20 * TERA,
    read_bytes=6 * GB,
    written_bytes=2 * GB,
    other_bytes=5 * GB,
    instructions=(PRODUCT, COPY, KERNEL),
    not_counted=(MISSING,),
)


def texts(page: Page, title: str) -> list[list[str]]:
    (table,) = (one for one in page.tables if one.title == title)
    return [["\n".join(line.text for line in value) for value in row] for row in table.rows]


def test_facts_separate_recomputation_and_say_what_the_model_needs() -> None:
    facts = dict(explain_page(report(cost=COST)).facts)
    assert facts["FLOPs of"] == "matrix products 180 TFLOP, attention 20 TFLOP, recomputed 20 TFLOP"
    assert facts["model share"] == "100 % of the FLOPs as compiled are the model's"
    assert facts["HBM traffic"] == "6 GB read, 2 GB written per device and step; 5 GB in other memory"
    half = report(
        cost=replace(COST, flops=Flops(matmul=400 * TERA, attention=0), recompute_flops=0, other_bytes=0)
    )
    facts = dict(explain_page(half).facts)
    assert facts["model share"].startswith("50 %")
    assert facts["FLOPs of"] == "matrix products 400 TFLOP"
    assert facts["HBM traffic"] == "6 GB read, 2 GB written per device and step"


def test_an_unbounded_loop_leaves_the_sums_unknown() -> None:
    flops = Flops(matmul=None, attention=0)
    facts = dict(explain_page(report(cost=replace(COST, flops=flops, read_bytes=None))).facts)
    assert facts["FLOPs of"].startswith("matrix products unknown")
    assert facts["HBM traffic"].startswith("unknown read")
    assert "model share" not in facts


def test_the_heaviest_instructions_are_listed_with_their_intensity() -> None:
    page = explain_page(report(cost=COST))
    where = "backward\nlayers/mlp/up\nlayers.py:65"
    product = "backward, recompute\nlayers/mlp/up\nlayers.py:65"
    assert texts(page, "Products") == [
        ["20 TFLOP\n×2 10 TFLOP", "fusion\nfusion.1", "2.5 k", product],
        ["10 TFLOP\n×1 10 TFLOP", "__cudnn$fmhaSoftmax\nk.1", "unknown", product],
    ]
    assert texts(page, "Memory traffic") == [
        ["8 GB\n×2 4 GB", "fusion\nfusion.1", "2.5 k", product],
        ["unknown\n×0 at least 4 GB", "copy\nc|1", "0", where],
    ]
    assert texts(page, "FLOPs or traffic not counted") == [["__cudnn$fmhaSoftmax", "k.1", "nobody knows"]]
    assert "`c\\|1`" in to_markdown(page)


def test_a_product_in_vmem_has_no_intensity() -> None:
    row = replace(PRODUCT, traffic=Traffic(0, 0, 5))
    page = explain_page(report(cost=replace(COST, instructions=(row,))))
    assert [cells[2] for cells in texts(page, "Products")] == ["–"]


def test_only_the_heaviest_are_shown_and_the_rest_is_summed() -> None:
    page = explain_page(report(cost=COST), top=1)
    (table,) = (one for one in page.tables if one.title == "Products")
    assert len(table.rows) == 1
    assert table.caption.startswith(
        "1 smaller ones not shown, 10 TFLOP together; of a conditional the dearest"
    )
