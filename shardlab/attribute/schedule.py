"""How often each device runs each computation, where devices differ: the executed schedule of a pipeline.

Counts go from callers to callees, one number per kind of device. Inside a loop whose branches are chosen by
its counter they are sets of ticks, so that a branch inside a branch counts the ticks at which both are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from shardlab.attribute.arrays import ELIDED, TOO_LARGE
from shardlab.attribute.choices import OUTER_COUNTER, Choice, Choices
from shardlab.attribute.edges import CallSite, CallSites
from shardlab.attribute.effort import OPERATIONS_SPENT, STEPS_SPENT
from shardlab.attribute.nodes import LoopKey
from shardlab.attribute.scalars import Slice
from shardlab.attribute.trips import Trips

Range = tuple[int, int | None]
Conditional = tuple[str, str]  # computation and name
Ticks = tuple[int, int]  # the ticks at which something certainly runs, and at which it may, as bits
Weight = Callable[[CallSite], Range]

ONCE: Range = (1, 1)
_NEVER: Range = (0, 0)
_WORTH_SAYING = (ELIDED, TOO_LARGE, OPERATIONS_SPENT, STEPS_SPENT, OUTER_COUNTER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Conditionals whose branches are known for every device, and what follows from them.

    kinds: the kind of each device by flattened id; empty where all are of kind 0.
    branches: conditional -> branch -> kind -> runs per step. times: computation -> kind -> runs per step;
    empty when no conditional is known. taken: conditional -> kind -> branch -> the ticks at which it runs, as
    bits; of one that all ticks choose alike bit 0 stands for all. ticks: of those, how many; None for these.
    reasons: conditionals that a table or a counter would decide, and why it does not.
    """

    kinds: tuple[int, ...] = ()
    branches: Mapping[Conditional, tuple[tuple[Range, ...], ...]] = field(default_factory=dict)
    times: Mapping[str, tuple[Range, ...]] = field(default_factory=dict)
    taken: Mapping[Conditional, tuple[Mapping[int, int], ...]] = field(default_factory=dict)
    ticks: Mapping[Conditional, int | None] = field(default_factory=dict)
    reasons: Mapping[Conditional, str] = field(default_factory=dict)

    def on_device(self, conditional: Conditional, device: int) -> tuple[Range, ...]:
        """Runs per step of each branch of a known conditional on one device (flattened id).

        A pipeline's bubble is the share of its idle branch. Raises KeyError when the conditional is not
        known.
        """
        kind = self.kinds[device] if self.kinds else 0
        return tuple(by_kind[kind] for by_kind in self.branches[conditional])

    def by_device(self, computation: str) -> tuple[Range, ...]:
        """Runs per step of a computation on each device; empty where all devices run it equally often."""
        times = self.times.get(computation, ())
        return tuple(times[kind] for kind in self.kinds) if len(set(times)) > 1 else ()


NO_SCHEDULE = Schedule()


