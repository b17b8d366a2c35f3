"""What users import in their own tests: what a function may communicate, as assertions.

    from shardlab.testing import assert_collectives

    def test_the_forward_pass_gathers_each_weight_once():
        assert_collectives(forward, x, weights, mesh=mesh, expect={("all-gather", "fsdp"): 2})

Each takes a function with its arguments (arrays or `jax.ShapeDtypeStruct` with shardings), which is compiled
for the devices of the mesh and not run; or, alone, a saved Program, an Analysis, or what a `make_step`
returned (`shardlab.StepProgram`), whose programs count as often as a step runs them. On
`--xla_force_host_platform_device_count` devices the bytes are those of the emulated compiler: bf16 in f32,
gradients all-reduced. A failure is an AssertionError that lists the collectives with their source lines.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from shardlab.analysis import Analysis, ByteRange, CollectiveRow, Range, axes_key
from shardlab.program import Program, write_atomically
from shardlab.review.baseline import against, baseline_of, read_baseline, write_text
from shardlab.review.flows import amounts_of
from shardlab.review.records import NOTHING, Side, plus
from shardlab.review.sides import side_of
from shardlab.spec.step import StepProgram, step_programs
from shardlab.units import format_bytes, parse_bytes

UPDATE = "SHARDLAB_UPDATE_BASELINES"
_LISTED = 20  # collectives in a message

__all__ = [
    "assert_collectives",
    "assert_matches_baseline",
    "assert_no_collectives_over",
    "assert_wire_bytes_below",
]


def assert_collectives(
    fn: Any, *args: Any, mesh: Any = None, expect: Mapping[tuple[str, str], int | Range]
) -> None:
    """The program runs these collectives and no others.

    expect: (kind, axes) -> executions per step, or (min, max) of them; axes joined by `+` in mesh order
    (`data+model`). Raises AssertionError with every difference.
    """
    __tracebackhide__ = True
    found: dict[tuple[str, str], list[CollectiveRow]] = {}
    for row in _moving(_side(fn, args, mesh)):
        found.setdefault((row.kind, axes_key(row.axes)), []).append(row)
    wrong = []
    for key in sorted({*found, *expect}):
        rows, wanted = found.get(key, []), _range(expect.get(key, 0))
        runs = _executions(rows)
        if runs != wanted:
            wrong.append(f"{key[0]} over {key[1]}: expected {_times(wanted)}, found {_times(runs)}")
            wrong += _listed(rows)
    if wrong:
        raise AssertionError("\n".join(["the program's collectives are not those expected", *wrong]))


def assert_wire_bytes_below(
    fn: Any, *args: Any, mesh: Any = None, limit: int | str, over: str | None = None
) -> None:
    """One device sends less than `limit` per step: bytes, or text such as "20 MB".

    over: only what goes over this set of axes, joined by `+` in mesh order. An unknown trip count is not
    below anything. Raises AssertionError with the collectives that send most.
    """
    __tracebackhide__ = True
    most = parse_bytes(limit) if isinstance(limit, str) else limit
    side = _side(fn, args, mesh)
    assert side.analysis is not None
    rows = [row for row in _moving(side) if over is None or axes_key(row.axes) == over]
    sent = side.analysis.totals.wire_bytes
    if over is not None:
        sent = side.analysis.totals.by_axes.get(over, {}).get("wire_bytes", NOTHING)
    if sent[1] is None or sent[1] >= most:
        where = "" if over is None else f" over {over}"
        least = "at least " if sent[1] is None else ""
        told = f"{least}{float(_largest(sent)):,.0f} B"
        heading = f"a device sends {told} per step{where}, not less than {most:,} B"
        raise AssertionError("\n".join([heading, *_listed(rows)]))


def assert_no_collectives_over(axis: str, fn: Any, *args: Any, mesh: Any = None) -> None:
    """Nothing goes over this mesh axis, alone or with others, whole or a part of it.

    A collective whose axes are not known counts as one that does. Raises AssertionError with the collectives,
    ValueError for an axis that the mesh does not have.
    """
    __tracebackhide__ = True
    side = _side(fn, args, mesh)
    assert side.analysis is not None
    known = side.analysis.mesh
    if known is not None and axis not in known:
        raise ValueError(f"the mesh has no axis {axis!r}, only {', '.join(known)}")
    rows = [
        row
        for row in _moving(side)
        if row.axes is None or axis in (name.partition(":")[0] for name in row.axes)
    ]
    if rows:
        raise AssertionError("\n".join([f"collectives run over {axis}", *_listed(rows)]))


def assert_matches_baseline(
    path: str | Path, fn: Any, *args: Any, mesh: Any = None, tolerance_percent: float = 1
) -> None:
    """Bytes per axis, memory and FLOPs are those of the baseline file, within the tolerance.

    With SHARDLAB_UPDATE_BASELINES=1 in the environment the file is written instead. What became better by
    more than the tolerance fails too, so that the file stays true. Raises AssertionError with every figure
    that is off or when the file is missing, UserError when it is no baseline.
    """
    __tracebackhide__ = True
    side, file = _side(fn, args, mesh), Path(path)
    now = baseline_of(side)
    if os.environ.get(UPDATE) == "1":
        write_atomically(file, write_text(now).encode())
        return
    if not file.exists():
        raise AssertionError(f"{file}: there is no baseline; run once with {UPDATE}=1 to write it")
    lines = against(read_baseline(file), now, Fraction(tolerance_percent) / 100)
    wrong = [
        f"{line.name}: {line.before} in the baseline, {line.after} now"
        for line in lines
        if line.outcome != "same"
    ]
    if wrong:
        heading = f"{file}: not what the program does now; {UPDATE}=1 writes it again"
        raise AssertionError("\n".join([heading, *wrong, *_listed(_moving(side))]))


def _side(fn: Any, args: tuple[Any, ...], mesh: Any) -> Side:
    """What is known of a function, Program or Analysis. Raises AssertionError when it does not fit."""
    if isinstance(fn, Analysis | Program | StepProgram | Mapping | tuple | list):
        if args:
            raise TypeError(f"a {type(fn).__name__} takes no arguments")
        program: Any = fn if isinstance(fn, Analysis | Program) else _step(fn, mesh)
    else:
        from shardlab.compile import compile_step  # jax is loaded here, not before

        program = compile_step(fn, *args, mesh=mesh)
    if isinstance(program, Program):
        for one in program.programs:
            if one.refusal is not None:
                raise AssertionError(f"the compiler refused it: {one.refusal.text}")
    return side_of(program)


def _step(returned: Any, mesh: Any) -> Program:
    """What a `make_step` returned, compiled."""
    from shardlab.compile import compile_step

    first, *others = (
        replace(compile_step(one.fn, *one.args, mesh=mesh, name=one.name), runs_per_step=one.runs_per_step)
        for one in step_programs(returned, "make_step")
    )
    return replace(first, then=tuple(others))


def _moving(side: Side) -> list[CollectiveRow]:
    """The collectives that send something, those that send most first."""
    assert side.analysis is not None
    rows = [row for row in side.analysis.collectives if row.wire_bytes]
    return sorted(rows, key=_sent, reverse=True)


def _sent(row: CollectiveRow) -> tuple[bool, Fraction]:
    sent = amounts_of(row).wire_bytes
    return sent[1] is None, _largest(sent)


def _largest(amount: ByteRange) -> Fraction:
    """The upper end; the lower one where there is none."""
    return amount[0] if amount[1] is None else amount[1]


def _executions(rows: Iterable[CollectiveRow]) -> Range:
    together = NOTHING
    for row in rows:
        low, high = row.executions
        together = plus(together, (Fraction(low), None if high is None else Fraction(high)))
    return int(together[0]), None if together[1] is None else int(together[1])


def _range(expected: int | Range) -> Range:
    return (expected, expected) if isinstance(expected, int) else expected


def _times(runs: Range) -> str:
    low, high = runs
    return str(low) if low == high else f"{low} at least" if high is None else f"{low} to {high}"


def _listed(rows: list[CollectiveRow]) -> list[str]:
    lines = [
        f"  {row.name} over {axes_key(row.axes)}, {_times(row.executions)} times"
        f" {format_bytes(row.wire_bytes)} ({'+'.join(row.dtypes)}), {row.phase}"
        f"{' in ' + row.layer if row.layer else ''}, {row.source or 'no source line'}"
        for row in rows[:_LISTED]
    ]
    return [*lines, f"  and {len(rows) - _LISTED} more"] if len(rows) > _LISTED else lines
