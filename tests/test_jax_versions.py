"""shard_map programs as JAX 0.4.26 to 0.12 compile them, against closed forms worked out from their names.

golden/jax_versions/make.py makes them, and says what a name means. Each collective stands once in a program,
on its own: XLA:CPU keeps all five kinds as they are, neither merged nor moved, in each of these releases.
"""

from __future__ import annotations

import functools
import gzip
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import pytest

from shardlab.analysis import analyze

GOLDEN = Path(__file__).parent / "golden" / "jax_versions"
VERSIONS = ("0.4.26", "0.4.38", "0.6.0", "0.8.0", "0.10.0", "0.12.0")
MESH = {"a": 2, "b": 2, "c": 2}
NUM_DEVICES = 8
LOCAL_BYTES = 40 * 4
SUBSETS = [axes for n in (1, 2, 3) for axes in itertools.combinations(MESH, n)]
OVER_EVERY_SUBSET = (
    "once",
    "scan_2__then__scan_3__then__scan_5",
    "fori_3_20",
    "while_2_21_3",
    "while_19_m4_m5",
    "upto_input",
    "halving_input",
    "cond",
    "scan_5__cond",
)
OVER_SOME_SUBSETS = (
    "chain",
    "bf16",
    "fori_m3_4",
    "doubling_1_100",
    "wrapping_250_4",
    "unroll_2_7",
    "scan_3__while_17_0_m1",
    "scan_3__upto_input",
    "switch_3",
    "fori_3_20__switch_3",
)
PROGRAMS = [
    *(f"{words}__over_{'_'.join(axes)}" for words in OVER_EVERY_SUBSET for axes in SUBSETS),
    *(f"{words}__over_{axes}" for words in OVER_SOME_SUBSETS for axes in ("b", "a_c", "a_b_c")),
    *(f"once__over_{axes}" for axes in ("b_a", "c_a", "c_b", "b_a_c", "c_b_a")),
]
# The call in make.py that a collective comes from, and its kind.
CALLS = {
    "psum": "all-reduce",
    "pmax": "all-reduce",
    "all_gather": "all-gather",
    "psum_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "ppermute": "collective-permute",
}
# JAX 0.8 gives what a loop or branch holds the line of the call that makes it (a fori_loop with fixed bounds
# is a scan, which does not).
GIVE_THEIR_LINE = {
    "while": "while_loop",
    "doubling": "while_loop",
    "wrapping": "while_loop",
    "halving": "while_loop",
    "upto": "fori_loop",
    "cond": "cond",
    "switch": "switch",
}
# How the text changed over these releases (by XLA's and JAX's own history): the first and the last of them
# that print it.
PRINTED = {
    "all-reduce(f32[": ("0.4.26", "0.4.38"),
    "known_trip_count": ("0.4.38", "0.12.0"),
    "source_line=": ("0.4.26", "0.8.0"),
    "source_end_line=": ("0.8.0", "0.8.0"),
    "StackFrames": ("0.10.0", "0.12.0"),
    "replica_groups={{": ("0.4.26", "0.10.0"),
    "replica_groups=mesh[": ("0.12.0", "0.12.0"),
}
Range = tuple[int, int | None]
every_version = pytest.mark.parametrize("version", VERSIONS)


@dataclass(frozen=True)
class Expected:
    """One collective: executions by the loops round it, bytes by DESIGN section 3."""

    kind: str
    source: str
    axes: tuple[str, ...]
    group_size: int
    num_groups: int
    dtypes: tuple[str, ...]
    payload_bytes: int
    wire_bytes: Fraction
    fabric_bytes: Fraction
    logical_payload_bytes: int | None = None
    logical_wire_bytes: Fraction | None = None
    executions: Range = (1, 1)

    def times(self, least: int, most: int | None) -> Expected:
        low, high = self.executions
        known = most is not None and high is not None
        return replace(self, executions=(low * least, high * most if known else None))


