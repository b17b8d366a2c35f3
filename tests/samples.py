"""Compiled programs under tests/golden by name, wherever they lie and however they are compressed."""

from __future__ import annotations

import gzip
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = (GOLDEN / "samples", GOLDEN / "hlo" / "printed")


def sample_path(name: str) -> Path:
    """The file that holds the sample `name`, which may be the file's name without its `.gz`."""
    (found,) = [path for folder in FOLDERS for path in folder.glob(f"{name}*") if _is(path, name)]
    return found


def sample(name: str) -> bytes:
    """What the sample `name` holds, decompressed."""
    return decompressed(sample_path(name))


def decompressed(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if path.suffix == ".gz" else data


def _is(path: Path, name: str) -> bool:
    return path.name in (name, f"{name}.gz")
