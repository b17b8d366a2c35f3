"""HLO text to modules: one tolerant grammar for every print style of 2023 to today (HLO.md section 1).

The grammar is not line based. `read_instruction` reads any legal instruction; since printed text has nearly
always one instruction per line, whole bodies are first matched line by line with one regular expression,
which proves that strings and brackets of a line are closed, and only lines that do not match are read with
care.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from shardlab.errors import ParseError
from shardlab.hlo.collector import paused_collector
from shardlab.hlo.fastlines import add_printed_lines, printed_computation, printed_head
from shardlab.hlo.instructions import Instructions, Lines, read_instruction
from shardlab.hlo.lexer import WORD, Text
from shardlab.hlo.module import Computation, Module
from shardlab.hlo.tables import Tables, read_table, stack_frames

_HEADER = re.compile(r"HloModule(?=[\s/])")
_TABLE = re.compile(r"(FileNames|FunctionNames|FileLocations|StackFrames)(?=\s)")
_ENTRY = re.compile(r"ENTRY(?=[\s%/{])")
_ARRAY_HEAD = re.compile(r"[a-z][a-z0-9]*+\[")
_MODULE_NAME = re.compile(r"[^\s,={}()\"']++")
_PRINTED_KEYS = frozenset({"entry_computation_layout", "is_scheduled"})
IMPLICIT = "entry"


def parse(text: str, source: str = "<hlo>") -> tuple[Module, ...]:
    """Read all modules of an HLO text.

    Instructions are read when they are asked for, but every bracket and string has been seen closed.
    Raises ParseError with line and column when the text is cut off, unbalanced or holds no instruction.
    """
    with paused_collector():
        return _parse(text, source, printed_lines=True)


def parse_with_care(text: str, source: str = "<hlo>") -> tuple[Module, ...]:
    """`parse` without the fast path for printed lines: tests hold one against the other."""
    return _parse(text, source, printed_lines=False)


def _parse(text: str, source: str, *, printed_lines: bool) -> tuple[Module, ...]:
    text = text.removeprefix("\ufeff")
    text = text.replace("\r\n", "\n") if "\r" in text else text
    reader = _Reader(Text(text, source), printed_lines=printed_lines)
    modules = []
    offset = reader.text.skip(0)
    while offset < len(text):
        module, offset = reader.module(offset)
        modules.append(module)
    if not modules:
        raise reader.text.error(0, "the text is empty: no HLO module")
    return tuple(modules)


class _Reader:
    """One pass over one text."""

    def __init__(self, text: Text, *, printed_lines: bool) -> None:
        self.text = text
        self.lines = Lines(text.text)
        self.printed_lines = printed_lines

    def module(self, offset: int) -> tuple[Module, int]:
        """A module with or without its `HloModule` line, and the offset of what follows it."""
        text, start = self.text, offset
        name, header = "", dict[str, str]()
        has_header = bool(_HEADER.match(text.text, offset))
        if has_header:
            name, header, offset = self._header(offset)
        computations: dict[str, Computation] = {}
        entries: list[str] = []
        tables: Tables = {}
        while True:
            found = printed_computation(text, self.lines, offset) if self.printed_lines else None
            if found is None:
                offset = text.skip(offset)
                if offset == len(text.text) or _HEADER.match(text.text, offset):
                    break
                table = _TABLE.match(text.text, offset)
                if table:
                    tables[table.group(1)], offset = read_table(text, table.end())
                    continue
                found = self._computation(offset, has_header=has_header)
            computation, is_entry, after = found
            if computation.name in computations:
                raise text.error(text.skip(offset), f"a second computation is named {computation.name}")
            computations[computation.name] = computation
            entries += [computation.name] if is_entry else []
            offset = after
        if not computations:
            raise text.error(offset, "the module ends before its first computation: cut off, or not HLO")
        entry = self._entry(entries, computations, header, start, offset)
        module = Module(
            name=name,
            entry=entry,
            computations=computations,
            num_partitions=self._count(header, "num_partitions", start),
            replica_count=self._count(header, "replica_count", start),
            is_scheduled=header.get("is_scheduled") == "true",
            stack_frames=stack_frames(tables),
        )
        return module, offset

    def _header(self, offset: int) -> tuple[str, dict[str, str], int]:
        at = self.text.skip(offset + len("HloModule"))
        match = _MODULE_NAME.match(self.text.text, at)
        if not match:
            raise self.text.error(at, f"expected the name of the module, found {self.text.found(at)}")
        header, end = self.text.attributes(match.end())
        return match.group().lstrip("%"), header, end

    def _count(self, header: Mapping[str, str], key: str, start: int) -> int | None:
        value = header.get(key)
        if value is None:
            return None
        if not re.fullmatch(r"[0-9]{1,18}", value) or int(value) < 1:
            raise self.text.error(start, f"{key}={value[:40]} is not a positive number")
        return int(value)

    def _entry(
        self,
        entries: list[str],
        computations: Mapping[str, Computation],
        header: Mapping[str, str],
        start: int,
        end: int,
    ) -> str:
        """The entry: the one marked ENTRY, else (hand-written text) the last one.

        Printed modules always mark it, so a printed header without it means that the text was cut.
        """
        if len(entries) > 1:
            raise self.text.error(start, f"two computations are marked ENTRY: {entries[0]} and {entries[1]}")
        if entries:
            return entries[0]
        if not _PRINTED_KEYS.isdisjoint(header):
            raise self.text.error(end, "the text ends before the ENTRY computation: cut off")
        return next(reversed(list(computations)))

    def _computation(self, offset: int, *, has_header: bool) -> tuple[Computation, bool, int]:
        """The computation at `offset`, whether it is marked ENTRY, and the offset after it."""
        text, start = self.text, offset
        entry = _ENTRY.match(text.text, offset)
        head = printed_head(text, offset) if self.printed_lines else None
        if not head:
            offset = text.skip(entry.end()) if entry else offset
            match = WORD.match(text.text, offset)
            if not match:
                raise text.error(offset, f"expected a computation, found {text.found(offset)}")
            after = text.skip(match.end())
            is_instruction = text.at(after) == "=" or match.group() == "ROOT"
            if is_instruction and not entry and not has_header:
                computation, end = self._bare_instructions(start)
                return computation, False, end
            after = self._signature_end(after) if text.at(after) == "(" else after
            head = match.group(1), text.expect(after, "{", f"to open computation {match.group(1)}")
        name, body = head
        instructions, root, end = self._body(name, body, start)
        trailer, end = text.attributes(end)
        thread = trailer.get("execution_thread", "").strip('"')
        computation = Computation(name=name, instructions=instructions, root=root, execution_thread=thread)
        return computation, bool(entry), end

    def _signature_end(self, offset: int) -> int:
        """The offset after `(p: f32[8]) -> f32[8]{0}`. A layout's `{` is followed by a digit, ':' or '}'."""
        text = self.text
        result = text.skip(text.expect(text.bracket_end(offset), "->", "after the parameters"))
        if text.at(result) == "(" or text.text.startswith("b(", result):
            return text.bracket_end(result + (text.at(result) == "b"))
        head = _ARRAY_HEAD.match(text.text, result)
        if not head:
            raise text.error(result, f"expected the result's shape, found {text.found(result)}")
        end = text.bracket_end(head.end() - 1)
        brace = text.skip(end)
        next_char = text.at(text.skip(brace + 1)) if text.at(brace) == "{" else ""
        return text.bracket_end(brace) if next_char and next_char in "0123456789:}" else end

    def _bare_instructions(self, offset: int) -> tuple[Computation, int]:
        """Instructions without a computation around them: the rest of the text, as XLA reads it."""
        instructions = Instructions(self.text, self.lines)
        root = ""
        while (offset := self.text.skip(offset)) < len(self.text.text):
            name, is_root, offset = self._careful(instructions, offset)
            root = name if is_root or not root else root
        return Computation(name=IMPLICIT, instructions=instructions, root=root or name), offset

    def _body(self, name: str, offset: int, start: int) -> tuple[Instructions, str, int]:
        """The instructions up to the closing brace, the root's name, the offset after the brace."""
        text = self.text
        instructions = Instructions(text, self.lines)
        root = last = ""
        while True:
            if self.printed_lines:
                offset, last, fast_root = add_printed_lines(text, self.lines, offset, instructions, last)
                root = fast_root or root
            offset = text.skip(offset)
            if text.at(offset) == "}":
                break
            if offset >= len(text.text):
                line = self.lines.line_of(start)
                raise text.error(offset, f"the text ends inside computation {name}, which line {line} opens")
            last, is_root, offset = self._careful(instructions, offset)
            root = last if is_root else root
        if not len(instructions):
            raise text.error(offset, f"computation {name} has no instruction")
        return instructions, root or last, offset + 1

    def _careful(self, instructions: Instructions, offset: int) -> tuple[str, bool, int]:
        """Read and keep one instruction: its name, whether it is the root, the offset after it."""
        instruction, end = read_instruction(self.text, self.lines, offset)
        if not instructions.add(instruction.name, instruction.opcode, instruction):
            raise self.text.error(
                offset, f"a second instruction is named {instruction.name} in one computation"
            )
        return instruction.name, instruction.is_root, end


__all__ = ["ParseError", "parse", "parse_with_care"]
