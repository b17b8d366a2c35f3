"""Laws of a diff, on random analyses: names mean nothing, the way back is the mirror, rows add up."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction

import pytest
from case_reports import analysis, collective, infeasible_report, memory, report
from hypothesis import given, settings
from hypothesis import strategies as st
from review.analyses import analyses, made_of, rewritten

import shardlab
from shardlab.analysis import Analysis, CollectiveRow
from shardlab.errors import UserError
from shardlab.review import Diff, Row, diff, diff_json
from shardlab.review.records import minus, total
from shardlab.review.verdict import verdict

FEWER = settings(max_examples=60)
SLOW = {"tier": "infiniband", "traffic": {"infiniband": Fraction(7)}}
MIRRORED = {"added": "removed", "removed": "added", "grew": "shrank", "shrank": "grew"}


def changes(found: Diff) -> list[tuple[str, tuple[str, ...]]]:
    return [(row.what, row.moved) for row in found.changes]


@FEWER
@given(analyses())
def test_nothing_changed_between_an_analysis_and_itself(found: Analysis) -> None:
    same = diff(found, found)
    assert same.changes == ()
    assert verdict(same).what == "same"


@FEWER
@given(st.data())
def test_what_a_compiler_calls_orders_combines_or_splits_is_no_change(data: st.DataObject) -> None:
    found = data.draw(analyses())
    assert diff(found, data.draw(rewritten(found))).changes == ()


@pytest.mark.parametrize("dtypes", ["f32", "bf16"])
def test_arrays_of_several_layers_and_dtypes_combined_into_one_are_no_change(dtypes: str) -> None:
    """3 GB of one layer and 4 of another, apart and as one tuple whose layer is what both share."""
    one, other = (
        collective(
            name,
            layer=f"layers/{name}",
            payload_bytes=gb,
            wire_bytes=Fraction(gb),
            traffic={"nvlink": Fraction(gb)},
            dtypes=(dtype,),
        )
        for name, gb, dtype in (("a", 3, "f32"), ("b", 4, dtypes))
    )
    together = replace(
        one,
        layer="layers",
        payload_bytes=7,
        wire_bytes=Fraction(7),
        traffic={"nvlink": Fraction(7)},
        dtypes=("f32", dtypes),
    )
    found = diff(made_of([one, other]), made_of([together]))
    assert [row.what for row in found.rows] == ["regrouped"]
    larger = replace(together, payload_bytes=8, wire_bytes=Fraction(8), traffic={"nvlink": Fraction(8)})
    assert diff(made_of([one, other]), made_of([larger])).changes != ()


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_a_change_elsewhere_hides_no_regrouping(dtype: str) -> None:
    """Two bf16 gathers of one scope become one; what grew is in another scope, in either dtype."""

    def gather(layer: str, sent: int, dtype: str = "bf16") -> CollectiveRow:
        carried = {"nvlink": Fraction(sent)}
        return collective(
            layer=layer, payload_bytes=sent, wire_bytes=Fraction(sent), traffic=carried, dtypes=(dtype,)
        )

    base = made_of([gather("layers/a", 3), gather("layers/b", 4), gather("head", 5, dtype)])
    head = made_of([gather("layers", 7), gather("head", 6, dtype)])
    assert [row.what for row in diff(base, head).rows] == ["grew", "regrouped"]
    # under a scope that shares nothing with the old ones, the dtype alone tells them apart
    renamed = made_of([gather("blocks", 7), gather("head", 6, dtype)])
    assert bool(diff(base, renamed).unchanged) == (dtype == "f32")


@FEWER
@given(analyses(), analyses())
def test_the_way_back_is_the_mirror_image(base: Analysis, head: Analysis) -> None:
    def mirrored(row: Row) -> Row:
        what = MIRRORED.get(row.what, row.what)
        return Row(what=what, base=row.head, head=row.base, moved=row.moved)  # type: ignore[arg-type]

    forth, back = diff(base, head), diff(head, base)
    assert sorted(map(repr, map(mirrored, forth.rows))) == sorted(map(repr, back.rows))
    assert {verdict(forth).what, verdict(back).what} in ({"same"}, {"mixed"}, {"better", "worse"})


@FEWER
@given(analyses(), analyses())
def test_rows_explain_the_change_of_every_total_exactly(base: Analysis, head: Analysis) -> None:
    found = diff(base, head)
    assert found.before is not None and found.after is not None
    old, new = total(row.before for row in found.rows), total(row.after for row in found.rows)
    for measure in ("payload_bytes", "wire_bytes"):
        # minuend and subtrahend from the totals that were given, not from rows
        told = minus(getattr(head.totals, measure), getattr(base.totals, measure))
        assert minus(getattr(new, measure), getattr(old, measure)) == told
    assert (dict(old.traffic), dict(new.traffic)) == (base.totals.traffic, head.totals.traffic)
    assert (found.before.time_s, found.after.time_s) == (old.time_s, new.time_s)


@FEWER
@given(analyses(), analyses())
def test_every_collective_stands_in_one_row(base: Analysis, head: Analysis) -> None:
    found = diff(base, head)
    for side, flows in (
        (base, [f for r in found.rows for f in r.base]),
        (head, [f for r in found.rows for f in r.head]),
    ):
        assert sum(flow.executions[0] for flow in flows) == sum(row.executions[0] for row in side.collectives)


@FEWER
@given(analyses(), analyses())
def test_a_saved_analysis_gives_the_same_diff(base: Analysis, head: Analysis) -> None:
    saved = [json.loads(json.dumps(side.to_json())) for side in (base, head)]
    assert Analysis.from_json(saved[0]) == base
    assert diff(*saved).rows == diff(base, head).rows


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"payload_bytes": 16, "wire_bytes": Fraction(14)}, ("grew", ())),
        ({"executions": (1, 1)}, ("shrank", ())),
        ({"axes": ("tensor",)}, ("moved", ("axes",))),
        ({"axes": ("tensor",), **SLOW}, ("moved", ("axes", "tier"))),
        (SLOW, ("moved", ("tier",))),
        ({"phase": "backward"}, ("moved", ("phase",))),
        ({"kind": "all-reduce", "wire_bytes": Fraction(14)}, ("moved", ("kind",))),
        ({"dtypes": ("f32",), "payload_bytes": 16}, ("moved", ("dtypes",))),
        ({"traffic": {"nvlink": Fraction(8)}}, ("changed", ())),
    ],
)  # fmt: skip
def test_each_kind_of_change_is_told_apart(
    change: dict[str, object], what: tuple[str, tuple[str, ...]]
) -> None:
    row = collective(payload_bytes=8, wire_bytes=Fraction(7), traffic={"nvlink": Fraction(7)})
    other = collective("other", layer="head", phase="backward", kind="all-reduce")
    base, head = made_of([row, other]), made_of([replace(row, **change), other])  # type: ignore[arg-type]
    assert changes(diff(base, head)) == [what]


def test_a_renamed_mesh_axis_is_said_and_no_change() -> None:
    base = analysis(collective(), collective("sub", axes=("fsdp:(2)4",)))
    head = analysis(collective(axes=("shard",)), collective("sub", axes=("shard:(2)4",)))
    found = diff(base, replace(head, mesh={"shard": 8}))
    assert (found.changes, dict(found.renamed)) == ((), {"fsdp": "shard"})
    assert "fsdp is now called shard" in verdict(found).text
    assert {flow.axes for row in found.rows for flow in row.base} == {("shard",), ("shard:(2)4",)}


def test_other_axes_in_the_place_of_the_old_ones_are_no_renaming() -> None:
    """One device grid of 8, but nothing of what was sent over it is left."""
    head = replace(
        analysis(collective(kind="all-reduce", axes=("tensor",), payload_bytes=9)), mesh={"tensor": 8}
    )
    found = diff(analysis(), head)
    assert dict(found.renamed) == {}
    assert {flow.axes for row in found.rows for flow in (*row.base, *row.head)} == {("fsdp",), ("tensor",)}


def test_a_loop_that_cannot_be_bounded_stays_unknown() -> None:
    known, unknown = made_of([collective(executions=(1, 1))]), made_of([collective(executions=(1, None))])
    found = diff(known, unknown)
    assert changes(found) == [("grew", ())]
    (row,) = diff_json(found)["changes"]
    assert row["head"]["wire_bytes"] == [7 * 10**9, None]
    assert diff(unknown, unknown).changes == ()


def test_a_conditional_counts_once_in_the_totals_and_each_branch_in_rows() -> None:
    """Two branches of 7 GB: a step sends 7, the rows sum to 14, and the page says so."""
    row = collective(executions=(0, 1))
    both = [row, replace(row, name="other", layer="head")]
    one_of_them = (Fraction(7 * 10**9), Fraction(7 * 10**9))
    made = made_of(both)
    made = replace(made, totals=replace(made.totals, wire_bytes=one_of_them))
    found = diff(made, made)
    assert found.after is not None
    assert found.after.wire_bytes == one_of_them
    assert total(row.after for row in found.rows).wire_bytes == (0, 14 * 10**9)


def test_the_verdict_says_what_became_worse_and_by_how_much() -> None:
    base = report("a", None, memory=memory(40), hardware_flops=100)
    head = report("a", None, memory=memory(90), hardware_flops=100)
    found = verdict(diff(base, head))
    assert found.what == "worse"
    assert found.text == "Worse: memory +50 GB (+125 %); no longer fits in memory"
    back = verdict(diff(head, base))
    assert (back.what, back.text) == ("better", "Better: memory −50 GB (−56 %); fits in memory now")


def test_better_in_one_and_worse_in_another_is_mixed() -> None:
    found = diff(report(memory=memory(50), hardware_flops=10), report(memory=memory(40), hardware_flops=20))
    assert verdict(found).text == "Mixed: memory −10 GB (−20 %); FLOPs +10 FLOP (+100 %)"


def test_a_plan_that_cannot_be_is_an_answer() -> None:
    found = diff(report(), infeasible_report("8 sequences over 6 devices"))
    assert verdict(found).text == "Worse: the head cannot run: infeasible: 8 sequences over 6 devices"
    assert found.rows == ()


def test_a_case_that_failed_is_a_mistake() -> None:
    with pytest.raises(UserError, match="no compiler"):
        diff(report(), report(analysis=None, failure="no compiler"))


def test_a_changed_compiler_and_another_batch_are_said() -> None:
    def by(version: str) -> Analysis:
        return replace(analysis(), made_by={"versions": {"jax": version, "jaxlib": "0.12"}, "flags": "stock"})

    assert diff(by("0.10"), by("0.12")).notes == ("versions changed too: jax 0.10 → 0.12",)
    twice = report().case.model_copy(update={"batch": 16})
    (note,) = diff(report(), report(case=twice)).notes
    assert note.startswith("batch: 8 in the base, 16 in the head")


def test_the_python_interface_reads_documents_and_says_what_is_none() -> None:
    document = analysis().to_json()
    assert shardlab.diff(document, analysis()).changes == ()
    with pytest.raises(UserError, match="its schema is 'x/1'"):
        shardlab.diff({"schema": "x/1"}, document)
    with pytest.raises(UserError, match="not an analysis"):
        shardlab.diff({"schema": "shardlab.analysis/1"}, document)
