"""Versions of what makes a program, from package metadata. Imports no jax."""

from __future__ import annotations

import functools
import hashlib
import sys
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
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in (*_EVERYWHERE, *_COMPILERS.get(family, ())):
        version = installed(package)
        if version is not None:
            found[package] = version
    return found


def installed(package: str) -> str | None:
    """Version of an installed distribution, None when it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def source_digest() -> str:
    """sha256 over the sources that decide what is compiled, so that a cached program dies with the code it
    came from.
    """
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for folder in ("model", "parallel", "compile"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