@functools.cache
def dump(version: str) -> str:
    """All modules that one JAX compiled, after a comment that says which."""
    return gzip.decompress((GOLDEN / f"jax-{version}.hlo.gz").read_bytes()).decode()


@functools.cache
def modules(version: str) -> dict[str, str]:
    """Program name -> HLO text."""
    _, *texts = re.split(r"^(?=HloModule )", dump(version), flags=re.MULTILINE)
    return {re.match(r"HloModule jit_(\w+),", text)[1]: text for text in texts}


@functools.cache
def lines_of(call: str) -> list[str]:
    """`make.py:75` and so on, where make.py calls lax.psum and the like."""
    lines = (GOLDEN / "make.py").read_text().splitlines()
    return [f"make.py:{number}" for number, line in enumerate(lines, 1) if f"lax.{call}(" in line]


def collective(call: str, axes: list[str], *, element_bytes: int = 4) -> Expected:
    """One collective of f32[40] per device (all-gather to and reduce-scatter from f32[40 n]).

    A permute joins pairs, one per device that sends.
    """
    n = math.prod(MESH[axis] for axis in axes)
    local = LOCAL_BYTES * element_bytes // 4
    payload = local * n if call in ("all_gather", "psum_scatter") else local
    wire = {
        "psum": Fraction(2 * (n - 1), n) * local,
        "pmax": Fraction(2 * (n - 1), n) * local,
        "all_gather": Fraction((n - 1) * local),
        "psum_scatter": Fraction((n - 1) * local),
        "all_to_all": Fraction(n - 1, n) * local,
        "ppermute": Fraction(local),
    }[call]
    return Expected(
        kind=CALLS[call],
        source=lines_of(call)[0],
        axes=tuple(sorted(axes)),
        group_size=2 if call == "ppermute" else n,
        num_groups=NUM_DEVICES if call == "ppermute" else NUM_DEVICES // n,
        dtypes=("f32",) if element_bytes == 4 else ("bf16",),
        payload_bytes=payload,
        wire_bytes=wire,
        fabric_bytes=NUM_DEVICES * wire,
    )


def chain(axes: list[str]) -> Expected:
    """A permute in which one of each n devices sends nothing: the busiest device sends all it has."""
    n = math.prod(MESH[axis] for axis in axes)
    senders = NUM_DEVICES // n * (n - 1)
    return replace(
        collective("ppermute", axes),
        source=lines_of("ppermute")[1],
        num_groups=senders,
        fabric_bytes=Fraction(senders * LOCAL_BYTES),
    )


def narrow(call: str, axes: list[str], version: str) -> Expected:
    """A collective of bf16. XLA:CPU carries reductions out in f32, and since 2024 the other kinds too."""
    asked = collective(call, axes, element_bytes=2)
    if version == "0.4.26" and call not in ("psum", "psum_scatter"):
        return asked
    return replace(
        collective(call, axes),
        logical_payload_bytes=asked.payload_bytes,
        logical_wire_bytes=asked.wire_bytes,
    )


def expected(words: list[str], axes: list[str], version: str) -> Iterator[Expected]:
    """The collectives of a program: each word changes what the words after it give."""
    how, *rest = words[0].split("_") if words else ("once",)
    five = ("psum", "all_to_all", "ppermute", "all_gather", "psum_scatter")
    if how == "chain":
        yield chain(axes)
    elif how == "bf16":
        yield from (narrow(call, axes, version) for call in five)
    elif how == "once":
        yield from (collective(call, axes) for call in five)
    elif how == "then":
        yield from expected(words[1:], axes, version)
        yield collective("pmax", axes)
    else:
        numbers = [int(number.replace("m", "-")) for number in rest if number != "input"]
        for one in expected(words[1:], axes, version):
            if version == "0.8.0" and how in GIVE_THEIR_LINE:
                one = replace(one, source=lines_of(GIVE_THEIR_LINE[how])[0])
            yield from (one.times(*trips) for trips in trips_of(how, numbers))


