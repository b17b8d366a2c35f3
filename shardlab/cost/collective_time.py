"""How long one collective takes with nothing else on its links: latency and bandwidth, by placement.

Five kinds of link, five forms. S is the full array, n the group's size, rounds 2 for all-reduce and 1 else.

- Inside one NVLink, xGMI or PCIe domain (NCCL): a ring of rounds · (n-1) steps, or, where the switch can
  reduce, NVLS, which sends and receives the array once: `launch + steps · latency + bytes / (rate ·
  efficiency)`, and the pipeline of chunks fills: `fill · √(latency · transfer)`. NCCL takes the faster (as
  its tuning.cc does), so does this.
- Over a network (NCCL): its rings run through every GPU of every host, so each NIC carries rounds · (n-1)/n
  · S/g, g of the group's GPUs in a host, not the (N-1)/N · S/g of the hierarchy that `traffic` counts. Two
  nodes of eight A100 reach 86 GB/s busbw on NICs of 100, not 187 (nccl_reported_busbw.csv). The steps are
  those of XLA's speed-of-light model (`network_use`). A small all-reduce is a tree instead.
- A TPU torus: the scaling book's forms (`network`), latency · hops added, not the larger of the two, as the
  Ironwood gathers measured are 13 µs late at every size.
- Between TPU slices (DCN): the hierarchy that `traffic` counts, rounds · (D-1) steps.
- Between CPU hosts (gloo): one ring per group, whose steps all wait for the slowest link (`cost/gloo.py`).

Machines without calibration are priced at their datasheet's rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Protocol

from shardlab.cost.gloo import HALF, GlooCollective, gloo_collective, inner_size, level_loads, uses_gloo
from shardlab.cost.network import gather_hops
from shardlab.cost.shapes import (
    ALL_TO_ALL,
    BROADCAST,
    POINT_TO_POINT,
    GroupShape,
    Ids,
    group_loads,
    group_shapes,
    pair_shape,
    wire_in,
)
from shardlab.hardware.machine import NETWORKS, Domain, Machine

# NVIDIA/nccl src/graph/tuning.cc @5067397c: what a tree reaches of what a ring does.
TREE_EFFICIENCY = 0.92
# What fits XLA's table of GB200 all-to-alls over 8 to 36 GPUs; 4 and 72 wait longer than that.
PEERS_AT_ONCE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveTime:
    """One execution of a collective, alone on its links.

    algorithm: ring, nvls, tree, direct, hierarchical, flat (uneven groups: an upper bound), gloo's, or none.
    latency_s: launch, steps, and pipelines that fill: links carry nothing. bandwidth_s: the busiest tier.
    tier_s: seconds that each device's links of a tier are busy: what others that share them wait for.
    """

    algorithm: str
    latency_s: float
    bandwidth_s: float
    tier_s: Mapping[str, float]

    @property
    def total_s(self) -> float:
        """Seconds from its start to its end."""
        return self.latency_s + self.bandwidth_s


class Sent(Protocol):
    """What a collective sends; `analysis.CollectiveRow` is one."""

    @property
    def kind(self) -> str:
        """As in DESIGN section 3."""

    @property
    def payload_bytes(self) -> int:
        """S of DESIGN section 3."""

    @property
    def wire_bytes(self) -> Fraction:
        """What the busiest device sends."""


class Joined(Protocol):
    """Which mesh positions it joins; `attribute.members.Members` is one."""

    @property
    def groups(self) -> Sequence[Sequence[int]]:
        """Replica groups; empty for permutes."""

    @property
    def pairs(self) -> Sequence[tuple[int, int]]:
        """(source, target) of permutes and sends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Use:
    """What one level does for a group: bytes of the busiest device over `rate`, and steps that wait."""

    domain: Domain
    busy_s: float
    waiting_s: float = 0.0
    launch_s: float | None = None
    fills: bool = False


NOTHING = CollectiveTime(algorithm="none", latency_s=0.0, bandwidth_s=0.0, tier_s={})


