"""Regular expressions for lines as XLA prints them: an instruction, or the head of a computation.

They prove that strings and braces of the line are closed. All quantifiers are possessive: matching is linear.
"""

from __future__ import annotations

import re

from shardlab.hlo.lexer import NAME

_INDEX_COMMENT = r"/\*index=[0-9]++\*/"
_STRING = r"\"(?:[^\"\\\n]++|\\[^\n])*+\""
_QUOTED = r"'[^'\n]*+'"


def _nested(plain: str, opener: str, closer: str, depth: int) -> str:
    """An expression for the inside of a bracket that nests to `depth`; `plain` needs no bracket."""
    inside = rf"(?:{plain})*+"
    for _ in range(depth):
        inside = rf"(?:{plain}|{opener}{inside}{closer})*+"
    return inside


_TILES = r"\([^(){}\"'\n/]*+\)"
_IN_BRACES = _nested(rf"[^(){{}}\"'\n/]++|{_TILES}", r"\{", r"\}", 4)
_IN_PARENS = _nested(rf"[^(){{}}\"'\n/]++|{_INDEX_COMMENT}|\{{{_IN_BRACES}\}}", r"\(", r"\)", 5)
_IN_DICT = _nested(rf"[^\"'{{}}\n/]++|{_STRING}", r"\{", r"\}", 12)
_IN_AXES = _nested(rf"[^\"'{{}}\n/]++|{_QUOTED}", r"\{", r"\}", 3)
_SHAPE = rf"(?:[a-z][a-z0-9]*+\[[0-9,<=?]*+\](?:\{{{_IN_BRACES}\}})?+|\({_IN_PARENS}\))"
_WORDS = rf"(?:[^\s\"'{{}}()\[\]/,]++|{_TILES}|\[[^\s\"'{{}}()\[\]/]*+\])"
_IDS = r",\ device_ids=\([0-9,\[\]T()]*+\)"
_MESH = (
    rf"(?<=replica_groups=)(?:maximal_)?+mesh\[(?:[^'\[\]\n]++|{_QUOTED})*+\](?:{_IDS})?+\ \{{{_IN_AXES}\}}"
)
_DICT = rf"\{{{_IN_DICT}\}}"
_VALUE = (
    rf"(?:{_DICT}|{_STRING}|(?:{_WORDS}++(?:{_DICT})?+)++(?:,\ %{NAME})*+|(?<=sharding=)\{{{_IN_AXES}\}})"
)
_TAIL = rf"(?:,\ {NAME}=(?:{_MESH}|{_VALUE}))*+"
_OPERAND = rf"%?+{NAME}"
_BEFORE = rf"\ *+(ROOT\ )?+%?+({NAME})\ =\ "

_CALLS = rf"(?:,\ kind=k[A-Za-z]++,\ calls=%?+({NAME})(?=[,\n])(?![^\n]*?,\ calls=))?+"

ROW = re.compile(rf"{_BEFORE}{_SHAPE}\ ([a-z][a-z0-9\-]*+)\({_IN_PARENS}\){_CALLS}{_TAIL}\n|([^\n]*+)\n")
"""One line: ROOT or not, name and opcode of the instruction that fills it, and the computation that it calls
if it is a fusion; or else the line itself."""

PARTS = re.compile(rf"^{_BEFORE}({_SHAPE})\ ([a-z][a-z0-9\-]*+)\(({_IN_PARENS})\)[^\n]*+", re.MULTILINE)
"""Root, name, shape, opcode and operands of an instruction that `ROW` has matched, up to the end of its line:
a search for all of them goes on there."""
HEAD = re.compile(
    rf"\n*+(?!HloModule\s)(ENTRY\ )?+%?+({NAME})\ (?:\({_IN_PARENS}\)\ ->\ {_SHAPE}\ )?+\{{(?=\n)"
)
"""The first line of a computation, up to its brace: ENTRY or not, the name."""

NAMES = re.compile(rf"{_OPERAND}(?:,\ (?:{_INDEX_COMMENT})?+{_OPERAND})*+")
"""Operands that are names only."""

ATTRIBUTE = re.compile(rf",\ ({NAME})=({_MESH}|{_VALUE})")
"""One attribute of the tail of an instruction that `ROW` has matched: its name and its raw value."""
