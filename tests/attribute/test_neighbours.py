"""What stands next to a collective that does not say where it comes from."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardlab.attribute.neighbours import MAX_REMEMBERED, MAX_VISITED, Neighbours
from shardlab.hlo.reader import parse


def op_names(body: str, kind: str = "all-gather", *, root: str | None = None) -> str:
    """What the neighbours of %here say in a loop body of these lines."""
    text = f"HloModule m\n\nENTRY %main (s: (f32[8], f32[8])) -> (f32[8], f32[8]) {{\n{body}}}\n"
    (module,) = parse(text)
    computation = module.computations["main"]
    if root is not None:
        computation = replace(computation, root=root)
    return Neighbours().op_name(computation, computation.instructions["here"], kind)


STATE = """  %s = (f32[8]{0}, f32[8]{0}) parameter(0)
  %a = f32[8]{0} get-tuple-element(%s), index=0
  %b = f32[8]{0} get-tuple-element(%s), index=1
"""
BOTH_WAYS = """  %made = f32[8]{0} negate(%a), metadata={op_name="jit(f)/made"}
  %here = f32[8]{0} copy(%made), metadata={op_name="weights[0]"}
  %used = f32[8]{0} negate(%here), metadata={op_name="jit(f)/used"}
  ROOT %t = (f32[8]{0}, f32[8]{0}) tuple(%used, %b)
"""
CARRIED = """  %here = f32[8]{0} copy(%b)
  %next = f32[8]{0} negate(%a), metadata={op_name="jit(f)/next"}
  ROOT %t = (f32[8]{0}, f32[8]{0}) tuple(%here, %next)
"""


@pytest.mark.parametrize(("kind", "found"), [("all-gather", "jit(f)/used"), ("all-reduce", "jit(f)/made")])
def test_gathers_ask_their_users_and_reductions_their_operands(kind: str, found: str) -> None:
    assert op_names(STATE + BOTH_WAYS, kind) == found


def test_an_element_of_the_state_comes_from_the_trip_before() -> None:
    assert op_names(STATE + CARRIED, "all-reduce") == "jit(f)/next"


def test_names_of_inputs_say_nothing() -> None:
    body = BOTH_WAYS.replace("jit(f)/", "input ")
    assert op_names(STATE + body) == ""


def test_a_root_that_is_not_there_carries_nothing() -> None:
    """A proto can name a root that it does not hold."""
    assert op_names(STATE + CARRIED, "all-reduce", root="gone") == ""


@pytest.mark.parametrize(("steps", "found"), [(MAX_VISITED - 3, "jit(f)/far"), (MAX_VISITED - 2, "")])
def test_the_search_is_bounded(steps: int, found: str) -> None:
    chain = [f"  %c{i + 1} = f32[8]{{0}} negate(%c{i})" for i in range(steps)]
    far = f'  ROOT %far = f32[8]{{0}} negate(%c{steps}), metadata={{op_name="jit(f)/far"}}'
    body = "\n".join(["  %here = f32[8]{0} copy(%a)", "  %c0 = f32[8]{0} negate(%here)", *chain, far, ""])
    assert op_names(STATE + body) == found


def test_one_search_does_not_hide_what_another_finds() -> None:
    """Where a search found nothing is remembered, for that direction only."""
    text = f"HloModule m\n\nENTRY %main (s: (f32[8], f32[8])) -> (f32[8], f32[8]) {{\n{STATE}{BOTH_WAYS}}}\n"
    (module,) = parse(text.replace("jit(f)/used", "input"))
    computation = module.computations["main"]
    neighbours = Neighbours()
    for _ in range(2):
        assert (
            neighbours.op_name(computation, computation.instructions["here"], "all-gather") == "jit(f)/made"
        )
        assert (
            neighbours.op_name(computation, computation.instructions["used"], "all-reduce") == "jit(f)/made"
        )


def test_what_is_remembered_is_bounded() -> None:
    """Who uses what is as large as the text: of a program of many computations only the last are kept."""
    text = f"HloModule m\n\nENTRY %main (s: (f32[8], f32[8])) -> (f32[8], f32[8]) {{\n{STATE}{BOTH_WAYS}}}\n"
    (module,) = parse(text)
    neighbours = Neighbours()
    for number in range(3 * MAX_REMEMBERED):
        computation = replace(module.computations["main"], name=f"c{number}")
        here = computation.instructions["here"]
        assert neighbours.op_name(computation, here, "all-gather") == "jit(f)/used"
    assert len(neighbours._wires) == MAX_REMEMBERED
