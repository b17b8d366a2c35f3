"""The fast path: printed one-line instructions, recognised by one regular expression over blocks of lines.

A line is taken only if the expression proves that its strings and braces are closed on that line; parentheses
and square brackets are then counted over the whole block. Whatever is not proved this way is left to the
careful reader.
"""

from __future__ import annotations

import re

from shardlab.hlo.instructions import Instructions, Lines, Row
from shardlab.hlo.lexer import STRING, Text
from shardlab.hlo.module import Computation
from shardlab.hlo.printed import HEAD, ROW

_FIRST_BLOCK, _LARGEST_BLOCK = 1 << 12, 1 << 18
_STARTS = re.compile(r"[A-Za-z0-9_%}]")


def printed_computation(text: Text, lines: Lines, offset: int) -> tuple[Computation, bool, int] | None:
    """The computation at `offset`, whether it is marked ENTRY, and the offset after it.

    None unless all of it is printed as XLA prints it.
    """
    head = HEAD.match(text.text, offset)
    brace = text.text.find("\n}", head.end()) if head else -1
    if not head or brace < 0 or text.text[brace + 2 : brace + 3] not in ("\n", ""):
        return None
    if not _is_balanced(text.text, offset, brace + 2):
        return None
    instructions = Instructions(text, lines)
    root = instructions.fill(head.end() + 1, brace + 1)
    if not root:
        return None
    return Computation(head.group(2), instructions, root), bool(head.group(1)), brace + 2


def printed_head(text: Text, offset: int) -> tuple[str, int] | None:
    """The name of the computation whose printed first line starts at `offset`, and the offset of its body."""
    match = HEAD.match(text.text, offset)
    if not match or not _is_balanced(text.text, offset, match.end() - 1):
        return None
    return match.group(2), match.end()


def add_printed_lines(
    text: Text, lines: Lines, offset: int, instructions: Instructions, last: str
) -> tuple[int, str, str]:
    """Add the instructions that fill the lines from `offset` on, until one needs care.

    last: the name of the instruction before `offset`. Returns the offset to go on from, the name of the last
    instruction, and the name of the root if it was among them.
    """
    if text.at(offset) == "\n":
        offset += 1
    if not text.text.startswith("\n", offset - 1):
        return offset, last, ""
    root, opcode, block = "", "", _FIRST_BLOCK
    while True:
        end, is_last = _block_end(text.text, offset, block)
        rows: list[Row] = ROW.findall(text.text, offset, end)
        line = lines.line_of(offset)
        whole = _whole_rows(text.text, lines, rows, line, end)
        for is_root, name, op, callee, _ in rows[:whole]:
            if not instructions.add(name, op, line, callee):
                raise text.error(
                    lines.start_of(line), f"a second instruction is named {name} in one computation"
                )
            root = name if is_root else root
            last, opcode = name, op
            line += 1
        offset = lines.start_of(line) if whole < len(rows) else end
        if whole < len(rows) or is_last or not rows:
            break
        block = min(2 * block, _LARGEST_BLOCK)
    if opcode and not _STARTS.match(text.text, text.skip(offset)) and text.skip(offset) < len(text.text):
        instructions.remove_last(opcode)
        return lines.start_of(line - 1), last, root
    return offset, last, root


def _block_end(text: str, offset: int, block: int) -> tuple[int, bool]:
    """Where the next block of whole lines ends, and whether the computation's closing brace may follow it."""
    brace = text.find("\n}", offset - 1, offset + block)
    if brace >= 0:
        return brace + 1, True
    newline = text.rfind("\n", offset, offset + block)
    if newline < 0:
        newline = text.find("\n", offset)
    return (newline + 1, False) if newline >= 0 else (offset, True)


def _whole_rows(text: str, lines: Lines, rows: list[Row], line: int, end: int) -> int:
    """How many of the first rows are instructions with balanced brackets."""
    count = next((index for index, row in enumerate(rows) if not row[1]), len(rows))
    start = lines.start_of(line)
    stop = lines.start_of(line + count) if count < len(rows) else end
    if _is_balanced(text, start, stop):
        return count
    for index in range(count):
        row_end = lines.start_of(line + index + 1) if line + index < len(lines.starts) else end
        if not _is_balanced(STRING.sub("", text[lines.start_of(line + index) : row_end]), 0, end):
            return index
    return count


def _is_balanced(text: str, start: int, end: int) -> bool:
    """Whether as many brackets of each kind open as close."""
    count = text.count
    return (
        count("(", start, end) == count(")", start, end)
        and count("[", start, end) == count("]", start, end)
        and count("{", start, end) == count("}", start, end)
    )
