"""Price one program under many device orders: bytes per link tier and communication time, best first.

The program is read once and its groups are known; only where their devices sit changes. Axes, payload and
wire bytes are facts of the program and stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from shardlab.analysis import Attributed, ByteRange, CollectiveRow, Range, attribute
from shardlab.analysis.build import Source
from shardlab.attribute.calls import step_totals
from shardlab.attribute.members import Members
from shardlab.cost.network import communication
from shardlab.cost.traffic import Traffic, traffic_of
from shardlab.errors import Problem, UserError
from shardlab.hardware.machine import Machine
from shardlab.order.layouts import Ids, Layout, candidates

OWN = "as compiled"
ROW_MAJOR = "row-major"
SHOWN = 5
MAX_ORDERS = 256
# Devices looked up over all orders: some two seconds on one core.
MAX_LOOKUPS = 500_000
# Sums of floats differ in their last digits with the order of the terms: that is no difference in time.
TIME_DIGITS = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderResult:
    """One order of the devices. device_ids: the device at each mesh position, row-major.

    tiers: bytes per device and step on each link tier. communication_s: as `cost.network.communication`
    counts it; None where unknown. how: how to get this order. own: the order the program was compiled for.
    """

    name: str
    device_ids: Ids
    tiers: Mapping[str, ByteRange]
    communication_s: float | None
    how: str
    own: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """The best orders found, best first, always with the program's own and row-major; orders that cost the
    same are shown once.

    tried: how many were priced; complete: whether these are all of the kinds looked at (nestings of the
    axes, and axes factored over the machine's dimensions). by: what ranks them, `time` or `bytes`.
    """

    results: tuple[OrderResult, ...]
    tried: int
    complete: bool
    by: str
    notes: tuple[str, ...] = ()

    @property
    def own(self) -> OrderResult:
        """The order the program was compiled for."""
        return next(result for result in self.results if result.own)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """Collectives that load the links alike: all of one kind and size over the same devices."""

    row: CollectiveRow
    members: Members
    executions: Range
    times_in: Mapping[str, int]  # computation -> how many of them one run of it holds


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loads:
    """`communication` reads this of an analysis."""

    collectives: tuple[CollectiveRow, ...]


def orders(
    source: Source | Sequence[Source],
    machine: Machine,
    axes: Mapping[str, int] | None = None,
    device_ids: Sequence[int] | None = None,
    own_name: str = OWN,
) -> Orders:
    """The best device orders of one program on `machine`; arguments as for `analyze`.

    Raises UserError for several modules at once, without mesh axes, and as `analyze` does.
    """
    return best_orders(tuple(attribute(source, axes, device_ids, machine)), machine, own_name)


def best_orders(
    parts: Sequence[Attributed],
    machine: Machine | None,
    own_name: str = OWN,
    max_lookups: int = MAX_LOOKUPS,
) -> Orders:
    """As `orders`, of what is attributed already. own_name: what the program's own order is called.

    max_lookups: devices looked up over all orders, which bounds the orders tried.
    """
    if machine is None:
        raise UserError(Problem("--order", "needs a machine", "give --on MACHINE, such as h100:64x8"))
    if len(parts) != 1:
        what = f"{len(parts)} modules at once: each could want another order"
        raise UserError(Problem("--order", what, "give one module"))
    (part,) = parts
    mesh = part.analysis.mesh
    if mesh is None:
        raise UserError(Problem("--order", "the mesh is not known", "give --axes data=4,model=2 or --mesh"))
    own = part.device_ids or tuple(range(part.placement.num_devices))
    if part.placement.slices > 1 or machine.slices > 1:
        return _own_alone(part, machine, own, own_name)
    jobs = _jobs(part)
    limit = max(2, min(MAX_ORDERS, max_lookups // max(1, _lookups(jobs))))
    layouts, complete = candidates(mesh, machine, sorted(own), limit)
    results = [_priced(part, jobs, layout, machine, own) for layout in _named(layouts, Layout(own_name, own))]
    by = "bytes" if any(result.communication_s is None for result in results) else "time"
    notes = _notes(machine)
    return Orders(
        results=_best(results, machine, by), tried=len(results), complete=complete, by=by, notes=notes
    )


def _named(layouts: Sequence[Layout], own: Layout) -> tuple[Layout, ...]:
    """The program's own order first, then row-major, then the rest, each device order once."""
    row_major = Layout(ROW_MAJOR, layouts[0].device_ids)
    others = {layout.device_ids: layout for layout in (row_major, *layouts[1:])}
    also = others.pop(own.device_ids, None)
    if also is not None and also.name != own.name:
        own = Layout(f"{own.name}: {also.name}", own.device_ids)
    return (own, *others.values())


def _own_alone(part: Attributed, machine: Machine, own: Ids, own_name: str) -> Orders:
    """Each slice runs a program of its own, which says what crosses slices by device: no order to try."""
    result = OrderResult(
        name=own_name,
        device_ids=own,
        tiers=part.analysis.totals.traffic,
        communication_s=communication(part.analysis, machine).communication_s,
        how="nothing to change",
        own=True,
    )
    note = "other device orders are not tried for programs of several slices"
    return Orders(results=(result,), tried=1, complete=False, by="time", notes=(note,))


def _notes(machine: Machine) -> tuple[str, ...]:
    if machine.emulated:
        return ("emulated devices have one kind of link: every order moves the same",)
    model = "times are of collectives one after another, by the model: measure an order before you adopt it"
    kept = "the compiled program is kept; compiled for another order, it may be another program"
    return (model, kept) if machine.family == "tpu" else (model,)


def _jobs(part: Attributed) -> tuple[_Job, ...]:
    """Collectives grouped by what their traffic depends on. Equal members are one object, so identity tells
    them apart cheaply; one that is listed twice is only priced twice."""
    groups: dict[tuple[str, int, Fraction, int], list[int]] = {}
    rows = part.analysis.collectives
    for i, (row, members) in enumerate(zip(rows, part.members, strict=True)):
        groups.setdefault((row.kind, row.payload_bytes, row.wire_bytes, id(members)), []).append(i)
    jobs = []
    for indices in groups.values():
        held: dict[str, int] = {}
        for i in indices:
            held[part.computations[i]] = held.get(part.computations[i], 0) + 1
        highs = [rows[i].executions[1] for i in indices]
        known = [high for high in highs if high is not None]
        jobs.append(
            _Job(
                row=rows[indices[0]],
                members=part.members[indices[0]],
                executions=(
                    sum(rows[i].executions[0] for i in indices),
                    sum(known) if len(known) == len(highs) else None,
                ),
                times_in=held,
            )
        )
    return tuple(jobs)


def _lookups(jobs: Sequence[_Job]) -> int:
    """Devices that are looked up for one order: groups that several jobs share are looked up once."""
    different = {id(job.members): job.members for job in jobs}
    return sum(sum(map(len, found.groups)) + 2 * len(found.pairs) for found in different.values())


def _priced(
    part: Attributed, jobs: Sequence[_Job], layout: Layout, machine: Machine, own: Ids
) -> OrderResult:
    amounts: dict[str, dict[str, Fraction]] = {}
    rows = []
    for job in jobs:
        traffic = _traffic(job, machine, layout.device_ids)
        priced = replace(job.row, traffic=traffic.tiers, tier_s=traffic.tier_s, time_s=traffic.time_s)
        rows.append(replace(priced, executions=job.executions, latency_s=traffic.latency_s))
        for computation, times in job.times_in.items():
            here = amounts.setdefault(computation, {})
            for tier, sent_bytes in traffic.tiers.items():
                here[tier] = here.get(tier, Fraction(0)) + times * sent_bytes
    is_own = layout.device_ids == own
    return OrderResult(
        name=layout.name,
        device_ids=layout.device_ids,
        tiers=step_totals(part.graph, amounts),
        communication_s=communication(_Loads(collectives=tuple(rows)), machine).communication_s,
        how=_how(layout, is_own),
        own=is_own,
    )


def _traffic(job: _Job, machine: Machine, device_ids: Ids) -> Traffic:
    return traffic_of(
        kind=job.row.kind,
        payload_bytes=job.row.payload_bytes,
        wire_bytes=job.row.wire_bytes,
        groups=job.members.groups,
        pairs=job.members.pairs,
        machine=machine,
        device_ids=device_ids,
    )


def _how(layout: Layout, is_own: bool) -> str:
    if is_own:
        return "nothing to change"
    if layout.name == ROW_MAJOR:
        return 'order = "row-major" in the mesh file'
    return "order = [its device_ids] in the mesh file"


def _best(results: Sequence[OrderResult], machine: Machine, by: str) -> tuple[OrderResult, ...]:
    """Best first: the program's own and row-major, and of the others the best that differ in what they cost.

    Of orders that cost the same the earlier one comes first: no change before a change, the simple before
    the intricate.
    """
    ranked = sorted(results, key=lambda result: _key(result, machine, by))
    kept: list[OrderResult] = []
    seen: list[tuple[Mapping[str, ByteRange], float | None]] = []
    found = 0
    for result in ranked:
        cost = (result.tiers, _time(result))
        fixed = result.own or result.name == ROW_MAJOR
        if fixed or (cost not in seen and found < SHOWN):
            kept.append(result)
            found += not fixed
        seen.append(cost)
    return tuple(kept)


def _key(result: OrderResult, machine: Machine, by: str) -> tuple[float | Fraction, ...]:
    """Time, then bytes on the outermost tier, the next one inwards, …; without a time only the bytes."""
    tiers = dict.fromkeys(domain.tier for domain in reversed(machine.domains))
    sent = tuple(_most(result.tiers.get(tier, (Fraction(0), Fraction(0)))) for tier in tiers)
    return (_time(result) or 0.0, *sent) if by == "time" else sent


def _time(result: OrderResult) -> float | None:
    """The communication time as far as two orders are told apart."""
    return None if result.communication_s is None else float(f"{result.communication_s:.{TIME_DIGITS}g}")


def _most(amount: ByteRange) -> Fraction:
    low, high = amount
    return low if high is None else high


def orders_member(found: Orders | None) -> dict[str, object]:
    """What `--order` adds to the documents of `analyze` and `explain`: `orders`, best first; {} for None."""
    if found is None:
        return {}
    member = {
        "tried": found.tried,
        "complete": found.complete,
        "ranked_by": found.by,
        "results": [_result_json(result) for result in found.results],
        "notes": list(found.notes),
    }
    return {"orders": member}


def _result_json(result: OrderResult) -> dict[str, object]:
    document: dict[str, object] = {
        "name": result.name,
        "own": result.own,
        "traffic": {tier: [_number(end) for end in amount] for tier, amount in result.tiers.items()},
        "how": result.how,
        "device_ids": list(result.device_ids),
    }
    if result.communication_s is not None:
        document["communication_s"] = result.communication_s
    return document


def _number(value: Fraction | None) -> int | float | None:
    if value is None:
        return None
    return value.numerator if value.denominator == 1 else float(value)
