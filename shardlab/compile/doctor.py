"""Which targets this machine can compile for, and the exact command that adds each of the others.

Judged from package metadata, without importing jax; `deep=True` proves each one with a tiny compile.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata

from shardlab.compile.versions import installed
from shardlab.errors import ShardlabError, TargetMissing
from shardlab.hardware.data_files import load_chip, shipped
from shardlab.hardware.machine import Machine

VersionOf = Callable[[str], str | None]
_JAX = ("jax", "jaxlib", "flax", "optax")
_CUDA = ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc")
_INSTALL = {
    "cpu": "pip install 'shardlab[jax]'",
    "tpu": "pip install 'shardlab[tpu]'",
    "gpu": "pip install 'shardlab[gpu]'",
    "attached": "pip install 'shardlab[jax]'",
}
# Small machines that a deep check compiles for, with the axes of a plan that fits them.
_PROOFS = {"cpu": ("cpu:2", 2), "tpu": ("v5e:2x2", 4), "gpu": ("h100:1x2", 2)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetStatus:
    """One target: whether it works here, what was found (versions) or is missing, and how to install it."""

    target: str
    works: bool
    detail: str
    install: str = ""


def targets(*, deep: bool = False, version_of: VersionOf = installed) -> tuple[TargetStatus, ...]:
    """The status of every target family, then of the chips that no compiler here knows.

    version_of: installed version of a distribution or None (tests give their own).
    """
    families = tuple(family_status(family, version_of) for family in ("cpu", "tpu", "gpu", "attached"))
    if deep:
        families = tuple(_proved(status) for status in families)
    return (*families, *_without_compiler())


def family_status(family: str, version_of: VersionOf = installed) -> TargetStatus:
    """Whether a family (`cpu`, `tpu`, `gpu`, `attached`) has what it needs, by package metadata alone."""
    needed = _JAX + {"tpu": ("libtpu",), "gpu": _CUDA}.get(family, ())
    found = {package: version_of(package) for package in needed}
    missing = [package for package, version in found.items() if version is None]
    if missing:
        detail = f"not installed: {', '.join(missing)}"
        return TargetStatus(target=family, works=False, detail=detail, install=_INSTALL[family])
    present = {package: version for package, version in found.items() if version is not None}
    clash = _clash(family, present)
    if clash:
        return TargetStatus(target=family, works=False, detail=clash, install=_INSTALL[family])
    detail = ", ".join(
        f"{package} {version}" for package, version in present.items() if package not in _JAX[2:]
    )
    return TargetStatus(target=family, works=True, detail=detail)


def _clash(family: str, present: dict[str, str]) -> str:
    """Compilers that do not belong to this jax: such a pair loads, and fails late with an unclear message."""
    if family == "gpu" and present["jax-cuda13-plugin"] != present["jaxlib"]:
        return f"jax-cuda13-plugin {present['jax-cuda13-plugin']} is not for jaxlib {present['jaxlib']}"
    pinned = _pinned_libtpu() if family == "tpu" else None
    if pinned and not present["libtpu"].startswith(pinned):
        return f"libtpu {present['libtpu']} is not the {pinned} that jax {present['jax']} pins"
    return ""


def _pinned_libtpu() -> str | None:
    """The libtpu version that the installed jax asks for in its `tpu` extra, None when it does not say."""
    for requirement in metadata.requires("jax") or ():
        if match := re.match(r"libtpu\s*==\s*([\d.]+?)(?:\.\*)?\s*(?:;|$)", requirement):
            return match[1]
    return None


def require_target(machine: Machine, version_of: VersionOf = installed) -> None:
    """Raise TargetMissing, with the command that changes it, when this machine cannot compile for
    `machine`.
    """
    if machine.family in ("gpu", "tpu") and machine.chip.compile_as is None:
        why = f"no compiler here knows {machine.chip.name}"
        raise TargetMissing(machine.spec, why, "analyse a dump made on such a machine: shardlab analyze DUMP")
    status = family_status(machine.family, version_of)
    if not status.works:
        raise TargetMissing(machine.spec, status.detail, status.install)


def _without_compiler() -> tuple[TargetStatus, ...]:
    chips = [load_chip(name) for name in shipped("chips")]
    return tuple(
        TargetStatus(
            target=chip.name,
            works=False,
            detail=f"no compiler here: {chip.not_compiled_because}; analyse a dump made on one",
        )
        for chip in chips
        if chip.compile_as is None
    )


def _proved(status: TargetStatus) -> TargetStatus:
    """The status after a real compile of the tiny model."""
    from shardlab.compile.launch import compile_case
    from shardlab.spec.case import Case
    from shardlab.spec.models import MODELS
    from shardlab.spec.plan import Plan

    if not status.works or status.target not in _PROOFS:
        return status
    machine, devices = _PROOFS[status.target]
    plan = Plan(name="doctor", axes={"data": devices}, activations={"batch": ("data",)})
    case = Case(plan=plan, model=MODELS["tiny"], machine=machine, batch=devices, seq=128)
    try:
        compiled = compile_case(case, timeout_s=300)
    except ShardlabError as error:
        return replace(status, works=False, detail=str(error))
    return replace(
        status, detail=f"{status.detail}; compiled for {machine} in {compiled.compile_s or 0:.1f} s"
    )
