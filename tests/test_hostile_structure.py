"""Absurd programs, well-formed or nearly: depth, cycles and sizes give figures, or errors that point."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from command_line import run

import shardlab
from shardlab.analysis import Analysis
from shardlab.errors import ParseError

DEPTH = 3_000
ADD = "%add {\n  %a = f32[] parameter(0)\n  %b = f32[] parameter(1)\n  ROOT %s = f32[] add(%a, %b)\n}\n\n"
GROUPS = "channel_id=1, replica_groups=[1,8]<=[8], use_global_device_ids=true, to_apply=%add"
REDUCE = f"%ar = f32[8]{{0}} all-reduce(%p), {GROUPS}"
INDEX = '%i = s32[] custom-call(%p), custom_call_target="Sharding"'
GROUP = "replica_groups={{0,1}}, use_global_device_ids=true"
LOOP = "(s32[], f32[8])"


def entry(*lines: str, header: str = "num_partitions=8") -> str:
    body = "".join(f"  {line}\n" for line in ("%p = f32[8]{0} parameter(0)", *lines))
    return f"HloModule m, {header}\n\n{ADD}ENTRY %main {{\n{body}}}\n"


def with_computations(main: str, *computations: str) -> str:
    return main.replace("ENTRY ", "".join(computations) + "ENTRY ", 1)


def nested(call: Callable[[int], str]) -> str:
    """DEPTH computations, each calling the next by `call`; the last reduces."""
    parts = [f"%c{DEPTH} {{\n  %p = f32[8]{{0}} parameter(0)\n  ROOT {REDUCE}\n}}\n\n"]
    parts += [f"%c{i} {{\n  %p = f32[8]{{0}} parameter(0)\n{call(i + 1)}}}\n\n" for i in range(DEPTH)]
    return with_computations(entry("ROOT %r = f32[8]{0} call(%p), to_apply=%c0"), *parts)


def once(number: int) -> str:
    return f"  ROOT %r = f32[8]{{0}} fusion(%p), kind=kLoop, calls=%c{number}\n"


def branch(number: int) -> str:
    both = f"branch_computations={{%c{number}, %c{DEPTH}}}"
    return f"  {INDEX}\n  ROOT %r = f32[8]{{0}} conditional(%i, %p, %p), {both}\n"


def looped(number: int) -> str:
    config = 'backend_config={"known_trip_count":{"n":"2"}}'
    return f"  ROOT %r = f32[8]{{0}} while(%p), condition=%never, body=%c{number}, {config}\n"


NEVER = "%never {\n  %q = f32[8]{0} parameter(0)\n  ROOT %no = pred[] constant(false)\n}\n\n"


def analyze(text: str) -> Analysis:
    return shardlab.analyze(text, {"all": 8})


@pytest.mark.parametrize(
    ("call", "executions"),
    [(once, 1), (branch, None), (looped, 2**DEPTH)],
    ids=["fusions", "conditionals", "loops"],
)
def test_deep_nests_of_calls(call: Callable[[int], str], executions: int | None) -> None:
    """7/4 of 32 bytes per run; of nested conditionals one innermost branch runs, whichever way is taken."""
    found = analyze(with_computations(nested(call), NEVER))
    (row,) = found.collectives
    assert (row.payload_bytes, row.wire_bytes) == (32, 56)
    assert found.totals.wire_bytes == (56 * (executions or 1),) * 2
    assert row.executions == (executions, executions) if executions else row.executions[0] == 0


def test_a_counter_behind_a_long_chain_of_copies() -> None:
    copies = "".join(f"  %i{k + 1} = s32[] copy(%i{k})\n" for k in range(20_000))
    body = (
        f"%body {{\n  %s = {LOOP} parameter(0)\n  %i0 = s32[] get-tuple-element(%s), index=0\n"
        f"  %p = f32[8]{{0}} get-tuple-element(%s), index=1\n{copies}  %one = s32[] constant(1)\n"
        f"  %next = s32[] add(%i20000, %one)\n  {REDUCE}\n  ROOT %t = {LOOP} tuple(%next, %ar)\n}}\n\n"
    )
    condition = (
        f"%cond {{\n  %s = {LOOP} parameter(0)\n  %i = s32[] get-tuple-element(%s), index=0\n"
        "  %n = s32[] constant(7)\n  ROOT %go = pred[] compare(%i, %n), direction=LT\n}\n\n"
    )
    main = entry(
        "%zero = s32[] constant(0)",
        f"%t = {LOOP} tuple(%zero, %p)",
        f"ROOT %w = {LOOP} while(%t), condition=%cond, body=%body",
    )
    (row,) = analyze(with_computations(main, body, condition)).collectives
    assert row.executions == (7, 7)


def test_different_tuples_in_tuples_are_compared_without_recursion() -> None:
    """What the search for neighbours asks: whether the root hands on what the parameter took."""
    took, left = ("(" * DEPTH + f"f32[{size}]{{0}}" + ")" * DEPTH for size in (8, 16))
    text = f"""HloModule m, num_partitions=2

