"""Large arguments that are left whole: real compiles for eight emulated devices, bytes by hand."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardlab.analysis import attribute
from shardlab.audit import Finding, audit_parts, finding_json
from shardlab.compile import compile_step
from shardlab.program import Argument, Program, from_bytes, to_bytes

Spec = tuple[str | tuple[str, ...] | None, ...]
MIB = 2**20
SPLIT: dict[str, Spec] = {"up": ("x",), "down": (None, "x")}  # f32[1024,1024]: 4 MiB, over 4 devices


def compiled(table: Spec, rows: int = 1024, **others: Spec) -> Program:
    """f32[rows,512] in this sharding, beside f32[1024,1024] in others, all doubled; on a 4 x 2 mesh."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))

    def array(spec: Spec, *shape: int) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    params = {name: array(spec, 1024, 1024) for name, spec in others.items()}
    params["table"] = array(table, rows, 512)
    doubled = jax.jit(lambda params: jax.tree.map(lambda one: one * 2, params))
    return compile_step(doubled, params, mesh=mesh)


def audited(program: Program) -> tuple[Finding, ...]:
    return audit_parts(tuple(attribute(program)))


def test_an_array_that_is_whole_where_the_others_are_split() -> None:
    """2 MiB on each of 4 devices of x; split over x they would hold 1/2 MiB."""
    (finding,) = audited(compiled((), **SPLIT))
    assert (finding.rule, finding.axes, finding.wire_bytes) == ("replicated", ("x",), None)
    assert finding.memory_bytes == 2 * MIB * 3 // 4
    assert finding.evidence.startswith(
        "params['table'], 2.10 MB per device, is the same on all 4 devices of x"
    )
    assert finding_json(finding)["memory_bytes"] == 1_572_864
    assert finding_json(finding)["wire_bytes"] is None


@pytest.mark.parametrize(
    ("table", "rows", "others"),
    [
        pytest.param(("x",), 1024, SPLIT, id="split too"),
        pytest.param((), 511, SPLIT, id="less than 1 MiB"),
        pytest.param((), 1024, {"up": ("y",), "down": (), "side": ()}, id="as most others"),
        pytest.param((), 1024, {"up": (), "down": ()}, id="as all others"),
    ],
)
def test_nothing_found(table: Spec, rows: int, others: dict[str, Spec]) -> None:
    assert audited(compiled(table, rows, **others)) == ()


def test_half_of_the_bytes_of_the_others_are_enough() -> None:
    """up and down are 8 MiB: half of the table's others, more of back's and side's, which are 8 MiB too."""
    (finding,) = audited(compiled((), up=("y",), down=("y",), side=(), back=()))
    assert finding.axes == ("y",)
    assert "and 2 more (10.5 MB in all)" in finding.evidence
    assert finding.memory_bytes == (4 + 4 + 2) * MIB // 2


def test_arrays_left_whole_over_the_same_axes_are_one_finding() -> None:
    found = audited(compiled((), **SPLIT, left=("x",), right=(), more=("x",)))
    (finding,) = found
    assert "params['right'], 4.19 MB per device, and 1 more (6.29 MB in all) are the same" in finding.evidence
    assert finding.memory_bytes == 6 * MIB * 3 // 4


def test_a_dump_says_nothing_of_how_arguments_are_split() -> None:
    program = compiled((), **SPLIT)
    assert audited(replace(program, arguments=None)) == ()
    assert audit_parts(tuple(attribute(program.hlo_text, axes={"x": 4, "y": 2}))) == ()


def test_a_program_keeps_its_arguments() -> None:
    program = compiled((("x", "y"),), up=(None, "y"))
    assert program.arguments == (
        Argument(
            path="arguments[0]['table']",
            dtype="float32",
            shape=(1024, 512),
            total_bytes=2 * MIB,
            split_over=("x", "y"),
            device_bytes=MIB // 4,
        ),
        Argument(
            path="arguments[0]['up']",
            dtype="float32",
            shape=(1024, 1024),
            total_bytes=4 * MIB,
            split_over=("y",),
            device_bytes=2 * MIB,
        ),
    )
    assert from_bytes(to_bytes(program)) == program


def test_arguments_without_a_mesh_are_not_known() -> None:
    assert compile_step(lambda x: x + 1, jax.ShapeDtypeStruct((4,), jnp.float32)).arguments is None


def test_an_argument_that_is_not_used_is_left_out_and_the_others_stay() -> None:
    placed = NamedSharding(Mesh(np.array(jax.devices()[:8]), ("x",)), PartitionSpec("x"))
    used, unused = (jax.ShapeDtypeStruct((8,), jnp.float32, sharding=placed) for _ in range(2))
    program = compile_step(lambda a, b: a + 1, used, unused)
    assert program.arguments is not None
    assert [argument.path for argument in program.arguments] == ["arguments[0]"]