def trips_of(how: str, numbers: list[int]) -> Iterator[Range]:
    """How often a word runs its body, (least, most), once per copy of the body in the program."""
    if how == "unroll":  # `scan` writes the body so often per trip, and the rest after the loop
        copies, length = numbers
        yield from [(length // copies,) * 2] * copies + [(1, 1)] * (length % copies)
    elif how in ("upto", "halving"):
        yield 0, None
    elif how in ("cond", "switch"):
        yield 0, 1
    else:
        trips = {
            "scan": lambda length: length,
            "fori": lambda *bounds: len(range(*bounds)),
            "while": lambda *bounds: len(range(*bounds)),
            "doubling": lambda start, stop: math.ceil(math.log2(stop / start)),
            "wrapping": lambda start, stop: (stop - start) % 256,  # a counter of eight bits
        }[how](*numbers)
        yield trips, trips


def collectives_of(program: str, version: str) -> list[Expected]:
    *words, over = program.split("__")
    return list(expected(words, over.split("_")[1:], version))


def sums_of(program: str, version: str) -> tuple[Fraction, Fraction | None]:
    """What each device sends in all, (least, most): executions times wire bytes."""
    least, most = Fraction(0), Fraction(0)
    unbounded = False
    for one in collectives_of(program, version):
        low, high = one.executions
        least += low * one.wire_bytes
        most += (high or 0) * one.wire_bytes
        unbounded |= high is None
    return least, None if unbounded else most


@every_version
def test_a_dump_says_which_jax_made_it_and_holds_every_program(version: str) -> None:
    assert dump(version).startswith(f"// jax {version}, jaxlib {version}, Python 3.")
    assert list(modules(version)) == PROGRAMS


def test_every_dump_is_of_a_version_tested() -> None:
    assert {path.name for path in GOLDEN.glob("*.hlo.gz")} == {
        f"jax-{version}.hlo.gz" for version in VERSIONS
    }


@pytest.mark.parametrize("printed", PRINTED)
def test_the_dumps_print_in_the_ways_of_their_time(printed: str) -> None:
    first, last = map(VERSIONS.index, PRINTED[printed])
    assert [version for version in VERSIONS if printed in dump(version)] == list(VERSIONS[first : last + 1])


@every_version
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_collective_equals_its_closed_form(program: str, version: str) -> None:
    analysis = analyze(modules(version)[program], axes=MESH)
    rows = [
        Expected(**{name: getattr(row, name) for name in Expected.__dataclass_fields__})
        for row in analysis.collectives
    ]
    sums = sums_of(program, version)
    assert Counter(rows) == Counter(collectives_of(program, version))
    assert analysis.totals.wire_bytes == sums
    assert {key: figures["wire_bytes"] for key, figures in analysis.totals.by_axes.items()} == {
        "+".join(rows[0].axes): sums
    }
    assert [entry.what for entry in analysis.ledger] == (["while"] if sums[1] is None else [])


@every_version
def test_a_text_of_many_modules_is_the_sum_of_its_programs(version: str) -> None:
    analysis = analyze(GOLDEN / f"jax-{version}.hlo.gz", axes=MESH)
    assert [module.name for module in analysis.modules] == [f"jit_{program}" for program in PROGRAMS]
    assert {module.num_devices for module in analysis.modules} == {NUM_DEVICES}
    assert analysis.totals.wire_bytes == (sum(sums_of(program, version)[0] for program in PROGRAMS), None)


@pytest.mark.parametrize("version", VERSIONS[1:])  # 0.4.26 writes none down
def test_trips_derived_from_the_counters_are_those_that_xla_wrote_down(version: str) -> None:
    derived = analyze(dump(version).replace('"known_trip_count"', '"trips_not_read"'), axes=MESH)
    written = [
        one.executions
        for program in PROGRAMS
        for one in analyze(modules(version)[program], axes=MESH).collectives
    ]
    assert [row.executions for row in derived.collectives] == written
