"""How a collective's groups and pairs lie on a machine's nested domains, and what each level carries.

The model (DESIGN section 3): a group that fills r_0 devices of each innermost domain, r_1 such domains of
each next one, and so on, runs hierarchically. All-gather goes from the outermost level inwards on ever
larger pieces, reduce-scatter back, all-reduce does both. Of the wire bytes W of one device, level i carries
W · (r_i - 1) · Π_{j>i} r_j / (n - 1): with g devices in each of N hosts the NIC sends (N-1)/N · S/g and
NVLink (g-1)/g · S. All-to-all goes straight to each peer: level i carries the share of peers whose
innermost common domain is of level i. The levels' bytes add up to W.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from shardlab.cost.network import (
    Coords,
    TorusSpan,
    all_to_all_links,
    gather_links,
    hops,
    permute_load,
    torus_span,
)
from shardlab.errors import Problem, UserError
from shardlab.hardware.machine import Machine
from shardlab.hardware.placement import torus_coords

ALL_TO_ALL = frozenset({"all-to-all", "ragged-all-to-all"})
POINT_TO_POINT = frozenset({"collective-permute", "send"})
BROADCAST = "collective-broadcast"
# A broadcast is a chain that crosses every level once; where a ragged exchange sends its bytes only the
# data says.
EVERYTHING_MAY_CROSS = frozenset({BROADCAST, "ragged-all-to-all"})

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GroupShape:
    """How one group lies in the nested domains; groups that are translates of each other have equal shapes.

    radices: r_0, r_1, … as in the module's docstring; None when the group is spread unevenly.
    peers: by level, for the device with the most, how many peers have their innermost common domain there.
    spans: by level, how the group lies on the torus where that level is one.
    """

    size: int
    radices: Ids | None
    peers: Ids
    spans: tuple[TorusSpan | None, ...]


@dataclass(frozen=True, slots=True)
class PairShape:
    """How the pairs of a permute lie in the nested domains, level by level, innermost first.

    counts: messages of the device that sends most there. links: what turns them into the load of the busiest
    link (1 away from a torus). hops: of the longest route. most: messages of the busiest device, all levels.
    """

    counts: Ids
    links: tuple[Fraction, ...]
    hops: Ids
    most: int


@dataclass(frozen=True, slots=True)
class LevelLoad:
    """Bytes of the busiest device at one level, and links it sends on at once (1 away from a torus)."""

    sent_bytes: Fraction
    links: Fraction


@lru_cache(maxsize=128)
def group_shapes(groups: tuple[Ids, ...], machine: Machine, device_ids: Ids | None) -> tuple[GroupShape, ...]:
    """The different ways in which these groups (of mesh positions) lie on the machine, but groups of one."""
    shapes = {
        _shape(_devices(group, machine, device_ids), machine): None for group in groups if len(group) > 1
    }
    return tuple(shapes)


def _devices(positions: Ids, machine: Machine, device_ids: Ids | None) -> list[int]:
    if max(positions) >= (machine.num_devices if device_ids is None else len(device_ids)):
        raise _too_small(machine, max(positions))
    devices = list(positions) if device_ids is None else [device_ids[position] for position in positions]
    if max(devices) >= machine.num_devices:
        raise _too_small(machine, max(devices))
    return devices


def _too_small(machine: Machine, device: int) -> UserError:
    what = f"has {machine.num_devices} devices, but the program uses device {device}"
    return UserError(
        Problem(f"machine {machine.spec}", what, "choose a machine with as many devices as the program")
    )


def _shape(devices: list[int], machine: Machine) -> GroupShape:
    """Count the group's devices domain by domain, from the innermost level outwards."""
    radices: list[int] | None = []
    peers = []
    inner = Counter(devices)  # the domains inside level 0 are the devices themselves
    inner_size = 1
    for domain in machine.domains:
        held = Counter(device // domain.size for device in devices)
        branches = set(Counter(unit * inner_size // domain.size for unit in inner).values())
        if radices is not None:
            radices = [*radices, branches.pop()] if len(branches) == 1 else None
        peers.append(max(held[d // domain.size] - inner[d // inner_size] for d in devices))
        inner, inner_size = held, domain.size
    spans = tuple(
        _span(devices, domain.size, machine) if domain.tier == "ici" else None for domain in machine.domains
    )
    return GroupShape(len(devices), None if radices is None else tuple(radices), tuple(peers), spans)


def _span(devices: list[int], size: int, machine: Machine) -> TorusSpan:
    """The group's lie on the torus, for its members in one slice: those in the slice that holds the most."""
    slices: dict[int, list[int]] = {}
    for device in devices:
        slices.setdefault(device // size, []).append(device)
    members = max(slices.values(), key=len)
    return torus_span((torus_coords(machine, device) for device in members), machine)


def wire_in(kind: str, wire_bytes: Fraction, size: int, largest: int) -> Fraction:
    """Wire bytes of a device in a group of `size` when `wire_bytes` is that of the largest group.

    All-gather sends (n-1) · operand, the rest a share of an operand that is the same in all groups.
    """
    if size == largest or kind == BROADCAST:
        return wire_bytes
    if kind == "all-gather":
        return wire_bytes * Fraction(size - 1, largest - 1)
    return wire_bytes * Fraction(size - 1, size) / Fraction(largest - 1, largest)


def group_loads(
    kind: str, payload_bytes: int, wire: Fraction, shape: GroupShape, machine: Machine
) -> Iterator[LevelLoad]:
    """What the busiest device of a group sends at each level."""
    links = all_to_all_links if kind in ALL_TO_ALL else gather_links
    for level, span in enumerate(shape.spans):
        if not shape.peers[level]:
            sent = Fraction(0)
        elif kind == "all-to-all":
            sent = wire * shape.peers[level] / (shape.size - 1)
        elif kind in EVERYTHING_MAY_CROSS or shape.radices is None:
            sent = Fraction(payload_bytes) if kind == BROADCAST else wire
        else:
            sent = wire * _share(shape.radices, level)
        yield LevelLoad(sent, links(span, machine) if span is not None else Fraction(1))


def _share(radices: Ids, level: int) -> Fraction:
    """The part of the wire bytes that level `level` carries."""
    outer, size = 1, 1
    for i, radix in enumerate(radices):
        size *= radix
        if i > level:
            outer *= radix
    return Fraction((radices[level] - 1) * outer, size - 1)


@lru_cache(maxsize=128)
def pair_shape(pairs: tuple[tuple[int, int], ...], machine: Machine, device_ids: Ids | None) -> PairShape:
    """How these pairs (of mesh positions) lie: each goes over the innermost domain that holds both."""
    by_level: list[list[tuple[int, int]]] = [[] for _ in machine.domains]
    for pair in pairs:
        source, target = _devices(pair, machine, device_ids)
        if source != target:
            by_level[_common_level(source, target, machine)].append((source, target))
    sent = [Counter(source for source, _ in level) for level in by_level]
    counts = tuple(max(level.values(), default=0) for level in sent)
    links, routes = [], []
    for level, count, domain in zip(by_level, counts, machine.domains, strict=True):
        on_torus = bool(count) and domain.tier == "ici"
        coords = [(torus_coords(machine, a), torus_coords(machine, b)) for a, b in level] if on_torus else []
        links.append(_pair_links(coords, count, machine) if on_torus else Fraction(1))
        routes.append(max((hops(a, b, machine) for a, b in coords), default=1))
    return PairShape(counts, tuple(links), tuple(routes), max(sum(sent, Counter()).values(), default=0))


def _pair_links(pairs: list[tuple[Coords, Coords]], count: int, machine: Machine) -> Fraction:
    """Links that turn `count` messages of the busiest device into the load of the busiest link."""
    load = permute_load(pairs, machine)
    return count / load if load else gather_links(TorusSpan((), True, 2), machine)


def _common_level(a: int, b: int, machine: Machine) -> int:
    for level, domain in enumerate(machine.domains):
        if a // domain.size == b // domain.size:
            return level
    return len(machine.domains) - 1
