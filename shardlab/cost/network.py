"""How fast each kind of link really is for a group of devices, and what a step's communication costs in time.

A torus (TPU ICI) needs the group's coordinates: an axis that runs round a whole torus dimension uses both
directions of its ring, one that ends inside it is a line. Rates follow the scaling book's chapters on TPUs
and on sharded matrices (jax-ml.github.io/scaling-book): all-gather of V bytes over a bidirectional ring
takes V / (2 links), over k rings at once V / (k · 2 links), about double without wraparound; all-to-all a
quarter of the all-gather. `collective_time` adds the latency.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Protocol

from shardlab.hardware.machine import Machine

Coords = tuple[int, ...]

# Both cores of a tpu7x chip are joined on the package. Google Cloud's TPU7x page: six times a one-
# dimensional ICI link.
SAME_CHIP_LINKS = 6


@dataclass(frozen=True, slots=True)
class TorusDim:
    """How a group lies along one torus dimension: `count` positions, `stride` chips apart, `ring` if it
    closes."""

    count: int
    stride: int
    ring: bool


@dataclass(frozen=True, slots=True)
class TorusSpan:
    """How a group lies on a torus: the dimensions along which it varies, and its devices per chip.

    block: whether the chips are every combination of the positions along each dimension.
    """

    dims: tuple[TorusDim, ...]
    block: bool
    per_chip: int


class CommunicationRow(Protocol):
    """What `communication` needs of a collective; `analysis.CollectiveRow` is one."""

    @property
    def executions(self) -> tuple[int, int | None]:
        """(min, max) per step."""

    @property
    def wire_bytes(self) -> Fraction:
        """Bytes the busiest device sends, per execution."""

    @property
    def traffic(self) -> Mapping[str, Fraction] | None:
        """Bytes per tier, per execution; None without a machine."""

    @property
    def tier_s(self) -> Mapping[str, float] | None:
        """Seconds that links of each tier are busy, per execution; None when unknown."""

    @property
    def time_s(self) -> float | None:
        """Seconds of one execution with nothing else on the links; None when unknown."""


class CommunicationAnalysis(Protocol):
    """What `communication` needs of an analysis."""

    @property
    def collectives(self) -> Sequence[CommunicationRow]:
        """The collectives of the step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Communication:
    """Time a step spends on communication if nothing overlaps and nothing waits.

    communication_s: Σ executions · time of one; None when any part is unknown. tier_s: Σ executions ·
    seconds that links are busy, per tier, of what is known. dominant: the tier with the most, "" if there is
    none.
    """

    communication_s: float | None
    tier_s: Mapping[str, float]
    dominant: str


def communication(analysis: CommunicationAnalysis, machine: Machine | None = None) -> Communication:
    """Communication time of one step, upper end of every range (both branches of a conditional count).

    A row without `tier_s` (a saved analysis) is priced from its traffic at the links' rates, without latency,
    but not on a torus, where the rate depends on coordinates that a row does not hold: then the total is
    unknown, as it is for such a row without a machine.
    """
    total: float | None = 0.0
    tiers: dict[str, float] = {}
    for row in analysis.collectives:
        executions = row.executions[1]
        if not row.wire_bytes or executions == 0:
            continue
        seconds = row.tier_s if row.tier_s is not None else _link_seconds(row.traffic, machine)
        if seconds is None or executions is None:
            total = None
            continue
        for tier, each_s in seconds.items():
            tiers[tier] = tiers.get(tier, 0.0) + executions * each_s
        if total is not None:
            alone_s = row.time_s if row.time_s is not None else max(seconds.values(), default=0.0)
            total += executions * alone_s
    dominant = max(tiers, key=lambda tier: tiers[tier]) if tiers else ""
    return Communication(communication_s=total, tier_s=tiers, dominant=dominant)


def _link_seconds(traffic: Mapping[str, Fraction] | None, machine: Machine | None) -> dict[str, float] | None:
    """Seconds per tier at each link's own rate; None where one is unknown or depends on the torus."""
    if machine is None:
        return None
    links = {domain.tier: domain for domain in machine.domains if domain.tier != "ici"}
    seconds = {}
    for tier, sent_bytes in (traffic or {"": Fraction(0)}).items():
        link = links.get(tier)
        if link is None or link.bytes_per_s is None:
            return None
        seconds[tier] = float(sent_bytes) / (link.bytes_per_s * link.calibration.efficiency)
    return seconds


def torus_span(coords: Iterable[Coords], machine: Machine) -> TorusSpan:
    """How devices at these chip coordinates lie on the machine's torus. Order and position do not matter."""
    chips = Counter(coords)
    dims = []
    for values, extent, wraps in zip(zip(*chips, strict=True), machine.torus, machine.wraps, strict=True):
        distinct = sorted(set(values))
        if len(distinct) > 1:
            dims.append(_torus_dim(distinct, extent, wraps))
    block = 1
    for dim in dims:
        block *= dim.count
    return TorusSpan(tuple(dims), block == len(chips), max(chips.values()))


