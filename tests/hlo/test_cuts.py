"""A dump cut off at any of 200 places is an error that points: the fast path sees it every time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from samples import GOLDEN, decompressed

import shardlab
from shardlab.analysis import Analysis
from shardlab.errors import ParseError, UserError
from shardlab.hlo.wire import read_varint

FILES = sorted(path for folder in ("hlo", "samples", "rings") for path in (GOLDEN / folder).rglob("*"))
TEXTS = [path for path in FILES if {".hlo", ".txt"} & set(path.suffixes) and ".pb" not in path.suffixes]
PROTOS = [path for path in FILES if ".pb" in path.suffixes]
PROTOS.append(GOLDEN / "second_counter" / "tpu_v5e_4x4.scan8.pb.gz")
CUTS = 200
_VARINT, _BYTES = 0, 2


def closing(text: str) -> int:
    """The offset of the last closing brace of the last module: a cut at or before it leaves it open."""
    blank = re.sub(r"//[^\n]*|/\*.*?\*/", lambda m: " " * len(m.group()), text, flags=re.DOTALL)
    return blank.rstrip().rfind("}") if blank.rstrip().endswith("}") else blank.rfind("\n}") + 1


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_cut_at_200_places(path: Path) -> None:
    text = decompressed(path).decode()
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


def field_ends(data: bytes) -> Iterator[int]:
    """Where the fields of a message end, but for the last: what is before such a place is a message too."""
    offset = 0
    while offset < len(data):
        key, offset = read_varint(data, offset)
        assert key & 7 in (_VARINT, _BYTES)
        size, offset = read_varint(data, offset)
        offset += size if key & 7 == _BYTES else 0
        if offset < len(data):
            yield offset


def moved(found: Analysis) -> list[tuple[object, ...]]:
    """In any order: a proto may be cut before the schedule."""
    return sorted((row.name, row.kind, row.executions, row.payload_bytes) for row in found.collectives)


@pytest.mark.parametrize("path", PROTOS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_proto_cut_at_200_places_and_between_all_fields(path: Path) -> None:
    """Of protobuf's own making, a message cut between two fields is a message. No collective is lost by it:
    before the last computation the entry is missing, and after it everything that moves is there."""
    data = decompressed(path)
    whole, between = moved(shardlab.analyze(data)), set(field_ends(data))
    for cut in between | {1 + (len(data) - 2) * number // (CUTS - 1) for number in range(CUTS)}:
        try:
            found = moved(shardlab.analyze(data[:cut]))
        except (ParseError, UserError):
            continue
        assert cut in between, cut
        assert found == whole, cut
