"""What a reviewer would be told: real programs before and after one change, with what it adds and removes by
arithmetic; the comments are golden files."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import pytest
import test_jax_versions as versions
from emulated import PLANS, SMALL
from review.programs import (
    BATCH,
    F32_BYTES,
    HIDDEN,
    WEIGHT_BYTES,
    WIDTH,
    gradient_step,
    layers,
    mesh_of,
    optimizer_step,
    refactored_layers,
    rematerialized_layers,
    tensor_parallel,
)

from shardlab.analysis import analyze
from shardlab.case_report import unanswered
from shardlab.hardware.catalog import load_machine
from shardlab.report.diff import diff_comment
from shardlab.review import Diff, diff
from shardlab.review.sides import side_of
from shardlab.review.verdict import verdict
from shardlab.spec.case import Case

GOLDEN = Path(__file__).parents[1] / "golden" / "review"
ACTUAL = GOLDEN.parent / "actual" / "review"


def told(found: Diff) -> list[tuple[str, str, tuple[str, ...] | None, Fraction]]:
    """(change, kind, axes, bytes sent) of each change; bytes added, or removed below zero."""
    rows = []
    for row in found.changes:
        flow = (row.head or row.base)[0]
        change = row.after.wire_bytes[0] - row.before.wire_bytes[0]
        rows.append((row.what, flow.kind, flow.axes, change))
    return rows


def check_golden(name: str, text: str) -> None:
    """Compared without source lines, of which JAX 0.10 knows some that 0.12 does not; the file is of 0.12."""
    path = GOLDEN / name
    expected = path.read_text(encoding="utf-8") if path.exists() else ""
    if but_sources(expected) != but_sources(text):
        ACTUAL.mkdir(parents=True, exist_ok=True)
        (ACTUAL / name).write_text(text, encoding="utf-8")
    assert but_sources(expected) == but_sources(text), f"compare {ACTUAL / name} with {path}"


def but_sources(comment: str) -> str:
    return re.sub(r"\| (–|`programs\.py:\d+`) \|$", "| … |", comment, flags=re.MULTILINE)


def test_a_dropped_constraint_computes_everything_everywhere() -> None:
    """The gradient's all-reduce goes: 2 · 7/8 of the weight. So does the split of the batch over 8 devices,
    and each now does the two products of forward and backward on the whole batch."""
    found = diff(gradient_step(split_batch=True), gradient_step(split_batch=False))
    assert told(found) == [("removed", "all-reduce", ("data",), -Fraction(2 * 7, 8) * WEIGHT_BYTES)]
    products = 2 * 2 * BATCH * WIDTH * HIDDEN
    assert (found.base.flops, found.head.flops) == (products // 8, products)
    assert found.changes[0].base[0].sources[0].startswith("programs.py:")
    assert verdict(found).what == "mixed"
    check_golden("dropped_constraint.md", diff_comment(found))


def test_an_optimizer_state_left_replicated_costs_memory_and_saves_a_gather() -> None:
    """Seven eighths of the momentum come in and go out besides; the updated weight need not be gathered."""
    base, head = optimizer_step(split_state=True), optimizer_step(split_state=False)
    found = diff(base, head)
    assert told(found) == [("removed", "all-gather", ("data",), -Fraction(7, 8) * WEIGHT_BYTES)]
    assert base.memory is not None and head.memory is not None
    assert base.memory.argument_bytes is not None and head.memory.argument_bytes is not None
    assert head.memory.argument_bytes - base.memory.argument_bytes == WEIGHT_BYTES * 7 // 8
    assert found.base.memory_bytes is not None and found.head.memory_bytes is not None
    more = found.head.memory_bytes - found.base.memory_bytes
    # in and out; temporaries differ by less than a page
    assert abs(more - 2 * WEIGHT_BYTES * 7 // 8) < 4096
    check_golden("replicated_optimizer_state.md", diff_comment(found))


def test_a_new_layer_gathers_one_more_weight() -> None:
    found = diff(layers(2), layers(3))
    weight = WIDTH * WIDTH * F32_BYTES
    assert told(found) == [("added", "all-gather", ("fsdp",), Fraction(7, 8) * weight)]
    assert found.changes[0].head[0].layer == "layer2"
    assert (found.base.flops, found.head.flops) == tuple(n * 2 * BATCH // 8 * WIDTH * WIDTH for n in (2, 3))
    assert verdict(found).text.startswith("Worse: bytes sent +14.3 kB (+50 %); ")
    check_golden("new_layer.md", diff_comment(found))


def test_another_remat_policy_gathers_again_and_computes_again() -> None:
    """Each of two layers gathers its weight once more, in the backward pass, and does its product once more:
    to two products forward, two for the weights and one for the activations between them come two."""
    found = diff(rematerialized_layers(remat=False), rematerialized_layers(remat=True))
    gathered = 2 * Fraction(7, 8) * WIDTH * WIDTH * F32_BYTES
    assert {(what, kind, axes) for what, kind, axes, _ in told(found)} == {("added", "all-gather", ("fsdp",))}
    assert sum(change for *_, change in told(found)) == gathered
    assert {row.head[0].phase for row in found.changes} == {"backward"}
    product = 2 * BATCH // 8 * WIDTH * WIDTH
    assert (found.base.flops, found.head.flops) == (5 * product, 7 * product)
    check_golden("remat_policy.md", diff_comment(found))


def test_a_harmless_refactoring_shows_nothing() -> None:
    found = diff(layers(3), refactored_layers(3))
    assert found.changes == ()
    assert {row.what for row in found.rows} == {"regrouped"}  # not even the layers are called alike
    assert (
        verdict(found).text == "No change: 3 collectives send the same 43.0 kB"
    )  # 3 · 7/8 · 16,384 = 43,008
    check_golden("harmless_refactoring.md", diff_comment(found))


def test_a_mesh_axis_renamed_shows_nothing_but_the_name() -> None:
    found = diff(layers(2), layers(2, axis="shard"))
    assert found.changes == ()
    assert verdict(found).text.endswith("(mesh axis fsdp is now called shard)")
    check_golden("renamed_axis.md", diff_comment(found))


def test_twice_the_tensor_parallelism_sums_more_over_more_devices() -> None:
    """All-reduces of the activations that a device holds: half the batch over 4 devices, all of it over 8."""
    found = diff(tensor_parallel(data=2, tensor=4), tensor_parallel(data=1, tensor=8))
    activations = BATCH * WIDTH * F32_BYTES
    before, after = Fraction(2 * 3, 4) * activations / 2, Fraction(2 * 7, 8) * activations
    assert told(found) == [("grew", "all-reduce", ("tensor",), after - before)]
    assert [row.base[0].group_sizes for row in found.changes] == [(4,)]
    assert [row.head[0].group_sizes for row in found.changes] == [(8,)]
    check_golden("tensor_parallelism_doubled.md", diff_comment(found))


def test_fsdp_over_the_slow_tier_says_so() -> None:
    """Two hosts of four: gathers of a 4-way axis stay in NVLink, those of the 2-way axis cross hosts."""
    mesh, machine = mesh_of(hosts=2, chips=4), load_machine("h100:2x4")
    base, head = (side_of(layers(1, axis, mesh), axis, machine=machine) for axis in ("chips", "hosts"))
    found = diff(base, head)
    weight = WIDTH * WIDTH * F32_BYTES
    assert told(found) == [
        ("moved", "all-gather", ("hosts",), Fraction(1, 2) * weight - Fraction(3, 4) * weight)
    ]
    (row,) = found.changes
    assert row.moved == ("axes", "tier")
    assert dict(row.before.traffic) == {"nvlink": (Fraction(3, 4) * weight,) * 2}
    assert dict(row.after.traffic) == {"infiniband": (Fraction(1, 2) * weight,) * 2}
    check_golden("fsdp_over_the_slow_tier.md", diff_comment(found))


def test_a_batch_no_longer_divisible_is_an_answer() -> None:
    plan = PLANS["fsdp"]
    base = side_of(layers(1), "base")
    case = Case(plan=plan, model=SMALL, machine="cpu:8", batch=12, seq=16)
    found = diff(base, unanswered(case, infeasible="12 sequences over 8 devices; 8 or 16 would do"))
    assert verdict(found).text.startswith(
        "Worse: the head cannot run: infeasible: 12 sequences over 8 devices"
    )
    check_golden("batch_not_divisible.md", diff_comment(found))


@pytest.mark.parametrize("version", ["0.4.26", "0.10.0"])
def test_another_jax_shows_what_it_changed_and_nothing_else(version: str) -> None:
    """98 programs as two releases compile them. XLA:CPU of 0.4.26 gathers, permutes and exchanges bf16 as it
    is, that of 0.12 in f32, at twice the bytes; nothing else changed, though names and text did."""
    old, new = versions.modules(version), versions.modules("0.12.0")
    for name, text in old.items():
        found = diff(analyze(text, axes=versions.MESH), analyze(new[name], axes=versions.MESH))
        widened = name.startswith("bf16") and version == "0.4.26"
        kinds = {"all-gather", "collective-permute", "all-to-all"} if widened else set()
        assert {kind for _, kind, _, _ in told(found)} == kinds, name
        for row in found.changes:
            assert (row.what, row.moved) == ("moved", ("dtypes",))
            assert row.after.wire_bytes[0] == 2 * row.before.wire_bytes[0]
        if widened and name == "bf16__over_b":
            check_golden("another_jax.md", diff_comment(found))
