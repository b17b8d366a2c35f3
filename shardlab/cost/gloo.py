"""What gloo sends: XLA:CPU's library between processes, with one rank for every device.

Its algorithms are not those of NCCL, and one of them is not bandwidth-optimal (S as in DESIGN section 3, n
ranks in the order of the replica group):

- all-reduce: one ring, rank r to r - 1, 2 (n-1)/n · S each (`gloo/allreduce.cc`, RING, which
  `xla/backends/cpu/collectives/gloo_communicator.cc` asks for).
- all-gather: one ring, rank r to r + 1, (n-1)/n · S each (`gloo/allgather.cc`).
- reduce-scatter: halving with the rank at distance 1, 2, 4, …; that leaves chunks in bit-reversed order, and
  ranks whose number is not its own reverse send their S/n once more (`gloo/reduce_scatter.h`). Here n is a
  power of two; for another n the bytes are those of S/n to every rank, and `exact` is false.
- all-to-all and collective-permute: straight to each peer (`gloo_communicator.cc`).

(facebookincubator/gloo @cc441984, openxla/xla @3e1a45f9 and @f07f240f.) There is one ring and no hierarchy:
of a group that fills two sites, one device of each sends the whole ring's bytes across. All groups run at
once and share their site's link. Devices of one process talk over the loopback interface. A collective of
several arrays runs them one after the other.

A message is sent when its receiver has said that it is ready, and that word waits behind what the receiver is
sending to the same rank itself (`gloo/transport/tcp/pair.cc`: one queue for each pair). Where two ranks send
to each other and post their send first, as all but all-reduce do, everything hangs on who comes first: when
both come within the time of a word, both words pass before any data, and data goes both ways at once; else
the one that came late sends first, its word behind its data, and they take turns. That lasts until something
brings them together again, as an all-reduce does. A plain TCP stream both ways over one connection has the
full rate each way. Who comes first no program says: taken is that half of them go in turn, and a prediction
says how much shorter or longer a step is with none or all (`turns_s`).

Measured by `experiments/wire_calibrate.py` over 20 to 500 Mbit/s on quiet cores, 128 and 512 KiB: a permute,
an all-to-all or a reduce-scatter between two ranks takes 1.86 to 2.04 times its bytes' time in turn, and
otherwise 1.03 to 1.15 (at 20 Mbit/s up to 1.40, when only some of the runs went in turn); an all-gather,
which sends two halves, 1.48 to 1.57, and 1.01 to 1.17. By themselves, again and again, 17 of 18 of the former
went in turn; right after an all-reduce none did throughout. In another hour, 16 to 256 KiB over 100 Mbit/s to
2 Gbit/s, 15 of 32 did, and none of 12 whose message takes 0.2 to 1 ms: that is how far apart turns leave two
ranks, and a word's time is not much less. An all-reduce posts what it receives first, of four pieces two at a
time: 1.00 to 1.07.

Among more than two, a word waits behind data for others, too: behind what the same rank sends on, if it posts
that first, and behind what another rank of its site sends over the same link. Of a ring two pieces of a chunk
are under way at once, of a permute the message. All of one or the other wait, unless the ranks come within a
word's time: of two sites of two devices, that whose data left before its other rank's word was there makes
the other site wait. Frames on the links show it: an all-reduce of 128 KiB over 2 x 2 has 2.6 ms between its
first word and its first data in one of the sites, and as much at the end in the other, of 19.7 ms, which is
14/12 of its bytes' time and acknowledgements (1.19 to 1.20 in all of 64 to 256 KiB, 1.03 to 1.12 on 4 x 1,
where a rank's word leaves before its data). All-gathers took 1.20 to 1.33 on 4 x 1 (all in turn: 1.19) and
1.13 to 1.38 on 2 x 2 (1.35); permutes 1.28 to 2.21 on 4 x 1 (2.02). Behind another connection's data a word
waits no longer than the kernel lets it queue: 6.0 to 10.5 ms over 20 to 500 Mbit/s, at 500 once 15.2 and, on
busy cores, 20.1 (`wire_calibrate.py`; taken as 7.5, and most messages here are shorter).

Ranks that share a link fill part of each other's gaps in an all-to-all: taken as 1/k of what waits for k
ranks on a link. Single ones of four ranks (16 to 256 KiB to each) took 1.61 to 2.02 times their bytes on four
links, once 2.48, and 1.19 to 1.61 on two, right after an all-reduce or not. The steps of halving come one
after the other, each with its turns: single reduce-scatters of four ranks on four links of 100 Mbit/s took
2.16 to 2.46 times the time of (n-1)/n · S (64 KiB to 1 MiB), where their bytes say 1.33, with half of the
turns 2, and with all 2.67.

Where a rank sends to one and receives from another, as in a ring of more than two, acknowledgements do not
ride on data: they take 0.0224 of what comes in (`wire_calibrate.py`) from what goes out. Plain TCP streams
around three or four such links have 0.914 to 0.935 of the rate, where both ways over one have 0.956.

Each message also has three headers of 48 bytes: the data's own, and a word of either side that it is ready.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from shardlab.hardware.machine import NETWORKS, Machine

Sends = Mapping[tuple[int, int], Fraction]
_Sends = defaultdict[tuple[int, int], Fraction]
_Links = defaultdict[tuple[str, int], Fraction]  # out of, or into, a domain
HEADER_BYTES = 48
ALL_TO_ALL = "gloo to each"
_POINT_TO_POINT = frozenset({"collective-permute", "send"})
HALF = Fraction(1, 2)  # of the collectives, that go in turn
# Bytes of acknowledgements that ride on no data, over those of the frames that they are for.
ACKNOWLEDGED = Fraction(224, 10_456)
QUEUED_S = 0.0075  # what one connection has in front of a link, which words of another wait for
TOGETHER_S = 0.001  # ranks whose messages to each other are shorter do not take turns for long


def uses_gloo(machine: Machine) -> bool:
    """Whether collectives run in gloo: CPU hosts with links between them, not emulated devices."""
    return machine.chip.family == "cpu" and not machine.emulated


@dataclass(frozen=True, slots=True, kw_only=True)
class GlooCollective:
    """One execution: bytes from a rank to another, and how many messages follow each other.

    phases: by (sending, receiving) mesh position, what is sent at once; one after the other. before_own: the
    part of what a rank sends that may leave before its own word that it is ready; before_others: before that
    of a rank on the same link. exact: whether gloo's algorithm is written out above.
    """

    algorithm: str
    phases: tuple[Sends, ...]
    steps: int
    before_own: Fraction = Fraction(1)
    before_others: Fraction = Fraction(1)
    exact: bool = True

    @property
    def sends(self) -> Sends:
        """In all."""
        total: _Sends = defaultdict(Fraction)
        for phase in self.phases:
            for pair, sent in phase.items():
                total[pair] += sent
        return total


def gloo_collective(
    kind: str, payload_bytes: int, groups: Sequence[Sequence[int]], pairs: Sequence[tuple[int, int]]
) -> GlooCollective:
    """What one execution of a collective sends; payload_bytes is S of the largest group."""
    phases = defaultdict[int, _Sends](lambda: defaultdict(Fraction))
    sends = phases[0]
    if kind in _POINT_TO_POINT:
        for source, target in pairs:
            if source != target:
                sends[source, target] += payload_bytes
        return GlooCollective(algorithm="gloo direct", phases=(sends,), steps=1)
    largest, exact, steps = max(map(len, groups), default=1), True, 0
    for group in groups:
        n = len(group)
        if n < 2:
            continue
        full = Fraction(payload_bytes * n, largest) if kind == "all-gather" else Fraction(payload_bytes)
        if kind == "all-reduce":
            _ring(group, -1, full * 2 * (n - 1) / n, sends)
            steps = max(steps, 2 * (n - 1))
        elif kind == "all-gather":
            _ring(group, 1, full * (n - 1) / n, sends)
            steps = max(steps, n - 1)
        elif kind == "reduce-scatter" and n & (n - 1) == 0:
            _halving(group, full, phases)
            steps = max(steps, n.bit_length())
        else:
            exact = exact and kind == "all-to-all"
            _to_each(group, full / n, sends)
            steps = max(steps, 1)
    name = {"all-reduce": "ring", "all-gather": "ring", "reduce-scatter": "halving"}.get(kind, "to each")
    own = others = Fraction(1)
    if name == "ring":  # two pieces of 2 (n-1) for each of its rounds are under way at once
        rounds = (2 if kind == "all-reduce" else 1) * max(largest - 1, 1)
        own = Fraction(1, 32) if kind == "all-reduce" else Fraction(1, 2 * rounds)
        others = Fraction(1, rounds)
    return GlooCollective(
        algorithm=f"gloo {name}",
        phases=tuple(phases.values()),
        steps=steps,
        before_own=own,
        before_others=others,
        exact=exact,
    )


def header_bytes(kind: str, sends: Sends, size: int) -> Mapping[tuple[int, int], int]:
    """What gloo's own headers add to `sends` for each array, in groups of `size`: two for a message, and one
    back. Arrays with fewer elements than messages have less.
    """
    messages = {"all-reduce": 4 * (size - 1), "all-gather": 2 * (size - 1)}.get(kind, 1)
    found: defaultdict[tuple[int, int], int] = defaultdict(int)
    for source, target in sends:
        found[source, target] += 2 * HEADER_BYTES * messages
        found[target, source] += HEADER_BYTES * messages
    return found


def _ring(group: Sequence[int], to: int, sent: Fraction, sends: _Sends) -> None:
    for rank, position in enumerate(group):
        sends[position, group[(rank + to) % len(group)]] += sent


def _halving(group: Sequence[int], full: Fraction, phases: Mapping[int, _Sends]) -> None:
    n = len(group)
    bits = n.bit_length() - 1
    for rank, position in enumerate(group):
        for bit in range(bits):
            phases[bit][position, group[rank ^ (1 << bit)]] += full / 2 ** (bit + 1)
        reverse = int(f"{rank:0{bits}b}"[::-1], 2)
        if reverse != rank:
            phases[bits][position, group[reverse]] += full / n


def _to_each(group: Sequence[int], piece: Fraction, sends: _Sends) -> None:
    for source in group:
        for target in group:
            if source != target:
                sends[source, target] += piece


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one level carries in one execution, bytes.

    device: sent by the busiest device. uplink: out of, or into, the busiest of the domains that the level
    joins. busy: the same with acknowledgements, and the expected part of what waits for its turn, as if it
    were sent.
    """

    device_bytes: Fraction
    uplink_bytes: Fraction
    busy_bytes: Fraction


