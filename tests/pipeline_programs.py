"""Programs whose conditionals are chosen by tables of tick and stage, as a pipeline's schedule is written.

Run as a script: `python pipeline_programs.py MACHINE FOLDER` compiles all of them for eight devices into
FOLDER/NAME.hlo, as shardlab prints them, and NAME.pb. The tables and what they mean need no jax.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

STAGES, DATA, ROWS, COLUMNS = 4, 2, 16, 64
MESH = {"stage": STAGES, "data": DATA}
ARRAY_BYTES = 4 * ROWS * COLUMNS  # what one device holds of x
IDLE, PLAIN, REDUCING = 0, 1, 2
# Rows are ticks, columns stages: warm-up and drain as in 1F1B, uneven on purpose. Stage 0: 3 plain, 3
# reducing; stage 1: 4 and 2; stage 2: 2 and 4; stage 3: 1 and 4.
TABLE = (
    (1, 0, 0, 0),
    (2, 1, 0, 0),
    (1, 1, 2, 0),
    (0, 2, 1, 2),
    (2, 1, 2, 2),
    (1, 2, 1, 2),
    (2, 1, 2, 1),
    (0, 0, 2, 2),
    (0, 0, 0, 0),
)
TICKS = len(TABLE)


def runs(branch: int, stage: int) -> int:
    """How many ticks a stage spends in a branch."""
    return sum(row[stage] == branch for row in TABLE)


def _branches(stage: Any) -> list[Callable[[Any], Any]]:
    """Idle; plain, where stage 0 alone sums half of its rows over data; and one that sums all of them."""
    import jax
    import jax.numpy as jnp

    def half(x_RxC: Any) -> Any:
        top = jax.lax.psum(jnp.tanh(x_RxC[: ROWS // 2]), "data")
        return jnp.concatenate([top, x_RxC[ROWS // 2 :]])

    def plain(x_RxC: Any) -> Any:
        return jax.lax.cond(stage == 0, half, jnp.sin, x_RxC)

    def reducing(x_RxC: Any) -> Any:
        return jnp.sin(x_RxC) + jax.lax.psum(jnp.tanh(x_RxC), "data")

    return [lambda x_RxC: x_RxC, plain, reducing]


def _tick(x_RxC: Any, index: Any, stage: Any) -> Any:
    import jax

    y_RxC = jax.lax.switch(index, _branches(stage), x_RxC)
    return jax.lax.ppermute(y_RxC, "stage", [(i, (i + 1) % STAGES) for i in range(STAGES)])


def scanned(x_RxC: Any) -> Any:
    """The table's rows are the scan's input."""
    import jax
    import numpy as np

    stage = jax.lax.axis_index("stage")
    rows = jax.numpy.asarray(np.array(TABLE, np.int32))
    return jax.lax.scan(lambda x, row: (_tick(x, row[stage], stage), None), x_RxC, rows)[0]


def flat(x_RxC: Any) -> Any:
    """The table is one row of bytes, read at tick * stages + stage."""
    import jax
    import numpy as np

    stage, table = jax.lax.axis_index("stage"), jax.numpy.asarray(np.array(TABLE, np.int8).reshape(-1))

    def body(tick: Any, x: Any) -> Any:
        index = jax.lax.dynamic_index_in_dim(table, tick * STAGES + stage, keepdims=False)
        return _tick(x, index.astype(np.int32), stage)

    return jax.lax.fori_loop(0, TICKS, body, x_RxC)


def twice(x_RxC: Any) -> Any:
    """The whole pipeline inside an outer loop of three trips."""
    import jax

    return jax.lax.fori_loop(0, 3, lambda _, x: scanned(x), x_RxC)


def once(x_RxC: Any) -> Any:
    """No loop: the stage alone chooses."""
    import jax

    stage = jax.lax.axis_index("stage")
    return _tick(x_RxC, jax.numpy.where(stage < 2, REDUCING, IDLE), stage)


def by_data(x_RxC: Any) -> Any:
    """The data choose: nobody can say beforehand."""
    import jax

    stage = jax.lax.axis_index("stage")

    def body(tick: Any, x: Any) -> Any:
        return _tick(x, jax.numpy.where(x[0, 0] > 0, REDUCING, tick % 2), stage)

    return jax.lax.fori_loop(0, TICKS, body, x_RxC)


PROGRAMS = {function.__name__: function for function in (scanned, flat, twice, once, by_data)}


def main(machine: str, folder: Path) -> None:
    """Compile all programs for a machine of eight devices."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from shardlab.compile.tables import text_of
    from shardlab.compile.target import open_target
    from shardlab.hardware.catalog import load_machine

    target = open_target(load_machine(machine))
    mesh = Mesh(np.array(target.devices).reshape(STAGES, DATA), tuple(MESH))
    spec = PartitionSpec(tuple(MESH))
    shape = (STAGES * DATA * ROWS, COLUMNS)
    argument = jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(mesh, spec))
    for name, function in PROGRAMS.items():
        mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        lowered = jax.jit(mapped).trace(argument).lower(lowering_platforms=(target.platform,))
        compiled = lowered.compile()
        (folder / f"{name}.hlo").write_text(text_of(compiled))
        module = compiled.runtime_executable().hlo_modules()[0]
        (folder / f"{name}.pb").write_bytes(module.as_serialized_hlo_module_proto())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
