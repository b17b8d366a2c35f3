"""Reading TOML that a person wrote: bounded, and every mistake with its file, line and key."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from shardlab.errors import Problem, UserError

MAX_FILE_BYTES = 1 << 20
MAX_LINE = 500  # characters; longer lines are not searched for keys
MAX_DOTS = 100  # in a line: tomllib needs memory in the square of a dotted key's parts
MAX_LISTED = 40  # known words listed in a message
MAX_QUOTED = 60  # characters of a value shown in a message
Table = dict[str, object]
KeyPath = tuple[str, ...]

_HEADER = re.compile(r"\s*\[\[?\s*([^\[\]]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")
_AT_LINE = re.compile(r"\s*\(at line (\d+), column (\d+)\)|\s*\(at end of document\)")


def read_text(path: Path, kind: str = "TOML file") -> str:
    """The file's text; kind: what it should be, for messages.

    Raises UserError when it is missing, not a file, not UTF-8 or larger than 1 MiB.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise UserError(Problem(str(path), "larger than 1 MiB", "this is not a file that a person wrote"))
        return data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(Problem(str(path), why or str(error), f"give the path of a {kind}")) from None


def parse_toml(text: str, where: str) -> Table:
    """The document. Raises UserError with the line of a syntax error."""
    import tomllib  # reading HLO needs no TOML

    if dotted := next((n for n, line in enumerate(text.split("\n"), 1) if line.count(".") > MAX_DOTS), None):
        raise UserError(
            Problem(f"{where}:{dotted}", f"more than {MAX_DOTS} dots in a line", "use shorter keys")
        )
    try:
        table = tomllib.loads(text.replace("\r\n", "\n"))
    except RecursionError:
        raise UserError(Problem(where, "nested too deeply", "write flat tables")) from None
    except ValueError as error:  # TOMLDecodeError, and int() on thousands of digits
        message = str(error)
        at = _AT_LINE.search(message)
        last = len(text.rstrip().split("\n"))
        line = f":{at[1] or last}" if at else ""
        what = _AT_LINE.sub("", message)
        raise UserError(Problem(f"{where}{line}", f"not TOML: {what[:1].lower()}{what[1:]}", "")) from None
    if _has_long_number(table):
        raise UserError(Problem(where, "not TOML: a number of more than 64 bits", "use smaller numbers"))
    return table


def _has_long_number(table: Table) -> bool:
    """TOML's whole numbers have 64 bits; Python reads any, and longer ones cannot even be printed."""
    stack: list[object] = [table]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            stack += value.values()
        elif isinstance(value, list):
            stack += value
        elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            return True
    return False


def key_lines(text: str) -> Mapping[KeyPath, int]:
    """Line (from 1) at which each key or table header first stands. Best effort: no quoting tricks."""
    lines: dict[KeyPath, int] = {}
    table: KeyPath = ()
    for number, line in enumerate(text.split("\n"), start=1):
        if len(line) > MAX_LINE:
            continue
        if header := _HEADER.match(line):
            table = _split(header[1])
            for n in range(1, len(table) + 1):
                lines.setdefault(table[:n], number)
        elif key := _KEY.match(line):
            lines.setdefault((*table, *_split(key[1])), number)
    return lines


def _split(dotted: str) -> KeyPath:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))


def at(where: str, key: KeyPath, lines: Mapping[KeyPath, int]) -> str:
    """`file:line: key.path`; the line of the nearest enclosing table where the key itself has none."""
    line = next((lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in lines), None)
    place = where if line is None else f"{where}:{line}"
    return f"{place}: {'.'.join(map(shown, key))}" if key else place


def quoted(value: object) -> str:
    """A value for a message: short, on one line, whatever it is."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        if any(isinstance(item, (list, dict)) for item in value):
            return "a nested list"
        return "[" + ", ".join(quoted(item) for item in value[:4]) + (", …]" if len(value) > 4 else "]")
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= MAX_QUOTED else text[:MAX_QUOTED] + "…"


def shown(part: str) -> str:
    """A key as it is written: bare where TOML allows it."""
    return part if re.fullmatch(r"[\w-]{1,60}", part) else quoted(part)


def did_you_mean(word: str, known: Iterable[str], noun: str) -> str:
    """The fix for an unknown word: `did you mean 'fsdp'? mesh axes: fsdp, tensor`."""
    import difflib  # only when something is wrong: half of this module's import time

    names = list(known)
    close = difflib.get_close_matches(word[:MAX_QUOTED], names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    listed = ", ".join(name if name.isprintable() else quoted(name) for name in names[:MAX_LISTED]) or "none"
    return f"{hint}{noun}: {listed}{', …' if len(names) > MAX_LISTED else ''}"
