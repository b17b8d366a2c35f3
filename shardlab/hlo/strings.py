"""Quoted strings as XLA prints them: C escapes."""

from __future__ import annotations

import re

_ESCAPE = re.compile(r"\\(?:([0-7]{1,3})|x([0-9A-Fa-f]{1,2})|(.))", re.DOTALL)
_SIMPLE = {"n": "\n", "r": "\r", "t": "\t", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}


def unescape(text: str) -> str:
    """The value of a quoted string: quotes removed, C escapes (`\\n`, `\\"`, `\\303\\251`) undone.

    Escaped bytes are UTF-8. Text that is not quoted is returned with its escapes undone all the same.
    """
    quoted = len(text) > 1 and text[0] == text[-1] == '"'
    text = text[1:-1] if quoted else text
    if "\\" not in text:
        return text
    # Escaped bytes become surrogates first, so that a run of them is decoded as one UTF-8 sequence.
    return _ESCAPE.sub(_replace, text).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _replace(match: re.Match[str]) -> str:
    octal, hexadecimal, char = match.groups()
    if char is not None:
        return _SIMPLE.get(char, char)
    value = int(octal, 8) & 0xFF if octal else int(hexadecimal, 16)
    return chr(value) if value < 0x80 else chr(0xDC00 + value)


def escape(text: str) -> str:
    """`text` as it stands between double quotes: backslash, quote and control characters are escaped."""
    if not _UNSAFE.search(text):
        return text
    return _UNSAFE.sub(lambda match: _ESCAPES.get(match.group()) or f"\\{ord(match.group()):03o}", text)


_UNSAFE = re.compile(r"[\\\"'\x00-\x1f\x7f]")
_ESCAPES = {"\\": "\\\\", '"': '\\"', "'": "\\'", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
