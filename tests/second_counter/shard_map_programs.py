"""shard_map programs whose traffic is known in closed form, as trees that are read twice.

`wire_bytes` reads a tree by arithmetic; run as a script, this module reads it as JAX, compiles it, and writes
the HLO text and the serialized module. Arrays are f32, so that XLA:CPU does not widen them; each collective
depends on the one before through a tanh and has its own size, so that XLA cannot merge or move it.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardlab.compile.target import Target

LOCAL_ROWS, COLUMNS, F32_BYTES = 64, 16, 4
NUM_DEVICES = 8
CUBE = {"a": 2, "b": 2, "c": 2}
FLAT = {"x": 2, "y": 4}

Range = tuple[Fraction, Fraction | None]
Cells = dict[tuple[str, str], Range]


@dataclass(frozen=True)
class Collective:
    """One collective over mesh axes on an f32[rows, 16] per device. index_groups: within one axis."""

    kind: str
    axes: tuple[str, ...]
    rows: int
    index_groups: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True)
class Repeat:
    """A loop. how: scan, `(start, stop)` of a fori_loop, or a name in WHILE_LOOPS. No trips: an input."""

    trips: int | None
    nodes: tuple[Node, ...]
    how: str | tuple[int, int] = "scan"


@dataclass(frozen=True)
class Either:
    """A conditional whose predicate is a program input."""

    if_true: tuple[Node, ...]
    if_false: tuple[Node, ...]


Node = Collective | Repeat | Either


@dataclass(frozen=True)
class Program:
    """mesh: axis -> size."""

    name: str
    mesh: dict[str, int]
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class WhileLoop:
    """A counter from `start` while `test`, then `step`; `trips` counted by hand."""

    start: int
    test: Callable[[Any], Any]
    step: Callable[[Any], Any]
    trips: int


WHILE_LOOPS = {
    "from 2 below 20 by 3": WhileLoop(2, lambda i: i < 20, lambda i: i + 3, 6),  # 2 5 8 11 14 17
    "doubling below 100": WhileLoop(1, lambda i: i < 100, lambda i: i * 2, 7),  # 1 2 4 … 64
    "down to 1": WhileLoop(9, lambda i: i >= 1, lambda i: i - 1, 9),
    "up to and with 9": WhileLoop(0, lambda i: i <= 9, lambda i: i + 1, 10),
    "until 27 by 3": WhileLoop(0, lambda i: i != 27, lambda i: i + 3, 9),
}

SUBSETS = [axes for n in (1, 2, 3) for axes in itertools.combinations(CUBE, n)]
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def every_kind(axes: tuple[str, ...]) -> tuple[Node, ...]:
    return tuple(Collective(kind, axes, 8 * (i + 1)) for i, kind in enumerate(KINDS))


def programs() -> list[Program]:
    """All programs."""
    over = [Program("every_kind_over_" + "_".join(axes), CUBE, every_kind(axes)) for axes in SUBSETS]
    inner = (Collective("all-gather", ("b", "c"), 16), Collective("collective-permute", ("c",), 24))
    nested = (
        Repeat(
            3,
            (
                Collective("all-reduce", ("a",), 8),
                Repeat(5, inner),
                Repeat(4, (Repeat(7, (Collective("all-to-all", ("a", "b"), 32),)),)),
                Collective("reduce-scatter", ("a", "c"), 40),
            ),
        ),
        Collective("all-reduce", ("a", "b", "c"), 48),
    )
    branches = Either(
        (Collective("all-reduce", ("a",), 8), Collective("all-gather", ("b",), 16)),
        (Collective("all-reduce", ("a",), 64),),
    )
    loops = tuple(
        Repeat(loop.trips, (Collective("all-reduce", ("b",), 8 * (i + 1)),), how)
        for i, (how, loop) in enumerate(WHILE_LOOPS.items())
    )
    unknown = (Repeat(None, (Collective("all-gather", ("a",), 8),)), *every_kind(("b",)))
    return [
        *over,
        Program("nested_scans", CUBE, nested),
        Program("fori_from_3_to_20", CUBE, (Repeat(17, every_kind(("a", "c")), (3, 20)),)),
        Program("while_loops", CUBE, loops),
        Program("conditional", CUBE, (branches, Collective("all-reduce", ("c",), 24))),
        Program("conditional_in_scan", CUBE, (Repeat(6, (branches,)),)),
        Program("unknown_trips", CUBE, unknown),
        Program("half_axis_neighbours", FLAT, (Collective("all-gather", ("y",), 8, ((0, 1), (2, 3))),)),
        Program("half_axis_strided", FLAT, (Collective("all-gather", ("y",), 8, ((0, 2), (1, 3))),)),
    ]


def closed_form(node: Collective, mesh: dict[str, int]) -> Fraction:
    """Bytes that each device sends: textbook volumes of bandwidth-optimal algorithms."""
    n = 1
    for axis in node.axes:
        n *= mesh[axis]
    if node.index_groups:
        n = len(node.index_groups[0])
    local = node.rows * COLUMNS * F32_BYTES
    return {
        "all-reduce": Fraction(2 * (n - 1) * local, n),
        "all-gather": Fraction((n - 1) * local),
        "reduce-scatter": Fraction((n - 1) * local, n),
        "all-to-all": Fraction((n - 1) * local, n),
        "collective-permute": Fraction(local),
    }[node.kind]


def axes_key(node: Collective) -> str:
    """`a+c`; the minor half of y is y:(2)2, the major half y:(1)2."""
    if node.index_groups:
        return f"y:({2 if node.index_groups[0][1] == 1 else 1})2"
    return "+".join(node.axes)


def wire_bytes(nodes: tuple[Node, ...], mesh: dict[str, int]) -> Cells:
    """What each device sends, (min, max) bytes: ("axes", "a+c"), ("kind", "all-reduce"), ("total", "")."""
    total: Cells = {}
    for node in nodes:
        if isinstance(node, Collective):
            sent = closed_form(node, mesh)
            keys = (("axes", axes_key(node)), ("kind", node.kind), ("total", ""))
            cells: Cells = dict.fromkeys(keys, (sent, sent))
        elif isinstance(node, Repeat):
            inner = wire_bytes(node.nodes, mesh)
            cells = {k: repeated(bounds, node.trips) for k, bounds in inner.items()}
        else:
            one, other = wire_bytes(node.if_true, mesh), wire_bytes(node.if_false, mesh)
            cells = {k: either(one.get(k), other.get(k)) for k in {**one, **other}}
        for key, bounds in cells.items():
            total[key] = plus(total.get(key), bounds)
    return total


def repeated(bounds: Range, trips: int | None) -> Range:
    low, high = bounds
    if trips is None:
        return Fraction(0), None
    return low * trips, None if high is None else high * trips


def either(a: Range | None, b: Range | None) -> Range:
    """One of two; no program here has an unknown loop inside a branch."""
    values = [Fraction(0) if r is None else r[i] for r in (a, b) for i in (0, 1)]
    known = [v for v in values if v is not None]
    return min(known), max(known)


def plus(a: Range | None, b: Range) -> Range:
    if a is None:
        return b
    return a[0] + b[0], None if a[1] is None or b[1] is None else a[1] + b[1]


def run_collective(node: Collective, mesh: dict[str, int], x_RxC: Any) -> Any:
    """The collective on the first rows of x, its result folded back into x."""
    import jax
    import jax.numpy as jnp

    size = functools.reduce(lambda n, axis: n * mesh[axis], node.axes, 1)
    data = jnp.tanh(x_RxC[: node.rows])
    ring = [(i, (i + 1) % size) for i in range(size)]
    groups = {"axis_index_groups": node.index_groups} if node.index_groups else {}
    result = {
        "all-reduce": lambda: jax.lax.psum(data, node.axes),
        "all-gather": lambda: jax.lax.all_gather(data, node.axes, **groups),
        "reduce-scatter": lambda: jax.lax.psum_scatter(data, node.axes, tiled=True),
        "all-to-all": lambda: jax.lax.all_to_all(data, node.axes, 0, 0, tiled=True),
        "collective-permute": lambda: jax.lax.ppermute(data, node.axes, ring),
    }[node.kind]()
    return x_RxC * 0.5 + jnp.mean(jnp.tanh(result))


def run_nodes(nodes: tuple[Node, ...], mesh: dict[str, int], flag: Any, bound: Any, x_RxC: Any) -> Any:
    """A tree as JAX operations on one device's x."""
    import jax

    for node in nodes:
        if isinstance(node, Collective):
            x_RxC = run_collective(node, mesh, x_RxC)
        elif isinstance(node, Repeat):
            x_RxC = run_repeat(
                node, functools.partial(run_nodes, node.nodes, mesh, flag, bound), bound, x_RxC
            )
        else:
            sides = (node.if_true, node.if_false)
            x_RxC = jax.lax.cond(
                flag, *(functools.partial(run_nodes, side, mesh, flag, bound) for side in sides), x_RxC
            )
    return x_RxC


