"""Machine names to machines: `h100:64x8`, `v5p:8x8x8`, `v5e:16x16*2`, `cpu:8`, `attached:4`, a file.

`NAME+LINK:SIZE` puts another link into a machine: `rtx4090+pcie4-x8:1x2` (slots of eight lanes),
`h100+ethernet-100g:4x8` (another network). Links are files too.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

from shardlab.errors import Problem, UserError
from shardlab.hardware.data_files import (
    DomainRule,
    MachineFile,
    Torus,
    load_link,
    load_machine_file,
    load_shipped_machine,
    shipped,
)
from shardlab.hardware.machine import Chip, Domain, Machine
from shardlab.hardware.toml_file import did_you_mean, quoted

ALIASES = {
    "a100": "dgx-a100",
    "a100-40": "dgx-a100-40",
    "h100": "dgx-h100",
    "h200": "dgx-h200",
    "b200": "dgx-b200",
    "hgx-h200": "dgx-h200",
    "hgx-b200": "dgx-b200",
    "gb200": "gb200-nvl72",
}
MAX_DEVICES = 1 << 20  # a bound on what a name can make us build
FORMS = "NAME:HOSTSxCHIPS (h100:64x8), NAME:TORUS[*SLICES] (v5p:8x8x8), cpu:N, attached:N, or a machine file"

_NUMBER = re.compile(r"[0-9]{1,7}")
_SIZE = re.compile(r"([0-9]{1,7}(?:x[0-9]{1,7}){1,2})(?:\*([0-9]{1,7}))?")


def load_machine(spec: str) -> Machine:
    """The machine that `spec` names. Raises UserError: unknown name, bad file, impossible topology."""
    name, _, size = spec.strip().partition(":")
    if name in ("cpu", "attached"):
        return _flat_machine(spec, name, size)
    name, *links = name.split("+") if ".toml+" in name or not _is_path(name) else [name]
    file = (
        load_machine_file(Path(name)) if _is_path(name) else load_shipped_machine(_shipped_name(spec, name))
    )
    for link in links:
        file = _linked(file, spec, link)
    return _build(file, spec, size)


def machine_names() -> tuple[str, ...]:
    """Every name that can stand before the colon, short ones first."""
    return ("cpu", "attached", *ALIASES, *shipped("machines"))


def _is_path(name: str) -> bool:
    return name.endswith(".toml") or "/" in name


def _linked(file: MachineFile, spec: str, name: str) -> MachineFile:
    if name not in shipped("links"):
        known = did_you_mean(name, shipped("links"), "known links")
        raise _wrong(spec, f"unknown link {quoted(name)}", f"{known}, or write a machine file")
    rule = load_link(name)
    made = file.with_link(rule)
    if made is None:
        raise _wrong(spec, f"{rule.tier} joins no chips here", "write a machine file")
    return made


def _shipped_name(spec: str, name: str) -> str:
    full = ALIASES.get(name, name)
    if full not in shipped("machines"):
        known = did_you_mean(name, machine_names(), "known machines")
        raise _wrong(
            spec, f"unknown machine {quoted(name)}", f"{known}, or the path of a machine file (.toml)"
        )
    return full


def _flat_machine(spec: str, name: str, size: str) -> Machine:
    """N emulated devices, or N that JAX will see at compile time; nothing is known of their links."""
    count = int(size) if _NUMBER.fullmatch(size) else 0
    if not 1 <= count <= MAX_DEVICES:
        raise _wrong(spec, "no number of devices", f"write {name}:8")
    emulated = name == "cpu"
    source = "emulated: no link" if emulated else "whatever JAX sees: unknown"
    link = Domain(tier="loopback", size=count, bytes_per_s=None, source=source)
    chip = Chip(name=name, family="cpu" if emulated else "attached", memory_bytes=None)
    return Machine(
        spec=spec, chip=chip, num_devices=count, domains=(link,), emulated=emulated, attached=not emulated
    )


def _build(file: MachineFile, spec: str, size: str) -> Machine:
    if file.torus is not None:
        return _torus_machine(file, file.torus, spec, size)
    return _host_machine(file, spec, size)


def _host_machine(file: MachineFile, spec: str, size: str) -> Machine:
    hosts, chips = _host_counts(file, spec, size)
    if not 1 <= chips <= file.max_chips_per_host:
        fix = f"write …:HOSTSx{file.max_chips_per_host} with more hosts"
        raise _wrong(spec, f"{chips} chips on a host that holds 1 to {file.max_chips_per_host}", fix)
    devices = hosts * chips * file.chip.xla_devices
    if not 1 <= devices <= MAX_DEVICES:
        raise _wrong(spec, f"{devices} devices", f"use 1 to {MAX_DEVICES}")
    spans = [min(hosts, rule.hosts or hosts) for rule in file.domains]
    _check_nesting(spec, hosts, file.domains, spans)
    sizes = [span * chips * file.chip.xla_devices for span in spans]
    return Machine(
        spec=spec,
        chip=_shared(file.chip, devices) if file.shares_cores else file.chip,
        num_devices=devices,
        domains=_domains(file, sizes),
        hosts=hosts,
        shared_cores=file.shares_cores,
        power_static_w=file.power_static_w,
        power_active_w=file.power_active_w,
        price_per_hour_usd=file.price_per_hour_usd,
    )


def _shared(chip: Chip, devices: int) -> Chip:
    """What each of the devices of one computer gets of its rates."""
    rates = ("bf16_flops_per_s", "memory_bytes_per_s", "dot_bf16_flops_per_s")
    known = {name: getattr(chip, name) for name in rates if getattr(chip, name) is not None}
    return replace(chip, **{name: rate / devices for name, rate in known.items()})


def _host_counts(file: MachineFile, spec: str, size: str) -> tuple[int, int]:
    """Hosts and chips per host, as written or as a machine file has them."""
    if not size and file.hosts is not None:
        return file.hosts, file.chips_per_host or file.max_chips_per_host
    match = _SIZE.fullmatch(size)
    extents = _extents(match[1]) if match else ()
    if match is None or match[2] or len(extents) != 2:
        name = spec.partition(":")[0]
        raise _wrong(spec, "is not HOSTSxCHIPS", f"write {name}:2x{file.max_chips_per_host}")
    return extents[0], extents[1]


def _check_nesting(spec: str, hosts: int, rules: tuple[DomainRule, ...], spans: list[int]) -> None:
    """Domains divide each other, and the outermost holds everything."""
    for rule, inner, outer in zip(rules, spans, [*spans[1:], hosts], strict=True):
        if outer % inner:
            near = [n for n in (hosts // inner * inner, -(-hosts // inner) * inner) if n]
            what = f"{hosts} hosts do not fill whole {rule.tier} domains of {inner} hosts"
            raise _wrong(spec, what, f"use {' or '.join(map(str, near))} hosts")
    if spans[-1] != hosts:
        raise _wrong(
            spec,
            f"its widest domain, {rules[-1].tier}, holds {spans[-1]} of {hosts} hosts",
            "use fewer hosts",
        )


def _torus_machine(file: MachineFile, torus: Torus, spec: str, size: str) -> Machine:
    match = _SIZE.fullmatch(size)
    name = spec.partition(":")[0]
    if match is None:
        raise _wrong(spec, "is not TORUS or TORUS*SLICES", f"write {name}:{_written(torus.shapes[-1])}")
    shape, slices = _extents(match[1]), int(match[2] or 1)
    chips = math.prod(shape)
    if not torus.has(shape):
        raise _wrong(spec, f"no slice has the shape {_written(shape)}", _shapes_fix(torus, shape))
    per_slice = chips * file.chip.xla_devices
    if not 1 <= slices * per_slice <= MAX_DEVICES:
        raise _wrong(spec, f"{slices} slices", f"use 1 to {MAX_DEVICES // per_slice}")
    sizes = [per_slice * min(slices, rule.slices or slices) for rule in file.domains]
    return Machine(
        spec=spec,
        chip=file.chip,
        num_devices=slices * per_slice,
        domains=_domains(file, sizes),
        hosts=slices * -(-chips // file.max_chips_per_host),
        slices=slices,
        torus=shape,
        wraps=torus.wraps(shape),
        power_static_w=file.power_static_w,
        power_active_w=file.power_active_w,
        price_per_hour_usd=file.price_per_hour_usd,
    )


def _shapes_fix(torus: Torus, shape: tuple[int, ...]) -> str:
    """The shapes that exist, nearest in chips first."""
    chips = math.prod(shape)
    near = sorted(torus.shapes, key=lambda known: abs(math.log(math.prod(known) / max(chips, 1))))
    cubes = (
        f", or multiples of {torus.cube} on every axis up to {torus.max_chips} chips" if torus.cube else ""
    )
    return f"slice shapes: {', '.join(map(_written, near))}{cubes}"


def _domains(file: MachineFile, sizes: list[int]) -> tuple[Domain, ...]:
    """The domains that join something: those that add nothing to the one inside them are left out."""
    kept: list[Domain] = []
    per_chip = file.chip.xla_devices
    for rule, inner, size in zip(file.domains, [1, *sizes], sizes, strict=False):
        if size > (kept[-1].size if kept else 1):
            kept.append(rule.domain(size, inner, per_chip))
    return tuple(kept) or (file.domains[0].domain(sizes[0], 1, per_chip),)


def _extents(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("x"))


def _written(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _wrong(spec: str, what: str, fix: str) -> UserError:
    return UserError(Problem(f"machine {quoted(spec)}", what, fix))
