"""Why a collective is there: what the compiled text and the plan say, and `unknown` where they do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import HLO, PLAN, mistakes, run, written
from saved_plans import LLAMA_70B, llama_70b

from shardlab.analysis import CollectiveRow, attribute
from shardlab.errors import UserError
from shardlab.lab.study import why_of
from shardlab.program import CompilerWarning, Program
from shardlab.report.why import why_page
from shardlab.why import Why, why

GOLDEN = Path(__file__).parents[1] / "golden"
ROOT = Path(__file__).parents[2]


def of(chosen: Callable[[CollectiveRow], bool]) -> Why:
    """The first such collective of Llama 3 70B, FSDP 64 x tensor 8."""
    found = llama_70b().analysis
    assert found is not None
    name = next(row.name for row in found.collectives if chosen(row))
    (one,) = why_of(llama_70b(), name) or ()
    return one


def test_a_gather_of_a_weight_names_it_and_its_rule() -> None:
    """gate is (embed 8192, mlp 28672): a device holds 8192 / 64 = 128 rows and 28672 / 8 = 3584 columns."""
    one = of(lambda row: row.kind == "all-gather" and row.layer == "layers/mlp/gate")
    (change,) = one.changes
    assert (change.before_shape, change.after_shape) == ("bf16[128,3584]", "bf16[8192,3584]")
    assert change.before == "dimension 0 split 64 ways over fsdp"
    assert change.after == "whole along dimension 0 over fsdp"
    assert change.arrays == ("layers/mlp/gate/kernel",)
    assert one.rules == ('[params] embed = ["fsdp"]',)
    assert "64 times the memory" in one.remedies[0]


def test_a_sum_of_partial_products_names_the_rule_of_its_layer() -> None:
    """down contracts mlp, which tensor splits."""
    one = of(
        lambda row: row.kind == "all-reduce" and row.layer == "layers/mlp/down" and row.phase == "forward"
    )
    assert one.changes[0].before == "partial sums on each of 8 devices of tensor"
    assert one.changes[0].after == "reduced, the same on all 8 devices of tensor"
    assert one.rules == ('[params] mlp = ["tensor"]',)
    assert one.remedies[0].startswith("It sums partial products")


def test_a_sum_of_gradients_names_the_batch_too() -> None:
    """Seven kernels of a layer. Query and output have one shape on a device, key and value, the MLP's."""
    one = of(lambda row: (row.kind, row.layer, row.dtypes) == ("reduce-scatter", "layers", ("bf16",)))
    assert one.rules == ('[params] embed = ["fsdp"]', '[activations] batch = ["fsdp"]')
    assert len(one.changes) == 7
    assert all(len(change.arrays) > 1 for change in one.changes)
    assert one.remedies[0].startswith("It sums gradients over fsdp")


