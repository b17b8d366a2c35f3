"""From one collective of a program to its row: devices, axes, bytes, tier, origin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from shardlab.analysis.records import CollectiveRow, DeviceRuns, LedgerEntry, Range
from shardlab.attribute.axes import Axes, axes_of_groups, axes_of_pairs
from shardlab.attribute.calls import CallGraph
from shardlab.attribute.chains import Chains
from shardlab.attribute.collectives import Collective
from shardlab.attribute.members import (
    Members,
    Placement,
    kinds_joined,
    megascale_members,
    members,
    send_members,
)
from shardlab.attribute.neighbours import Neighbours, enclosing_op_name
from shardlab.attribute.origin import Origin, origin_of
from shardlab.attribute.payload import Payload
from shardlab.attribute.rings import Realized, realized_by_permutes
from shardlab.cost.gloo import HALF, uses_gloo
from shardlab.cost.traffic import Traffic, traffic_of
from shardlab.cost.wire import Wire, wire_of
from shardlab.hardware.machine import Machine
from shardlab.hlo.attributes import channel_id, errors_at
from shardlab.hlo.module import Module


@dataclass(slots=True)
class Rows:
    """What rows of one module are made from."""

    module: Module
    graph: CallGraph
    mesh: Mapping[str, int] | None
    device_ids: Sequence[int] | None
    machine: Machine | None
    placement: Placement
    training: bool
    _known: dict[tuple[object, ...], tuple[Members, Axes]] = field(default_factory=dict)
    _wires: dict[tuple[str, int, int, int], Wire] = field(default_factory=dict)
    _inexact: dict[str, str] = field(default_factory=dict)
    _uneven: dict[str, str] = field(default_factory=dict)
    _neighbours: Neighbours = field(default_factory=Neighbours)
    _chains: Chains = field(init=False)

    def __post_init__(self) -> None:
        self._chains = Chains(self.module)

    def realized(self, collectives: Sequence[Collective]) -> dict[tuple[str, str], Realized]:
        """What permutes carry out together, by (computation, instruction)."""
        pairs = []
        for one in collectives:
            if one.kind == "collective-permute" and one.target is None:
                with errors_at(one.instruction):
                    pairs.append((one, self._joined(one)[0].pairs))
        return realized_by_permutes(self.module, self.graph, pairs)

    def row(self, collective: Collective, realizes: Realized | None = None) -> CollectiveRow:
        """The row of one collective. realizes: what it is part of, where it is a permute of a ring.

        Raises ParseError, which points to it, when its text cannot be read.
        """
        with errors_at(collective.instruction):
            return self._row(collective, realizes)

    def _row(self, collective: Collective, realizes: Realized | None) -> CollectiveRow:
        joined, axes = self._joined(collective)
        wire = self._wire(collective.kind, collective.payload, joined)
        logical = self._wire(collective.kind, collective.logical, joined) if collective.logical else None
        origin = self._origin(collective)
        traffic = self._traffic(collective, wire, joined)
        pairs = [pair for pair in joined.pairs if pair[0] != pair[1]]
        sizes = [len(group) for group in joined.groups] or [2] * len(pairs) or [1] * len(joined.pairs)
        tier = traffic.tier if traffic else None
        return CollectiveRow(
            name=collective.name,
            kind=collective.kind,
            axes=axes.names,
            axes_reason=axes.reason,
            tier=tier or ("dcn" if collective.target is not None else None),
            group_size=max(sizes, default=1),
            num_groups=len(sizes),
            executions=self.graph.times[collective.computation],
            by_device=self._by_device(collective, joined),
            asynchronous=collective.asynchronous,
            dtypes=collective.payload.dtypes,
            payload_bytes=wire.payload_bytes,
            wire_bytes=wire.wire_bytes,
            fabric_bytes=wire.fabric_bytes,
            logical_payload_bytes=logical.payload_bytes if logical else None,
            logical_wire_bytes=logical.wire_bytes if logical else None,
            traffic=traffic.tiers if traffic else None,
            tier_s=traffic.tier_s if traffic else None,
            latency_s=traffic.latency_s if traffic else None,
            time_s=traffic.time_s if traffic else None,
            algorithm=traffic.algorithm if traffic else None,
            bound="upper" if collective.payload.upper_bound else None,
            realizes=realizes,
            phase=origin.phase,
            recompute=origin.recompute,
            op_name=origin.op_name,
            layer=origin.layer,
            source=origin.source,
        )

    def _by_device(self, collective: Collective, joined: Members) -> tuple[DeviceRuns, ...] | None:
        """How often each device runs a collective, None where all run it equally often."""
        schedule = self.graph.schedule
        runs = schedule.by_device(collective.computation)
        if not runs:
            return None
        for together in (*joined.groups, *joined.pairs):
            found = {runs[member % len(runs)] for member in together}
            if len(found) > 1:
                self._uneven[collective.name] = "devices that it joins run it a different number of times"
        devices: dict[Range, list[int]] = {}
        for device, executions in enumerate(runs):
            devices.setdefault(executions, []).append(device)
        return tuple(DeviceRuns(executions=e, devices=device_ranges(d)) for e, d in devices.items())

    def members(self, collective: Collective) -> Members:
        """The mesh positions that a collective joins; one object for all that are written alike."""
        return self._joined(collective)[0]

    def _origin(self, collective: Collective) -> Origin:
        inside_out = (collective.instruction, *collective.around)
        outermost = self.module.computations[collective.outermost]

        def nearby() -> str:
            found = ""
            if collective.around and collective.around[0].opcode == "call":  # else it stands there by itself
                inner = self.module.computations[collective.computation]
                found = self._neighbours.op_name(inner, collective.instruction, collective.kind)
            if not found:
                last = self._chains.end(outermost, collective.instruction) or inside_out[-1]
                found = self._neighbours.op_name(outermost, last, collective.kind)
            return found or enclosing_op_name(self.graph.sites, collective.outermost)

        return origin_of(self.module, inside_out, self.training, nearby)

    def _joined(self, collective: Collective) -> tuple[Members, Axes]:
        """Devices and axes. Large programs repeat few group texts, so these are worked out once per text."""
        attributes = collective.instruction.attributes
        key = (
            collective.instruction.opcode,
            attributes.get("replica_groups"),
            attributes.get("source_target_pairs"),
            collective.pairs_text,
            collective.target,
            # what the ids in the text are
            attributes.get("use_global_device_ids"),
            channel_id(collective.instruction) is None,
        )
        if key not in self._known:
            joined = self._read_members(collective)
            self._known[key] = joined, self._axes_of(joined)
        joined, axes = self._known[key]
        taking_part, devices = sum(map(len, joined.groups)), self.placement.num_devices
        if joined.assumed:
            self._inexact[collective.name] = f"the device order is unknown: assumed that {joined.assumed}"
        elif joined.groups and taking_part < devices:
            self._inexact[collective.name] = f"only {taking_part} of {devices} devices take part"
        return joined, axes

    def _read_members(self, collective: Collective) -> Members:
        if collective.target is not None:
            return megascale_members(collective.target, self.placement)
        if collective.pairs_text is not None:
            return send_members(collective.pairs_text, self.placement)
        return members(collective.instruction, self.placement)

    def _wire(self, kind: str, payload: Payload, joined: Members) -> Wire:
        """Bytes of one execution. `joined` is one object for all collectives that are written alike."""
        sizes = payload.operand_bytes or 0, payload.gathered_bytes or 0
        key = (kind, *sizes, id(joined))
        if key not in self._wires:
            self._wires[key] = wire_of(
                kind=kind,
                operand_bytes=sizes[0],
                result_bytes=sizes[1],
                groups=joined.groups,
                pairs=joined.pairs,
            )
        return self._wires[key]

    def _axes_of(self, joined: Members) -> Axes:
        if not any(len(group) > 1 for group in joined.groups) and all(a == b for a, b in joined.pairs):
            return Axes(())
        if self.mesh is None:
            return Axes(None, "no mesh axes were given")
        if joined.pairs:
            return axes_of_pairs(joined.pairs, self.mesh)
        return axes_of_groups(joined.groups, self.mesh)

    def _traffic(self, collective: Collective, wire: Wire, joined: Members) -> Traffic | None:
        if self.machine is None:
            return None
        return traffic_of(
            kind=collective.kind,
            payload_bytes=wire.payload_bytes,
            wire_bytes=wire.wire_bytes,
            groups=joined.groups,
            pairs=joined.pairs,
            machine=self.machine,
            device_ids=self.device_ids,
            in_turn=self._in_turn(joined, self.machine),
        )

    def _in_turn(self, joined: Members, machine: Machine) -> Fraction:
        """How often gloo's ranks take turns: always where kinds of devices meet, as the stages of a pipeline,
        which compute for different times before."""
        mixed = uses_gloo(machine) and kinds_joined(joined, self.graph.schedule.kinds)
        return Fraction(1) if mixed else HALF

    def notes(
        self, collectives: Sequence[Collective], rows: Sequence[CollectiveRow]
    ) -> Iterator[LedgerEntry]:
        """What is known about the whole that is not exact."""
        if not collectives and self.placement.num_devices > 1:
            why = f"compiled for {self.placement.num_devices} devices, but no collective was found"
            yield LedgerEntry(what="module", name=self.module.name, why=why)
        for name, why in self._inexact.items():
            yield LedgerEntry(what="groups", name=name, why=why)
        moving = _reaching(self.graph, {collective.computation for collective in collectives})
        for (caller, name), trips in self.graph.loops.items():
            body = [s.callee for s in self.graph.sites.by_caller[caller] if s.instruction.name == name]
            if trips.reason and moving.intersection(body):
                yield LedgerEntry(what="while", name=name, why=f"trip count unknown: {trips.reason}")
        for name, why in self._uneven.items():
            yield LedgerEntry(what="conditional", name=name, why=why)
        for (caller, name), why in self.graph.schedule.reasons.items():
            branches = [s.callee for s in self.graph.sites.by_caller[caller] if s.instruction.name == name]
            if moving.intersection(branches):
                yield LedgerEntry(what="conditional", name=name, why=f"which branch runs is unknown: {why}")
        for line, text in self.module.unparsed:
            yield LedgerEntry(what="text", name=f"line {line}", why=f"could not be read: {text[:80]}")


def row_times(row: CollectiveRow, runs: int) -> CollectiveRow:
    """The row of a program that runs so many times."""
    devices = row.by_device
    if devices is not None:
        devices = tuple(replace(part, executions=_range_times(part.executions, runs)) for part in devices)
    return replace(row, executions=_range_times(row.executions, runs), by_device=devices)


def _range_times(executions: Range, runs: int) -> Range:
    low, high = executions
    return low * runs, None if high is None else high * runs


def device_ranges(devices: Sequence[int]) -> str:
    """Ascending ids as text: `0-3,8`."""
    parts: list[list[int]] = []
    for device in devices:
        if parts and device == parts[-1][-1] + 1:
            parts[-1][1:] = [device]
        else:
            parts.append([device])
    return ",".join("-".join(map(str, part)) for part in parts)


def _reaching(graph: CallGraph, wanted: set[str]) -> set[str]:
    """Computations that run one of `wanted`, directly or not, and `wanted` themselves."""
    reaching = set(wanted)
    for name in reversed(graph.sites.order):
        if any(site.callee in reaching for site in graph.sites.by_caller[name]):
            reaching.add(name)
    return reaching
