"""The assertions that users import: what passes, what fails, and what a failure tells."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from case_reports import analysis, collective
from jax.sharding import NamedSharding, PartitionSpec
from review.analyses import made_of
from review.programs import BATCH, F32_BYTES, HIDDEN, WIDTH, layers, mesh_of, tensor_parallel

from shardlab.errors import UserError
from shardlab.program import Program
from shardlab.testing import (
    UPDATE,
    assert_collectives,
    assert_matches_baseline,
    assert_no_collectives_over,
    assert_wire_bytes_below,
)

WEIGHT_BYTES = WIDTH * WIDTH * F32_BYTES


@cache
def two_layers() -> Program:
    return layers(2)


def test_a_function_is_compiled_for_the_mesh_and_not_run() -> None:
    mesh = mesh_of(fsdp=8)

    def forward(x_BxD: jax.Array, weight_DxF: jax.Array) -> jax.Array:
        return x_BxD @ jax.lax.with_sharding_constraint(weight_DxF, NamedSharding(mesh, PartitionSpec()))

    def abstract(*shape: int) -> jax.ShapeDtypeStruct:
        split = NamedSharding(mesh, PartitionSpec("fsdp"))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=split)

    given = (abstract(BATCH, WIDTH), abstract(WIDTH, HIDDEN))
    assert_collectives(forward, *given, mesh=mesh, expect={("all-gather", "fsdp"): 1})
    assert_collectives(jax.jit(forward), *given, expect={("all-gather", "fsdp"): (1, 1)})
    with pytest.raises(AssertionError, match="expected 2, found 1"):
        assert_collectives(forward, *given, mesh=mesh, expect={("all-gather", "fsdp"): 2})


def test_every_difference_is_told_with_the_collectives_and_their_lines() -> None:
    rows = [
        collective("gather.1", source="model.py:7", executions=(2, 2)),
        collective(
            "reduce.1", kind="all-reduce", axes=("data", "fsdp"), source="loss.py:3", executions=(0, None)
        ),
    ]
    with pytest.raises(AssertionError) as caught:
        assert_collectives(made_of(rows), expect={("all-gather", "fsdp"): 1, ("all-to-all", "fsdp"): 4})
    assert str(caught.value).splitlines() == [
        "the program's collectives are not those expected",
        "all-gather over fsdp: expected 1, found 2",
        "  gather.1 over fsdp, 2 times 7 GB (bf16), forward in layers/mlp/gate, model.py:7",
        "all-reduce over data+fsdp: expected 0, found 0 at least",
        "  reduce.1 over data+fsdp, 0 at least times 7 GB (bf16), forward in layers/mlp/gate, loss.py:3",
        "all-to-all over fsdp: expected 4, found 0",
    ]


def test_bytes_are_below_a_limit_in_total_or_over_an_axis() -> None:
    """Two gathers of 7/8 of 16 KiB: 28,672 bytes, which is not below itself."""
    sent = 2 * 7 * WEIGHT_BYTES // 8
    assert_wire_bytes_below(two_layers(), limit=sent + 1)
    assert_wire_bytes_below(two_layers(), limit="28.673 kB", over="fsdp")
    assert_wire_bytes_below(two_layers(), limit=1, over="tensor")
    for over in (None, "fsdp"):
        with pytest.raises(AssertionError, match=r"a device sends 28,672 B per step.* 28,672 B\n") as caught:
            assert_wire_bytes_below(two_layers(), limit=sent, over=over)
        assert str(caught.value).count("all-gather") == 2


def test_an_unknown_trip_count_is_below_nothing() -> None:
    with pytest.raises(AssertionError, match="at least 7,000,000,000 B"):
        assert_wire_bytes_below(made_of([collective(executions=(1, None))]), limit="1 TB")


def test_nothing_runs_over_an_axis() -> None:
    program = tensor_parallel(data=2, tensor=4)
    assert_no_collectives_over("data", program)
    with pytest.raises(
        AssertionError, match=r"collectives run over tensor\n  all-reduce over tensor.*programs\.py:"
    ):
        assert_no_collectives_over("tensor", program)
    with pytest.raises(ValueError, match="no axis 'model', only data, tensor"):
        assert_no_collectives_over("model", program)


@pytest.mark.parametrize(
    "axes", [("data", "fsdp"), ("fsdp:(2)4",), None], ids=["with-another", "a-part", "unknown"]
)
def test_a_part_of_an_axis_and_what_is_not_known_count(axes: tuple[str, ...] | None) -> None:
    with pytest.raises(AssertionError, match="collectives run over fsdp"):
        assert_no_collectives_over("fsdp", analysis(collective(axes=axes)))


def test_a_baseline_is_written_once_and_then_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "step.baseline.json"
    with pytest.raises(AssertionError, match=f"no baseline; run once with {UPDATE}=1"):
        assert_matches_baseline(path, two_layers())
    monkeypatch.setenv(UPDATE, "1")
    assert_matches_baseline(path, two_layers())
    monkeypatch.delenv(UPDATE)
    assert_matches_baseline(path, two_layers())
    sent = 2 * 7 * WEIGHT_BYTES // 8
    assert json.loads(path.read_text())["wire_bytes"] == {"total": sent, "fsdp": sent}
    # an eighth of the batch through both products
    assert json.loads(path.read_text())["compute"] == {"flops": 2 * 2 * BATCH // 8 * WIDTH * WIDTH}
    with pytest.raises(
        AssertionError, match=rf"wire_bytes.fsdp: {sent} in the baseline, {sent * 3 // 2} now"
    ):
        assert_matches_baseline(path, layers(3))
    with pytest.raises(AssertionError, match=rf"wire_bytes.total: {sent} in the baseline, {sent // 2} now"):
        assert_matches_baseline(path, layers(1))
    path.write_text("{}")
    with pytest.raises(UserError, match="not a baseline"):
        assert_matches_baseline(path, two_layers())


def test_importing_it_loads_no_jax() -> None:
    code = "import sys, shardlab.testing; print(sorted({'jax', 'flax', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_program_takes_no_arguments_and_a_refused_one_says_so() -> None:
    with pytest.raises(TypeError, match="a Program takes no arguments"):
        assert_collectives(two_layers(), 1, expect={})
    from shardlab.program import Refusal

    refused = replace(two_layers(), hlo_text="", refusal=Refusal(needed_bytes=2, limit_bytes=1, text="2 > 1"))
    with pytest.raises(AssertionError, match=re.escape("the compiler refused it: 2 > 1")):
        assert_collectives(refused, expect={})
