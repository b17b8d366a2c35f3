"""What context parallel attention sends against closed forms, and what it may not send.

On CPU, and ahead of time on GPU and TPU.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache

import pytest
from compiled_plans import compiled_plan, scheduled_case

from shardlab.analysis import Analysis, CollectiveRow, analyze
from shardlab.program import Program
from shardlab.spec.case import make_case
from shardlab.spec.models import find_model
from shardlab.spec.plan import plan_from_text

pytestmark = pytest.mark.matrix

F32_BYTES = 4
MODEL = replace(find_model("tiny"), name="tiny-grouped", kv_heads=4)
BATCH, SEQ = 2, 512
Axes = tuple[tuple[str, int], ...]
KERNEL = "layers/attention/kernel"
PLAN = """\
[axes]
{axes}
[activations]
{batch}
seq = [{split}]
[method]
context = "{kind}"
remat = "{remat}"
"""
GPU = pytest.param("h100:1x8", marks=pytest.mark.gpu)
GPU_FULL = pytest.param("h100:1x8", marks=[pytest.mark.gpu, pytest.mark.full])
TPU = pytest.param("v5e:2x4", marks=[pytest.mark.tpu, pytest.mark.full])
TPU_GATE = pytest.param("v5e:2x4", marks=pytest.mark.tpu)  # both kinds of hop in one compile


@dataclass(frozen=True)
class Closed:
    """Bytes that one device sends per layer and step in attention.

    tokens: of one device. forwards: 2 where the backward pass runs the forward again (full remat).
    """

    tokens: int
    element_bytes: int
    forwards: int

    def heads_bytes(self, heads: int) -> int:
        """Of one device's queries or output (heads), or its keys or its values (KV heads)."""
        return self.tokens * heads * MODEL.head_dim * self.element_bytes

    @property
    def keys_values(self) -> int:
        """A device's keys and values."""
        return 2 * self.heads_bytes(MODEL.kv_heads)

    def ring(self, n: int) -> int:
        """n - 1 hops of K and V forward, and again backward with dK and dV, which are sums and travel in f32.

        Ring Attention (arXiv:2310.01889, section 3): blocks of keys and values go around the ring of hosts
        once per pass; what is at home is not sent. Backward is 2 times forward in f32, 3 times in bf16. Run
        again in the backward pass, forward starts with the same hop as backward does: compilers merge the
        two.
        """
        gradients = self.keys_values * F32_BYTES // self.element_bytes
        merged = (self.forwards - 1) * self.keys_values
        return (n - 1) * (self.forwards * self.keys_values + self.keys_values + gradients) - merged

    def gathers(self, n: int) -> int:
        """(n - 1) / n of all keys and values, n - 1 shards, each forward (arXiv:2407.21783, 3.3.2)."""
        return self.forwards * (n - 1) * self.keys_values

    def scatters(self, n: int) -> int:
        """Their gradients reduce-scattered, once, in the compute type: as many bytes as one gather."""
        return (n - 1) * self.keys_values

    def ulysses(self, n: int) -> Fraction:
        """Four all-to-alls per pass: Q, K, V and the output, (n - 1) / n of a device's part each.

        DeepSpeed-Ulysses (arXiv:2309.14509, section 3.2): 3 N h / P for Q, K, V and N h / P for the output,
        with K and V smaller by the ratio of their heads. Backward is the transpose: four again.
        """
        part = 2 * self.heads_bytes(MODEL.heads) + self.keys_values
        return Fraction(n - 1, n) * part * (self.forwards + 1)


def closed(on: str, remat: str, ways: int) -> Closed:
    """ways: over how many devices batch and sequence are split. XLA:CPU computes bf16 collectives in f32."""
    return Closed(
        tokens=BATCH * SEQ // ways,
        element_bytes=4 if on.startswith("cpu") else 2,
        forwards=2 if remat == "full" else 1,
    )


@cache
def program(on: str, kind: str, axes: Axes, remat: str) -> Program:
    split = [name for name, _ in axes if name != "data"]
    text = PLAN.format(
        axes="\n".join(f"{name} = {size}" for name, size in axes),
        batch='batch = ["data"]' if ("data", 2) in axes else "",
        split=", ".join(f'"{name}"' for name in split),
        kind=kind,
        remat=remat,
    )
    case = make_case(plan_from_text(text), MODEL, on, BATCH, SEQ)
    return scheduled_case(case)


@cache
def compiled(on: str, kind: str, axes: Axes, remat: str = "full") -> Analysis:
    return analyze(program(on, kind, axes, remat))


