"""Random damage to HLO inputs: what disks, editors, other tools and attackers do to a dump."""

from __future__ import annotations

import gzip
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden"
MAX_SEED_BYTES = 20_000
MAX_INPUT_BYTES = 60_000

_NUMBER = re.compile(rb"-?[0-9]+")
_LINE = re.compile(rb"[^\n]*\n")
_NUMBERS = (
    b"0", b"-1", b"1", b"2", b"7", b"1000000000000000000", b"9223372036854775807", b"18446744073709551615",
    b"18446744073709551616", b"99999999999999999999", b"123456789012345678901234567890", b"2147483648",
)  # fmt: skip
_PIECES = (
    b"{", b"}", b"(", b")", b"[", b"]", b'"', b"'", b"\\", b"/*", b"*/", b"//", b",", b"=", b":", b"%", b"\n",
    b"<=", b"?", b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r\n", b"ROOT ", b"ENTRY ", b"HloModule x\n", b"#1#0",
    b"replica_groups={}", b"replica_groups={{}}", b"replica_groups=[4,2]<=[8]",
    b"replica_groups=[2,4]<=[4,2]T(1,0)",
    b"replica_groups=mesh['a'=2,'b'=4] {'b'}", b"replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}",
    b"source_target_pairs={{0,1},{1,0}}", b"channel_id=1", b"use_global_device_ids=true", b"dimensions={0}",
    b'backend_config={"known_trip_count":{"n":"9"}}', b"execution_thread=\"host\"", b"is_scheduled=true",
    b"num_partitions=8", b"replica_count=2", b"f32[]", b"(f32[8], token[])", b"s64[1000000000000000000]",
    b"all-reduce", b"all-gather-start", b"all-gather-done", b"collective-permute", b"while", b"conditional",
    b"fusion", b"call", b"async-start", b"custom-call", b"get-tuple-element", b"tuple", b"parameter",
    b"constant", b"nan", b"inf", b"1e30", b"<b>&amp;</b>", b"[bold]", b"metadata={op_name=\"",
)  # fmt: skip

Mutator = Callable[[random.Random, bytes, Sequence[bytes]], bytes]


def seeds() -> list[bytes]:
    """Every small sample: HLO texts and protos of tests/golden, decompressed."""
    found = []
    for path in sorted(GOLDEN.rglob("*")):
        if path.is_file() and "actual" not in path.parts and {".hlo", ".txt", ".pb"} & set(path.suffixes):
            data = path.read_bytes()
            data = gzip.decompress(data) if path.suffix == ".gz" else data
            found += [data] if len(data) < MAX_SEED_BYTES else []
    return found


def _span(chosen: random.Random, data: bytes) -> tuple[int, int]:
    """A random span: short ones as likely as long ones."""
    size = min(len(data), 1 << chosen.randrange(14))
    start = chosen.randrange(len(data) + 1)
    return start, min(len(data), start + chosen.randrange(size + 1))


def _line_span(chosen: random.Random, data: bytes) -> tuple[int, int]:
    start = data.rfind(b"\n", 0, chosen.randrange(len(data) + 1)) + 1
    end = start
    for _ in range(1 << chosen.randrange(4)):
        end = data.find(b"\n", end) + 1 or len(data)
    return start, end


def _either_span(chosen: random.Random, data: bytes) -> tuple[int, int]:
    return (_span if chosen.random() < 0.5 else _line_span)(chosen, data)


