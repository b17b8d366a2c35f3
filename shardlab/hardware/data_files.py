"""Chip and machine files (TOML) to records. The files we ship and the ones users write have one format.

Every figure carries its unit in the key's name and has an entry in `[source]` or a `source` key beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from shardlab.errors import Problem, UserError
from shardlab.hardware.file_checks import machine_problems
from shardlab.hardware.machine import AS_RATED, Calibration, Chip, Domain, GpuTarget
from shardlab.hardware.toml_file import (
    Table,
    did_you_mean,
    key_lines,
    parse_toml,
    read_text,
)

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainRule:
    """A domain before the machine's size is known: it spans `hosts` or `slices`, all of them when None.

    uplink_bytes_per_s: what each domain inside this one sends out, one way, however many devices share it.
    """

    tier: str
    hosts: int | None = None
    slices: int | None = None
    bytes_per_s: float | None = None
    pair_bytes_per_s: float | None = None
    uplink_bytes_per_s: float | None = None
    latency_s: float | None = None
    calibration: Calibration = AS_RATED
    source: str = ""

    @property
    def is_network(self) -> bool:
        """Whether it joins hosts, or what is larger."""
        return self.tier in ("infiniband", "ethernet", "dcn", "wan")

    def domain(self, size: int, inner_size: int, devices_per_chip: int) -> Domain:
        """The domain of `size` devices, in domains of `inner_size`.

        Its devices share what a chip has; ICI stays per link of a chip.
        """
        rate = self.bytes_per_s
        shared = rate if rate is None or self.tier == "ici" else rate / devices_per_chip
        if self.uplink_bytes_per_s is not None:
            shared = self.uplink_bytes_per_s / inner_size
        return Domain(
            tier=self.tier,
            size=size,
            bytes_per_s=shared,
            latency_s=self.latency_s,
            pair_bytes_per_s=self.pair_bytes_per_s,
            calibration=self.calibration,
            source=self.source,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Torus:
    """Which slice shapes exist, in chips, and which axes close into rings.

    shapes: the published small ones. cube: any shape of whole cubes of this extent exists too, and all its
    axes wrap.
    wrap_extent: without cubes, an axis of exactly this extent wraps.
    """

    max_chips: int
    shapes: tuple[tuple[int, ...], ...]
    cube: int | None = None
    wrap_extent: int | None = None
    source: str = ""

    @property
    def dimensions(self) -> int:
        """2 or 3."""
        return len(self.shapes[0])

    def has(self, shape: tuple[int, ...]) -> bool:
        """Whether a slice of this shape exists; a 2-D one may be written either way round."""
        if min(shape) < 1 or _product(shape) > self.max_chips or len(shape) != self.dimensions:
            return False
        if self.cube and all(extent % self.cube == 0 for extent in shape):
            return True
        return shape in self.shapes or (len(shape) == 2 and shape[::-1] in self.shapes)

    def wraps(self, shape: tuple[int, ...]) -> tuple[bool, ...]:
        """Which axes have wraparound links."""
        if self.cube:
            return (all(extent % self.cube == 0 for extent in shape),) * len(shape)
        return tuple(extent == self.wrap_extent for extent in shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFile:
    """One machine file: the chip, how hosts hold it, and the rules for its domains, innermost first.

    shares_cores: its hosts are parts of one computer with so many cores, whose rates the chip has, and each
    device gets its share.
    """

    chip: Chip
    max_chips_per_host: int
    domains: tuple[DomainRule, ...]
    shares_cores: int | None = None
    torus: Torus | None = None
    hosts: int | None = None
    chips_per_host: int | None = None
    power_static_w: float | None = None
    power_active_w: float | None = None
    price_per_hour_usd: float | None = None
    description: str = ""

    def with_link(self, rule: DomainRule) -> MachineFile | None:
        """The same machine with another network, or with another link inside its hosts; None: it has none."""
        level = len(self.domains) - 1 if rule.is_network else 0
        replaced = self.domains[level]
        on_torus = {rule.tier, replaced.tier} & {"ici", "dcn"}
        if replaced.is_network != rule.is_network or (on_torus and rule.tier != replaced.tier):
            return None
        swapped = replace(rule, hosts=replaced.hosts, slices=replaced.slices)
        domains = (*self.domains[:level], swapped, *self.domains[level + 1 :])
        return replace(self, domains=domains)


def shipped(kind: str) -> list[str]:
    """Names of the shipped `chips`, `links` or `machines`."""
    return sorted(path.stem for path in (DATA / kind).glob("*.toml"))


@cache
def load_chip(name: str) -> Chip:
    """The shipped chip of this name. Raises UserError that lists the known ones."""
    return _chip(_shipped_table("chips", name), f"chips/{name}.toml")


@cache
def load_gpu_target(name: str) -> GpuTarget:
    """What the GPU compiler wants to know of this chip (`Chip.compile_as`). Raises UserError if not a GPU."""
    table = _shipped_table("chips", name)
    target = table.get("gpu_target")
    if not isinstance(target, dict):
        raise UserError(Problem(f"chip {name!r}", "is not a GPU that XLA can compile for", "choose a GPU"))
    fields: dict[str, Any] = {key: value for key, value in target.items() if key != "source"}
    fields["memory_bandwidth"] = table["memory_bytes_per_s"]
    fields["device_memory_size"] = table["memory_bytes"]
    return GpuTarget(**fields)


@cache
def load_shipped_machine(name: str) -> MachineFile:
    """The shipped machine file of this name. Raises UserError that lists the known ones."""
    return machine_from_text((DATA / "machines" / f"{name}.toml").read_text("utf-8"), f"machines/{name}.toml")


@cache
def load_link(name: str) -> DomainRule:
    """The shipped link of this name, as the domain of whatever it joins. Raises UserError that lists them."""
    return _domain_rule(_shipped_table("links", name))


def load_machine_file(path: Path) -> MachineFile:
    """A user's machine file. Raises UserError with every mistake in it."""
    return machine_from_text(read_text(path), str(path))


