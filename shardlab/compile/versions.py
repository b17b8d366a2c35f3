"""Versions of what makes a program, from package metadata. Imports no jax."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

_EVERYWHERE = ("jax", "jaxlib", "flax", "optax", "shardlab")
_COMPILERS: dict[str, tuple[str, ...]] = {
    "tpu": ("libtpu",),
    "gpu": (
        "jax-cuda13-plugin",
        "jax-cuda13-pjrt",
        "nvidia-cuda-nvcc",
        "jax-cuda12-plugin",
        "nvidia-cudnn-cu13",
    ),
    "attached": (
        "libtpu",
        "jax-cuda13-plugin",
        "jax-cuda12-plugin",
        "nvidia-cudnn-cu13",
        "nvidia-cudnn-cu12",
    ),
}


def versions(family: str) -> dict[str, str]:
    """Package -> version for a target family, with `python`; a package that is not installed is absent."""
    return dict(_versions(family))


@functools.cache
def _versions(family: str) -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in (*_EVERYWHERE, *_COMPILERS.get(family, ())):
        version = installed(package)
        if version is not None:
            found[package] = version
    return found


# What runs and builds, not what compiles: its effect is in the lowered program.
_NO_COMPILERS = ("python", "shardlab", "flax", "optax")


def compiler_versions(found: Mapping[str, str]) -> dict[str, str]:
    """Of `versions`, those that decide what becomes of a lowered program."""
    return {package: version for package, version in found.items() if package not in _NO_COMPILERS}


def installed(package: str) -> str | None:
    """Version of an installed distribution, None when it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# The packages whose code decides which program a case is.
BUILDERS = ("spec", "model", "parallel", "compile")
_MAX_SOURCE_BYTES = 1 << 20  # of a file of the user's package; data sets are no sources


@functools.cache
def source_digest(package: Path = Path(__file__).parents[1]) -> str:
    """sha256 over the sources of a `shardlab` package that decide what is compiled, so that a kept program
    dies with the code it came from.
    """
    return _digest((path, path.relative_to(package)) for name in BUILDERS for path in _python(package / name))


def digest_of(sources: Sequence[Path]) -> str:
    """sha256 over files and folders of the user's that build a step: all files below 1 MiB, hidden ones and
    compiled ones left out.
    """
    files = (
        (path, path.relative_to(source))
        for source in sources
        for path in ([source] if source.is_file() else sorted(source.rglob("*")))
        if path.is_file() and path.stat().st_size <= _MAX_SOURCE_BYTES
    )
    return _digest((path, name) for path, name in files if not _is_hidden(name))


def _python(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def _is_hidden(name: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in name.parts)


def _digest(files: Iterable[tuple[Path, Path]]) -> str:
    digest = hashlib.sha256()
    for path, name in files:
        digest.update(name.as_posix().encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
