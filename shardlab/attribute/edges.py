"""Who calls whom in a module: the call sites, and an order in which callers come before what they call.

Reducers (`to_apply` of reduce, all-reduce, sort, …) are not calls: they run once per element, not once per
step. The walk is iterative, since call chains of thousands of computations occur.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from shardlab.errors import ParseError
from shardlab.hlo.attributes import computation_names
from shardlab.hlo.instructions import Instructions
from shardlab.hlo.module import Computation, Instruction, Module

Role = Literal["call", "async", "body", "condition", "branch"]

# Attributes whose value is one or more computations that the instruction runs, with the part they play.
_ROLES: Mapping[str, Role] = {
    "calls": "call",
    "called_computations": "call",
    "body": "body",
    "condition": "condition",
    "branch_computations": "branch",
    "true_computation": "branch",
    "false_computation": "branch",
}
# `to_apply` of these runs the computation; of anything else it names a reducer.
_APPLYING = frozenset({"call", "call-start", "scan", "scan-start"})
# What most instructions are. They run no computation and move nothing between devices: not worth reading.
_PLAIN_WORDS = """
    abs add and bitcast bitcast-convert broadcast clamp compare concatenate constant convert convolution
    copy copy-done copy-start cosine divide dot dynamic-slice dynamic-update-slice exponential
    exponential-minus-one floor gather get-tuple-element iota log log-plus-one logistic maximum minimum
    multiply negate not or pad parameter partition-id power reduce reduce-precision reduce-window
    remainder reshape reverse rsqrt scatter select shift-left shift-right-logical sign sine slice sort
    sqrt subtract tanh transpose tuple xor
"""
_PLAIN = frozenset(_PLAIN_WORDS.split())


@dataclass(frozen=True, slots=True)
class CallSite:
    """`instruction` of computation `caller` runs `callee`; `position` counts the branches of a
    conditional.
    """

    caller: str
    instruction: Instruction
    callee: str
    role: Role
    position: int = 0


@dataclass(frozen=True, slots=True)
class CallSites:
    """The call sites reachable from ENTRY.

    order: every reachable computation, callers before callees. by_caller, by_callee: the sites of each
    computation.
    """

    order: tuple[str, ...]
    by_caller: Mapping[str, tuple[CallSite, ...]]
    by_callee: Mapping[str, tuple[CallSite, ...]]


def call_sites(module: Module) -> CallSites:
    """Walk from ENTRY. Raises ParseError when a called computation is missing or calls form a cycle."""
    by_caller: dict[str, tuple[CallSite, ...]] = {}
    finished: list[str] = []
    open_: dict[str, Iterator[CallSite]] = {}
    _enter(module, module.entry, by_caller, open_)
    while open_:
        name, sites = next(reversed(open_.items()))
        site = next(sites, None)
        if site is None:
            finished.append(name)
            del open_[name]
        elif site.callee in open_:
            raise _error(site, f"computation {site.callee} calls itself")
        elif site.callee not in by_caller:
            if site.callee not in module.computations:
                raise _error(site, f"computation {site.callee} is not defined")
            _enter(module, site.callee, by_caller, open_)
    by_callee: dict[str, list[CallSite]] = {}
    for name in by_caller:
        for site in by_caller[name]:
            by_callee.setdefault(site.callee, []).append(site)
    return CallSites(tuple(reversed(finished)), by_caller, {k: tuple(v) for k, v in by_callee.items()})


def active_instructions(computation: Computation) -> list[Instruction]:
    """In printed order, the instructions that may run a computation or talk to another device."""
    instructions = computation.instructions
    if not isinstance(instructions, Instructions):
        return [instruction for instruction in instructions.values() if instruction.opcode not in _PLAIN]
    names = [name for opcode, names in instructions.opcodes.items() if opcode not in _PLAIN for name in names]
    return sorted((instructions[name] for name in names), key=lambda instruction: instruction.line)


def _enter(
    module: Module,
    name: str,
    by_caller: dict[str, tuple[CallSite, ...]],
    open_: dict[str, Iterator[CallSite]],
) -> None:
    if name not in module.computations:
        raise ParseError(f"the entry computation {name!r} is not defined", source=module.name)
    instructions = active_instructions(module.computations[name])
    sites = tuple(site for instruction in instructions for site in _sites_of(name, instruction))
    by_caller[name] = sites
    open_[name] = iter(sites[::-1])  # so that the reversed order is the printed one


def _sites_of(caller: str, instruction: Instruction) -> Iterator[CallSite]:
    opcode, attributes = instruction.opcode, instruction.attributes
    # Older text repeats `calls=` on -update and -done; the computation runs once, at the start.
    if not attributes or opcode.endswith(("-update", "-done")):
        return
    position = 0
    for key, role in _ROLES.items():
        if key not in attributes:
            continue
        started = role == "call" and opcode.endswith("-start")
        for callee in computation_names(instruction, key):
            yield CallSite(caller, instruction, callee, "async" if started else role, position)
            position += 1
    if opcode in _APPLYING and "to_apply" in attributes:
        for callee in computation_names(instruction, "to_apply"):
            yield CallSite(caller, instruction, callee, "async" if opcode.endswith("-start") else "call")


def _error(site: CallSite, message: str) -> ParseError:
    return ParseError(f"{site.instruction.name}: {message}", line=site.instruction.line, column=1)
