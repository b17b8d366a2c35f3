"""Questions that the text's index answers: the same answers as when every instruction is read."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hlo.described import GOLDEN

from shardlab.hlo.instructions import Instructions
from shardlab.hlo.lookup import (
    active,
    fusions,
    is_plain,
    may_mention,
    names_of,
    of_opcodes,
    operand_names,
    raw_metadata,
    shape_of,
)
from shardlab.hlo.module import Computation
from shardlab.hlo.reader import parse

ROOT = GOLDEN.parent
TEXTS = sorted([*ROOT.rglob("*.hlo"), *ROOT.rglob("*.hlo.gz"), *ROOT.rglob("*.txt"), *ROOT.rglob("*.txt.gz")])
HAND = """HloModule hand

%fused (p: f32[8], q: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %q = f32[8]{0} parameter(1)
  ROOT %s = f32[8]{0} add(%p, %q), metadata={op_name="jit(f)/add" source_file="a b/c.py" source_line=3}
}

ENTRY %main (true: f32[8], x: f32[8]) -> f32[8] {
  %true = f32[8]{0} parameter(0), metadata={op_name="weights[0][1]"}
  %x = f32[8]{0} parameter(1)
  %c = pred[] constant(true)
  %shaped = f32[8]{0} negate(f32[8]{0} %x), metadata={op_name="a/b"}
  %t = (f32[8]{0}, f32[8]{0}) tuple(%true, /*index=1*/%shaped)
  %g = f32[8]{0} get-tuple-element(%t), index=1
  %odd = f32[8]{0} fusion(%g, %t#0), kind=kLoop, calls=%fused, metadata={op_name="x/calls=%main"}
  ROOT %f = f32[8]{0} fusion(%odd, %x), kind=kLoop, calls=%fused
}
"""


def texts() -> list[pytest.param]:
    named = [pytest.param(path, id=str(path.relative_to(ROOT))) for path in TEXTS]
    return [pytest.param(HAND, id="hand"), *named]


def computations(source: Path | str) -> list[tuple[Computation, Computation]]:
    """Each computation twice: as it was read, and a copy whose instructions are plain records."""
    if isinstance(source, Path):
        data = source.read_bytes()
        source = (gzip.decompress(data) if source.suffix == ".gz" else data).decode()
    records = [
        Computation(one.name, dict(one.instructions), one.root)
        for module in parse(source)
        for one in module.computations.values()
    ]
    indexed = [one for module in parse(source) for one in module.computations.values()]
    assert all(isinstance(one.instructions, Instructions) for one in indexed)
    return list(zip(indexed, records, strict=True))


@pytest.mark.parametrize("source", texts())
def test_the_index_says_what_the_instructions_say(source: Path | str) -> None:
    for indexed, records in computations(source):
        got, want = indexed.instructions, records.instructions
        # Answers first, from what the index knows; reading the instructions would change how it answers.
        assert operand_names(got) == operand_names(want)
        assert {name: shape_of(got, name) for name in want} == {n: one.shape for n, one in want.items()}
        assert shape_of(got, "?") is None
        assert {name: raw_metadata(got, name) for name in want} == {
            name: one.attributes.get("metadata", "") for name, one in want.items()
        }
        assert is_plain(got) == is_plain(want)
        assert sorted(fusions(got)) == sorted(fusions(want))
        opcodes = sorted({one.opcode for one in want.values()})
        for opcode in opcodes:
            assert names_of(got, opcode) == names_of(want, opcode)
        assert of_opcodes(got, opcodes[::2]) == of_opcodes(want, opcodes[::2])
        assert sorted(one.name for one in active(got)) == sorted(one.name for one in active(want))


def test_a_text_that_mentions_nothing_is_not_searched_further() -> None:
    ((fused, _), (main, _)) = computations(HAND)
    assert may_mention(fused.instructions, "jit(f)/add")
    assert not may_mention(fused.instructions, "weights")
    assert may_mention(main.instructions, "weights")
    assert may_mention({}, "anything")
