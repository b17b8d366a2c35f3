"""Who calls whom in a module: the call sites, and an order in which callers come before what they call.

Reducers (`to_apply` of reduce, all-reduce, sort, …) are not calls: they run once per element, not once per
step. The walk is iterative, since call chains of thousands of computations occur.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from shardlab.errors import ParseError
from shardlab.hlo.attributes import computation_names, instruction_error
from shardlab.hlo.instructions import Instructions
from shardlab.hlo.lookup import active, is_plain
from shardlab.hlo.module import Instruction, Module
from shardlab.hlo.opcodes import PLAIN

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


def call_sites(module: Module, *, plain: bool = True) -> CallSites:
    """Walk from ENTRY. Raises ParseError when a called computation is missing or calls form a cycle.

    plain: also enter fusions in which nothing is called or moved between devices. They are most of a program,
    and only who asks what they compute needs them.
    """
    by_caller: dict[str, tuple[CallSite, ...]] = {}
    finished: list[str] = []
    open_: dict[str, Iterator[CallSite]] = {}
    if module.entry not in module.computations:
        raise ParseError(f"the entry computation {module.entry!r} is not defined", source=module.name)
    todo = module.entry
    while todo or open_:
        if todo:
            by_caller[todo] = _calls_of(module, todo, plain)
            open_[todo] = iter(by_caller[todo][::-1])  # so that the reversed order is the printed one
            todo = ""
        name, sites = next(reversed(open_.items()))
        site = next(sites, None)
        if site is None:
            finished.append(name)
            del open_[name]
        elif site.callee in open_:
            raise instruction_error(site.instruction, f"computation {site.callee} calls itself")
        elif site.callee not in by_caller:
            todo = site.callee
    by_callee: dict[str, list[CallSite]] = {}
    for name in by_caller:
        for site in by_caller[name]:
            by_callee.setdefault(site.callee, []).append(site)
    return CallSites(tuple(reversed(finished)), by_caller, {k: tuple(v) for k, v in by_callee.items()})


def _calls_of(module: Module, name: str, plain: bool) -> tuple[CallSite, ...]:
    """The call sites of one computation in printed order. Raises ParseError when a callee is missing."""
    instructions = module.computations[name].instructions
    found: list[CallSite] = []
    for instruction in sorted(_calling(module, instructions, plain), key=lambda one: one.line):
        for site in sites_of(name, instruction):
            if site.callee not in module.computations:
                raise instruction_error(instruction, f"computation {site.callee} is not defined")
            found.append(site)
    return tuple(found)


def _calling(module: Module, instructions: Mapping[str, Instruction], plain: bool) -> Iterator[Instruction]:
    """What may run a computation; unless `plain`, without reading fusions of plain computations."""
    if plain or not isinstance(instructions, Instructions):
        yield from active(instructions)
        return
    skipped = set[str]()
    for name, callee in instructions.callees.items():
        called = module.computations.get(callee)
        if called is not None and is_plain(called.instructions):
            skipped.add(name)
    for opcode, names in instructions.opcodes.items():
        if opcode not in PLAIN:
            yield from (instructions[name] for name in names if name not in skipped)


def sites_of(caller: str, instruction: Instruction) -> Iterator[CallSite]:
    """The computations that `instruction` of computation `caller` runs."""
    opcode, attributes = instruction.opcode, instruction.attributes
    # Older text repeats `calls=` on -update and -done; the computation runs once, at the start.
    if not attributes or opcode.endswith(("-update", "-done")):
        return
    position = 0
    for key, role in () if _ROLES.keys().isdisjoint(attributes) else _ROLES.items():
        if key not in attributes:
            continue
        started = role == "call" and opcode.endswith("-start")
        for callee in computation_names(instruction, key):
            yield CallSite(caller, instruction, callee, "async" if started else role, position)
            position += 1
    if opcode in _APPLYING and "to_apply" in attributes:
        for callee in computation_names(instruction, "to_apply"):
            yield CallSite(caller, instruction, callee, "async" if opcode.endswith("-start") else "call")