def collective_time(
    row: Sent,
    members: Joined,
    machine: Machine,
    device_ids: Sequence[int] | None = None,
    in_turn: Fraction = HALF,
) -> CollectiveTime | None:
    """The time of one execution of `row` on `machine`; None when a bandwidth, or who takes part, is unknown.

    device_ids: the device at each mesh position, None for the same number. Groups run at once: the slowest
    counts. in_turn: how often gloo's ranks take turns (`cost/gloo.py`). Raises UserError when the machine has
    fewer devices than the program.
    """
    ids = tuple(device_ids) if device_ids is not None else None
    if not row.wire_bytes:
        return NOTHING
    if uses_gloo(machine):
        found = gloo_collective(row.kind, row.payload_bytes, members.groups, members.pairs)
        return _gloo_time(found, machine, ids, in_turn) if found.sends else None
    if row.kind in POINT_TO_POINT:
        pairs = tuple((source, target) for source, target in members.pairs)
        return _pairs_time(row.wire_bytes, pairs, machine, ids) if pairs else None
    if not members.groups:
        return None
    shapes = group_shapes(tuple(map(tuple, members.groups)), machine, ids)
    largest = max((shape.size for shape in shapes), default=1)
    times = [
        group_time(
            row.kind,
            row.payload_bytes,
            wire_in(row.kind, row.wire_bytes, shape.size, largest),
            shape,
            machine,
        )
        for shape in shapes
    ]
    known = [time for time in times if time is not None]
    return _at_once(known) if len(known) == len(times) else None


def _gloo_time(
    found: GlooCollective, machine: Machine, device_ids: Ids | None, in_turn: Fraction
) -> CollectiveTime | None:
    """All groups at once over the links of their hosts. Every step waits for the slowest level's latency."""
    uses = []
    for level, load in enumerate(level_loads(found, machine, device_ids, in_turn)):
        domain = machine.domains[level]
        if not load.busy_bytes:
            continue
        if domain.bytes_per_s is None:
            return None
        rate = domain.bytes_per_s * inner_size(machine, level) * domain.calibration.efficiency
        uses.append(_Use(domain=domain, busy_s=float(load.busy_bytes) / rate))
    waiting_s = found.steps * max((use.domain.latency_s or 0.0 for use in uses), default=0.0)
    return _run(found.algorithm, [replace(use, waiting_s=waiting_s / len(uses)) for use in uses])


def group_time(
    kind: str, payload_bytes: int, wire: Fraction, shape: GroupShape, machine: Machine
) -> CollectiveTime | None:
    """The fastest algorithm for one group that sends `wire` bytes per device; None: a rate is unknown."""
    used = [domain for domain, peers in zip(machine.domains, shape.peers, strict=True) if peers]
    if any(domain.bytes_per_s is None for domain in used):
        return None
    return min(
        algorithms(kind, payload_bytes, wire, shape, machine), key=lambda time: time.total_s, default=NOTHING
    )


def algorithms(
    kind: str, payload_bytes: int, wire: Fraction, shape: GroupShape, machine: Machine
) -> Iterator[CollectiveTime]:
    """What each algorithm that the library has for this group takes; all rates must be known."""
    levels = [level for level, peers in enumerate(shape.peers) if peers]
    if not levels:
        return
    domains = [machine.domains[level] for level in levels]
    if shape.radices is None and kind not in ALL_TO_ALL:
        yield _run("flat", _hierarchy(kind, payload_bytes, wire, shape, machine))
    elif machine.family == "tpu":
        name = "direct" if kind in ALL_TO_ALL else "hierarchical" if len(levels) > 1 else "ring"
        yield _run(name, _hierarchy(kind, payload_bytes, wire, shape, machine))
    elif len(levels) == 1 and domains[0].tier not in NETWORKS:
        yield from _inside(kind, wire, shape.size, domains[0])
    else:
        yield from _across(kind, payload_bytes, wire, shape, machine)


def _rounds(kind: str) -> int:
    return 2 if kind == "all-reduce" else 1


def _rate(domain: Domain, size: int) -> float:
    """Bytes per second that a device reaches in a group of `size`."""
    rate = domain.bytes_per_s or math.inf  # unknown rates were answered with None before
    if domain.pair_bytes_per_s is not None:
        rate = min(rate, domain.pair_bytes_per_s * (size - 1))
    return rate * domain.calibration.efficiency


