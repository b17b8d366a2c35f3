"""What the compilers print, read back: rejected flags, refusals for want of memory, warnings. Pure text ->
records.

The formats are those of XLA (`parse_flags_from_env.cc`, `command_line_flags.cc`, `spmd_partitioner.cc`,
`hlo_rematerialization.cc`) and of libtpu's absl flags, jax 0.10 to 0.12; tests/compile/test_logs.py has
samples.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

from shardlab.program import CompilerWarning, Refusal

_UNKNOWN_XLA = re.compile(r"Unknown flags? in XLA_FLAGS: (.*)")
_UNKNOWN_TPU = re.compile(r"ERROR: Unknown command line flag '([^']+)'")
_ILLEGAL_XLA = re.compile(r"Couldn't interpret value (\S*) for flag (\w+)")
_ILLEGAL_TPU = re.compile(r"ERROR: Illegal value '([^']*)' specified for flag '([^']+)'")

_HBM_TOTAL = re.compile(
    r"total memory required for HLO temporaries \(([\d.]+)([KMGT]?)\).*?HBM \(([\d.]+)([KMGT]?)\)"
)
_HBM_USED = re.compile(r"Used ([\d.]+)([KMGT]?)i?B? of ([\d.]+)([KMGT]?)i?B? hbm", re.IGNORECASE)
_BINARY_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

_REMATERIALIZED = re.compile(
    r"\[spmd\] Involuntary full rematerialization\. The compiler (?:cannot|was not able to) go from sharding "
    r"(?P<from>\{.*\}) to (?P<to>\{.*\}) "
    r"(?:efficiently|without doing a full rematerialization of the tensor) "
    r"for HLO operation:? (?P<operation>%?[\w.-]+)(?P<rest>.*)",
    re.IGNORECASE,
)
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_LOG_PREFIX = re.compile(r"^[IWEF]\d{4} [\d:.]+\s+\d+ ")
_OTHER_WARNINGS = (
    ("memory not reduced enough", re.compile(r"Can't reduce memory use below .*")),
    ("donated buffers not used", re.compile(r"Some donated buffers were not usable.*")),
)


def rejected_flags(log: str) -> tuple[tuple[str, str], ...]:
    """(flag name without dashes or value, why) for each flag that a compiler named before it gave up."""
    return tuple(dict.fromkeys(_rejections(log)))


def _rejections(log: str) -> Iterator[tuple[str, str]]:
    for line in log.splitlines():
        if match := _UNKNOWN_XLA.search(line):
            for flag in match[1].split():
                yield flag_name(flag), "unknown to this XLA"
        if match := _UNKNOWN_TPU.search(line):
            yield match[1], "unknown to this libtpu"
        if match := _ILLEGAL_XLA.search(line) or _ILLEGAL_TPU.search(line):
            yield match[2], f"{match[1]!r} is not a value for it"


def flag_name(flag: str) -> str:
    """`xla_foo` of `--xla_foo=1`."""
    return flag.lstrip("-").partition("=")[0]


def refusal(message: str) -> Refusal | None:
    """The refusal in an error message, None when the message is about something else.

    Bytes are per device; the compiler prints two decimals of a binary unit, so they are good to about 0.01
    GiB.
    """
    match = _HBM_USED.search(message) or _HBM_TOTAL.search(message)
    if match is None:
        return None
    needed_bytes, limit_bytes = _bytes(match[1], match[2]), _bytes(match[3], match[4])
    return Refusal(
        needed_bytes=needed_bytes, limit_bytes=limit_bytes, text=_line_around(message, match.start())
    )


def _bytes(number: str, unit: str) -> int:
    return round(Fraction(number) * _BINARY_UNITS[unit.upper()])


def _line_around(text: str, position: int) -> str:
    start = text.rfind("\n", 0, position) + 1
    return text[start:].partition("\n")[0].strip()


def warnings(log: str) -> tuple[CompilerWarning, ...]:
    """The warnings a user can act on, each once, in the order they were printed."""
    found = {(w.kind, w.text): w for w in map(_warning, log.splitlines()) if w is not None}
    return tuple(found.values())


def _warning(line: str) -> CompilerWarning | None:
    if match := _REMATERIALIZED.search(line):
        op_names = _OP_NAME.findall(match["rest"])[:1]
        names = (match["operation"].lstrip("%"), *op_names, match["from"], match["to"])
        return CompilerWarning(kind="involuntary full rematerialization", text=match[0], names=names)
    for kind, pattern in _OTHER_WARNINGS:
        if match := pattern.search(line):
            return CompilerWarning(kind=kind, text=match[0])
    return None


def last_words(log: str) -> str:
    """The line of a dead process's log that says most: its fatal check, else its last error or last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for mark in (
        re.compile(r"^F\d{4} "),
        re.compile(r"^\S*(Error|Exception): "),
        re.compile(r"^(E\d{4} |ERROR)"),
    ):
        for line in reversed(lines):
            if mark.search(line):
                return _LOG_PREFIX.sub("", line)[:500]
    return lines[-1][:500] if lines else "it printed nothing"
