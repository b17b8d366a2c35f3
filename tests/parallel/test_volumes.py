"""Data and tensor parallelism move what the literature says: compiled programs against closed forms.

Exact, but for all-reduces of scalars (the loss, and squares of gradients for their norm): of these there are
few, and their bytes are bounded. In f32 on emulated devices; in bf16 ahead of time for GPUs and TPUs.

What XLA:CPU does otherwise: its partitioner makes no reduce-scatter (it all-reduces and slices: twice the
bytes), and sums the input gradients of gate and up, and of query, key and value, after reducing each.

What XLA:TPU does otherwise: `strategy_volumes.SummedWhole`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import pytest
import strategy_volumes as closed
from compiled_plans import scheduled_case
from compilers import otherwise_in_jax_0_10
from emulated import SMALL, asked, case_of, step_of
from strategy_volumes import F32, SummedWhole, Volumes, together

from shardlab.analysis import CollectiveRow, analyze
from shardlab.spec.case import Case

# Large enough for compilers to treat arrays as they treat large ones.
LARGER = replace(SMALL, name="larger", embed=512, head_dim=64, mlp=1_024, vocab=2_048, context=256)
MACHINES = {"cpu": "cpu:8", "gpu": "h100:1x8", "tpu": "v5e:2x4"}
D8, F8, T8 = {"data": 8}, {"fsdp": 8}, {"tensor": 8}
DF, DT, TY = {"data": 2, "fsdp": 4}, {"data": 2, "tensor": 4}, {"tensor": 4, "y": 2}
CPU_BACKWARD = 5  # all-reduces of a layer's backward pass: gate, up; query, key, value


@dataclass(frozen=True)
class Figures:
    """What the closed forms need of a case on a target."""

    case: Case
    target: str

    @property
    def element(self) -> int:
        """Bytes of an activation or a weight in use."""
        return F32 if self.target == "cpu" else 2

    def params(self, *, outer: bool | None = None, norms: bool | None = None) -> int:
        """How many: of all, in no layer (outer) or in layers, of norms or of matrices."""
        return sum(
            p.size
            for p in self.case.parameters()
            if outer in (None, not p.path.startswith("layers/")) and norms in (None, "norm" in p.path)
        )

    def in_use(self, *, outer: bool | None = None) -> int:
        """Bytes of weights (or their gradients) as they are computed with: norms in f32."""
        matrices = self.params(outer=outer, norms=False)
        return matrices * self.element + self.params(outer=outer, norms=True) * F32

    def stream(self, batch_ways: int = 1) -> int:
        """Bytes of the residual stream of a step, of one batch shard."""
        return self.case.batch // batch_ways * self.case.seq * self.case.model.embed * self.element


def data(f: Figures) -> Volumes:
    """The sums of microbatches are f32; of one microbatch gradients are reduced as they were computed."""
    accumulates = f.case.plan.method.accumulate > 1
    return closed.data_parallel("data", 8, F32 * f.params() if accumulates else f.in_use())


def zero1(f: Figures) -> Volumes:
    return closed.zero1("data", 8, f.params())


def zero2(f: Figures) -> Volumes:
    """One microbatch: ZeRO-1 too is this, since every gradient is scattered as soon as it is made."""
    count = f.case.plan.method.accumulate
    return without_scatters(f, closed.zero2("data", 8, f.params(), f.in_use(), count))


def fsdp(f: Figures) -> Volumes:
    ways, count = f.case.plan.axes["fsdp"], f.case.plan.method.accumulate
    layers, outer = f.in_use(outer=False), f.in_use(outer=True)
    # XLA:CPU moves the gathers that do not depend on the microbatch out of its loop.
    hoisted = 1 if f.target == "cpu" else count
    one = closed.fsdp("fsdp", ways, layers, outer, count, outer_gathers=hoisted)
    return without_scatters(f, one)


def hsdp(f: Figures) -> Volumes:
    """FSDP for every microbatch; over the copies what a device has of the gradients, once."""
    return together([fsdp(f), closed.data_parallel("data", 2, F32 * f.params() // 4)])


def tensor(f: Figures) -> Volumes:
    layers, backward = f.case.model.layers, CPU_BACKWARD if f.target == "cpu" else 2
    return together([closed.megatron("tensor", 8, layers, f.stream(), backward=backward), loss(f, 8)])


def vocabulary(f: Figures) -> Volumes:
    """Only the embedding and the head are split."""
    return together([closed.megatron("tensor", 8, 0, f.stream()), loss(f, 8)])


def sequence_zero1(f: Figures) -> Volumes:
    """Two microbatches of half the tokens move as much as one batch."""
    layers, count = f.case.model.layers, f.case.plan.method.accumulate
    # GPU and TPU move this sum out of the loop over microbatches (XLA's while-loop all-reduce code motion).
    norms = (count if f.target == "cpu" else 1) * F32 * f.params(norms=True)
    parts = [closed.sequence_parallel("tensor", 4, layers, f.stream(2), norms), loss(f, 4, 2)]
    if f.target == "cpu":
        # The embedding's scatter is our own; the others, and those of the backward pass, are all-reduces.
        more = closed.megatron("tensor", 4, layers, f.stream(2), backward=CPU_BACKWARD)
        one = closed.all_reduce(4, f.stream(2))
        parts[0][("tensor", "reduce-scatter")] = one / 2
        parts += [more, {("tensor", "all-reduce"): -one}]
    split = f.params(norms=False) // 4 + f.params(norms=True)
    return together([*parts, closed.zero1("data", 2, split)])


def two_dimensional(f: Figures) -> Volumes:
    model = f.case.model
    return together(
        [
            closed.two_dimensional(
                ("tensor", 4),
                ("y", 2),
                layers=model.layers,
                tokens=f.case.batch * f.case.seq,
                sizes=(model.embed, model.heads * model.head_dim, model.mlp, model.padded_vocab),
                element=f.element,
                backward=CPU_BACKWARD if f.target == "cpu" else 2,
            ),
            loss(f, 4),
        ]
    )


def loss(f: Figures, ways: int, batch_ways: int = 1) -> Volumes:
    return closed.vocabulary_loss("tensor", ways, f.case.batch // batch_ways * f.case.seq)


def without_scatters(f: Figures, volumes: Volumes) -> Volumes:
    """On emulated devices: the partitioner's reduce-scatters as all-reduces."""
    if f.target != "cpu":
        return volumes
    found: Counter[tuple[str, str]] = Counter()
    for (axes, kind), sent in volumes.items():
        scatters = kind == "reduce-scatter"
        found[axes, "all-reduce" if scatters else kind] += sent * (2 if scatters else 1)  # type: ignore[assignment]
    return dict(found)  # type: ignore[arg-type]


