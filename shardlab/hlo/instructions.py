"""The instructions of one computation, read when they are asked for.

Reading a module only has to find where each instruction starts and that its line is whole; most instructions
are never looked at again. `Instructions` therefore keeps line numbers and builds an `Instruction` on first
use.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from sys import intern
from typing import TypeVar, overload

from shardlab.errors import ParseError
from shardlab.hlo.lexer import NAME, WORD, Text, split_top_level
from shardlab.hlo.module import Instruction, Operand, Shape
from shardlab.hlo.opcodes import PLAIN
from shardlab.hlo.printed import ATTRIBUTE, NAMES, PARTS, ROW
from shardlab.hlo.shape import parse_shape

_LITERAL_OPCODES = ("constant", "parameter")
_OPERAND = re.compile(rf"(?:.*\s)?%?({NAME}|[0-9][A-Za-z0-9_.\-]*+)((?:#[0-9]{{1,18}})*+)", re.DOTALL)
_NAME = re.compile(NAME)
_NOT_NAMES = re.compile(r"[^A-Za-z0-9_.\-%, ]|[^,] |,(?! )")
_INDEX = re.compile(r"/\*index=[0-9]++\*/")
_OPCODE = re.compile(r"([a-z][a-z0-9\-]*+)\(")
_SHAPE_HEAD = re.compile(r"b?\(|[a-z][a-z0-9]*+\[")
_SPLIT_LINES = 1 << 20
_BLOCK = 1 << 20

T = TypeVar("T")
Row = tuple[str, str, str, str, str]
"""Groups of `ROW`: `ROOT `, name, opcode, callee of a fusion; or else the line."""


class Lines:
    """Where the lines of a text start: offset to line and back, without counting newlines again and again."""

    __slots__ = ("starts",)

    def __init__(self, text: str) -> None:
        self.starts = array("Q", [0])
        offset, size = 0, len(text)
        while offset < size:
            end = text.find("\n", min(offset + _SPLIT_LINES, size)) + 1 or size
            lengths = map(len, text[offset:end].split("\n"))
            ends = [offset + end + number for number, end in enumerate(accumulate(lengths), 1)]
            self.starts.extend(ends[:-1])
            offset = end

    def line_of(self, offset: int) -> int:
        """The line that holds `offset`, from 1."""
        return bisect_right(self.starts, offset)

    def start_of(self, line: int) -> int:
        """The offset at which `line` (from 1) starts."""
        return self.starts[line - 1]


class Attributes(Mapping[str, str]):
    """Raw attribute values by name. The tail of the instruction is split on first use."""

    __slots__ = ("_found", "_offset", "_text")

    def __init__(self, text: Text, offset: int) -> None:
        self._text: Text = text
        self._offset = offset
        self._found: dict[str, str] | None = None

    def _values(self) -> dict[str, str]:
        if self._found is None:
            self._found = _printed_attributes(self._text.text, self._offset)
        if self._found is None:
            self._found, end = self._text.attributes(self._offset)
            if self._text.at(end) not in ("\n", ""):
                raise self._text.error(end, f"expected ', name=value', found {self._text.found(end)}")
        return self._found

    def __getitem__(self, name: str) -> str:
        return self._values()[name]

    @overload
    def get(self, name: str, default: None = None, /) -> str | None: ...
    @overload
    def get(self, name: str, default: str | T, /) -> str | T: ...
    def get(self, name: str, default: object = None, /) -> object:
        """The raw value of attribute `name`; asked so often that Mapping's own is too slow."""
        found = self._found
        return (self._values() if found is None else found).get(name, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values())

    def __len__(self) -> int:
        return len(self._values())

    def __contains__(self, name: object) -> bool:
        return name in self._values()

    def __repr__(self) -> str:
        return repr(self._values())


def _printed_attributes(text: str, offset: int) -> dict[str, str] | None:
    """Raw values by name, None unless all up to the end of the line are printed as usual, each once."""
    end = text.find("\n", offset)
    pairs: list[tuple[str, str]] = ATTRIBUTE.findall(text, offset, end)
    written = sum([len(name) + len(value) for name, value in pairs]) + len(", =") * len(pairs)
    found = {intern(name): value for name, value in pairs}
    return found if written == end - offset and len(found) == len(pairs) else None