def machine_from_text(text: str, where: str) -> MachineFile:
    """A machine file's text to the record. Raises UserError with every mistake in it."""
    table = parse_toml(text, where)
    problems = machine_problems(table, where, key_lines(text), shipped("chips"), shipped("links"))
    if problems:
        raise UserError(*problems)
    data: dict[str, Any] = {key: value for key, value in table.items() if key != "source"}
    chip = data.pop("chip")
    torus = data.pop("torus", None)
    return MachineFile(
        chip=_chip(chip, where) if isinstance(chip, dict) else load_chip(chip),
        domains=tuple(map(_domain_rule, data.pop("domain"))),
        torus=replace(Torus(**torus), shapes=tuple(map(tuple, torus["shapes"]))) if torus else None,
        **data,
    )


def _domain_rule(table: Table) -> DomainRule:
    """A `[[domain]]` table: the link that it names, if any, and what it says otherwise of its own."""
    own: dict[str, Any] = dict(table)
    link: dict[str, Any] = dict(_shipped_table("links", own.pop("link"))) if "link" in own else {}
    sources = [str(text) for text in (own.get("source"), link.get("source")) if text]
    measured = {**link.get("calibration", {}), **own.get("calibration", {})}
    measured.pop("source", None)
    figures = {**link, **own, "source": "; ".join(sources)}
    figures.pop("description", None)
    figures["calibration"] = Calibration(**measured)
    return DomainRule(**figures)


def _shipped_table(kind: str, name: str) -> Table:
    if name not in shipped(kind):
        known = did_you_mean(name, shipped(kind), f"known {kind}")
        raise UserError(Problem(f"{kind[:-1]} {name!r}", "unknown", known))
    return parse_toml((DATA / kind / f"{name}.toml").read_text("utf-8"), f"{kind}/{name}.toml")


def _chip(table: Mapping[str, Any], where: str) -> Chip:
    """A chip's table to the record: figures per JAX device."""
    devices = table.get("xla_devices", 1)
    memory, rate, flops, dots = (
        table.get(key)
        for key in ("memory_bytes", "memory_bytes_per_s", "bf16_flops_per_s", "dot_bf16_flops_per_s")
    )
    return Chip(
        name=table["name"],
        family=table["family"],
        memory_bytes=None if memory is None else memory // devices,
        pool_fraction=float(table.get("pool_fraction", 1.0)),
        bf16_flops_per_s=None if flops is None else flops / devices,
        memory_bytes_per_s=None if rate is None else rate / devices,
        xla_devices=devices,
        compile_as=table.get("compile_as"),
        not_compiled_because=table.get("not_compiled_because", ""),
        memory_source=str(table.get("source", {}).get("memory_bytes", where)),
        power_w=table.get("power_w"),
        dot_bf16_flops_per_s=None if dots is None else dots / devices,
    )


def _product(extents: tuple[int, ...]) -> int:
    product = 1
    for extent in extents:
        product *= extent
    return product