CASES: dict[str, tuple[Any, Callable[[Figures], Volumes]]] = {
    "data": (asked(D8, remat="none"), data),
    "data-accumulate": (asked(D8, accumulate=2), data),
    "zero1": (asked(D8, "zero1"), zero2),
    "zero1-accumulate": (asked(D8, "zero1", accumulate=2), zero1),
    "zero2-accumulate": (asked(D8, "zero2", accumulate=2), zero2),
    "fsdp": (asked(F8), fsdp),
    "fsdp-accumulate": (asked(F8, accumulate=2), fsdp),
    "hsdp-accumulate": (asked(DF, accumulate=2), hsdp),
    "tensor": (asked(T8, remat="none"), tensor),
    "vocabulary": (asked(T8, "vocab", remat="none"), vocabulary),
    "tensor-y": (asked(TY, remat="none"), two_dimensional),
    "sequence-zero1-accumulate": (asked(DT, "seq zero1", remat="none", accumulate=2), sequence_zero1),
}


FINAL = (("final_norm", 1),)
WHOLE = {  # on a TPU
    "zero1": SummedWhole("data", 8, ("norm", "attention/output"), FINAL),
    "zero1-accumulate": SummedWhole("data", 8, ("norm", "attention/"), FINAL, once=True),
    "zero2-accumulate": SummedWhole("data", 8, ("norm", "attention/output", "embedding"), FINAL),
    # FSDP gathers a layer's norms forward, and again in the backward pass.
    "fsdp": SummedWhole("fsdp", 8, ("norm", "attention/output"), (("layers/", 2), ("final_norm", 1))),
    "fsdp-accumulate": SummedWhole(
        "fsdp", 8, ("norm", "attention/output", "embedding"), (("layers/", 4), ("final_norm", 2))
    ),
    "hsdp-accumulate": SummedWhole(
        "fsdp", 4, ("norm", "attention/", "mlp/gate", "mlp/up", "embedding", "head")
    ),
    "sequence-zero1-accumulate": SummedWhole("data", 2, ("norm",), once=True),
}


def expected(figures: Figures, name: str) -> Volumes:
    """The closed form, with what the target does otherwise."""
    volumes = CASES[name][1](figures)
    if figures.target != "tpu" or name not in WHOLE:
        return volumes
    sizes = {p.path: p.size for p in figures.case.parameters()}
    return WHOLE[name].instead(volumes, sizes, figures.element, figures.case.plan.method.accumulate)