class Instructions(Mapping[str, Instruction]):
    """Instructions by name in printed order, read on first use.

    is_plain: nothing in it runs a computation or moves data between devices; most computations of a program
    are so, and are not even listed before they are asked for.
    """

    __slots__ = ("_callees", "_found", "_lines", "_opcodes", "_span", "_text", "is_plain")

    def __init__(self, text: Text, lines: Lines) -> None:
        self._text = text
        self._lines = lines
        self._span: tuple[int, int] | None = None
        self._found: dict[str, int | Instruction] | None = None
        self._opcodes: dict[str, list[str]] = {}
        self._callees: dict[str, str] = {}
        self.is_plain = True

    def fill(self, start: int, end: int) -> str:
        """Take the lines between two offsets if each is one instruction: the name of the root, else ''.

        Only for a computation that has no instruction yet. Whether brackets balance is not seen here.
        """
        self._span = start, end
        root = last = ""
        for rows in self._rows():
            if not rows:
                return ""
            roots, names, opcodes, _, _ = zip(*rows, strict=True)
            kinds = set(opcodes)
            if "" in kinds:
                return ""
            last = names[-1]
            root = last if roots[-1] else next((row[1] for row in reversed(rows) if row[0]), root)
            if self._found is None and kinds <= PLAIN and end - start <= _BLOCK:
                return root or last if len(set(names)) == len(rows) else ""
            self.is_plain = self.is_plain and kinds <= PLAIN
            if not self._list(rows):
                return ""
        return root or last

    def _rows(self) -> Iterator[list[Row]]:
        """The rows of the span, a block of whole lines at a time."""
        text = self._text.text
        start, end = self._span or (0, 0)
        while start < end:
            stop = end if end - start <= _BLOCK else text.find("\n", start + _BLOCK, end) + 1 or end
            yield ROW.findall(text, start, stop)
            start = stop

    def _list(self, rows: Sequence[Row]) -> bool:
        """Append rows; False when two have the same name."""
        assert self._span is not None
        found = self._found = {} if self._found is None else self._found
        first = self._lines.line_of(self._span[0]) + len(found)
        together = len(found) + len(rows)
        found.update(zip([row[1] for row in rows], range(first, first + len(rows)), strict=True))
        for _, name, opcode, callee, _ in rows:
            self._opcodes.setdefault(opcode, []).append(name)
            if callee:
                self._callees[name] = callee
        return len(found) == together

    def _listed(self) -> dict[str, int | Instruction]:
        if self._found is None:
            self._found = {}
            for rows in self._rows():
                self._list(rows)
        return self._found

    def add(self, name: str, opcode: str, found: int | Instruction, callee: str = "") -> bool:
        """Append an instruction, or the line that it fills; False when the name is taken.

        callee: what a fusion calls, where that is known without reading it.
        """
        listed = self._listed()
        if name in listed:
            return False
        listed[name] = found
        self._opcodes.setdefault(opcode, []).append(name)
        if callee:
            self._callees[name] = callee
        self.is_plain = self.is_plain and opcode in PLAIN
        return True

    def remove_last(self, opcode: str) -> None:
        """Take back what `add` appended last; `opcode` is its opcode."""
        name, _ = self._listed().popitem()
        self._opcodes[opcode].pop()
        self._callees.pop(name, None)

    @property
    def opcodes(self) -> Mapping[str, Sequence[str]]:
        """Names by opcode, in printed order."""
        self._listed()
        return self._opcodes

    @property
    def callees(self) -> Mapping[str, str]:
        """The computations that fusions call, by name of the fusion, as far as they are known unread."""
        self._listed()
        return self._callees

    def mentions(self, text: str) -> bool:
        """Whether the printed lines may hold `text`."""
        return self._span is None or self._text.text.find(text, *self._span) >= 0

    def __getitem__(self, name: str) -> Instruction:
        found = self.get(name)
        if found is None:
            raise KeyError(name)
        return found

    def printed_operands(self) -> dict[str, list[str]]:
        """Names of operands by instruction; instructions of which lines do not tell it are missing."""
        rows = PARTS.findall(self._text.text, *self._span) if self._span is not None else []
        return {
            name: [] if opcode in _LITERAL_OPCODES or not inner else inner.replace("%", "").split(", ")
            for _, name, _, opcode, inner in rows
            if opcode in _LITERAL_OPCODES or not _NOT_NAMES.search(inner)
        }

    def printed_shape(self, name: str) -> Shape | None:
        """Its shape; None when it has been read, is not there, or its line does not tell."""
        found = self._listed().get(name)
        if type(found) is not int:
            return None
        match = PARTS.match(self._text.text, self._lines.start_of(found))
        return shape_at(self._text, *match.span(3)) if match else None

    def printed_metadata(self, name: str) -> str | None:
        """The raw metadata of an instruction, `` if it has none; None when its line does not tell."""
        found = self._listed()[name]
        if type(found) is not int:
            return None
        text, start = self._text.text, self._lines.start_of(found)
        if text.find("metadata=", start, text.find("\n", start)) < 0:
            return ""
        match = PARTS.match(text, start)
        attributes = _printed_attributes(text, match.end(5) + 1) if match else None
        return None if attributes is None else attributes.get("metadata", "")

    @overload
    def get(self, name: str, default: None = None, /) -> Instruction | None: ...
    @overload
    def get(self, name: str, default: Instruction | T, /) -> Instruction | T: ...
    def get(self, name: str, default: object = None, /) -> object:
        """The instruction `name`, read now if it was not; asked so often that Mapping's own is too slow."""
        listed = self._found if self._found is not None else self._listed()
        found = listed.get(name)
        if type(found) is int:
            found = listed[name] = _printed_instruction(self._text, self._lines, found)
        return default if found is None else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._listed())

    def __len__(self) -> int:
        return len(self._listed())

    def __contains__(self, name: object) -> bool:
        return name in self._listed()


