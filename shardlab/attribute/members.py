"""Which devices a collective joins, as positions in the user's mesh.

HLO ids are positions in the device assignment. A multi-slice TPU module is per slice: its ids count the
devices of one slice, and what crosses slices names devices of the megascale runtime, (slice + 1) * 100000 +
id in the slice.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from shardlab.errors import ParseError, Problem, UserError
from shardlab.hlo.attributes import channel_id, errors_at
from shardlab.hlo.groups import (
    MAX_IDS,
    flattened_groups,
    flattened_pairs,
    parse_replica_groups,
    parse_source_target_pairs,
)
from shardlab.hlo.module import Instruction, Module

IdGroups = tuple[tuple[int, ...], ...]
IdPairs = tuple[tuple[int, int], ...]

MEGASCALE_STRIDE = 100_000

_CROSS = re.compile(r"\s*\{([^{}]*)\}\s*x\s*\{([^{}]*)\}\s*", re.ASCII)
_ID = re.compile(r"[0-9]{1,12}")
_BRACED = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True, slots=True)
class Members:
    """Mesh positions: `groups` of a collective, or `pairs` (source, target) of a permute or a send.

    assumed: what had to be assumed about the device order, empty when nothing was.
    """

    groups: IdGroups = ()
    pairs: IdPairs = ()
    assumed: str = ""


def kinds_joined(joined: Members, kinds: Sequence[int]) -> frozenset[tuple[int, int]]:
    """The different kinds of devices that a collective brings together, as pairs; kinds: by flattened id."""
    if not kinds:
        return frozenset()
    found: set[tuple[int, int]] = set()
    for together in (*joined.groups, *joined.pairs):
        here = sorted({kinds[member % len(kinds)] for member in together})
        found |= set(combinations(here, 2))
    return frozenset(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """How a module's ids lie in the mesh.

    replicas, partitions: of the module; slices: how many copies of it make the mesh. Id r * partitions + p
    of slice s is at position `positions[s][id]`. device_position: device id (slice * devices per slice + id
    in slice) -> position, None when the caller did not say where the devices are.
    """

    replicas: int
    partitions: int
    slices: int
    positions: tuple[Sequence[int], ...]
    device_position: Mapping[int, int] | None

    @property
    def num_devices(self) -> int:
        """Devices of all slices together."""
        return self.replicas * self.partitions * self.slices


def place(
    module: Module,
    mesh: Mapping[str, int] | None,
    device_ids: Sequence[int] | None,
    used: Iterable[Instruction],
) -> Placement:
    """Lay a module on the mesh. used: its collectives, from which older text's device count is inferred.

    Raises UserError when the mesh is not a whole number of copies of the module, or device ids do not fit it.
    """
    replicas, partitions = _counts(module, mesh, used)
    devices = replicas * partitions
    total = math.prod(mesh.values()) if mesh else max(devices, len(device_ids or ()))
    if max(devices, total) > MAX_IDS:
        what = f"it is compiled for {devices} devices, and the mesh has {total}"
        raise UserError(Problem(f"module {module.name}", what, f"shardlab reads at most {MAX_IDS} devices"))
    slices, rest = divmod(total, devices)
    leading = device_ids is not None or _leading_axes_split(mesh, slices)
    copies_fit = slices == 1 or (replicas == 1 and leading)
    if rest or not slices or not copies_fit:
        raise UserError(_wrong_size(mesh, total, devices, module.name))
    where = None if device_ids is None else _where(device_ids, total, devices)
    return Placement(
        replicas=replicas,
        partitions=partitions,
        slices=slices,
        positions=_positions(slices, devices, where),
        device_position=where,
    )


def _leading_axes_split(mesh: Mapping[str, int] | None, slices: int) -> bool:
    """Whether the leading axes, the last of them perhaps in part, make `slices` equal runs of positions."""
    for size in (mesh or {"": slices}).values():
        shared = math.gcd(size, slices)
        slices //= shared
        if slices == 1 or shared != size:
            break
    return slices == 1


def members(instruction: Instruction, placement: Placement) -> Members:
    """Devices that a collective other than a send joins. Raises ParseError for ids that do not exist."""
    if "source_target_pairs" in instruction.attributes:
        pairs = flattened_pairs(instruction, placement.replicas, placement.partitions)
        return Members(pairs=_pairs_in_slices(pairs, placement))
    groups = flattened_groups(instruction, placement.replicas, placement.partitions)
    if placement.slices == 1:
        return Members(groups=groups)
    return Members(
        groups=tuple(tuple(at[i] for i in group) for at in placement.positions for group in groups)
    )


def send_members(pairs_text: str, placement: Placement) -> Members:
    """Devices of a GPU send: `_xla_send_recv_source_target_pairs`. Raises ParseError for unreadable pairs."""
    pairs = parse_source_target_pairs(pairs_text)
    highest, limit = max(map(max, pairs), default=-1), placement.replicas * placement.partitions
    if highest >= limit:
        raise ParseError(f"id {highest} in a send's pairs, but only {limit} devices exist")
    return Members(pairs=_pairs_in_slices(pairs, placement))


def megascale_members(target: str, placement: Placement) -> Members:
    """Devices of a transfer between slices.

    target: `{1,2}x{0:15}` (slices x ids in the slice), `{{100000,200000},…}` or pairs `{{100000->200000},…}`.
    Raises ParseError when it is none of these.
    """
    cross = _CROSS.fullmatch(target)
    if cross:
        slices, ids = (_ranges(part) for part in cross.groups())
        if len(slices) * len(ids) > MAX_IDS:
            raise ParseError(f"more than {MAX_IDS} devices in the megascale target {target[:80]!r}")
        named = tuple(tuple((s - 1, i) for s in slices) for i in ids)
    else:
        named = tuple(tuple(map(_slice_and_id, _numbers(group))) for group in _BRACED.findall(target))
    if not named or not all(named) or any(s < 0 for group in named for s, _ in group):
        raise ParseError(f"cannot read the megascale target {target[:80]!r}")
    found, assumed = _located(named, placement, "->" in target)
    if "->" in target:
        return Members(pairs=tuple((group[0], group[-1]) for group in found), assumed=assumed)
    return Members(groups=found, assumed=assumed)


Named = tuple[tuple[tuple[int, int], ...], ...]  # groups of (slice, id in the slice)


def _located(named: Named, placement: Placement, are_pairs: bool) -> tuple[IdGroups, str]:
    """Named devices as mesh positions."""
    per_slice = placement.partitions
    where = placement.device_position
    if where is None:
        # Where slices list their devices in one order, which order it is does not matter.
        plain = all(len({i for _, i in group}) == 1 for group in named)
        if not plain and not are_pairs and all(len({s for s, _ in group}) == len(group) for group in named):
            return _aligned(named, per_slice), "every group joins devices at one place of each slice"
        return tuple(tuple(s * per_slice + i for s, i in group) for group in named), ""
    try:
        return tuple(tuple(where[s * per_slice + i] for s, i in group) for group in named), ""
    except KeyError as error:
        what = f"device {error.args[0]} of a transfer between slices is not among them"
        raise UserError(Problem("device ids", what, "list the devices of all slices")) from None


def _aligned(named: Named, per_slice: int) -> IdGroups:
    """Groups of unknown device order, listed partition by partition."""
    seen: dict[tuple[int, ...], int] = defaultdict(int)
    found = []
    for group in named:
        slices = tuple(s for s, _ in group)
        found.append(tuple(s * per_slice + seen[slices] for s in slices))
        seen[slices] += 1
    return tuple(found)


def _pairs_in_slices(pairs: IdPairs, placement: Placement) -> IdPairs:
    if placement.slices == 1:
        return pairs
    return tuple((at[source], at[target]) for at in placement.positions for source, target in pairs)


def _counts(module: Module, mesh: Mapping[str, int] | None, used: Iterable[Instruction]) -> tuple[int, int]:
    """Replicas and partitions; text from before November 2023 says neither: then the ids in use say it."""
    if module.num_partitions is not None or module.replica_count is not None:
        return module.replica_count or 1, module.num_partitions or 1
    listed, replicated = 1, True
    for instruction in used:
        with errors_at(instruction):
            highest = _highest_id(instruction)
        listed = max(listed, highest + 1)
        replicated = replicated and (channel_id(instruction) is None or highest < 0)
    total = math.prod(mesh.values()) if mesh else listed
    if total < listed:
        raise UserError(_wrong_size(mesh, total, listed, module.name))
    total = total if listed > 1 else 1
    return (total, 1) if replicated else (1, total)


def _highest_id(instruction: Instruction) -> int:
    groups = parse_replica_groups(instruction.attributes.get("replica_groups", "{}")).groups
    pairs = parse_source_target_pairs(instruction.attributes.get("source_target_pairs", "{}"))
    return max((member for group in (*groups, *pairs) for member in group), default=-1)


def _wrong_size(mesh: Mapping[str, int] | None, total: int, devices: int, name: str) -> Problem:
    shape = " x ".join(f"{axis}={size}" for axis, size in (mesh or {}).items())
    what = f"the mesh {shape} has {total} devices, but module {name} is compiled for {devices}"
    return Problem("axes", what, f"give axes whose product is {devices}, or a multiple of it for TPU slices")


def _where(device_ids: Sequence[int], total: int, per_slice: int) -> dict[int, int]:
    """Device id -> position."""
    if len(device_ids) != total:
        what = f"{len(device_ids)} device ids for {total} mesh positions"
        raise UserError(Problem("device ids", what, "list one device per position, in row-major mesh order"))
    where: dict[int, int] = {}
    for position, device in enumerate(device_ids):
        if _plain(device, per_slice) in where:
            raise UserError(
                Problem("device ids", f"device {device} is listed twice", "list each device once")
            )
        where[_plain(device, per_slice)] = position
    return where


def _plain(device: int, per_slice: int) -> int:
    """A device id as slice * devices per slice + id in the slice."""
    if device < MEGASCALE_STRIDE:
        return device
    return (device // MEGASCALE_STRIDE - 1) * per_slice + device % MEGASCALE_STRIDE


def _positions(slices: int, devices: int, where: Mapping[int, int] | None) -> tuple[Sequence[int], ...]:
    """Position of each id of each slice: ids of a slice follow the flat order of the mesh."""
    if slices == 1 or where is None:
        return tuple(range(s * devices, (s + 1) * devices) for s in range(slices))
    found: list[list[int]] = [[] for _ in range(slices)]
    for device, position in where.items():  # in order of position
        if device // devices < slices:
            found[device // devices].append(position)
    if any(len(positions) != devices for positions in found):
        what = f"they are not {slices} slices of {devices} devices"
        fix = "number the devices slice * devices per slice + id in the slice"
        raise UserError(Problem("device ids", what, fix))
    return tuple(map(tuple, found))


def _slice_and_id(device: int) -> tuple[int, int]:
    return device // MEGASCALE_STRIDE - 1, device % MEGASCALE_STRIDE


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.replace("->", ",").split(",")]
    return [int(part) for part in parts] if all(map(_ID.fullmatch, parts)) else []


def _ranges(text: str) -> list[int]:
    """`0:3,8` as 0, 1, 2, 3, 8."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = (bound.strip() for bound in part.partition(":"))
        last = last or first
        if (
            not (_ID.fullmatch(first) and _ID.fullmatch(last))
            or int(last) - int(first) + len(found) > MAX_IDS
        ):
            return []
        found.extend(range(int(first), int(last) + 1))
    return found
