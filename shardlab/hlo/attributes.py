"""Values of attributes that later stages ask for: called computations, metadata, configs.

Each function takes an `Instruction` and reads its raw text; an attribute that is absent gives an empty value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from shardlab.errors import ParseError
from shardlab.hlo.lexer import STRING, Text, without_comments
from shardlab.hlo.module import Instruction, Operand
from shardlab.hlo.strings import unescape

CALLING_ATTRIBUTES = (
    "calls",
    "to_apply",
    "body",
    "condition",
    "branch_computations",
    "true_computation",
    "false_computation",
    "called_computations",
)
"""Every attribute that names computations."""

_FIELD = re.compile(r'([a-z_]+)=(?:"((?:[^"\\]++|\\.)*+)"|([^\s"{}]++)|(\{))', re.DOTALL)
_FRONTEND_KEY = re.compile(r"\s*+,?\s*+([^\s=,{}\"]++)\s*+=\s*+")
_INT = re.compile(r"-?[0-9]{1,18}")
_POSITION = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """Where an instruction comes from; empty or 0 where the text does not say.

    source_file and source_line: older text. stack_frame_id: since December 2025, a key of
    `Module.stack_frames`.
    """

    op_name: str = ""
    op_type: str = ""
    source_file: str = ""
    source_line: int = 0
    stack_frame_id: int = 0


def instruction_error(instruction: Instruction, message: str) -> ParseError:
    """The error for what an instruction says; it points to the start of the instruction's line."""
    column = 1 if instruction.line else 0
    return ParseError(f"{instruction.name}: {message}", line=instruction.line, column=column)


class errors_at:  # noqa: N801  (used as a function)
    """A ParseError that is raised inside, and does not know where, points to `instruction`."""

    __slots__ = ("_instruction",)

    def __init__(self, instruction: Instruction) -> None:
        self._instruction = instruction

    def __enter__(self) -> None: ...

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, ParseError) and not error.line:
            raise instruction_error(self._instruction, error.message) from None


def first_operand(instruction: Instruction) -> Operand:
    """The first operand. Raises ParseError when there is none."""
    if not instruction.operands:
        raise instruction_error(instruction, f"{instruction.opcode} without an operand")
    return instruction.operands[0]


def tuple_index(instruction: Instruction) -> int:
    """The element that a get-tuple-element takes. Raises ParseError when the index is not a number."""
    return _position(instruction, instruction.attributes.get("index", "0"))


def parameter_number(instruction: Instruction) -> int:
    """Which parameter this is. Raises ParseError when that is not a number."""
    return _position(instruction, (instruction.literal or "0").strip())


def _position(instruction: Instruction, text: str) -> int:
    if not _POSITION.fullmatch(text):
        raise instruction_error(instruction, f"{text[:40]!r} is not a position")
    return int(text)


def computation_names(instruction: Instruction, attribute: str) -> tuple[str, ...]:
    """Names in `to_apply=%add`, `calls=%a, %b` or `branch_computations={%a, %b}`, without `%`, in order."""
    raw = instruction.attributes.get(attribute)
    if not raw:
        return ()
    inner = without_comments(raw).strip().removeprefix("{").removesuffix("}")
    return tuple(name.strip().lstrip("%") for name in inner.split(",") if name.strip())


def called_computations(instruction: Instruction) -> tuple[str, ...]:
    """All computations that an instruction names, in the order of CALLING_ATTRIBUTES."""
    return tuple(
        name for attribute in CALLING_ATTRIBUTES for name in computation_names(instruction, attribute)
    )


def metadata(instruction: Instruction) -> Metadata:
    """The `metadata={…}` of an instruction. Fields are separated by blanks; unknown ones are passed over."""
    raw = instruction.attributes.get("metadata")
    if not raw:
        return Metadata()
    try:
        return read_metadata(raw)
    except ParseError as error:  # its position is one within the metadata
        raise instruction_error(instruction, f"metadata: {error.message}") from None