def _cut(chosen: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    at = chosen.randrange(len(data) + 1)
    return data[:at] if chosen.random() < 0.8 else data[at:]


def _delete(chosen: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    start, end = _either_span(chosen, data)
    return data[:start] + data[end:]


def _duplicate(chosen: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    start, end = _either_span(chosen, data)
    at = chosen.choice((end, chosen.randrange(len(data) + 1)))
    return data[:at] + data[start:end] * chosen.choice((1, 1, 1, 2, 9)) + data[at:]


def _swap(chosen: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    a, b = sorted((_either_span(chosen, data), _either_span(chosen, data)))
    if a[1] > b[0]:
        return data
    return data[: a[0]] + data[slice(*b)] + data[a[1] : b[0]] + data[slice(*a)] + data[b[1] :]


def _flip(chosen: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(min(1 << chosen.randrange(5), len(changed))):
        at = chosen.randrange(len(changed))
        changed[at] = chosen.choice((chosen.randrange(256), changed[at] ^ (1 << chosen.randrange(8))))
    return bytes(changed)


def _insert(chosen: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    at = chosen.randrange(len(data) + 1)
    return data[:at] + chosen.choice(_PIECES) + data[at:]


def _splice(chosen: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    other = chosen.choice(others)
    start, end = _either_span(chosen, other)
    at, till = _either_span(chosen, data)
    return data[:at] + other[start:end] + data[chosen.choice((at, till)) :]


def _number(chosen: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    found = list(_NUMBER.finditer(data))
    for match in sorted(chosen.sample(found, min(len(found), 1 << chosen.randrange(3))), reverse=True,
                        key=re.Match.start):  # fmt: skip
        data = data[: match.start()] + chosen.choice(_NUMBERS) + data[match.end() :]
    return data


def _nest(chosen: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    """Deep nesting, sometimes closed."""
    opener, closer = chosen.choice(((b"{", b"}"), (b"(", b")"), (b"[", b"]"), (b"b(", b")"), (b'{"', b'"}')))
    depth = 1 << chosen.randrange(13)
    start, end = _either_span(chosen, data)
    middle = data[start:end] + closer * chosen.choice((0, depth, depth, depth, depth - 1))
    return data[:start] + opener * depth + middle + data[end:]


def _rename(chosen: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    """One name becomes another of the text: cycles of calls, wrong operands, names twice."""
    names = _NAMES.findall(data)
    if len(names) < 2:
        return data
    old, new = chosen.choice(names), chosen.choice(names)
    return data.replace(old, new, chosen.choice((1, 2, -1)))


def _attribute(chosen: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """One attribute's value becomes that of another instruction, here or in another sample."""
    found = list(_ATTRIBUTE.finditer(data))
    donors = _ATTRIBUTE.findall(chosen.choice((data, chosen.choice(others))))
    if not found or not donors:
        return data
    match, (name, value) = chosen.choice(found), chosen.choice(donors)
    name = chosen.choice((name, match.group(1)))
    return data[: match.start()] + b", " + name + b"=" + value + data[match.end() :]


def _opcode(chosen: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """One opcode becomes another that occurs in the samples."""
    found = list(_OPCODE.finditer(data))
    donors = _OPCODE.findall(chosen.choice(others))
    if not found or not donors:
        return data
    match = chosen.choice(found)
    return data[: match.start(1)] + chosen.choice(donors) + data[match.end(1) :]


_ATTRIBUTE = re.compile(rb", ([a-z_]+)=([^\s,{}\"\[\]()]+|\{[^\n{}]*\}|\{\{[^\n{}]*\}(?:,\{[^\n{}]*\})*\})")
_OPCODE = re.compile(rb"[\])}] ([a-z][a-z\-]+)\(")
_NAMES = re.compile(rb"%[A-Za-z_][A-Za-z0-9_.\-]*")
_MUTATORS: tuple[Mutator, ...] = (
    _cut, _delete, _delete, _duplicate, _swap, _flip, _insert, _insert, _splice, _splice, _number, _number,
    _nest, _rename, _rename, _rename, _rename, _attribute, _attribute, _attribute, _attribute,
    _opcode, _opcode, _opcode,
)  # fmt: skip


def mutate(chosen: random.Random, originals: Sequence[bytes]) -> bytes:
    """One new input: a seed with one to six kinds of damage, at most MAX_INPUT_BYTES."""
    data = chosen.choice(originals)
    for _ in range(chosen.choice((1, 1, 1, 1, 2, 2, 3, 5))):
        data = chosen.choice(_MUTATORS)(chosen, data, originals)[:MAX_INPUT_BYTES]
    return data
