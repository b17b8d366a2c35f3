"""A dump cut off at any of 200 places is an error that points: the fast path sees it every time."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest

import shardlab
from shardlab.errors import ParseError

GOLDEN = Path(__file__).parents[1] / "golden"
TEXTS = sorted(
    path
    for folder in ("hlo", "samples", "rings")
    for path in (GOLDEN / folder).rglob("*")
    if {".hlo", ".txt"} & set(path.suffixes) and ".pb" not in path.suffixes
)
CUTS = 200


def read(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()


def closing(text: str) -> int:
    """The offset of the last closing brace of the last module: a cut at or before it leaves it open."""
    blank = re.sub(r"//[^\n]*|/\*.*?\*/", lambda m: " " * len(m.group()), text, flags=re.DOTALL)
    return blank.rstrip().rfind("}") if blank.rstrip().endswith("}") else blank.rfind("\n}") + 1


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_cut_at_200_places(path: Path) -> None:
    text = read(path)
    last = closing(text)
    joint = text.find("\n\nHloModule")  # a cut there leaves whole modules
    missed = []
    for number in range(CUTS):
        cut = 1 + (last - 1) * number // (CUTS - 1)
        if joint >= 0 and joint - 1 <= cut <= joint + 2:
            continue
        try:
            shardlab.analyze(text[:cut] + "\n")
        except ParseError as error:
            lines = text[:cut].count("\n") + 2
            assert 1 <= error.line <= lines, (cut, error)
            assert error.column >= 1, (cut, error)
        else:
            missed.append(cut)
    assert not missed, [text[max(0, cut - 60) : cut] for cut in missed[:3]]