@lru_cache(maxsize=1 << 12)
def read_metadata(raw: str) -> Metadata:
    """`metadata` from its text. Raises ParseError, with a position within that text."""
    fields = dict(_metadata_fields(raw))
    return Metadata(
        op_name=unescape(fields.get("op_name", "")),
        op_type=unescape(fields.get("op_type", "")),
        source_file=unescape(fields.get("source_file", "")),
        source_line=_to_int(fields.get("source_line")) or 0,
        stack_frame_id=_to_int(fields.get("stack_frame_id")) or 0,
    )


def _metadata_fields(raw: str) -> Iterator[tuple[str, str]]:
    text, offset = Text(raw, "metadata"), 1
    while match := _FIELD.search(raw, offset):
        name, quoted, word, brace = match.groups()
        offset = text.dict_end(match.end() - 1) if brace else match.end()
        yield name, f'"{quoted}"' if quoted is not None else word or ""


def _to_int(text: object) -> int | None:
    match = _INT.fullmatch(str(text).strip()) if text is not None else None
    return int(match.group()) if match else None


def backend_config_text(instruction: Instruction) -> str:
    """The backend config as its backend wrote it: raw braces as they are, the older quoted form unescaped."""
    raw = instruction.attributes.get("backend_config", "")
    return unescape(raw) if raw.startswith('"') else raw


def backend_config(instruction: Instruction) -> Mapping[str, object]:
    """The backend config as a JSON object; empty when it is absent or is not JSON (`{is_stable = true}`)."""
    return _json_object(backend_config_text(instruction))


@lru_cache(maxsize=256)
def _json_object(text: str) -> Mapping[str, object]:
    if not text.lstrip().startswith("{"):
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def config_value(instruction: Instruction, *path: str) -> object | None:
    """The member of the backend config at `path`, or None; a config without the key is not parsed.

    Raises ParseError when the config names the key but is not JSON.
    """
    text = backend_config_text(instruction)
    if not text or f'"{path[0]}"' not in text:
        return None
    value: object = backend_config(instruction)
    if not value:
        raise instruction_error(instruction, f"the backend config is not JSON: {text[:60]!r}")
    for key in path:
        if not isinstance(value, dict) or key not in value:
            return None
        value = value[key]
    return value


def config_int(instruction: Instruction, *path: str) -> int | None:
    """The same as an integer; JSON of proto int64 writes integers as strings (`"n":"6"`)."""
    return _to_int(config_value(instruction, *path))


def known_trip_count(instruction: Instruction) -> int | None:
    """`known_trip_count.n` of a while (GPU always, CPU since July 2024, TPU never), or None."""
    return config_int(instruction, "known_trip_count", "n")


def frontend_attributes(instruction: Instruction) -> dict[str, str]:
    """Values by key of `frontend_attributes={a="text",b={{0,4}}}`: quoted ones unescaped, braced ones raw."""
    raw = instruction.attributes.get("frontend_attributes")
    if not raw or not raw.startswith("{"):
        return {}
    text, offset, found = Text(raw, "frontend_attributes"), 1, {}
    while match := _FRONTEND_KEY.match(raw, offset):
        start = match.end()
        string = STRING.match(raw, start)
        if string:
            offset = string.end()
            found[match.group(1)] = unescape(string.group())
        elif raw.startswith("{", start):
            offset = text.dict_end(start)
            found[match.group(1)] = raw[start:offset]
        else:
            break
    return found


def channel_id(instruction: Instruction) -> int | None:
    """The channel id, None where there is none: 0 and below mean none. It does not identify a collective."""
    value = _to_int(instruction.attributes.get("channel_id"))
    return value if value is not None and value > 0 else None


def is_true(instruction: Instruction, attribute: str) -> bool:
    """Whether a boolean attribute (`use_global_device_ids`, `has_dynamic_root`, …) is printed as true."""
    return instruction.attributes.get(attribute) == "true"
