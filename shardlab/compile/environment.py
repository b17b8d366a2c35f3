"""What a compile child's environment must say before jax is imported, per target family. No jax here.

A child inherits nothing that would change its program (JAX_*, XLA_*, TPU_* and the like), so that one key
means one program; `attached` is the exception, since there the environment describes the user's own hardware.
"""

from __future__ import annotations

from collections.abc import Mapping

from shardlab.compile.logs import flag_name
from shardlab.hardware.machine import Machine

_DEVICE_COUNT = "xla_force_host_platform_device_count"
_PROGRAM_VARIABLES = ("JAX_", "XLA_", "TPU_", "LIBTPU_", "MEGASCALE_", "NVIDIA_TF32_OVERRIDE", "FLAX_")
_FLAG_FAMILIES = (("xla_gpu_", "gpu"), ("xla_cpu_", "cpu"), ("xla_tpu_", "tpu"), ("megascale_", "tpu"))
_QUIET = {
    # 1: warnings and worse. A remat warning is at that level; the user sees none of it, it goes to the log.
    "TF_CPP_MIN_LOG_LEVEL": "1",
    "TPU_MIN_LOG_LEVEL": "1",
    "TPU_STDERR_LOG_LEVEL": "1",
    "TPU_LOG_DIR": "disabled",
    "PYTHONUNBUFFERED": "1",
}
_NO_HARDWARE = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def split_flags(flags: tuple[str, ...], family: str) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """(flags to pass, (flag, why) withheld) for a target family (`gpu`, `tpu`, `cpu`, `attached`).

    Another family's flags mean nothing here (and libtpu dies of them); a plan may not choose the number of
    emulated devices, nor where the compiler writes files.
    """
    kept: list[str] = []
    withheld: list[tuple[str, str]] = []
    for flag in flags:
        why = _why_withheld(flag_name(flag), family)
        if why:
            withheld.append((flag, why))
        else:
            kept.append(flag)
    return tuple(kept), tuple(withheld)


def _why_withheld(name: str, family: str) -> str:
    if name == _DEVICE_COUNT:
        return "the machine decides the number of devices"
    if name.startswith("xla_dump_"):
        return "a plan may not write files; use --hlo or --save"
    for prefix, meant_for in _FLAG_FAMILIES:
        if name.startswith(prefix) and family not in (meant_for, "attached"):
            return f"a {meant_for} flag, and the target is {family}"
    return ""


def child_environment(
    machine: Machine, flags: tuple[str, ...], inherited: Mapping[str, str]
) -> dict[str, str]:
    """The environment of the child that compiles for `machine` with `flags` (those that `split_flags`
    kept).
    """
    if machine.family == "attached":
        return _attached_environment(flags, inherited)
    environment = {k: v for k, v in inherited.items() if not k.startswith(_PROGRAM_VARIABLES)}
    environment |= _QUIET | _NO_HARDWARE
    if machine.family == "tpu":
        return environment | {"LIBTPU_INIT_ARGS": " ".join(flags)}
    if machine.family == "cpu":
        flags = (f"--{_DEVICE_COUNT}={machine.num_devices}", *flags)
    return environment | {"XLA_FLAGS": " ".join(flags)}


def _attached_environment(flags: tuple[str, ...], inherited: Mapping[str, str]) -> dict[str, str]:
    """The user's own environment, plus the plan's flags: libtpu's where libtpu reads them."""
    tpu_flags = [f for f in flags if flag_name(f).startswith(("xla_tpu_", "megascale_"))]
    xla_flags = [f for f in flags if f not in tpu_flags]
    return {
        **inherited,
        "TF_CPP_MIN_LOG_LEVEL": "1",
        "XLA_FLAGS": " ".join([inherited.get("XLA_FLAGS", ""), *xla_flags]).strip(),
        "LIBTPU_INIT_ARGS": " ".join([inherited.get("LIBTPU_INIT_ARGS", ""), *tpu_flags]).strip(),
    }
