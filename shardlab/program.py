"""The saved, compiled program: the hand-over record between compiling (dear) and analysing (cheap).

A file is zstd-compressed JSON (`{"schema": "shardlab.program/1", …}`), written atomically and read with a
size bound. Imports neither jax nor anything heavy.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from shardlab.errors import Problem, UserError

SCHEMA = "shardlab.program/1"
MAX_DOCUMENT_BYTES = 4 << 30
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The compiler's own memory analysis, bytes per device; None where the backend does not say.

    host_bytes: arguments, results and temporaries in the host's memory. All others are of the device's, but
    `peak_bytes` counts both.
    """

    argument_bytes: int | None = None
    output_bytes: int | None = None
    alias_bytes: int | None = None
    temp_bytes: int | None = None
    code_bytes: int | None = None
    peak_bytes: int | None = None
    host_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """Compiler flags of the plan: asked for, in effect, and rejected (flag, why)."""

    requested: tuple[str, ...] = ()
    effective: tuple[str, ...] = ()
    rejected: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CompilerWarning:
    """A warning the compiler printed, such as `involuntary full rematerialization`, with what it names."""

    kind: str
    text: str
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """The compiler refused because the program does not fit. Bytes per device.

    largest_batch: the largest global batch (sequences) that did compile, None if none did or none was tried.
    """

    needed_bytes: int
    limit_bytes: int
    largest_batch: int | None = None
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Argument:
    """An array that the program takes.

    path: where jax has it among the arguments. shape: of the whole array, in elements; total_bytes: of it.
    split_over: the mesh axes that split it. device_bytes: of what one device holds.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    total_bytes: int
    split_over: tuple[str, ...]
    device_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One compiled program, per device code, with the facts that the text alone does not hold.

    mesh: axis name -> size, major to minor; HLO id p is position p in the row-major grid of these axes.
    device_ids: at each mesh position the device, its index in the machine (slice * devices per slice + id in
        its slice).
    device_coords: physical coordinates by device id where the target has them (TPU torus), else None.
    hlo_text: the optimised HLO; empty when `refusal` is set.
    autotuned: False for ahead-of-time GPU programs, None where the word means nothing.
    arguments: in device memory, in order; None where it is not known how they are split.
    runs_per_step: how often one step runs it. then: the other programs that the same step runs (an update
        after sixteen microbatches), each with its own `runs_per_step` and none of them with others.
    left_out: (program, why) of what was recorded and is no part of the step. given: what the user's own step
        function was given, by name: batch in sequences, seq in tokens, model, workload.
    """

    name: str
    backend: str
    hlo_text: str
    num_devices: int
    mesh: Mapping[str, int] | None = None
    device_ids: tuple[int, ...] | None = None
    device_coords: tuple[tuple[int, ...], ...] | None = None
    memory: Memory | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    flags: Flags = field(default_factory=Flags)
    warnings: tuple[CompilerWarning, ...] = ()
    refusal: Refusal | None = None
    autotuned: bool | None = None
    compile_s: float | None = None
    notes: tuple[str, ...] = ()
    arguments: tuple[Argument, ...] | None = None
    runs_per_step: int = 1
    then: tuple[Program, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()
    given: Mapping[str, str | int] = field(default_factory=dict)

    @property
    def programs(self) -> tuple[Program, ...]:
        """Every program of the step, this one first."""
        return (self, *self.then)


def to_bytes(program: Program) -> bytes:
    """Serialise: compressed JSON."""
    import zstandard

    document = {"schema": SCHEMA, **asdict(program)}
    return zstandard.ZstdCompressor(level=6).compress(json.dumps(document, separators=(",", ":")).encode())


def from_bytes(data: bytes, source: str = "<program>") -> Program:
    """Read what `to_bytes` wrote. Raises UserError when it is not a saved program."""
    import zstandard

    try:
        reader = zstandard.ZstdDecompressor().stream_reader(data)
        raw = reader.read(MAX_DOCUMENT_BYTES + 1)
        if len(raw) > MAX_DOCUMENT_BYTES:
            raise ValueError(f"more than {MAX_DOCUMENT_BYTES} bytes after decompression")
        document = json.loads(raw)
        return from_document(document)
    except (zstandard.ZstdError, ValueError, TypeError, KeyError, AttributeError) as error:
        problem = Problem(
            source, f"not a saved program ({error})", "save one with: shardlab explain … --save FILE"
        )
        raise UserError(problem) from None


def from_document(document: dict[str, Any]) -> Program:
    """Program from its JSON document. Raises ValueError, TypeError or KeyError when it does not fit."""
    if document.pop("schema", None) != SCHEMA:
        raise ValueError(f"schema is not {SCHEMA}")
    others = tuple(_program(one) for one in document.pop("then", ()))
    if any(one.then for one in others):
        raise ValueError("a program of a step holds another step")
    return replace(_program(document), then=others)


def _program(document: dict[str, Any]) -> Program:
    fields = dict(document)
    runs = fields.get("runs_per_step", 1)
    if type(runs) is not int or runs < 1:
        raise ValueError(f"runs_per_step is {str(runs)[:40]}, not a whole number above 0")
    fields["memory"] = Memory(**fields["memory"]) if fields.get("memory") else None
    flags = fields.get("flags") or {}
    fields["flags"] = Flags(
        requested=tuple(flags.get("requested", ())),
        effective=tuple(flags.get("effective", ())),
        rejected=tuple((str(flag), str(why)) for flag, why in flags.get("rejected", ())),
    )
    fields["warnings"] = tuple(
        CompilerWarning(kind=w["kind"], text=w["text"], names=tuple(w["names"]))
        for w in fields.get("warnings", ())
    )
    fields["refusal"] = Refusal(**fields["refusal"]) if fields.get("refusal") else None
    if fields.get("arguments") is not None:
        fields["arguments"] = tuple(map(_argument, fields["arguments"]))
    for key in ("device_ids", "notes"):
        fields[key] = tuple(fields[key]) if fields.get(key) is not None else fields.get(key)
    if fields.get("device_coords") is not None:
        fields["device_coords"] = tuple(tuple(c) for c in fields["device_coords"])
    fields["left_out"] = tuple((str(name), str(why)) for name, why in fields.get("left_out", ()))
    return Program(**fields)


def _argument(document: dict[str, Any]) -> Argument:
    lists = {"shape": tuple(document["shape"]), "split_over": tuple(document["split_over"])}
    return Argument(**{**document, **lists})


def save(program: Program, path: str | Path) -> None:
    """Write the program; a reader never sees half a file, a killed writer leaves none."""
    write_atomically(Path(path), to_bytes(program))


def load(path: str | Path) -> Program:
    """Read a saved program. Raises UserError when the file is missing or is something else."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            Problem(str(path), error.strerror or str(error), "give the path of a saved program")
        ) from None
    return from_bytes(data, str(path))


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to a sibling temporary file, then rename it into place."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
