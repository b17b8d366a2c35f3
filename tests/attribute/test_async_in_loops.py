"""Transfers that start in one trip of a loop and end in the next: carried through its state."""

from __future__ import annotations

import pytest

from shardlab.analysis import analyze
from shardlab.errors import ParseError

ATTRIBUTES = "channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}, use_global_device_ids=true"
# form -> shape of the start in the loop's state, the start, the done, and what else the module holds
STATE = "(f32[256]{0}, f32[1024]{0})"
GENERIC = "((f32[256]{0}), f32[1024]{0}, s32[])"
WRAPPED = f"""%NAME (q: f32[256]) -> f32[1024] {{
  %q = f32[256]{{0}} parameter(0)
  ROOT %ag = f32[1024]{{0}} all-gather(%q), {ATTRIBUTES}
}}

"""
FORMS = {
    "native": (STATE, f"all-gather-start(%x), {ATTRIBUTES}", "all-gather-done", ""),
    "sugar": (GENERIC, f"all-gather-start(%x), {ATTRIBUTES}", "all-gather-done", ""),
    "generic": (
        GENERIC,
        "async-start(%x), calls=%wrapped",
        "async-done",
        WRAPPED.replace("NAME", "wrapped") + WRAPPED.replace("NAME", "again"),
    ),
}


def program(state: str, start: str, done: str, more: str, *, trips: int) -> str:
    """A gather starts before the loop; each trip ends one and starts the next; the last ends after it."""
    whole = f"(s32[], f32[256]{{0}}, {state})"
    return f"""HloModule m, num_partitions=8

{more}%body (s: {whole}) -> {whole} {{
  %s = {whole} parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[256]{{0}} get-tuple-element(%s), index=1
  %started = {state} get-tuple-element(%s), index=2
  %gathered = f32[1024]{{0}} {done}(%started)
  %next = {state} {start.replace("%wrapped", "%again")}
  %one = s32[] constant(1)
  %j = s32[] add(%i, %one)
  ROOT %t = {whole} tuple(%j, %x, %next)
}}

%cond (s: {whole}) -> pred[] {{
  %s = {whole} parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] constant({trips})
  ROOT %go = pred[] compare(%i, %n), direction=LT
}}

ENTRY %main (x: f32[256]) -> f32[1024] {{
  %x = f32[256]{{0}} parameter(0)
  %zero = s32[] constant(0)
  %first = {state} {start}
  %t = {whole} tuple(%zero, %x, %first)
  %w = {whole} while(%t), condition=%cond, body=%body
  %last = {state} get-tuple-element(%w), index=2
  ROOT %r = f32[1024]{{0}} {done}(%last)
}}
"""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("trips", [0, 5])
def test_starts_count_and_trips_multiply(form: str, trips: int) -> None:
    """1 start before the loop and one per trip; 3/4 of 4096 bytes each."""
    state, start, done, more = FORMS[form]
    found = analyze(program(state, start, done, more, trips=trips), axes={"data": 2, "model": 4})
    assert found.totals.wire_bytes == ((trips + 1) * 3_072,) * 2
    assert {(row.axes, row.payload_bytes, row.wire_bytes, row.asynchronous) for row in found.collectives} == {
        (("model",), 4_096, 3_072, True)
    }
    assert [row.executions for row in found.collectives] == [(1, 1), (trips, trips)]
    assert found.ledger == ()


def test_a_done_without_its_start_moves_nothing() -> None:
    """What started it stands in another computation, where it is counted."""
    text = program(*FORMS["native"], trips=3).replace(
        f"%next = {STATE} all-gather-start(%x), {ATTRIBUTES}", f"%next = {STATE} copy(%started)"
    )
    found = analyze(text, axes={"data": 2, "model": 4})
    assert [row.executions for row in found.collectives] == [(1, 1)]


def test_an_async_start_of_a_missing_computation_is_an_error() -> None:
    state, start, done, _ = FORMS["generic"]
    with pytest.raises(ParseError, match="is not defined"):
        analyze(program(state, start, done, "", trips=3))
