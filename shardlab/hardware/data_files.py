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
from shardlab.hardware.machine import Chip, Domain, GpuTarget
from shardlab.hardware.toml_file import (
    KeyPath,
    Table,
    at,
    did_you_mean,
    key_lines,
    parse_toml,
    quoted,
    read_text,
)

DATA = Path(__file__).parent / "data"
TIERS = ("nvlink", "pcie", "infiniband", "ethernet", "ici", "dcn", "wan", "loopback")


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainRule:
    """A domain before the machine's size is known: it spans `hosts` or `slices`, all of them when None."""

    tier: str
    hosts: int | None = None
    slices: int | None = None
    bytes_per_s: float | None = None
    latency_s: float | None = None
    source: str = ""

    def domain(self, size: int, devices_per_chip: int) -> Domain:
        """The domain of `size` devices. Its devices share what a chip has; ICI stays per link of a chip."""
        rate = self.bytes_per_s
        shared = rate if rate is None or self.tier == "ici" else rate / devices_per_chip
        return Domain(
            tier=self.tier, size=size, bytes_per_s=shared, latency_s=self.latency_s, source=self.source
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
    """One machine file: the chip, how hosts hold it, and the rules for its domains, innermost first."""

    chip: Chip
    max_chips_per_host: int
    domains: tuple[DomainRule, ...]
    torus: Torus | None = None
    hosts: int | None = None
    chips_per_host: int | None = None
    description: str = ""


def shipped(kind: str) -> list[str]:
    """Names of the shipped `chips` or `machines`."""
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


def load_machine_file(path: Path) -> MachineFile:
    """A user's machine file. Raises UserError with every mistake in it."""
    return machine_from_text(read_text(path), str(path))


def machine_from_text(text: str, where: str) -> MachineFile:
    """A machine file's text to the record. Raises UserError with every mistake in it."""
    table = parse_toml(text, where)
    problems = _machine_problems(table, where, key_lines(text))
    if problems:
        raise UserError(*problems)
    data: dict[str, Any] = {key: value for key, value in table.items() if key != "source"}
    chip = data.pop("chip")
    torus = data.pop("torus", None)
    return MachineFile(
        chip=_chip(chip, where) if isinstance(chip, dict) else load_chip(chip),
        domains=tuple(DomainRule(**rule) for rule in data.pop("domain")),
        torus=replace(Torus(**torus), shapes=tuple(map(tuple, torus["shapes"]))) if torus else None,
        **data,
    )


def _shipped_table(kind: str, name: str) -> Table:
    if name not in shipped(kind):
        known = did_you_mean(name, shipped(kind), f"known {kind}")
        raise UserError(Problem(f"{kind[:-1]} {name!r}", "unknown", known))
    return parse_toml((DATA / kind / f"{name}.toml").read_text("utf-8"), f"{kind}/{name}.toml")


def _chip(table: Mapping[str, Any], where: str) -> Chip:
    """A chip's table to the record: figures per JAX device."""
    devices = table.get("xla_devices", 1)
    memory, rate, flops = (
        table.get(key) for key in ("memory_bytes", "memory_bytes_per_s", "bf16_flops_per_s")
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
        memory_source=str(table.get("source", {}).get("memory_bytes", where)),
        power_w=table.get("power_w"),
    )


# key -> (types, required). Numbers must be positive.
_Fields = Mapping[str, tuple[tuple[type, ...], bool]]
_TEXT, _COUNT, _FIGURE, _MAP = (str,), (int,), (int, float), (dict,)
_MACHINE: _Fields = {
    "description": (_TEXT, False), "chip": ((str, dict), True), "hosts": (_COUNT, False),
    "chips_per_host": (_COUNT, False), "max_chips_per_host": (_COUNT, True), "source": (_MAP, False),
    "domain": ((list,), True), "torus": (_MAP, False),
}  # fmt: skip
_CHIP: _Fields = {
    "name": (_TEXT, True), "family": (_TEXT, True), "compile_as": (_TEXT, False),
    "xla_devices": (_COUNT, False),
    "memory_bytes": (_COUNT, False), "pool_fraction": (_FIGURE, False), "bf16_flops_per_s": (_FIGURE, False),
    "memory_bytes_per_s": (_FIGURE, False), "power_w": (_FIGURE, False), "source": (_MAP, False),
}  # fmt: skip
_DOMAIN: _Fields = {
    "tier": (_TEXT, True), "hosts": (_COUNT, False), "slices": (_COUNT, False),
    "bytes_per_s": (_FIGURE, False), "latency_s": (_FIGURE, False), "source": (_TEXT, True),
}  # fmt: skip
_TORUS: _Fields = {
    "max_chips": (_COUNT, True), "shapes": ((list,), True), "cube": (_COUNT, False),
    "wrap_extent": (_COUNT, False), "source": (_TEXT, False),
}  # fmt: skip
_TYPE_NAMES = {str: "a string", int: "a whole number", float: "a number", dict: "a table", list: "a list"}


def _machine_problems(table: Table, where: str, lines: Mapping[KeyPath, int]) -> list[Problem]:
    problems = _table_problems(table, _MACHINE, (), where, lines)
    if isinstance(chip := table.get("chip"), dict):
        problems += _table_problems(chip, _CHIP, ("chip",), where, lines)
        problems += _word_problem(chip.get("family"), ("gpu", "tpu"), ("chip", "family"), where, lines)
    else:
        problems += _word_problem(chip, shipped("chips"), ("chip",), where, lines)
    if isinstance(torus := table.get("torus"), dict):
        problems += _torus_problems(torus, where, lines)
    rules = table.get("domain")
    for rule in rules if isinstance(rules, list) else ():
        problems += _domain_problems(rule, where, lines)
    return problems


def _domain_problems(rule: object, where: str, lines: Mapping[KeyPath, int]) -> list[Problem]:
    if not isinstance(rule, dict):
        return [Problem(at(where, ("domain",), lines), "is not a table", "write [[domain]] tables")]
    problems = _table_problems(rule, _DOMAIN, ("domain",), where, lines)
    return problems + _word_problem(rule.get("tier"), TIERS, ("domain", "tier"), where, lines)


def _torus_problems(torus: Table, where: str, lines: Mapping[KeyPath, int]) -> list[Problem]:
    problems = _table_problems(torus, _TORUS, ("torus",), where, lines)
    shapes = torus.get("shapes")
    if isinstance(shapes, list) and not _are_shapes(shapes):
        fix = "write extents of two or three axes each: [[2, 2], [2, 4]]"
        problems.append(Problem(at(where, ("torus", "shapes"), lines), "is not a list of shapes", fix))
    return problems


def _are_shapes(shapes: list[object]) -> bool:
    lists = [shape for shape in shapes if isinstance(shape, list) and len(shape) in (2, 3)]
    if not shapes or len(lists) != len(shapes) or len({len(shape) for shape in lists}) != 1:
        return False
    return all(type(extent) is int and extent > 0 for shape in lists for extent in shape)


def _word_problem(
    word: object, known: tuple[str, ...] | list[str], key: KeyPath, where: str, lines: Mapping[KeyPath, int]
) -> list[Problem]:
    if not isinstance(word, str) or word in known:
        return []  # a wrong type is reported where types are
    what = f"unknown {key[-1]} {quoted(word)}"
    return [Problem(at(where, key, lines), what, did_you_mean(word, known, "known"))]


def _table_problems(
    table: Table, fields: _Fields, key: KeyPath, where: str, lines: Mapping[KeyPath, int]
) -> list[Problem]:
    """Unknown keys, missing keys, wrong types and numbers that are not positive."""
    problems = [
        Problem(at(where, (*key, name), lines), "unknown key", did_you_mean(name, fields, "known keys"))
        for name in table
        if name not in fields
    ]
    for name, (types, required) in fields.items():
        if name not in table:
            if required:
                problems.append(Problem(at(where, key, lines), f"{name!r} is missing", f"add {name} = …"))
        elif wrong := _value_wrong(table[name], types):
            problems.append(Problem(at(where, (*key, name), lines), wrong, ""))
    return problems


def _value_wrong(value: object, types: tuple[type, ...]) -> str:
    expected = _TYPE_NAMES[types[-1]]
    if type(value) not in types:
        return f"{quoted(value)} is not {expected}"
    finite = not isinstance(value, float) or value < float("inf")
    return "" if not isinstance(value, (int, float)) or (value > 0 and finite) else f"{value} is not positive"


def _product(extents: tuple[int, ...]) -> int:
    product = 1
    for extent in extents:
        product *= extent
    return product
