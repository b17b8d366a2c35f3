"""How often each computation runs per step, and sums over the step that respect branches.

A body runs as often as its loop; of a conditional's branches one runs, so sums add the branches' minimum and
maximum.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

from shardlab.attribute.edges import CallSite, CallSites, call_sites
from shardlab.attribute.scalars import Slice
from shardlab.attribute.schedule import (
    NO_SCHEDULE,
    ONCE,
    Range,
    Schedule,
    add,
    branch_sites,
    hull,
    multiply,
    schedule_of,
)
from shardlab.attribute.trips import Trips, trip_count
from shardlab.hlo.attributes import errors_at
from shardlab.hlo.module import Module

Amount = tuple[Fraction, Fraction | None]
K = TypeVar("K", bound=Hashable)

_ZERO = Fraction(0)
_UNKNOWN = Trips(0, None)
_NOTHING: Amount = (_ZERO, _ZERO)
_EXTENT = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class Calls:
    """What one instruction runs: each callee so many times, or, if `branches`, exactly one of them."""

    callees: tuple[tuple[str, Range], ...]
    branches: bool = False


@dataclass(frozen=True, slots=True)
class CallGraph:
    """What runs what, how often.

    sites: the call sites, callers before callees. calls: computation -> what its instructions run, in order.
    loops: (computation, while) -> its trips. times: reached computation -> runs per step, over all
    devices. schedule: what conditionals choose where that is known; these are not among `calls`.
    """

    sites: CallSites
    calls: Mapping[str, tuple[Calls, ...]]
    loops: Mapping[tuple[str, str], Trips]
    times: Mapping[str, Range]
    schedule: Schedule = NO_SCHEDULE


def computation_executions(module: Module) -> dict[str, Range]:
    """Times each computation runs per step, as (min, max); a max of None is unknown.

    Every computation of the module is a key. (0, 0): nobody runs it, or it is a reducer, which runs per
    element. Raises ParseError when calls form a cycle or name a computation that is not there.
    """
    times = call_graph(module).times
    return {name: times.get(name, (0, 0)) for name in module.computations}


def call_graph(module: Module, *, plain: bool = True) -> CallGraph:
    """Call sites, trip counts and runs per step. Raises ParseError as `computation_executions` does.

    plain: with the fusions in which nothing is called or moved between devices, as `call_sites` has it.
    """
    sites = call_sites(module, plain=plain)
    loops: dict[tuple[str, str], Trips] = {}
    scalars = Slice(module, sites)
    for name in sites.order:
        for site in sites.by_caller[name]:
            if site.role == "body":
                with errors_at(site.instruction):
                    loops[name, site.instruction.name] = trip_count(scalars, name, site.instruction)
    schedule = schedule_of(scalars, loops, lambda site: _weight(module, loops, site))
    calls = {
        name: _calls(
            module,
            [
                site
                for site in sites.by_caller[name]
                if site.role != "branch" or (name, site.instruction.name) not in schedule.branches
            ],
            loops,
        )
        for name in sites.order
    }
    by_kind = schedule.times.items()
    times = {name: hull(found) for name, found in by_kind} or _times(sites.order, calls)
    return CallGraph(sites, calls, loops, times, schedule)


def step_totals(graph: CallGraph, amounts: Mapping[str, Mapping[K, Fraction]]) -> dict[K, Amount]:
    """Sums over one step. amounts: computation -> key -> what one run of its own instructions adds, without
    callees.

    A conditional adds, key by key, the least and the greatest of its branches. An unknown trip count makes
    the maximum None for every key that the loop's body adds to.
    """
    totals: dict[str, Mapping[K, Amount]] = {}
    for name in reversed(graph.sites.order):
        total: dict[K, Amount] = {key: (value, value) for key, value in amounts.get(name, {}).items()}
        for calls in graph.calls[name]:
            parts = [_scaled(totals[callee], times) for callee, times in calls.callees if totals[callee]]
            for part in [_one_of(parts, len(calls.callees))] if calls.branches else parts:
                _accumulate(total, part)
        totals[name] = total
    return _over_devices(graph, totals)


def _over_devices(graph: CallGraph, totals: Mapping[str, Mapping[K, Amount]]) -> dict[K, Amount]:
    """Key by key the least and the greatest over the kinds of devices. totals: of one run of each
    computation, without the branches of known conditionals; these are added as often as each kind runs them.
    """
    parts = [
        (totals[site.callee], runs)
        for (name, conditional), branches in graph.schedule.branches.items()
        for site, runs in zip(branch_sites(graph.sites, name)[name, conditional], branches, strict=True)
        if totals[site.callee]
    ]
    kinds: list[dict[K, Amount]] = []
    for of_kind in dict.fromkeys(zip(*[runs for _, runs in parts], strict=True)) or [()]:
        total = dict(totals[graph.sites.order[0]])
        for (part, _), times in zip(parts, of_kind, strict=True):
            _accumulate(total, _scaled(part, times))
        kinds.append(total)
    return _one_of(kinds, len(kinds))


def _calls(
    module: Module, sites: Sequence[CallSite], loops: Mapping[tuple[str, str], Trips]
) -> tuple[Calls, ...]:
    """Call sites of one computation, joined by the instruction that makes them."""
    by_instruction: dict[str, list[CallSite]] = {}
    for site in sites:
        by_instruction.setdefault(site.instruction.name, []).append(site)
    return tuple(_one_instruction(module, group, loops) for group in by_instruction.values())


def _one_instruction(
    module: Module, group: Sequence[CallSite], loops: Mapping[tuple[str, str], Trips]
) -> Calls:
    if group[0].role == "branch":
        different = len({site.callee for site in group}) > 1
        return Calls(tuple((site.callee, ONCE) for site in (group if different else group[:1])), different)
    return Calls(tuple((site.callee, _weight(module, loops, site)) for site in group))


def _weight(module: Module, loops: Mapping[tuple[str, str], Trips], site: CallSite) -> Range:
    """Runs of `site.callee` per run of the calling instruction, given that its branch is taken."""
    if site.role in ("body", "condition"):
        trips = loops.get((site.caller, site.instruction.name), _UNKNOWN)
        extra = int(site.role == "condition")  # the test that ends the loop
        return trips.low + extra, None if trips.high is None else trips.high + extra
    return _scanned(module, site) if site.instruction.opcode.startswith("scan") else ONCE


def _scanned(module: Module, site: CallSite) -> Range:
    """A `scan` applies its computation once per slice of its first input along the scanned dimension."""
    instruction = site.instruction
    instructions = module.computations[site.caller].instructions
    dimension = instruction.attributes.get("dimensions", "{0}").strip("{} ").split(",")[0]
    source = instructions.get(instruction.operands[0].name) if instruction.operands else None
    if source is None or not _EXTENT.fullmatch(dimension) or int(dimension) >= len(source.shape.dims):
        return 0, None
    extent = source.shape.dims[int(dimension)]
    return 0 if extent is None else extent, extent


def _times(order: Sequence[str], calls: Mapping[str, Sequence[Calls]]) -> dict[str, Range]:
    """Runs per step of each reached computation, callers first."""
    times: dict[str, Range] = {name: (0, 0) for name in order}
    times[order[0]] = ONCE
    for name in order:
        for group in calls[name]:
            per_callee: dict[str, Range] = {}
            for callee, weight in group.callees:
                # A computation that is two of a conditional's branches still runs at most once.
                per_callee[callee] = (0, 1) if group.branches else add(per_callee.get(callee, (0, 0)), weight)
            for callee, weight in per_callee.items():
                times[callee] = add(times[callee], multiply(times[name], weight))
    return times


def _scaled(total: Mapping[K, Amount], times: Range) -> Mapping[K, Amount]:
    if times == ONCE:
        return total
    low, high = times
    return {
        key: (
            least * low,
            _ZERO if 0 in (most, high) else None if most is None or high is None else most * high,
        )
        for key, (least, most) in total.items()
    }


def _one_of(branches: Sequence[Mapping[K, Amount]], count: int) -> dict[K, Amount]:
    """Key by key the least and the greatest of `count` branches; those that are not listed add nothing."""
    keys = dict.fromkeys(key for branch in branches for key in branch)
    silent = [_NOTHING] if len(branches) < count else []
    return {key: _hull([branch.get(key, _NOTHING) for branch in branches] + silent) for key in keys}


def _hull(amounts: Sequence[Amount]) -> Amount:
    known = [high for _, high in amounts if high is not None]
    return min(low for low, _ in amounts), max(known) if len(known) == len(amounts) else None


def _accumulate(total: dict[K, Amount], more: Mapping[K, Amount]) -> None:
    for key, (low, high) in more.items():
        low_so_far, high_so_far = total.get(key, _NOTHING)
        total[key] = low_so_far + low, None if high is None or high_so_far is None else high_so_far + high