ENTRY %main (p: {took}, q: f32[8]) -> {left} {{
  %p = {took} parameter(0)
  %q = f32[8]{{0}} parameter(1)
  %g = f32[8]{{0}} get-tuple-element(%p), index=0
  %ag = f32[16]{{0}} all-gather(%q), channel_id=1, {GROUP}, dimensions={{0}}
  ROOT %t = {left} tuple(%ag)
}}
"""
    (row,) = shardlab.analyze(text, {"d": 2}).collectives
    assert row.wire_bytes == 32


def test_tuples_in_tuples() -> None:
    shape = "(" * DEPTH + "f32[8]{0}" + ")" * DEPTH
    lines = (
        f'%d = {shape} custom-call(%p), custom_call_target="Sharding"',
        f"%ar = {shape} all-reduce(%d), {GROUPS}",
        "ROOT %r = f32[8]{0} copy(%p)",
    )
    (row,) = analyze(entry(*lines)).collectives
    assert row.payload_bytes == 32


@pytest.mark.parametrize(
    "deep",
    ['{"a":' * 50_000 + "1" + "}" * 50_000, '{"known_trip_count":' + "[" * 50_000 + "]" * 50_000 + "}"],
    ids=["objects", "lists"],
)
def test_deep_json_is_no_recursion(deep: str) -> None:
    text = entry(f"{REDUCE}, backend_config={deep}", "ROOT %r = f32[8]{0} copy(%p)")
    (row,) = analyze(text).collectives
    assert row.wire_bytes == 56


def test_values_that_use_each_other_in_a_circle() -> None:
    """Nothing in a loop's arithmetic: the collective is read, and its neighbours end somewhere."""
    lines = ("%x = f32[8]{0} copy(%y)", "%y = f32[8]{0} copy(%x)")
    reduced = REDUCE.replace("(%p)", "(%x)")
    (row,) = analyze(entry(*lines, reduced, "ROOT %r = f32[8]{0} add(%ar, %y)")).collectives
    assert row.payload_bytes == 32


def test_a_circle_of_calls_through_every_kind_of_call_is_an_error_that_points() -> None:
    for call in (once, branch, looped):
        text = with_computations(nested(call), NEVER).replace(f"calls=%c{DEPTH}\n", "calls=%c0\n")
        text = text.replace(f"%c{DEPTH}}}", "%c0}").replace(f"body=%c{DEPTH},", "body=%c0,")
        with pytest.raises(ParseError, match="calls itself") as caught:
            analyze(text)
        assert caught.value.line > 1


HUGE = 10**18
QUINTILLION = entry(
    f"%h = f32[{HUGE},{HUGE}]{{1,0}} broadcast(%p), dimensions={{}}",
    f"%ar = f32[{HUGE},{HUGE}]{{1,0}} all-reduce(%h), {GROUPS}",
    "ROOT %r = f32[8]{0} copy(%p)",
)
MANY = f'backend_config={{"known_trip_count":{{"n":"{HUGE - 1}"}}}}'
LONG = with_computations(
    entry(f"ROOT %w = f32[8]{{0}} while(%p), condition=%never, body=%b, {MANY}"),
    f"%b {{\n  %p = f32[8]{{0}} parameter(0)\n  ROOT {REDUCE}\n}}\n\n",
    NEVER,
)


def test_bytes_of_absurd_shapes_and_trips_are_exact() -> None:
    assert analyze(QUINTILLION).totals.payload_bytes == (4 * HUGE**2,) * 2
    assert analyze(QUINTILLION).totals.wire_bytes == (7 * HUGE**2,) * 2
    assert analyze(LONG).totals.wire_bytes == (56 * (HUGE - 1),) * 2


@pytest.mark.parametrize("text", [QUINTILLION, LONG], ids=["shape", "trips"])
@pytest.mark.parametrize("flags", [(), ("--markdown",), ("--json",)], ids=["terminal", "markdown", "json"])
def test_absurd_sizes_are_reported(
    text: str,
    flags: tuple[str, ...],
    tmp_path,
    capsys: pytest.CaptureFixture[str],  # type: ignore[no-untyped-def]
) -> None:
    path = tmp_path / "m.hlo"
    path.write_text(text)
    assert run("analyze", str(path), "--axes", "all=8", "--on", "h100:1x8", *flags) == 0
    out = capsys.readouterr().out
    if flags == ("--json",):
        sent = 7 * HUGE**2 if text is QUINTILLION else 56 * (HUGE - 1)
        assert json.loads(out)["totals"]["wire_bytes"] == [sent, sent]
    else:
        assert "all-reduce" in out


def test_a_shape_of_more_digits_than_any_machine_has_is_refused_or_exact() -> None:
    with pytest.raises(ParseError) as caught:
        analyze(QUINTILLION.replace(str(HUGE), "9" * 5_000))
    assert caught.value.line > 1
