"""The fast path: printed one-line instructions, found with one regular expression per block of text."""

from __future__ import annotations

from shardlab.hlo.instructions import Instructions, Lines
from shardlab.hlo.lexer import Text


def add_printed_lines(
    text: Text, lines: Lines, offset: int, instructions: Instructions, last: str
) -> tuple[int, str, str]:
    return offset, last, ""
