"""Tokens of HLO text: white space, comments, strings, names and balanced brackets. Positions are offsets.

Nothing here recurses: nesting is bounded by memory, not by the interpreter's stack.
Reference for the tokens: XLA, xla/hlo/parser/hlo_lexer.cc.
"""

from __future__ import annotations

import re

from shardlab.errors import ParseError

NAME = r"[A-Za-z_][A-Za-z0-9_.\-]*+"
BLANK = re.compile(r"(?:[ \t\r\n\f\v]++|//[^\n]*+|/\*(?:[^*]++|\*(?!/))*+\*/)*+")
STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
QUOTED = re.compile(r"'[^']*+'")
WORD = re.compile(rf"%?({NAME}|[0-9][A-Za-z0-9_.\-]*+)")
ATTRIBUTE_NAME = re.compile(rf"({NAME})=")

_CLOSER = {"(": ")", "[": "]", "{": "}"}
_PLAIN = re.compile(r"[^\"'(){}\[\]/]++|/(?![/*])")
# A bracket that nests once at most, without strings or comments: lists of thousands of groups.
_SHALLOW = re.compile(
    r"\{(?:[^\"'(){}\[\]/]++|\{[^\"'(){}\[\]/]*+\})*+\}|\([^\"'(){}\[\]/]*+\)|\[[^\"'(){}\[\]/]*+\]"
)
_DICT_PLAIN = re.compile(r"[^\"{}]++")
_BARE = re.compile(r"[^\"'(){}\[\]/\s,]++|/(?![/*])")