def in_attention(analysis: Analysis) -> dict[tuple[str, str], Fraction]:
    """(axis, kind) -> bytes per layer of the kernel's collectives; executions are exact."""
    found: dict[tuple[str, str], Fraction] = defaultdict(Fraction)
    for row in analysis.collectives:
        if row.layer == KERNEL:
            low, high = row.executions
            assert low == high, row.name
            found["+".join(row.axes or ("unknown",)), row.kind] += row.wire_bytes * low / MODEL.layers
    return dict(found)


def elsewhere(analysis: Analysis) -> list[CollectiveRow]:
    return [row for row in analysis.collectives if row.layer != KERNEL]


RING8 = (("ring", 8),)
DATA2 = (("data", 2), ("split", 4))


@pytest.mark.parametrize("on", ["cpu:8", GPU, TPU])
@pytest.mark.parametrize("remat", ["full", pytest.param("none", marks=pytest.mark.full)])
def test_ring(on: str, remat: str) -> None:
    analysis = compiled(on, "ring", RING8, remat)
    assert in_attention(analysis) == {("ring", "collective-permute"): closed(on, remat, 8).ring(8)}


@pytest.mark.parametrize("on", ["cpu:8", GPU_FULL, TPU])
@pytest.mark.parametrize("remat", ["full", pytest.param("none", marks=pytest.mark.full)])
def test_gathered_keys_and_values(on: str, remat: str) -> None:
    expected = closed(on, remat, 8)
    assert in_attention(compiled(on, "all-gather", DATA2, remat)) == {
        ("split", "all-gather"): expected.gathers(4),
        ("split", "reduce-scatter"): expected.scatters(4),
    }


@pytest.mark.parametrize("on", ["cpu:8", GPU_FULL, TPU])
@pytest.mark.parametrize("remat", ["full", pytest.param("none", marks=pytest.mark.full)])
def test_ulysses(on: str, remat: str) -> None:
    expected = closed(on, remat, 8).ulysses(4)
    assert in_attention(compiled(on, "ulysses", DATA2, remat)) == {("split", "all-to-all"): expected}


@pytest.mark.parametrize("on", ["cpu:8", GPU_FULL, TPU_GATE])
def test_ring_of_ulysses(on: str) -> None:
    """The ring's shards are whole groups' tokens, of a share of the heads: as many bytes as one device's."""
    expected = closed(on, "full", 8)
    assert in_attention(compiled(on, "ring+ulysses", (("ring", 2), ("ulysses", 4)))) == {
        ("ring", "collective-permute"): expected.ring(2),
        ("ulysses", "all-to-all"): expected.ulysses(4),
    }


@pytest.mark.parametrize(
    ("kind", "axes", "allowed"),
    [
        ("ring", RING8, {"collective-permute"}),
        ("ulysses", DATA2, {"all-to-all"}),
        ("all-gather", DATA2, {"all-gather", "reduce-scatter"}),
        ("ring+ulysses", (("ring", 2), ("ulysses", 4)), {"collective-permute", "all-to-all"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("on", ["cpu:8", GPU_FULL, TPU])
def test_nothing_else_moves(on: str, kind: str, axes: Axes, allowed: set[str]) -> None:
    """A ring gathers no keys, Ulysses neither; and outside of attention no token changes its device.

    Weights are whole on every device here, so that nothing remains but sums: of gradients and scalars.
    """
    analysis = compiled(on, kind, axes)
    assert {row.kind for row in analysis.collectives if row.layer == KERNEL} == allowed
    assert {row.kind for row in elsewhere(analysis)} == {"all-reduce"}
    assert {row.phase for row in elsewhere(analysis)} <= {"backward", "optimizer", "forward"}
    assert not analysis.ledger


@pytest.mark.gpu
def test_hops_travel_while_tiles_are_computed() -> None:
    """In the loops over hops (forward, again, backward) the loop over tiles stands between start and end."""
    lines = program("h100:1x8", "ring", RING8, "full").hlo_text.splitlines()
    starts = {
        place: match[1]
        for place, line in enumerate(lines)
        if (match := re.search(r"%(\S+) = .* collective-permute-start\(", line))
        and re.search(r"while/body/[^\"]*while/body/[^\"]*ppermute\"", line)
    }
    assert len(starts) == 3
    for place, name in starts.items():
        end = next(
            i for i, line in enumerate(lines) if i > place and f"collective-permute-done(%{name})" in line
        )
        assert any(" while(" in line for line in lines[place:end]), name


@pytest.mark.gpu
@pytest.mark.full
def test_a_million_tokens_compile_and_fit() -> None:
    """llama3-8b on 512 H100s, a ring of 64 hosts: a device's own scores alone would be 4 GB."""
    case, compiled_program, _ = compiled_plan("h100x512-ring64-tensor8")
    assert case.seq == 1_048_576
    memory = compiled_program.memory
    assert memory is not None
    assert memory.argument_bytes is not None
    assert memory.temp_bytes is not None
    assert memory.argument_bytes + memory.temp_bytes < 4_000_000_000
