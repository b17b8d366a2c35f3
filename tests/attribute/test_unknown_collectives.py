"""Operations between devices that no release of XLA has today: on the ledger, never dropped."""

from __future__ import annotations

from dataclasses import replace

import pytest
from samples import sample

from shardlab.analysis import Analysis, analyze
from shardlab.hlo.reader import parse

ADD = "%add (a: f32[], b: f32[]) -> f32[] {\n  %a = f32[] parameter(0)\n  %b = f32[] parameter(1)\n"
ADD += "  ROOT %s = f32[] add(%a, %b)\n}\n"
GROUPS = "replica_groups={{0,1,2,3},{4,5,6,7}}"


def program(*lines: str, before: str = "") -> Analysis:
    body = "".join(f"  {line}\n" for line in ("%p = f32[8]{0} parameter(0)", *lines))
    root = "  ROOT %r = f32[8]{0} copy(%p)\n"
    text = f"HloModule m, num_partitions=8\n\n{ADD}\n{before}\nENTRY %main {{\n{body}{root}}}\n"
    return analyze(text, axes={"data": 2, "model": 4})


def listed(found: Analysis) -> list[tuple[str, str]]:
    return [(entry.what, entry.name) for entry in found.ledger]


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        ((f"%u = f32[8]{{0}} all-frobnicate(%p), channel_id=1, {GROUPS}, to_apply=%add",), "all-frobnicate"),
        (("%u = f32[8]{0} collective-swirl(%p), source_target_pairs={{0,1}}",), "collective-swirl"),
        (("%u = f32[8]{0} exchange(%p), channel_id=3",), "exchange"),
        ((f"%u = f32[8]{{0}} all-frobnicate(%p), {GROUPS}\n  // printed with care",), "all-frobnicate"),
        (
            (
                f"%u = ((f32[8]{{0}}), f32[8]{{0}}) all-frobnicate-start(%p), channel_id=1, {GROUPS}",
                f"%w = f32[8]{{0}} all-frobnicate-done(%u), channel_id=1, {GROUPS}",
            ),
            "all-frobnicate-start",
        ),
    ],
    ids=["groups", "pairs", "channel", "careful", "start-and-done"],
)
def test_an_unknown_collective_is_on_the_ledger_once(lines: tuple[str, ...], what: str) -> None:
    found = program(*lines)
    assert found.collectives == ()
    assert listed(found) == [(what, "u"), ("module", "m")]


CALLS = [
    "fusion(%p), kind=kLoop, calls=%f",
    "call(%p), to_apply=%f",
    'custom-call(%p), custom_call_target="x", called_computations={%f}',
]


@pytest.mark.parametrize("call", CALLS, ids=["fusion", "call", "custom-call"])
def test_an_unknown_collective_is_found_wherever_it_runs(call: str) -> None:
    inner = "%f (q: f32[8]) -> f32[8] {\n  %q = f32[8]{0} parameter(0)\n  ROOT %u = f32[8]{0} "
    inner += f"all-frobnicate(%q), {GROUPS}\n}}\n"
    assert listed(program(f"%c = f32[8]{{0}} {call}", before=inner))[0] == ("all-frobnicate", "u")
    assert listed(program(before=inner)) == [("module", "m")]  # nobody calls it


def test_known_operations_that_name_a_channel_are_no_strangers() -> None:
    found = program(
        "%t = token[] after-all()",
        "%s = (f32[8]{0}, u32[], token[]) send(%p, %t), channel_id=1, "
        'frontend_attributes={_xla_send_recv_source_target_pairs="{{0,4}}"}',
        "%sd = token[] send-done(%s), channel_id=1",
        "%q = (f32[8]{0}, u32[], token[]) recv(%t), channel_id=1",
        "%qd = (f32[8]{0}, token[]) recv-done(%q), channel_id=1",
    )
    assert listed(found) == []
    assert [row.kind for row in found.collectives] == ["send"]


def test_an_unknown_collective_of_a_proto_is_on_the_ledger() -> None:
    """Three all-reduces of a compiled program, under an opcode of as many letters."""
    proto = sample("module_0000.jit__lambda.cpu_after_optimizations.hlo.pb")
    found = analyze(proto.replace(b"\x12\nall-reduce", b"\x12\nall-rubric"), axes={"data": 2, "model": 4})
    assert [what for what, _ in listed(found)] == ["all-rubric"] * 3
    assert "all-reduce" not in {row.kind for row in found.collectives}


def test_lines_that_were_not_read_are_on_the_ledger() -> None:
    """The reader of today refuses what it cannot read; a reader that skips lines says so."""
    (module,) = parse("HloModule m\n\nENTRY %main {\n  ROOT %p = f32[8]{0} parameter(0)\n}\n")
    found = analyze(replace(module, unparsed=((7, "%x = <garbage>"),)))
    assert [(entry.what, entry.name, entry.why) for entry in found.ledger] == [
        ("text", "line 7", "could not be read: %x = <garbage>")
    ]
