"""Damage that the fuzzer found: each is an error at its line, or an analysis, never another crash."""

from __future__ import annotations

import pytest

import shardlab
from shardlab.errors import ParseError, UserError

ADD = "%add (a: f32[], b: f32[]) -> f32[] {\n  %a = f32[] parameter(0)\n  %b = f32[] parameter(1)\n"
ADD += "  ROOT %s = f32[] add(%a, %b)\n}\n\n"
FIRST_LINE = 11  # where the lines that a case gives stand in the module below


def program(*lines: str, before: str = "", header: str = "num_partitions=8") -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return (
        f"HloModule m, is_scheduled=true, {header}\n\n{ADD}ENTRY %main (p: f32[8]) -> f32[8] {{\n"
        f"  %p = f32[8]{{0}} parameter(0)\n{body}\n  ROOT %r = f32[8]{{0}} copy(%p)\n}}\n{before}"
    )


def reduce(operand: str = "%p", groups: str = "{{0,1,2,3,4,5,6,7}}", extra: str = "") -> str:
    rest = f"channel_id=1, replica_groups={groups}, use_global_device_ids=true, to_apply=%add{extra}"
    return f"%ar = f32[8]{{0}} all-reduce({operand}), {rest}"


def sent(frontend: str) -> str:
    return f"%s = (f32[8], u32[], token[]) send(%p, %p), channel_id=1, frontend_attributes={{{frontend}}}"


PAIRS = "_xla_send_recv_source_target_pairs"
MEGASCALE = (
    '_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ONE_TO_ONE"'
)

POINTING = [
    pytest.param(reduce(groups="{{0,1},{99999999999999999999,3}}"), "not replica groups", id="huge-id"),
    pytest.param(reduce(groups="{{0,1},{1,2}}"), "listed twice", id="id-twice"),
    pytest.param(reduce(groups="[4,4]<=[8]"), "does not hold as many", id="iota-size"),
    pytest.param(reduce(groups="mesh['a'=2,'b'=4] {'c'}"), "not in the mesh", id="no-such-axis"),
    pytest.param(reduce("%p#1"), "no element 1 in a tuple of 0", id="element-of-an-array"),
    pytest.param(sent(f'{PAIRS}="{{{{0,1}},{{-1,2}}}}"'), "not source-target pairs", id="negative-pair"),
    pytest.param(sent(f'{PAIRS}="{{{{0,1}},{{1,8}}}}"'), "only 8 devices exist", id="send-beyond"),
    pytest.param(
        sent(f'{MEGASCALE},_xla_megascale_target="{{{{100000->x}}}}"'), "megascale target", id="no-target"
    ),
    pytest.param(
        sent(f'{MEGASCALE},_xla_megascale_target="{{{{1->200000}}}}"'), "megascale target", id="slice--1"
    ),
    pytest.param(
        sent(f'{MEGASCALE},_xla_megascale_target="{{1:60000}}x{{0:60000}}"'), "more than", id="expansion"
    ),
]


@pytest.mark.parametrize(("line", "message"), POINTING)
def test_an_error_names_the_line_of_its_instruction(line: str, message: str) -> None:
    with pytest.raises(ParseError, match=message) as caught:
        shardlab.analyze(program(line))
    assert (caught.value.line, caught.value.column) == (FIRST_LINE, 1)


@pytest.mark.parametrize(
    ("field", "literal"),
    [pytest.param("index=x", "0", id="tuple-index"), pytest.param("index=0", "zero", id="parameter-number")],
)
def test_a_position_that_is_no_number_is_an_error_that_points(field: str, literal: str) -> None:
    loops = (
        f"\n%body (t: (s32[])) -> (s32[]) {{\n  %t = (s32[]) parameter({literal})\n"
        f"  %i = s32[] get-tuple-element(%t), {field}\n  ROOT %o = (s32[]) tuple(%i)\n}}\n\n"
        f"%cond (u: (s32[])) -> pred[] {{\n  %u = (s32[]) parameter(0)\n"
        f"  %j = s32[] get-tuple-element(%u), {field}\n  %n = s32[] call(%j), to_apply=%f\n"
        f"  ROOT %c = pred[] compare(%j, %n), direction=LT\n}}\n\n"
        f"%f (v: s32[]) -> s32[] {{\n  ROOT %v = s32[] parameter({literal})\n}}\n"
    )
    start = ("%z = s32[] constant(0)", "%t0 = (s32[]) tuple(%z)")
    text = program(*start, "%w = (s32[]) while(%t0), condition=%cond, body=%body", before=loops)
    with pytest.raises(ParseError, match="is not a position") as caught:
        shardlab.analyze(text)
    assert caught.value.line > FIRST_LINE