def _torus_dim(values: list[int], extent: int, wraps: bool) -> TorusDim:
    gaps = [after - before for before, after in pairwise(values)]
    round_gap = extent - values[-1] + values[0]
    if wraps and max(gaps) == min(gaps) == round_gap:
        return TorusDim(len(values), gaps[0], ring=True)
    if wraps:  # a line may run over the edge: it starts after the widest gap
        gaps = sorted([*gaps, round_gap])[:-1]
    return TorusDim(len(values), max(gaps), ring=False)


def gather_links(span: TorusSpan, machine: Machine) -> Fraction:
    """Links a device sends on at once in all-gather, reduce-scatter, all-reduce or broadcast.

    Two for each dimension whose ring closes, one for a line (its ends have one link, and hold up the rest).
    Groups that interleave (stride s) share the links; so do the devices of one chip that belong to
    different groups. A group that fills no block is taken as one chain.
    """
    if not span.dims:
        return Fraction(SAME_CHIP_LINKS)
    if span.block:
        links = sum((Fraction(2 if dim.ring else 1, dim.stride) for dim in span.dims), Fraction(0))
    else:
        links = Fraction(1, max(dim.stride for dim in span.dims))
    return links * span.per_chip / machine.chip.xla_devices


def all_to_all_links(span: TorusSpan, machine: Machine) -> Fraction:
    """Links that an all-to-all keeps busy per device, after its multi-hop routes: wire bytes / (this ·
    link) is the time.

    On a bidirectional ring of n chips each link carries S·Σ min(k, n-k) / 2n (S·n/8 for even n) of the S
    bytes per device, at the middle of a line S·⌊n/2⌋·⌈n/2⌉ / n; the busiest dimension decides.
    """
    if not span.dims:
        return Fraction(SAME_CHIP_LINKS)
    load = max(_all_to_all_load(dim) for dim in span.dims)
    chips = 1
    for dim in span.dims:
        chips *= dim.count
    size = chips * span.per_chip
    sharing = Fraction(
        machine.chip.xla_devices
    )  # every device of a chip sends its own S over the chip's links
    return Fraction(size - 1, size) / (load * sharing)


def _all_to_all_load(dim: TorusDim) -> Fraction:
    n = dim.count
    if dim.ring:
        return Fraction(sum(min(k, n - k) for k in range(1, n)), 2 * n) * dim.stride
    return Fraction((n // 2) * (n - n // 2), n) * dim.stride


def permute_load(pairs: Iterable[tuple[Coords, Coords]], machine: Machine) -> Fraction:
    """Messages over the busiest link direction when every pair sends one: routes go dimension by dimension.

    Each goes the shorter way round; exactly half-way round, half of it goes each way. 0 when no pair leaves
    its chip.
    """
    load: Counter[tuple[Coords, int, int]] = Counter()  # (from chip, dimension, direction) -> half messages
    for source, target in pairs:
        here = list(source)
        for axis, (extent, wraps) in enumerate(zip(machine.torus, machine.wraps, strict=True)):
            for direction, hops, halves in _ways(target[axis] - here[axis], extent, wraps):
                for step in range(hops):
                    at = (*here[:axis], (here[axis] + direction * step) % extent, *here[axis + 1 :])
                    load[at, axis, direction] += halves
            here[axis] = target[axis]
    return Fraction(max(load.values(), default=0), 2)


def hops(source: Coords, target: Coords, machine: Machine) -> int:
    """Links on the shortest route between two chips of one slice."""
    return sum(
        _ways(there - here, extent, wraps)[0][1]
        for here, there, extent, wraps in zip(source, target, machine.torus, machine.wraps, strict=True)
        if here != there
    )


def gather_hops(span: TorusSpan, size: int) -> int:
    """Links that the last piece of an all-gather crosses: half-way round each ring, along all of each line.

    The scaling book's latency of a gather is this times that of one hop. size: devices of the group; one that
    fills no block is a chain.
    """
    if not span.block:
        return (size // span.per_chip - 1) * max(dim.stride for dim in span.dims)
    return sum((dim.count // 2 if dim.ring else dim.count - 1) * dim.stride for dim in span.dims)


def _ways(distance: int, extent: int, wraps: bool) -> list[tuple[int, int, int]]:
    """Directions to go `distance` along a dimension: (direction, hops, halves of the message)."""
    if distance == 0:
        return []
    if not wraps:
        return [(1 if distance > 0 else -1, abs(distance), 2)]
    forward = distance % extent
    backward = extent - forward
    if forward == backward:
        return [(1, forward, 1), (-1, backward, 1)]
    return [(1, forward, 2)] if forward < backward else [(-1, backward, 2)]