def schedule_of(scalars: Slice, loops: Mapping[LoopKey, Trips], weight: Weight) -> Schedule:
    """Interpret the conditionals of a module, as far as its effort goes.

    weight: how often a call site that is no branch runs its callee, per run of the caller.
    """
    sites = scalars.sites
    if not any(site.role == "branch" for found in sites.by_caller.values() for site in found):
        return NO_SCHEDULE
    choices, reasons, regions = _choices(scalars, loops, weight)
    known = {key: choice for key, choice in choices.items() if isinstance(choice, Choice)}
    if not known:
        return Schedule(reasons=reasons)
    of_each, kinds = _common_kinds(known)
    size = sum(1 + (choice.ticks or 0) // 64 for choice in known.values()) + len(sites.order)
    if not scalars.effort.spend(size * len(of_each) + len(kinds)):
        return Schedule(reasons=reasons | dict.fromkeys(known, OPERATIONS_SPENT))
    counter = _Counter(sites, weight, regions, known, of_each)
    counter.count()
    return Schedule(
        kinds=kinds,
        branches={key: counter.runs(key) for key in known},
        times=counter.times,
        taken={key: tuple(choice.taken[one[key]] for one in of_each) for key, choice in known.items()},
        ticks={key: choice.ticks for key, choice in known.items()},
        reasons=reasons,
    )


def _choices(
    scalars: Slice, loops: Mapping[LoopKey, Trips], weight: Weight
) -> tuple[dict[Conditional, Choice | str], dict[Conditional, str], dict[str, str]]:
    """What each conditional chooses, why some that tables decide are unknown, and of each computation the
    region that it belongs to.
    """
    sites, reader = scalars.sites, Choices(scalars, loops)
    found: dict[Conditional, Choice | str] = {}
    regions: dict[str, str] = {}
    for name in sites.order:
        callers = sites.by_callee.get(name, ())
        if len(callers) == 1:
            reader.enter(callers[0])
        regions[name] = regions[callers[0].caller] if _is_inside(callers, weight) else name
        region = sites.by_callee.get(regions[name], ())
        in_loop = len(region) == 1 and region[0].role == "body"
        loop = (region[0].caller, region[0].instruction.name) if in_loop else None
        for key, branches in branch_sites(sites, name).items():
            found[key] = reader.read(name, branches[0].instruction, len(branches), loop)
    reasons = {
        key: why
        for key, why in found.items()
        if isinstance(why, str) and any(limit in why for limit in _WORTH_SAYING)
    }
    return found, reasons, regions


def _is_inside(callers: Sequence[CallSite], weight: Weight) -> bool:
    """Whether a computation runs as part of its one caller: at most once for each run of it."""
    if len(callers) != 1 or callers[0].role not in ("call", "async", "branch"):
        return False
    return callers[0].role == "branch" or weight(callers[0]) == ONCE


def branch_sites(sites: CallSites, name: str) -> dict[Conditional, list[CallSite]]:
    """The conditionals of a computation, with their branches in order."""
    found: dict[Conditional, list[CallSite]] = {}
    for site in sites.by_caller[name]:
        if site.role == "branch":
            found.setdefault((name, site.instruction.name), []).append(site)
    return found


def _common_kinds(
    known: Mapping[Conditional, Choice],
) -> tuple[list[dict[Conditional, int]], tuple[int, ...]]:
    """Kinds that tell devices apart for all conditionals: of each the kind within each choice; and of each
    device its kind.
    """
    lists = {id(choice.kinds): choice.kinds for choice in known.values() if choice.kinds}
    seen: dict[tuple[int, ...], int] = {}
    kinds = tuple(seen.setdefault(row, len(seen)) for row in zip(*lists.values(), strict=True))
    position = {key: number for number, key in enumerate(lists)}
    of_each = [
        {name: row[position[id(choice.kinds)]] if choice.kinds else 0 for name, choice in known.items()}
        for row in (seen or {(): 0})
    ]
    return of_each, kinds


@dataclass(slots=True)
class _Counter:
    """Counts runs kind by kind. A region is a loop's body, or whatever else several callers or trips run,
    with all that runs inside it at most once per run.

    base: region -> kind -> how often it is entered. ticks: computation -> kind -> the ticks of its region.
    """

    sites: CallSites
    weight: Weight
    regions: Mapping[str, str]
    known: Mapping[Conditional, Choice]
    of_each: Sequence[Mapping[Conditional, int]]
    times: dict[str, tuple[Range, ...]] = field(default_factory=dict)
    _base: dict[str, tuple[Range, ...]] = field(default_factory=dict)
    _ticks: dict[str, tuple[Ticks, ...]] = field(default_factory=dict)
    _length: dict[str, int] = field(default_factory=dict)

    def count(self) -> None:
        """Fill `times`, callers first."""
        for (name, _), choice in self.known.items():
            if choice.ticks is not None:
                self._length[self.regions[name]] = choice.ticks
        for name in self.sites.order:
            if self.regions[name] == name:
                self._base[name] = self._entered(name)
                whole = (1 << self._length.get(name, 1)) - 1
                self._ticks[name] = ((whole, whole),) * len(self.of_each)
            else:
                self._ticks[name] = self._part(self.sites.by_callee[name][0])
            self.times[name] = self._counted(name, self._ticks[name])

    def runs(self, conditional: Conditional) -> tuple[tuple[Range, ...], ...]:
        """Branch -> kind -> runs per step of a known conditional."""
        name = conditional[0]
        branches = branch_sites(self.sites, name)[conditional]
        return tuple(self._counted(name, self._part(site)) for site in branches)

    def _counted(self, name: str, ticks: Sequence[Ticks]) -> tuple[Range, ...]:
        base = self._base[self.regions[name]]
        return tuple(
            multiply(entered, (sure.bit_count(), maybe.bit_count()))
            for entered, (sure, maybe) in zip(base, ticks, strict=True)
        )

    def _part(self, site: CallSite) -> tuple[Ticks, ...]:
        """The ticks of its caller at which `site` runs."""
        around = self._ticks[site.caller]
        if site.role != "branch":
            return around
        key = (site.caller, site.instruction.name)
        if key not in self.known:
            return tuple((0, maybe) for _, maybe in around)
        whole = (1 << self._length.get(self.regions[site.caller], 1)) - 1
        found = []
        for (sure, maybe), kind_in in zip(around, self.of_each, strict=True):
            taken = self.known[key].taken[kind_in[key]].get(site.position, 0)
            if self.known[key].ticks is None and taken:
                taken = whole
            found.append((sure & taken, maybe & taken))
        return tuple(found)

    def _entered(self, name: str) -> tuple[Range, ...]:
        """How often a region starts: for a loop that is run tick by tick its executions, else its trips."""
        callers = self.sites.by_callee.get(name, ())
        if not callers:
            return (ONCE,) * len(self.of_each)
        total = (_NEVER,) * len(self.of_each)
        unknown: dict[Conditional, None] = {}
        for site in callers:
            key = (site.caller, site.instruction.name)
            if site.role == "branch" and key in self.known:
                part = self._counted(site.caller, self._part(site))
            elif site.role == "branch":
                # A computation that is two of a conditional's branches still runs at most once.
                weight = _NEVER if key in unknown else (0, 1)
                unknown[key] = None
                part = tuple(multiply(times, weight) for times in self.times[site.caller])
            else:
                weight = ONCE if name in self._length and site.role == "body" else self.weight(site)
                part = tuple(multiply(times, weight) for times in self.times[site.caller])
            total = tuple(add(a, b) for a, b in zip(total, part, strict=True))
        return total


def hull(ranges: Sequence[Range]) -> Range:
    """The least and the greatest over some ranges."""
    known = [high for _, high in ranges if high is not None]
    return min(low for low, _ in ranges), max(known) if len(known) == len(ranges) else None


def multiply(a: Range, b: Range) -> Range:
    """Product of two ranges of counts; nothing times unknown is nothing."""
    if 0 in (a[1], b[1]):
        return _NEVER
    return a[0] * b[0], None if a[1] is None or b[1] is None else a[1] * b[1]


def add(a: Range, b: Range) -> Range:
    """Sum of two ranges of counts."""
    return a[0] + b[0], None if a[1] is None or b[1] is None else a[1] + b[1]
