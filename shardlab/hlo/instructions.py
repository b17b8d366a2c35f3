"""The instructions of one computation, read when they are asked for.

Reading a module only has to find where each instruction starts and that its line is whole; most instructions
are never looked at again. `Instructions` therefore keeps line numbers and builds an `Instruction` on first
use.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from sys import intern

from shardlab.errors import ParseError
from shardlab.hlo.lexer import NAME, WORD, Text, split_top_level
from shardlab.hlo.module import Instruction, Operand, Shape
from shardlab.hlo.printed import ATTRIBUTE, NAMES, PARTS
from shardlab.hlo.shape import parse_shape

_LITERAL_OPCODES = ("constant", "parameter")
_OPERAND = re.compile(rf"(?:.*\s)?%?({NAME}|[0-9][A-Za-z0-9_.\-]*+)((?:#[0-9]{{1,18}})*+)", re.DOTALL)
_NAME = re.compile(NAME)
_INDEX = re.compile(r"/\*index=[0-9]++\*/")
_OPCODE = re.compile(r"([a-z][a-z0-9\-]*+)\(")
_SHAPE_HEAD = re.compile(r"b?\(|[a-z][a-z0-9]*+\[")
_SPLIT_LINES = 1 << 20


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
            self._found, end = _printed_attributes(self._text.text, self._offset)
            if self._text.at(end) not in ("\n", ""):
                self._found, end = self._text.attributes(self._offset)
            if self._text.at(end) not in ("\n", ""):
                raise self._text.error(end, f"expected ', name=value', found {self._text.found(end)}")
        return self._found

    def __getitem__(self, name: str) -> str:
        return self._values()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values())

    def __len__(self) -> int:
        return len(self._values())

    def __contains__(self, name: object) -> bool:
        return name in self._values()

    def __repr__(self) -> str:
        return repr(self._values())


def _printed_attributes(text: str, offset: int) -> tuple[dict[str, str], int]:
    """Raw values by name as far as they are printed in the usual way, and the offset after the last one."""
    found: dict[str, str] = {}
    while match := ATTRIBUTE.match(text, offset):
        found[intern(match.group(1))] = match.group(2)
        offset = match.end()
    return found, offset


class Instructions(Mapping[str, Instruction]):
    """Instructions by name in printed order, read on first use. `opcodes`: names by opcode, in order."""

    __slots__ = ("_found", "_lines", "_text", "opcodes")

    def __init__(self, text: Text, lines: Lines) -> None:
        self._text = text
        self._lines = lines
        self._found: dict[str, int | Instruction] = {}
        self.opcodes: dict[str, list[str]] = {}

    def add(self, name: str, opcode: str, found: int | Instruction) -> bool:
        """Append an instruction, or the line that it fills; False when the name is taken."""
        if name in self._found:
            return False
        self._found[name] = found
        self.opcodes.setdefault(opcode, []).append(name)
        return True

    def remove_last(self, opcode: str) -> None:
        """Take back what `add` appended last; `opcode` is its opcode."""
        self._found.popitem()
        self.opcodes[opcode].pop()

    def __getitem__(self, name: str) -> Instruction:
        found = self._found[name]
        if isinstance(found, int):
            found = self._found[name] = _printed_instruction(self._text, self._lines, found)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, name: object) -> bool:
        return name in self._found


def of_opcodes(instructions: Mapping[str, Instruction], opcodes: Iterable[str]) -> list[Instruction]:
    """The instructions with one of these opcodes, in printed order within each opcode.

    Reads nothing else when `instructions` is an `Instructions`, which keeps an index.
    """
    if isinstance(instructions, Instructions):
        return [instructions[name] for opcode in opcodes for name in instructions.opcodes.get(opcode, ())]
    wanted = set(opcodes)
    return [instruction for instruction in instructions.values() if instruction.opcode in wanted]


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
        attributes=Attributes(text, match.end()),
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
        return tuple([Operand(name) for name in _NAME.findall(_INDEX.sub("", inner))])
    operands = []
    for piece in split_top_level(inner):
        match = _OPERAND.fullmatch(piece)
        if not match:
            raise text.error(offset, f"cannot read the operand {piece[:60]!r}")
        index = tuple(int(step) for step in match.group(2).split("#")[1:])
        operands.append(Operand(match.group(1), index))
    return tuple(operands)