KINDS = {
    "all-gather": (
        "f32[8]{0} all-gather(p), dimensions={0},",
        ("f32[4]", "dimension 0 split 2 ways over x", "f32[8]", "whole along dimension 0 over x"),
    ),
    "all-reduce": (
        "f32[4]{0} all-reduce(p), to_apply=add,",
        (
            "f32[4]",
            "partial sums on each of 2 devices of x",
            "f32[4]",
            "reduced, the same on all 2 devices of x",
        ),
    ),
    "reduce-scatter": (
        "f32[2]{0} reduce-scatter(p), to_apply=add, dimensions={0},",
        (
            "f32[4]",
            "partial sums on each of 2 devices of x",
            "f32[2]",
            "reduced, dimension 0 split 2 ways over x",
        ),
    ),
    "all-to-all": (
        "f32[4]{0} all-to-all(p), dimensions={0},",
        ("f32[4]", "one dimension split over x", "f32[4]", "another dimension split over x"),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_says_what_it_does(kind: str) -> None:
    written_as, (before_shape, before, after_shape, after) = KINDS[kind]
    start = HLO.index("f32[4]{0} all-reduce(p)")
    end = HLO.index("replica_groups")
    text = (HLO[:start] + written_as + " channel_id=1, " + HLO[end:]).replace(", to_apply=add\n}", "\n}")
    (one,) = why(tuple(attribute(text, {"x": 2})), "r")
    (change,) = one.changes
    assert (change.before_shape, change.before, change.after_shape, change.after) == (
        before_shape, before, after_shape, after,
    )  # fmt: skip


def test_another_reduction_is_no_sum() -> None:
    text = HLO.replace("ROOT c = f32[] add(a, b)", "ROOT c = f32[] maximum(a, b)")
    (one,) = why(tuple(attribute(text, {"x": 2})), "r")
    assert one.changes[0].before == "partial maxima on each of 2 devices of x"


def test_without_plan_and_model_they_are_unknown() -> None:
    (one,) = why(tuple(attribute(HLO, {"x": 2})), "r")
    assert one.rules == () and one.rules_reason.startswith("unknown: a dump does not say")
    shown = [line.text for row in why_page(one).tables[0].rows for value in row for line in value]
    assert "unknown: nothing says of which model it is" in shown
    assert ("source", "unknown: the compiled text does not say") in why_page(one).facts
    assert ("remedy", "unknown: nothing here says what made it") in why_page(one).facts


def test_the_partitioners_warning_comes_with_its_remedy() -> None:
    """As recorded from a compile that went from one sharding to another by replicating."""
    text = (GOLDEN / "audit" / "reshard_by_replication.cpu.hlo").read_text(encoding="utf-8")
    (part,) = attribute(text, {"x": 8})
    row = part.analysis.collectives[0]
    op_name = row.op_name
    warned = CompilerWarning(
        kind="involuntary full rematerialization",
        text="…",
        names=("%copy.1", op_name, "{devices=[8,1]<=[8]}", "{devices=[1,8]<=[8]}"),
    )
    program = Program(
        name="p", backend="cpu", hlo_text=text, num_devices=8, mesh={"x": 8}, warnings=(warned,)
    )
    (one,) = why(tuple(attribute(program)), row.name)
    assert one.warnings and one.warnings[0].startswith("involuntary full rematerialization: %copy.1")
    assert [finding.rule for finding in one.findings] == ["rematerialized"]
    assert one.remedies[0].startswith("Make the two shardings agree")


def test_an_unknown_name_comes_with_near_ones(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = mistakes(capsys, "analyze", str(LLAMA_70B), "--why", "all-gather-start.33")
    assert line.startswith(
        "--why: no collective is called 'all-gather-start.33'; near names: all-gather-start.3,"
    )


def test_a_program_without_collectives_says_so() -> None:
    text = HLO.replace("ROOT r = f32[4]{0} all-reduce(p)", "ROOT r = f32[4]{0} negate(p)").split(
        ", channel_id"
    )[0]
    with pytest.raises(UserError, match="the program has no collectives"):
        why(tuple(attribute(text + "\n}\n", {"x": 2})), "r")


def test_analyze_answers_in_json_beside_its_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = written(tmp_path / "plan.toml", PLAN)
    source = written(tmp_path / "m.hlo", HLO)
    assert run("analyze", source, "--mesh", plan, "--why", "r", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    (one,) = document["why"]
    assert document["schema"] == "shardlab.analysis/1"
    assert one["arrays"][0]["before"]["sharding"] == "partial sums on each of 2 devices of fsdp"
    assert one["rules"] == ['[params] embed = ["fsdp"]', '[activations] batch = ["fsdp"]']
    assert "which of them set it" in one["rules_reason"]


def test_analyze_shows_only_what_was_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written(tmp_path / "m.hlo", HLO)
    assert run("analyze", source, "--axes", "x=2", "--why", "r") == 0
    out = capsys.readouterr().out
    assert out.startswith("Why r\n") and "By kind" not in out