def _inside(kind: str, wire: Fraction, size: int, domain: Domain) -> Iterator[CollectiveTime]:
    """One domain of NVLink, xGMI or PCIe: ring, NVLS, or straight to each peer."""
    fact, rounds = domain.calibration, _rounds(kind)
    rate, hop_s = _rate(domain, size), domain.latency_s or 0.0
    if kind in ALL_TO_ALL:
        waiting_s = (size - 1) / PEERS_AT_ONCE * hop_s
        yield _run(
            "direct", [_Use(domain=domain, busy_s=float(wire) / rate, waiting_s=waiting_s, fills=True)]
        )
        return
    own_bytes = fact.own_piece * float(wire) / (size - 1)
    ring = _Use(
        domain=domain,
        busy_s=(float(wire) + own_bytes) / rate,
        waiting_s=rounds * (size - 1) * hop_s,
        fills=True,
    )
    yield _run("ring", [ring])
    if kind == "all-reduce" and size > 2 and fact.switch_efficiency and domain.bytes_per_s:
        full_bytes = float(wire) * size / (2 * (size - 1))  # each device sends and receives the array once
        busy_s = full_bytes / (domain.bytes_per_s * fact.switch_efficiency)
        yield _run("nvls", [_Use(domain=domain, busy_s=busy_s, launch_s=fact.switch_latency_s, fills=True)])


def _across(
    kind: str, payload_bytes: int, wire: Fraction, shape: GroupShape, machine: Machine
) -> Iterator[CollectiveTime]:
    """Groups over a network: the links inside run beside it, and wait for it."""
    loads = list(group_loads(kind, payload_bytes, wire, shape, machine))
    size, held = shape.size, _held(shape)
    ring, tree = [], []
    for level, domain in enumerate(machine.domains):
        if not shape.peers[level]:
            continue
        if domain.tier not in NETWORKS:
            busy_s = float(loads[level].sent_bytes) / _rate(domain, size)
            ring.append(_Use(domain=domain, busy_s=busy_s))
            tree.append(ring[-1])
            continue
        steps, piece_bytes = _network_steps(kind, wire, shape, held, level)
        ring.append(network_use(domain, steps, piece_bytes))
        tree.append(_tree_use(domain, wire, shape, held, level))
    yield _run("direct" if kind in ALL_TO_ALL else "ring", ring)
    if kind == "all-reduce":
        yield _run("tree", tree)


def _held(shape: GroupShape) -> list[int]:
    """Of the group's devices, how many one domain inside each level holds, and at the end all of them."""
    held = [1]
    for radix in shape.radices or ():
        held.append(held[-1] * radix)
    return held


def _network_steps(
    kind: str, wire: Fraction, shape: GroupShape, held: list[int], level: int
) -> tuple[float, float]:
    """How many pieces in turn a NIC of this level sends, and their bytes (XLA's speed-of-light model).

    A ring's rounds · (n-1) steps leave a domain of g devices one time in g, in any one of its g channels.
    """
    size = shape.size
    if kind in ALL_TO_ALL:
        return float(shape.peers[level]), float(wire) / (size - 1)
    piece_bytes = float(wire) if kind == BROADCAST else float(wire) / (_rounds(kind) * (size - 1))
    return _rounds(kind) * (size - 1) / held[level], piece_bytes


def network_use(domain: Domain, steps: float, piece_bytes: float) -> _Use:
    """`steps` pieces in turn over a network.

    XLA's speed-of-light model (xla/service/gpu/model/sol_gpu_cost_model.cc @2418c88b5d): each takes
    `piece / (rate · efficiency) + ⌈piece / chunk⌉ · preparation + round trip`; it counts 2.5 % of headers,
    which is an efficiency of 1 / 1.025.
    """
    fact = domain.calibration
    chunks = math.ceil(piece_bytes / fact.chunk_bytes) if fact.chunk_bytes else 0
    wait_s = (domain.latency_s or 0.0) + chunks * (fact.chunk_s or 0.0)
    return _Use(domain=domain, busy_s=steps * piece_bytes / _rate(domain, 2), waiting_s=steps * wait_s)