def level_loads(
    found: GlooCollective, machine: Machine, device_ids: Sequence[int] | None, in_turn: Fraction = HALF
) -> list[Load]:
    """Bytes by level of the machine's domains: each send goes over the innermost that holds both devices.

    in_turn: how often they go in turn, 0 to 1.
    """
    phases = [_phase_loads(phase, found, machine, device_ids, in_turn) for phase in found.phases]
    if len(phases) == 1:
        return phases[0]
    whole = _phase_loads(found.sends, found, machine, device_ids, in_turn)
    return [
        replace(load, busy_bytes=sum((phase[level].busy_bytes for phase in phases), Fraction(0)))
        for level, load in enumerate(whole)
    ]


def _phase_loads(
    sends: Sends, found: GlooCollective, machine: Machine, device_ids: Sequence[int] | None, in_turn: Fraction
) -> list[Load]:
    """Of what is sent at once."""
    by_level: list[_Sends] = [defaultdict(Fraction) for _ in machine.domains]
    for (source, target), sent in sends.items():
        a, b = (source, target) if device_ids is None else (device_ids[source], device_ids[target])
        level = next(i for i, domain in enumerate(machine.domains) if a // domain.size == b // domain.size)
        by_level[level][a, b] += sent
    return [_load(crossing, found, machine, level, in_turn) for level, crossing in enumerate(by_level)]


def _load(crossing: Sends, found: GlooCollective, machine: Machine, level: int, in_turn: Fraction) -> Load:
    """Of what crosses one level at once, by sending and receiving device."""
    inner, network = inner_size(machine, level), machine.domains[level].tier in NETWORKS
    devices, links, words = defaultdict[int, Fraction](Fraction), _Links(Fraction), _Links(Fraction)
    for (source, target), sent in crossing.items():
        devices[source] += sent
        links["out", source // inner] += sent
        links["in", target // inner] += sent
        if network and (target, source) not in crossing:
            words["out", target // inner] += sent * ACKNOWLEDGED
            words["in", source // inner] += sent * ACKNOWLEDGED
    most = max(links.values(), default=Fraction(0))
    lasting, queue = (_carried(time_s, machine, level) for time_s in (TOGETHER_S, QUEUED_S))
    busy = max((sent + words[link] for link, sent in links.items()), default=Fraction(0))
    turn = Fraction(0)
    for (source, target), sent in crossing.items():
        back = crossing.get((target, source))
        if back is not None:
            lasts = in_turn == 1 or back >= lasting
            turn = max(turn, sent + (found.before_own * in_turn * back if lasts else 0))
        elif network:
            link = "out", source // inner
            waits = min(_ahead(target, devices, found, inner), queue)
            busy = max(busy, links[link] + words[link] + in_turn * waits)
    if found.algorithm == ALL_TO_ALL and busy > turn:
        sharing = Counter(device // inner for device in devices)
        busy = most * (1 + in_turn / max(sharing.values()))
    return Load(
        device_bytes=max(devices.values(), default=Fraction(0)),
        uplink_bytes=most,
        busy_bytes=max(turn, busy),
    )


def _ahead(device: int, sent: Mapping[int, Fraction], found: GlooCollective, inner: int) -> Fraction:
    """What a device's word may wait for: the most of its own message, or of another one's on its link."""
    waits = [
        out * (found.before_own if other == device else found.before_others)
        for other, out in sent.items()
        if other // inner == device // inner
    ]
    return max(waits, default=Fraction(0))


def _carried(time_s: float, machine: Machine, level: int) -> Fraction:
    """Bytes that a domain's link carries in that time; none where its rate is unknown."""
    return Fraction(time_s * (machine.domains[level].bytes_per_s or 0) * inner_size(machine, level))


def inner_size(machine: Machine, level: int) -> int:
    """Devices in each of the domains that this level joins."""
    return machine.domains[level - 1].size if level else 1
