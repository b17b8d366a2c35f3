"""Whether a value is the same on every trip of a loop, also inside loops that are nested in it."""

from __future__ import annotations

from collections.abc import Iterator

from shardlab.audit.findings import Audited
from shardlab.audit.flow import MAX_NESTED, MAX_STEPS, Value
from shardlab.hlo.module import Instruction

# They give something else each time, or depend on more than their operands.
_UNSTEADY = frozenset({"rng", "rng-bit-generator", "rng-get-and-update-state", "infeed", "recv", "outfeed"})


def steady_loops(audited: Audited, outermost: str, value: Value) -> list[tuple[Instruction, int]]:
    """(the while, its trips) for the loops around `outermost` on whose trips a value does not depend.

    Only loops whose trips are known exactly. What the value depends on is followed through the state of the
    loops nested in the one that is asked about.
    """
    found = []
    inside: dict[str, tuple[str, Instruction]] = {}
    for caller, loop, body in _around(audited, outermost):
        inside[body] = (caller, loop)
        trips = audited.graph.loops.get((caller, loop.name))
        if trips is not None and trips.low == trips.high and _is_steady(audited, value, inside, body):
            found.append((loop, trips.low))
    return found


def _around(audited: Audited, name: str) -> Iterator[tuple[str, Instruction, str]]:
    """(caller, while, body) of the loops around a computation, from the inside out; up to a branch."""
    sites = audited.graph.sites.by_callee
    callers = sites.get(name, ())
    for _ in range(MAX_NESTED):
        if len(callers) != 1 or callers[0].role not in ("body", "call"):
            break
        if callers[0].role == "body":
            yield callers[0].caller, callers[0].instruction, name
        name = callers[0].caller
        callers = sites.get(name, ())


def _is_steady(audited: Audited, value: Value, inside: dict[str, tuple[str, Instruction]], loop: str) -> bool:
    """Whether nothing that the value is made from changes from trip to trip of the loop with body `loop`."""
    queue, seen = [value], {value}
    for current in queue:
        needed = _needs(audited, current, inside, loop)
        if needed is None or len(seen) > MAX_STEPS:
            return False
        for one in needed:
            if one not in seen:
                seen.add(one)
                queue.append(one)
    return True


def _needs(
    audited: Audited, value: Value, inside: dict[str, tuple[str, Instruction]], loop: str
) -> list[Value] | None:
    """What a value is made from within the loop; None when it changes with the trip, or may."""
    flow = audited.flow
    made = flow.origin(value)
    instruction = flow.instruction(made)
    if instruction is None or instruction.opcode in _UNSTEADY or instruction.opcode.startswith("custom-call"):
        return None
    if instruction.opcode == "parameter":
        return _state(audited, made, inside, loop)
    operands = (flow.operand(made, position) for position in range(len(instruction.operands)))
    return [operand for operand in operands if operand is not None]


def _state(
    audited: Audited, made: Value, inside: dict[str, tuple[str, Instruction]], loop: str
) -> list[Value] | None:
    flow, place = audited.flow, made.place
    name = place.computation.name
    if name not in inside or place.site is not None or not made.path:
        return None
    after = Value(place, place.computation.root, made.path)
    if name == loop:
        return [] if flow.origin(after) == made else None
    caller, inner = inside[name]
    before = flow.operand(Value(flow.home(caller), inner.name), 0, made.path)
    return None if before is None else [before, after]