def run_repeat(node: Repeat, body: Callable[[Any], Any], bound: Any, x: Any) -> Any:
    """A loop as JAX writes it."""
    import jax

    if isinstance(node.how, tuple):
        return jax.lax.fori_loop(*node.how, lambda _, x: body(x), x)
    if node.how in WHILE_LOOPS:
        loop = WHILE_LOOPS[node.how]
        state = (loop.start, x)
        return jax.lax.while_loop(lambda s: loop.test(s[0]), lambda s: (loop.step(s[0]), body(s[1])), state)[
            1
        ]
    if node.trips is None:
        return jax.lax.fori_loop(0, bound, lambda _, x: body(x), x)
    return jax.lax.scan(lambda x, _: (body(x), None), x, length=node.trips)[0]


def compile_program(program: Program, target: Target) -> Any:
    """jax.stages.Compiled for the target's eight devices."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(target.devices).reshape(tuple(program.mesh.values())), tuple(program.mesh))
    rows, replicated = PartitionSpec(tuple(program.mesh)), PartitionSpec()
    function = jax.shard_map(
        lambda x, flag, bound: run_nodes(program.nodes, program.mesh, flag, bound, x),
        mesh=mesh,
        in_specs=(rows, replicated, replicated),
        out_specs=rows,
        check_vma=False,
    )
    arguments = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in (
            ((NUM_DEVICES * LOCAL_ROWS, COLUMNS), jnp.float32, rows),
            ((), jnp.bool_, replicated),
            ((), jnp.int32, replicated),
        )
    )
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(target.platform,)).compile()


def main(machine: str, folder: Path) -> None:
    """Compile all programs for a machine of eight devices into NAME.hlo and NAME.pb."""
    from shardlab.compile.target import open_target
    from shardlab.hardware.catalog import load_machine

    target = open_target(load_machine(machine))
    for program in programs():
        compiled = compile_program(program, target)
        (folder / f"{program.name}.hlo").write_text(compiled.as_text())
        module = compiled.runtime_executable().hlo_modules()[0]
        (folder / f"{program.name}.pb").write_bytes(module.as_serialized_hlo_module_proto())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
