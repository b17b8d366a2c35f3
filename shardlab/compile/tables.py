"""The text of a compiled program, with the integer tables that choose its branches.

XLA prints `constant({...})` for an array of more than ten elements. A pipeline's schedule is such an array,
and without it nobody can say which stage runs what. So a program with conditionals is printed once more with
all constants, unless they are large, and the integers among them are put back.
"""

from __future__ import annotations

import math
import re
from typing import Any

MAX_ENTRIES = 1_000_000

_ELIDED = re.compile(r"= ([a-z][a-z0-9]*)\[([0-9,]*)\]\S* constant\(\{\.\.\.\}\)")
_WHOLE = re.compile(r"(= [a-z][a-z0-9]*\[[0-9,]*\]\S* constant)\(\{[^\n()]*\}\)")
_INTEGER = re.compile(r"pred|[su](8|16|32|64)")


def text_of(executable: Any) -> str:
    """HLO text of a jax.stages.Compiled, as `as_text()` gives it but for elided integer constants."""
    text = str(executable.as_text())
    if " conditional(" not in text:
        return text
    elided = [(dtype, _size(dims)) for dtype, dims in _ELIDED.findall(text)]
    if sum(size for _, size in elided) > MAX_ENTRIES or not any(_INTEGER.fullmatch(d) for d, _ in elided):
        return text
    try:
        from jaxlib import _hlo  # type: ignore[attr-defined,unused-ignore]  # what jax itself prints with; it has no public name

        options = _hlo.HloPrintOptions()
    except (ImportError, AttributeError):
        return text  # the analysis says which tables it misses
    options.print_large_constants = True
    modules = executable.runtime_executable().hlo_modules()
    return with_tables(text, "\n\n".join(module.to_string(options) for module in modules))


def with_tables(text: str, whole: str) -> str:
    """`text` with the integer constants of `whole`, the same text with nothing left out; if it is that."""
    lines, others = text.splitlines(keepends=True), whole.splitlines(keepends=True)
    if len(lines) != len(others):
        return text
    return "".join(
        other if _is_table(line) and _same(line, other) else line
        for line, other in zip(lines, others, strict=True)
    )


def _is_table(line: str) -> bool:
    match = _ELIDED.search(line)
    return match is not None and _INTEGER.fullmatch(match[1]) is not None


def _same(line: str, other: str) -> bool:
    return _WHOLE.sub(r"\1({...})", other) == line


def _size(dims: str) -> int:
    return math.prod(int(extent) for extent in dims.split(",") if extent)