SILENT = [
    pytest.param(("%w = f32[8]{0} while(%p), condition=%add", reduce()), id="condition-without-body"),
    pytest.param(
        ("%f = f32[8]{0} fusion(%p), kind=kLoop", reduce("%f"), "%g = f32[8]{0} bitcast()"), id="no-calls"
    ),
    pytest.param(("%c = f32[8]{0} copy()", reduce("%c")), id="copy-of-nothing"),
    pytest.param(("%n = f32[8]{0} negate(%gone)", reduce("%n")), id="operand-that-is-not-there"),
]


@pytest.mark.parametrize("lines", SILENT)
def test_damage_beside_a_collective_leaves_it_readable(lines: tuple[str, ...]) -> None:
    (row,) = shardlab.analyze(program(*lines), {"all": 8}).collectives
    assert (row.axes, row.payload_bytes) == (("all",), 32)


@pytest.mark.parametrize("text", [program("%x = \ud800"), "\n\ud800"], ids=["module", "other"])
def test_text_that_no_encoding_holds_is_an_error_that_points(text: str) -> None:
    with pytest.raises(ParseError):
        shardlab.analyze(text)


def test_a_negative_trip_count_is_not_a_count() -> None:
    loop = (
        "\n%body (t: f32[8]) -> f32[8] {\n  %t = f32[8]{0} parameter(0)\n"
        f"  ROOT {reduce('%t')}\n}}\n\n%cond (u: f32[8]) -> pred[] {{\n"
        "  %u = f32[8]{0} parameter(0)\n  ROOT %c = pred[] constant(true)\n}\n"
    )
    config = 'backend_config={"known_trip_count":{"n":"-1"}}'
    text = program(f"%w = f32[8]{{0}} while(%p), condition=%cond, body=%body, {config}", before=loop)
    (row,) = shardlab.analyze(text).collectives
    assert row.executions == (0, None)


def test_arithmetic_with_too_few_operands_is_no_count() -> None:
    loop = (
        "\n%body (t: (s32[])) -> (s32[]) {\n  %t = (s32[]) parameter(0)\n"
        "  %i = s32[] get-tuple-element(%t), index=0\n  %one = s32[] constant(1)\n"
        f"  %x = f32[8]{{0}} constant({{...}})\n  {reduce('%x')}\n"
        "  %next = s32[] add(%i, %one)\n  ROOT %o = (s32[]) tuple(%next)\n}\n\n"
        "%cond (u: (s32[])) -> pred[] {\n  %u = (s32[]) parameter(0)\n"
        "  %j = s32[] get-tuple-element(%u), index=0\n  %sum = s32[] add(%j)\n  %n = s32[] constant(9)\n"
        "  ROOT %c = pred[] compare(%sum, %n), direction=LT\n}\n"
    )
    start = ("%z = s32[] constant(0)", "%t0 = (s32[]) tuple(%z)")
    text = program(*start, "%w = (s32[]) while(%t0), condition=%cond, body=%body", before=loop)
    (row,) = shardlab.analyze(text).collectives
    assert row.executions == (0, None)
    (exact,) = shardlab.analyze(text.replace("add(%j)", "add(%j, %j)")).collectives
    assert exact.executions == (5, 5)  # 0, 2, 4, 6, 8 are below 9


@pytest.mark.parametrize("header", ["num_partitions=1000000000000", "num_partitions=1, replica_count=200000"])
def test_an_absurd_number_of_devices_is_refused(header: str) -> None:
    with pytest.raises(UserError, match="at most 131072 devices"):
        shardlab.analyze(program(header=header))


@pytest.mark.parametrize("blank", ["\x1e", "\x1c", "\x85", "\xa0"], ids=ascii)
def test_what_only_python_calls_a_blank_is_none_in_hlo(blank: str) -> None:
    """HLO's blanks are ASCII; int() refuses some of those that str.strip() takes off."""
    with pytest.raises(ParseError) as caught:
        shardlab.analyze(program(f"%ar = f32[{blank}8]{{0}} all-reduce(%p), channel_id=1, to_apply=%add"))
    assert caught.value.line == FIRST_LINE
    with pytest.raises(ParseError) as caught:
        shardlab.analyze(program(reduce(groups=f"[1,{blank}8]<=[8]")))
    assert caught.value.line == FIRST_LINE
