"""Which conditionals of a schedule a computation meets, and what each kind of device takes at each tick."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from shardlab.attribute.calls import CallGraph
from shardlab.attribute.edges import CallSite
from shardlab.attribute.schedule import Conditional


def is_scheduled(site: CallSite) -> bool:
    """Whether a callee has a schedule of its own: a loop's body, a branch, a called computation."""
    return site.role in ("body", "branch") or (site.role == "call" and site.instruction.opcode == "call")


@dataclass(slots=True)
class Regions:
    """Of one module's call graph.

    met: computation -> the known conditionals that one run of it may meet outside loops. staged: the
    computations that run a loop over ticks.
    """

    graph: CallGraph
    met: dict[str, tuple[Conditional, ...]] = field(default_factory=dict)
    staged: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for name in reversed(self.graph.sites.order):  # callees first
            found = {key: None for key in self.graph.schedule.taken if key[0] == name}
            for site in self.graph.sites.by_caller[name]:
                if not is_scheduled(site):
                    continue
                if site.role == "body":
                    if site.callee in self.staged or self.ticks(site) is not None:
                        self.staged.add(name)
                    continue
                found |= dict.fromkeys(self.met[site.callee])
                if site.callee in self.staged:
                    self.staged.add(name)
            self.met[name] = tuple(found)

    def ticks(self, loop: CallSite) -> int | None:
        """The ticks of a loop whose conditionals they choose; None for other loops."""
        known = self.graph.schedule.ticks
        counts = {known[key] for key in self.met[loop.callee]} - {None}
        trips = self.graph.loops.get((loop.caller, loop.instruction.name))
        return trips.high if trips is not None and counts == {trips.high} else None

    def branch(self, conditional: Conditional, kind: int, tick: int | None) -> int | None:
        """The position of the branch that is taken; None where that is not known or differs by tick."""
        taken = self.graph.schedule.taken.get(conditional)
        if taken is None:
            return None
        if self.graph.schedule.ticks[conditional] is None:
            tick = 0
        if tick is None:
            return None
        return next((at for at, ticks in taken[kind].items() if ticks >> tick & 1), None)

    def chosen(self, name: str, kind: int, ticks: int) -> Sequence[tuple[int | None, ...]]:
        """What `branch` gives for each conditional that a computation meets, tick by tick."""
        columns: list[list[int | None]] = []
        for conditional in self.met[name]:
            if self.graph.schedule.ticks.get(conditional) is None:
                columns.append([self.branch(conditional, kind, 0)] * ticks)
                continue
            column: list[int | None] = [None] * ticks
            for at, bits in reversed(tuple(self.graph.schedule.taken[conditional][kind].items())):
                for tick, bit in enumerate(reversed(f"{bits:0{ticks}b}"[-ticks:])):
                    if bit == "1":
                        column[tick] = at
            columns.append(column)
        return list(zip(*columns, strict=True)) if columns else [()] * ticks