def _tree_use(domain: Domain, wire: Fraction, shape: GroupShape, held: list[int], level: int) -> _Use:
    """An all-reduce as two binary trees over the hosts, each with half of the array.

    A host is a leaf of one (half of it up) and has two children in the other (half up, half down twice): 2
    S/g per NIC, and 2 · log2(hosts) waits. NCCL's tuning.cc counts two hosts alike.
    """
    units = shape.size // held[level]
    sent_bytes = float(wire) * shape.size / (shape.size - 1) / held[level]
    waiting_s = 2 * math.ceil(math.log2(units)) * (domain.latency_s or 0.0)
    return _Use(domain=domain, busy_s=sent_bytes / (_rate(domain, 2) * TREE_EFFICIENCY), waiting_s=waiting_s)


def _hierarchy(
    kind: str, payload_bytes: int, wire: Fraction, shape: GroupShape, machine: Machine
) -> list[_Use]:
    """A TPU's torus and DCN, and groups that are spread unevenly: bytes as `traffic` has them."""
    uses = []
    loads = group_loads(kind, payload_bytes, wire, shape, machine)
    rounds, units = _rounds(kind), [*(shape.radices or shape.peers)]
    for level, load in enumerate(loads):
        domain, span = machine.domains[level], shape.spans[level]
        if not load.sent_bytes:
            continue
        inside = shape.peers[level] + 1  # of the group, in the slice that holds the most
        steps = rounds * (gather_hops(span, inside) if span is not None else max(units[level] - 1, 1))
        busy_s = float(load.sent_bytes / load.links) / _rate(domain, shape.size)
        uses.append(_Use(domain=domain, busy_s=busy_s, waiting_s=steps * (domain.latency_s or 0.0)))
    return uses


def _pairs_time(
    wire_bytes: Fraction, pairs: tuple[tuple[int, int], ...], machine: Machine, device_ids: Ids | None
) -> CollectiveTime | None:
    """Permutes and sends: every pair at once, each over the innermost domain that holds both its devices."""
    shape = pair_shape(pairs, machine, device_ids)
    each = wire_bytes / shape.most if shape.most else Fraction(0)
    uses = []
    for level, domain in enumerate(machine.domains):
        if not shape.counts[level]:
            continue
        if domain.bytes_per_s is None:
            return None
        sent_bytes = float(each * shape.counts[level] / shape.links[level])
        if domain.tier in NETWORKS:
            uses.append(network_use(domain, shape.counts[level], float(each)))
        else:
            busy_s, waiting_s = sent_bytes / _rate(domain, 2), shape.hops[level] * (domain.latency_s or 0.0)
            fills = domain.tier != "ici"
            uses.append(_Use(domain=domain, busy_s=busy_s, waiting_s=waiting_s, fills=fills))
    return _run("direct", uses) if uses else NOTHING


def _run(name: str, uses: Sequence[_Use]) -> CollectiveTime:
    """Levels that work at once: the busiest decides, their waits add up, one launch."""
    tier_s: dict[str, float] = {}
    for use in uses:
        tier_s[use.domain.tier] = tier_s.get(use.domain.tier, 0.0) + use.busy_s
    launches = [use.launch_s if use.launch_s is not None else use.domain.calibration.launch_s for use in uses]
    latency_s = max((one or 0.0 for one in launches), default=0.0) + sum(use.waiting_s for use in uses)
    bandwidth_s = max(tier_s.values(), default=0.0)
    filling = max((use.domain.calibration.fill for use in uses if use.fills), default=0.0)
    latency_s += filling * math.sqrt(latency_s * bandwidth_s)
    return CollectiveTime(algorithm=name, latency_s=latency_s, bandwidth_s=bandwidth_s, tier_s=tier_s)


def _at_once(times: Sequence[CollectiveTime]) -> CollectiveTime:
    """Groups that run at once: the slowest decides, and each tier is as busy as the busiest group's."""
    slowest = max(times, key=lambda time: time.total_s, default=NOTHING)
    tier_s: dict[str, float] = {}
    for time in times:
        for tier, busy_s in time.tier_s.items():
            tier_s[tier] = max(tier_s.get(tier, 0.0), busy_s)
    return CollectiveTime(
        algorithm=slowest.algorithm,
        latency_s=slowest.latency_s,
        bandwidth_s=slowest.bandwidth_s,
        tier_s=tier_s,
    )
