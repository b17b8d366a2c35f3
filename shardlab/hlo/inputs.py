"""What a user may hand over: HLO text, protos, compressed or not, dump folders, saved programs, stdin."""

from __future__ import annotations

import json
import re
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shardlab import program as programs
from shardlab import recording
from shardlab.errors import ParseError, Problem, UserError
from shardlab.hlo.module import Module
from shardlab.hlo.proto import parse_proto
from shardlab.hlo.reader import parse
from shardlab.program import Program

MAX_INPUT_BYTES = 1 << 30
"""Largest input, before and after decompression."""

_GZIP_MAGIC = b"\x1f\x8b"
_MAX_LAYERS = 3
_STEP_BYTES = 1 << 10  # zstd expands it to 32 MiB at most
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_DUMP = re.compile(
    r"module_(?P<number>[0-9]+)\.(?:(?P<name>.+?)\.)??"
    r"(?:cl_[0-9]+\.)?(?:sm_[0-9]+\.[0-9]+[a-z]?_)?(?:[a-z0-9]+_)?after_optimizations"
    r"\.(?P<ext>txt|hlo|hlo\.pb)(?:\.gz|\.zst)?"
)
_ADVICE = "give HLO text, an HLO proto, either compressed, a dump folder, or a saved program"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One thing that was read: where it came from, its modules, and the saved program if it was one.

    modules is empty when a saved program was refused by its compiler.
    """

    name: str
    modules: tuple[Module, ...]
    program: Program | None = None


def read_sources(path: str | Path) -> list[Source]:
    """Read a file, a dump folder or (`-`) standard input.

    Raises UserError when it is missing, empty, too large or no HLO, ParseError when it is HLO that is broken.
    """
    if str(path) == "-":
        return [read_bytes(sys.stdin.buffer.read(MAX_INPUT_BYTES + 1), "<stdin>")]
    path = Path(path)
    try:
        return _read_folder(path) if path.is_dir() else [read_bytes(_read_file(path), str(path))]
    except OSError as error:
        raise _problem(str(path), error.strerror or str(error), "give the path of an HLO dump") from None


def read_bytes(data: bytes, name: str = "<bytes>") -> Source:
    """Read one input whatever its format, which is told from its content."""
    data = _decompress(data, name)
    if not data.strip():
        raise _problem(name, "it is empty", _ADVICE)
    saved = _saved_program(data, name)
    if saved is not None:
        modules = parse(saved.hlo_text, name) if saved.hlo_text.strip() else ()
        return Source(name=name, modules=modules, program=saved)
    if _CONTROL.search(data, 0, 1 << 16):
        return Source(name=name, modules=_proto(data, name))
    return Source(name=name, modules=parse(data.decode("utf-8", "replace"), name))


def _problem(where: str, what: str, fix: str) -> UserError:
    return UserError(Problem(where, what, fix))


def _read_file(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_INPUT_BYTES + 1)


def _proto(data: bytes, name: str) -> tuple[Module, ...]:
    try:
        return parse_proto(data, name)
    except ParseError as error:
        raise _problem(name, f"it is binary, but no HLO proto ({error.message})", _ADVICE) from None


def _saved_program(data: bytes, name: str) -> Program | None:
    """The saved program in `data`, None when it is something else. JSON of another kind is a mistake."""
    if not data.lstrip().startswith(b"{"):
        return None
    try:
        document = json.loads(data)
        return programs.from_document(document)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _problem(name, f"it is JSON, but not a saved program ({error})", _ADVICE) from None


def _decompress(data: bytes, name: str) -> bytes:
    """Undo gzip and zstd, a few layers at most, never beyond MAX_INPUT_BYTES."""
    for _ in range(_MAX_LAYERS):
        if len(data) > MAX_INPUT_BYTES:
            break
        if data.startswith(_GZIP_MAGIC):
            data = _gunzip(data, name)
        elif data.startswith(programs.ZSTD_MAGIC):
            data = _unzstd(data, name)
        else:
            return data
    if len(data) > MAX_INPUT_BYTES:
        raise _problem(name, f"it holds more than {MAX_INPUT_BYTES >> 30} GiB", "give a smaller dump")
    return data


def _gunzip(data: bytes, name: str) -> bytes:
    return _inflate(data, name, "gzip", lambda: zlib.decompressobj(wbits=31), zlib.error)


def _unzstd(data: bytes, name: str) -> bytes:
    import zstandard

    frames = zstandard.ZstdDecompressor(max_window_size=1 << 28)
    return _inflate(data, name, "zstd", frames.decompressobj, zstandard.ZstdError)


class _Stream(Protocol):
    """What zlib and zstandard decompress one member, or frame, with."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def _inflate(
    data: bytes, name: str, kind: str, start: Callable[[], _Stream], damage: type[Exception]
) -> bytes:
    """All members, each to its end: a cut one is refused.

    Input goes in by small pieces, which cannot expand beyond measure; the rest is not copied per member.
    """
    pieces: list[bytes] = []
    size = offset = 0
    while offset < len(data) and size <= MAX_INPUT_BYTES:
        stream = start()
        while not stream.eof and size <= MAX_INPUT_BYTES:
            piece = data[offset : offset + _STEP_BYTES]
            if not piece:
                raise _problem(name, f"the {kind} data is cut off", "copy the file again")
            try:
                pieces.append(stream.decompress(piece))
            except damage as error:
                raise _problem(name, f"the {kind} data is damaged ({error})", "copy the file again") from None
            size += len(pieces[-1])
            offset += len(piece) - len(stream.unused_data)
    return b"".join(pieces)


def _read_folder(folder: Path) -> list[Source]:
    """The last after-optimisation module of each name in an `xla_dump_to` folder, text rather than proto; or
    what was recorded."""
    if recording.is_recording(folder):
        program = recording.read_recording(folder)
        return [Source(name=str(folder), modules=parse(program.hlo_text, program.name), program=program)]
    best: dict[str, tuple[int, bool, Path]] = {}
    for path in sorted(folder.iterdir()):
        match = _DUMP.fullmatch(path.name)
        if not match or not path.is_file():
            continue
        # XLA leaves long module names out of file names: such files are told apart by their number alone.
        name = match["name"] or f"#{match['number']}"
        rank = (int(match["number"]), match["ext"] != "hlo.pb", path)
        best[name] = max(best.get(name, rank), rank)
    if not best:
        raise _problem(
            str(folder),
            "no file in this folder is called module_*after_optimizations.txt or .hlo.pb",
            "make dumps with XLA_FLAGS='--xla_dump_to=DIR --xla_dump_hlo_as_text'",
        )
    chosen = sorted(best.values())
    return [read_bytes(_read_file(path), str(path)) for _, _, path in chosen]