def compiled(name: str, target: str) -> tuple[Figures, list[CollectiveRow]]:
    plan, _ = CASES[name]
    if target == "cpu":
        case = case_of(plan)
        step = step_of(case)
        text = step.function.lower(*step.arguments).compile().as_text()
        return Figures(case, target), list(analyze(text, axes=dict(plan.axes)).collectives)
    # The unfused attention has no collective either, and compiles in half the time.
    method = plan.method.model_copy(update={"attention": "reference"})
    plan = plan.model_copy(update={"method": method})
    case = case_of(plan, LARGER, machine=MACHINES[target], seq=256)
    return Figures(case, target), list(analyze(scheduled_case(case)).collectives)


def sent(rows: list[CollectiveRow]) -> Volumes:
    """Bytes per device per step by axes and kind."""
    total: Counter[tuple[str, str]] = Counter()
    for row in rows:
        low, high = row.executions
        assert low == high and row.axes is not None
        total["+".join(row.axes), row.kind] += row.wire_bytes * low  # type: ignore[assignment]
    return {key: Fraction(value) for key, value in total.items() if value}


def scalars(figures: Figures) -> Fraction:
    """What all-reduces of scalars can add per set of axes: two per parameter array, two per microbatch."""
    count = 2 * len(figures.case.parameters()) + 2 * figures.case.plan.method.accumulate
    return closed.all_reduce(8, F32 * count)


def differences(figures: Figures, name: str, rows: list[CollectiveRow]) -> dict[tuple[str, str], Fraction]:
    """What was found beyond the closed form, scalars left out."""
    wanted, found = expected(figures, name), sent(rows)
    more = {key: found.get(key, Fraction(0)) - wanted.get(key, 0) for key in {*wanted, *found}}
    return {
        key: value
        for key, value in more.items()
        if not 0 <= value <= (scalars(figures) if key[1] == "all-reduce" else 0)
    }


def forbid(name: str, figures: Figures, rows: list[CollectiveRow]) -> None:
    """The collectives that may not appear."""
    method, moving = figures.case.plan.method, [row for row in rows if row.wire_bytes]
    for row in moving:
        over_tensor = "tensor" in (row.axes or ())
        if over_tensor and (row.layer or "").startswith(("head", "loss")):
            # Logits are never gathered; the loss moves numbers per token, and the head its input's gradient.
            assert row.kind in ("all-reduce", "reduce-scatter"), row
        if (row.layer or "").startswith("loss"):
            assert row.payload_bytes <= 3 * F32 * figures.case.batch * figures.case.seq, row
        if over_tensor and "sequence" in name and figures.target != "cpu":
            # The loss and the norms' gradients are all that is all-reduced: both are f32, activations bf16.
            assert row.kind != "all-reduce" or row.dtypes == ("f32",), row
        if "data" in (row.axes or ()) and method.accumulate > 1 and "zero2" not in name:
            assert row.executions == (1, 1), row  # once per step


NONE: Mapping[str, pytest.MarkDecorator] = {}
ALWAYS = ("fsdp-accumulate", "tensor", "sequence-zero1-accumulate")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ALWAYS else [pytest.mark.matrix]) for n in CASES]
)
def test_bytes_on_emulated_devices(name: str) -> None:
    figures, rows = compiled(name, "cpu")
    assert differences(figures, name, rows) == {}
    forbid(name, figures, rows)


def compiled_for(*often: str, marks: Mapping[str, pytest.MarkDecorator] = NONE) -> Any:
    """All cases as parameters; in the full set only, but for these. marks: more of some cases."""
    sets = {True: pytest.mark.matrix, False: pytest.mark.full}
    params = [pytest.param(n, marks=[sets[n in often], *([marks[n]] if n in marks else [])]) for n in CASES]
    return pytest.mark.parametrize("name", params)


@pytest.mark.gpu
@compiled_for(
    "sequence-zero1-accumulate",
    marks={
        "sequence-zero1-accumulate": otherwise_in_jax_0_10(
            "all-reduces the norms' gradients over `tensor` for each microbatch"
        )
    },
)
def test_bytes_on_gpus(name: str) -> None:
    figures, rows = compiled(name, "gpu")
    assert differences(figures, name, rows) == {}
    forbid(name, figures, rows)


@pytest.mark.tpu
@compiled_for("fsdp-accumulate")
def test_bytes_on_tpus(name: str) -> None:
    figures, rows = compiled(name, "tpu")
    assert differences(figures, name, rows) == {}
    forbid(name, figures, rows)