class Text:
    """The text being read, and where errors in it are. Offsets count characters after BOM and CR removal."""

    __slots__ = ("source", "text")

    def __init__(self, text: str, source: str) -> None:
        self.text = text
        self.source = source

    def error(self, offset: int, message: str) -> ParseError:
        """The error to raise for what stands at `offset`: line and column count from 1."""
        offset = min(offset, len(self.text))
        line = self.text.count("\n", 0, offset) + 1
        column = offset - self.text.rfind("\n", 0, offset)
        return ParseError(message, source=self.source, line=line, column=column)

    def skip(self, offset: int) -> int:
        """The offset of the next token: white space and both kinds of comment are passed over."""
        match = BLANK.match(self.text, offset)
        end = match.end() if match else offset
        if self.text.startswith("/*", end):
            raise self.error(end, "this comment is never closed")
        return end

    def at(self, offset: int) -> str:
        """The character at `offset`, or an empty string at the end of the text."""
        return self.text[offset : offset + 1]

    def expect(self, offset: int, token: str, where: str) -> int:
        """The offset after `token`, which must be next. Raises ParseError otherwise."""
        offset = self.skip(offset)
        if not self.text.startswith(token, offset):
            raise self.error(offset, f"expected '{token}' {where}, found {self.found(offset)}")
        return offset + len(token)

    def found(self, offset: int) -> str:
        """What stands at `offset`, in words, for messages."""
        rest = self.text[offset : offset + 20].split("\n", 1)[0]
        return (
            repr(rest)
            if rest
            else "the end of the line"
            if offset < len(self.text)
            else "the end of the text"
        )

    def string_end(self, offset: int) -> int:
        """The offset after the string that starts at `offset`, double or single quoted."""
        pattern = STRING if self.text[offset] == '"' else QUOTED
        match = pattern.match(self.text, offset)
        if not match:
            raise self.error(offset, "this string is never closed")
        return match.end()

    def bracket_end(self, offset: int) -> int:
        """The offset after the bracket that closes the one at `offset`, past strings and comments."""
        shallow = _SHALLOW.match(self.text, offset)
        if shallow:
            return shallow.end()
        stack = [(_CLOSER[self.text[offset]], offset)]
        offset += 1
        while stack:
            plain = _PLAIN.match(self.text, offset)
            offset = plain.end() if plain else offset
            char = self.at(offset)
            if not char:
                raise self.error(
                    stack[-1][1], f"'{self.text[stack[-1][1]]}' is never closed: unbalanced or cut off"
                )
            offset = self._step(offset, char, stack)
        return offset

    def _step(self, offset: int, char: str, stack: list[tuple[str, int]]) -> int:
        """Past one bracket, string or comment; `stack` holds the closers that are still owed."""
        if char in "\"'":
            return self.string_end(offset)
        if char in _CLOSER:
            stack.append((_CLOSER[char], offset))
            return offset + 1
        if char in ")]}":
            closer, opened = stack.pop()
            if char != closer:
                raise self.error(offset, f"'{char}' does not close '{self.text[opened]}'")
            return offset + 1
        return self.skip(offset)

    def dict_end(self, offset: int) -> int:
        """The offset after the braced dict at `offset`: braces balance outside double-quoted strings."""
        opened, depth = offset, 0
        while True:
            char = self.at(offset)
            if char == "{":
                depth, offset = depth + 1, offset + 1
            elif char == "}":
                depth, offset = depth - 1, offset + 1
            elif char == '"':
                offset = self.string_end(offset)
            elif not char:
                raise self.error(opened, "'{' is never closed: unbalanced or cut off")
            if not depth:
                self._check_json_lists(opened, offset)
                return offset
            plain = _DICT_PLAIN.match(self.text, offset)
            offset = plain.end() if plain else offset

    def _check_json_lists(self, start: int, end: int) -> None:
        """A dict that looks like JSON must close its lists too; other dicts (`{order = [0, 1)}`) are free."""
        if self.text.startswith('{"', start):
            without_strings = STRING.sub("", self.text[start:end])
            if without_strings.count("[") != without_strings.count("]"):
                raise self.error(start, "'[' and ']' do not balance in this JSON")

    def chunk_end(self, offset: int) -> int:
        """The offset after words, strings and bracket groups that no white space or comma divides."""
        while True:
            char = self.at(offset)
            if char and char in "\"'":
                offset = self.string_end(offset)
            elif char and char in _CLOSER:
                offset = self.bracket_end(offset)
            else:
                bare = _BARE.match(self.text, offset)
                if not bare:
                    return offset
                offset = bare.end()

    def value_end(self, offset: int, name: str) -> int:
        """The offset after the value of attribute `name` that starts at `offset`.

        A value ends before `, identifier=`, before `}` and before whatever is not a value. Only the mesh form
        of `replica_groups` and lists of computations (`calls=%a, %b`) hold a comma outside brackets.
        """
        if name in ("backend_config", "frontend_attributes") and self.at(offset) == "{":
            return self.dict_end(offset)
        if name == "replica_groups" and self.text.startswith(("mesh[", "maximal_mesh["), offset):
            return self.mesh_groups_end(offset)
        end = self.chunk_end(offset)
        if end == offset:
            raise self.error(offset, f"attribute {name} has no value, found {self.found(offset)}")
        return self._more_names(end)

    def _more_names(self, end: int) -> int:
        """Past `, %b` in `calls=%a, %b`."""
        while True:
            comma = self.skip(end)
            if self.at(comma) != ",":
                return end
            name = self.skip(comma + 1)
            if self.at(name) != "%":
                return end
            end = self.chunk_end(name)

    def mesh_groups_end(self, offset: int) -> int:
        """The offset after `mesh['a'=2], device_ids=(0,1) {'a'}`."""
        end = self.bracket_end(self.text.index("[", offset))
        comma = self.skip(end)
        if self.at(comma) == ",":
            ids = self.skip(comma + 1)
            if self.text.startswith("device_ids=(", ids):
                end = self.bracket_end(ids + len("device_ids="))
        axes = self.skip(end)
        if self.at(axes) != "{":
            raise self.error(axes, f"expected the axes of the mesh in braces, found {self.found(axes)}")
        return self.bracket_end(axes)

    def attributes(self, offset: int) -> tuple[dict[str, str], int]:
        """Read `, name=value`* from `offset`: the raw values by name, and the offset after them."""
        found: dict[str, str] = {}
        while True:
            comma = self.skip(offset)
            if self.at(comma) != ",":
                return found, offset
            start = self.skip(comma + 1)
            match = ATTRIBUTE_NAME.match(self.text, start)
            if not match:
                raise self.error(start, f"expected an attribute 'name=', found {self.found(start)}")
            if match.group(1) in found:
                raise self.error(start, f"attribute {match.group(1)} is given twice")
            value = self.skip(match.end())
            offset = self.value_end(value, match.group(1))
            found[match.group(1)] = self.text[value:offset]


def without_comments(text: str) -> str:
    """`text` with its comments blanked out; strings in it are left alone."""
    return (
        _COMMENT_OR_STRING.sub(lambda match: " " if match.group(1) else match.group(), text)
        if "/" in text
        else text
    )


_COMMENT_OR_STRING = re.compile(
    r"(//[^\n]*+|/\*(?:[^*]++|\*(?!/))*+\*/)|\"(?:[^\"\\]++|\\.)*+\"|'[^']*+'", re.DOTALL
)


def split_top_level(text: str) -> list[str]:
    """Split at the commas outside brackets and strings; the pieces are stripped. Empty text has no pieces."""
    text = without_comments(text)
    if not _NESTED.search(text):
        return [piece.strip() for piece in text.split(",")] if text.strip() else []
    pieces, depth, start = [], 0, 0
    for match in _SPLIT.finditer(text):
        token = match.group()
        if token in "([{":
            depth += 1
        elif token in ")]}":
            depth -= 1
        elif token == "," and not depth:
            pieces.append(text[start : match.start()].strip())
            start = match.end()
    pieces.append(text[start:].strip())
    return pieces


_NESTED = re.compile(r"[(\[{\"']")
_SPLIT = re.compile(r"[(){}\[\],]|\"(?:[^\"\\]++|\\.)*+\"|'[^']*+'", re.DOTALL)
