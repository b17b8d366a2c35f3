"""What each kind of link carries for one collective, and how long that takes.

Bytes follow the model of `shapes` (DESIGN section 3), whatever algorithm carries them out, but gloo's, which
are known (`gloo`); time follows `collective_time`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from shardlab.cost.collective_time import CollectiveTime, collective_time
from shardlab.cost.gloo import HALF, gloo_collective, level_loads, uses_gloo
from shardlab.cost.shapes import (
    ALL_TO_ALL,
    POINT_TO_POINT,
    GroupShape,
    Ids,
    LevelLoad,
    group_loads,
    group_shapes,
    pair_shape,
    wire_in,
)
from shardlab.hardware.machine import Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Per execution: bytes the busiest device sends over each tier, and the time it takes alone.

    tier: the slowest that a group spans, None when nothing is sent. time: None when a bandwidth is unknown.
    algorithm: {"name": that of the time, or of the bytes without one, "from": "model"}; `flat` is an upper
    bound.
    """

    tiers: Mapping[str, Fraction]
    time: CollectiveTime | None
    tier: str | None
    algorithm: Mapping[str, str]

    @property
    def tier_s(self) -> Mapping[str, float] | None:
        """Seconds that links of each tier are busy; None when unknown."""
        return None if self.time is None else self.time.tier_s

    @property
    def latency_s(self) -> float | None:
        """The part of `time_s` in which its links carry nothing; None when unknown."""
        return None if self.time is None else self.time.latency_s

    @property
    def time_s(self) -> float | None:
        """Seconds of one execution with nothing else on the links; None when unknown."""
        return None if self.time is None else self.time.total_s


@dataclass(frozen=True, slots=True)
class Sent:
    """A collective as `collective_time` reads it: bytes of one execution, per device."""

    kind: str
    payload_bytes: int
    wire_bytes: Fraction


@dataclass(frozen=True, slots=True)
class Joined:
    """The mesh positions that it joins."""

    groups: tuple[Ids, ...]
    pairs: tuple[tuple[int, int], ...] = ()


def traffic_of(
    *,
    kind: str,
    payload_bytes: int,
    wire_bytes: Fraction,
    groups: Sequence[Sequence[int]],
    pairs: Sequence[tuple[int, int]],
    machine: Machine,
    device_ids: Sequence[int] | None,
    in_turn: Fraction = HALF,
) -> Traffic:
    """Traffic of one execution of a collective of `kind` on `machine`.

    payload_bytes: S of DESIGN section 3. wire_bytes: what the busiest device sends. groups, pairs: mesh
    positions. device_ids: the device at each mesh position, None for the same number. in_turn: as
    `collective_time` has it. Raises UserError when
    the machine has fewer devices than the program.
    """
    ids = tuple(device_ids) if device_ids is not None else None
    joined = Joined(tuple(map(tuple, groups)), tuple((source, target) for source, target in pairs))
    row = Sent(kind, payload_bytes, wire_bytes)
    time = collective_time(row, joined, machine, ids, in_turn)
    if not wire_bytes or (not groups and not pairs):
        return _combined([[] for _ in machine.domains], machine, "none", time)
    if uses_gloo(machine):
        found = gloo_collective(kind, payload_bytes, joined.groups, joined.pairs)
        sent = [load.device_bytes for load in level_loads(found, machine, ids)]
        return _combined([[LevelLoad(one, Fraction(1))] for one in sent], machine, found.algorithm, time)
    if kind in POINT_TO_POINT:
        lie = pair_shape(joined.pairs, machine, ids)
        each = wire_bytes / lie.most if lie.most else Fraction(0)
        counted = zip(lie.counts, lie.links, strict=True)
        return _combined([[LevelLoad(each * n, link)] for n, link in counted], machine, "direct", time)
    shapes = group_shapes(joined.groups, machine, ids)
    largest = max((shape.size for shape in shapes), default=1)
    loads: list[list[LevelLoad]] = [[] for _ in machine.domains]
    for shape in shapes:
        wire = wire_in(kind, wire_bytes, shape.size, largest)
        for level, load in enumerate(group_loads(kind, payload_bytes, wire, shape, machine)):
            loads[level].append(load)
    return _combined(loads, machine, _spread(kind, shapes), time)


def _combined(
    loads: list[list[LevelLoad]], machine: Machine, spread: str, time: CollectiveTime | None
) -> Traffic:
    """Traffic of groups that run at once: at each level that of the group with the most bytes."""
    tiers: dict[str, Fraction] = {}
    slowest = None
    for domain, level in zip(machine.domains, loads, strict=True):
        most = max((load.sent_bytes for load in level), default=Fraction(0))
        if most:
            slowest = domain.tier
            tiers[domain.tier] = tiers.get(domain.tier, Fraction(0)) + most
    name = time.algorithm if time is not None else spread if tiers else "none"
    return Traffic(tiers=tiers, time=time, tier=slowest, algorithm={"name": name, "from": "model"})


def _spread(kind: str, shapes: Sequence[GroupShape]) -> str:
    """What the bytes assume where no time says more."""
    if kind in ALL_TO_ALL:
        return "direct"
    if any(shape.radices is None for shape in shapes):
        return "flat"
    levels = max((sum(radix > 1 for radix in shape.radices or ()) for shape in shapes), default=0)
    return "hierarchical" if levels > 1 else "ring"
