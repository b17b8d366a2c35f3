"""The text of a program with conditionals keeps the integer tables that choose its branches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardlab.attribute.arrays import constant_table
from shardlab.attribute.nodes import Table
from shardlab.compile.tables import text_of, with_tables
from shardlab.hlo.proto import parse_proto
from shardlab.hlo.reader import parse

ELIDED = """ENTRY %main (i: s32[]) -> f32[] {
  %t = s32[12]{0} constant({...}), metadata={op_name="t(1)"}
  %f = f32[12]{0} constant({...})
  %p = pred[2,6]{1,0:T(8,128)} constant({...})
  ROOT %c = f32[] conditional(%t, %x)
}
"""
NUMBERS = "{" + ", ".join(map(str, range(12))) + "}"
TRUTHS = "{ { 0, 1, 0, 1, 0, 1 }, { 1, 1, 1, 0, 0, 0 } }"
WHOLE = ELIDED.replace("s32[12]{0} constant({...})", f"s32[12]{{0}} constant({NUMBERS})")
WHOLE = WHOLE.replace("(8,128)} constant({...})", f"(8,128)}} constant({TRUTHS})")


def test_integers_are_put_back_and_the_rest_is_as_it_was() -> None:
    everything = WHOLE.replace("f32[12]{0} constant({...})", "f32[12]{0} constant({0, 0.5, 1e+30, nan})")
    assert with_tables(ELIDED, everything) == WHOLE


@pytest.mark.parametrize(
    "other", [WHOLE + "\n", WHOLE.replace("%t =", "%u =").replace("%p =", "%q =")], ids=["longer", "renamed"]
)
def test_another_text_changes_nothing(other: str) -> None:
    assert with_tables(ELIDED, other) == ELIDED


def compiled(entries: int, *, branches: bool = True) -> jax.stages.Compiled:
    """A function that reads one of so many numbers and, if `branches`, chooses by it."""
    table = jnp.asarray(np.arange(entries, dtype=np.int32) % 2)

    def function(i: jax.Array, x: jax.Array) -> jax.Array:
        index = table[i]
        return jax.lax.cond(index == 1, jnp.sin, jnp.cos, x) if branches else x * index

    return jax.jit(function).lower(0, np.float32(0)).compile()


def test_a_compiled_table_is_in_the_text() -> None:
    program = compiled(12)
    assert "constant({...})" in program.as_text()
    numbers = "{" + ", ".join(str(i % 2) for i in range(12)) + "}"
    assert text_of(program) == program.as_text().replace("{...}", numbers)


@pytest.mark.parametrize(
    ("entries", "branches"), [(12, False), (1_000_001, True)], ids=["nothing_to_choose", "too_large"]
)
def test_other_programs_keep_their_text(entries: int, branches: bool) -> None:
    program = compiled(entries, branches=branches)
    assert "constant({...})" in program.as_text()
    assert text_of(program) == program.as_text()


DTYPES = (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32)


def test_a_proto_holds_the_tables_that_the_text_holds() -> None:
    """Two rows of three, entries negative where the type allows it: the same by both readers, as numpy has
    them.
    """
    numbers = np.arange(24).reshape(2, 3, 4) * 37 - 60
    tables = [numbers % 3 == 0, *(numbers.astype(dtype) for dtype in DTYPES)]

    def function(i: jax.Array, x: jax.Array) -> jax.Array:
        read = [jnp.asarray(table)[i, i, i].astype(jnp.int32) for table in tables]
        return jax.lax.switch(sum(read), [jnp.sin, jnp.cos, jnp.tan], x)

    program = jax.jit(function).lower(0, np.float32(0)).compile()
    (printed,) = parse(text_of(program))
    proto = program.runtime_executable().hlo_modules()[0].as_serialized_hlo_module_proto()
    (serialised,) = parse_proto(proto)
    wanted = sorted(tuple(int(entry) for entry in table.flat) for table in tables)
    for module in (printed, serialised):
        constants = [
            instruction
            for computation in module.computations.values()
            for instruction in computation.instructions.values()
            if instruction.opcode == "constant" and instruction.shape.dims == (2, 3, 4)
        ]
        found = [constant_table(instruction) for instruction in constants]
        assert all(isinstance(table, Table) and table.dims == (2, 3, 4) for table in found)
        assert sorted(table.values for table in found if isinstance(table, Table)) == wanted