def read_instruction(text: Text, lines: Lines, offset: int) -> tuple[Instruction, int]:
    """Read `[ROOT] name = shape opcode(operands), attributes` at `offset`; also the offset after it.

    Raises ParseError where the text departs from that.
    """
    start = text.skip(offset)
    is_root = bool(_ROOT.match(text.text, start))
    name_at = text.skip(start + 4) if is_root else start
    match = WORD.match(text.text, name_at)
    if not match:
        raise text.error(name_at, f"expected an instruction or '}}', found {text.found(name_at)}")
    after = text.expect(match.end(), "=", f"after {match.group(1)}")
    shape, after = _read_shape(text, text.skip(after))
    opcode_at = text.skip(after)
    opcode = _OPCODE.match(text.text, opcode_at)
    if not opcode:
        raise text.error(opcode_at, f"expected an opcode and its operands, found {text.found(opcode_at)}")
    close = text.bracket_end(opcode.end() - 1)
    inner = text.text[opcode.end() : close - 1]
    is_literal = opcode.group(1) in _LITERAL_OPCODES
    attributes, end = text.attributes(close)
    instruction = Instruction(
        name=match.group(1),
        opcode=opcode.group(1),
        shape=shape,
        operands=() if is_literal else read_operands(text, opcode.end(), inner),
        attributes=attributes,
        literal=inner if is_literal else None,
        is_root=is_root,
        line=lines.line_of(start),
    )
    return instruction, end


def _printed_instruction(text: Text, lines: Lines, line: int) -> Instruction:
    """The instruction that fills `line`, whose brackets and strings are known to be closed."""
    offset = lines.start_of(line)
    match = PARTS.match(text.text, offset)
    if not match:
        return read_instruction(text, lines, offset)[0]
    root, name, _, opcode, inner = match.groups()
    is_literal = opcode in _LITERAL_OPCODES
    return Instruction(
        name=name,
        opcode=intern(opcode),
        shape=shape_at(text, *match.span(3)),
        operands=() if is_literal else read_operands(text, match.start(5), inner),
        attributes=Attributes(text, match.end(5) + 1),  # after the closing parenthesis
        literal=inner if is_literal else None,
        is_root=bool(root),
        line=line,
    )


_ROOT = re.compile(r"ROOT(?=[\s%/])")
_NO_SHAPE = Shape("")


def _read_shape(text: Text, offset: int) -> tuple[Shape, int]:
    """The shape at `offset`; hand-written HLO may leave it out, which gives a shape of type ''."""
    head = _SHAPE_HEAD.match(text.text, offset)
    if not head:
        return _NO_SHAPE, offset
    end = text.bracket_end(head.end() - 1)
    layout = text.skip(end)
    if not head.group().endswith("(") and text.at(layout) == "{":
        end = text.bracket_end(layout)
    return shape_at(text, offset, end), end


def shape_at(text: Text, offset: int, end: int) -> Shape:
    """The shape between two offsets; its errors point into the whole text."""
    try:
        return parse_shape(text.text[offset:end])
    except ParseError as error:
        raise text.error(offset + max(error.column - 1, 0), error.message) from None


def read_operands(text: Text, offset: int, inner: str) -> tuple[Operand, ...]:
    """Operands from the text between the parentheses: `%x`, `x`, `f32[8]{0} %x`, `%x#1#0`, `null`."""
    if NAMES.fullmatch(inner):
        return tuple(map(Operand, _NAME.findall(_INDEX.sub("", inner) if "/" in inner else inner)))
    operands = []
    for piece in split_top_level(inner):
        match = _OPERAND.fullmatch(piece)
        if not match:
            raise text.error(offset, f"cannot read the operand {piece[:60]!r}")
        index = tuple(int(step) for step in match.group(2).split("#")[1:])
        operands.append(Operand(match.group(1), index))
    return tuple(operands)
