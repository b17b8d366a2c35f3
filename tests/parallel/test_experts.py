"""Experts on eight devices: each plan trains as one device does, and moves what the literature says."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from fractions import Fraction
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_plans import scheduled_case
from emulated import (
    BATCH,
    FSDP,
    SEQ,
    SMALL,
    TENSOR,
    Rules,
    case_of,
    inference,
    mesh_of,
    plan,
    step_of,
    steps_alone,
    trained,
)

from shardlab.analysis import CollectiveRow, analyze
from shardlab.errors import Infeasible
from shardlab.model.experts import (
    balance_loss,
    grouped_experts,
    with_capacity,
)
from shardlab.model.loss import cross_entropy
from shardlab.model.runtime import Runtime
from shardlab.model.transformer import abstract_model, with_params
from shardlab.parallel.step import Batch, build_step
from shardlab.spec.case import make_case
from shardlab.spec.models import ModelConfig
from shardlab.spec.plan import Plan

MIXTURE = replace(
    SMALL,
    name="mixture",
    kv_heads=4,
    num_experts=8,
    experts_per_token=2,
    balance_coefficient=0.02,
)
LAYERS, EMBED, MLP = MIXTURE.layers, MIXTURE.embed, MIXTURE.mlp
EXPERTS, CHOSEN = MIXTURE.num_experts, MIXTURE.experts_per_token
TIGHT = "capacity 0.75"  # of an even load: tokens are dropped
EXPERT: Rules = {"expert": ("expert",)}


def on(axes: dict[str, int], params: Rules, activations: Rules, **method: Any) -> Plan:
    """As in a mesh file, experts of activations follow the parameters."""
    follow = {"expert": params["expert"]} if "expert" in params else {}
    return plan(axes, params, {**follow, **activations}, None, **method)


ALONE = plan({"data": 1}, {}, {"batch": ("data",)})
GRIDS: dict[str, tuple[dict[str, int], Rules, Rules]] = {
    "expert": ({"expert": 8}, EXPERT, {"batch": ("expert",)}),
    "data-expert": ({"data": 2, "expert": 4}, EXPERT, {"batch": ("data", "expert")}),
    "expert-tensor": ({"expert": 4, "tensor": 2}, EXPERT | TENSOR, {"batch": ("expert",)}),
    "two-axes": (
        {"data": 2, "major": 2, "minor": 2},
        {"expert": ("major", "minor")},
        {"batch": ("data", "major", "minor")},
    ),
    "fsdp-expert-tensor-sequence": (
        {"fsdp": 2, "expert": 2, "tensor": 2},
        EXPERT | FSDP | TENSOR,
        {"batch": ("fsdp", "expert"), "norm_seq": ("tensor",)},
    ),
    "experts-over-tensor": (
        {"data": 2, "tensor": 4},
        {"heads": ("tensor",), "kv_heads": ("tensor",), "vocab": ("tensor",), "expert": ("tensor",)},
        {"batch": ("data",), "norm_seq": ("tensor",)},
    ),
    "fsdp": ({"fsdp": 8}, FSDP, {"batch": ("fsdp",)}),
    "experts-gathered": ({"expert": 8}, EXPERT, {"batch": ("expert",), "expert": ()}),
}


def every_grid(always: str) -> pytest.MarkDecorator:
    """The grids; only one of them in the default set."""
    params = [pytest.param(n, marks=[] if n == always else pytest.mark.full) for n in GRIDS]
    return pytest.mark.parametrize("name", params)


def of_grid(name: str, **method: Any) -> Plan:
    return on(*GRIDS[name], **method)


@cache
def alone(model: ModelConfig) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    return trained(case_of(ALONE, model))


def check_equal(gradients: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert gradients.keys() == expected.keys()
    for path, gradient in gradients.items():
        worst = np.abs(gradient - expected[path]).max()
        assert worst <= 1e-5 * np.abs(expected[path]).max(), path


@pytest.mark.matrix
@every_grid("fsdp-expert-tensor-sequence")
def test_dropless_trains_as_one_device(name: str) -> None:
    points, gradients = trained(case_of(of_grid(name), MIXTURE))
    expected_points, expected = alone(MIXTURE)
    np.testing.assert_allclose(points, expected_points, rtol=1e-5)
    check_equal(gradients, expected)


def groups_of(plan: Plan) -> tuple[int, int]:
    """Into how many groups the devices cut the batch and the sequence; tensor parallelism gathers its own."""
    split = [plan.activations.get(axis, ()) for axis in ("batch", "norm_seq")]
    tensor = plan.params.get("mlp", ())
    ways = [np.prod([plan.axes[a] for a in axes if a not in tensor], dtype=int) for axes in split]
    return int(ways[0]), int(ways[1])


@pytest.mark.matrix
@every_grid("data-expert")
def test_capacity_trains_as_one_device_with_the_same_groups(name: str) -> None:
    asked = of_grid(name, experts=TIGHT)
    points, gradients = trained(case_of(asked, MIXTURE))
    expected_points, expected = grouped_alone(groups_of(asked))
    np.testing.assert_allclose(points, expected_points, rtol=1e-5)
    check_equal(gradients, expected)


@cache
def grouped_alone(groups: tuple[int, int]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What `trained` gives, on one device that takes the groups in turn, each with its own capacity."""
    run = Runtime(compute_dtype=jnp.float32, experts=grouped_experts(with_capacity(Fraction(3, 4)), groups))
    return steps_of(partial(loss_of, run=run))


@pytest.mark.full
def test_accumulated_trains_as_one_device_microbatch_by_microbatch() -> None:
    """Data parallel groups reduce once per step; the load of a microbatch is that of all its devices."""

    def loss(params: dict[str, jax.Array], batch: Batch) -> jax.Array:
        run = Runtime(compute_dtype=jnp.float32)
        micro = [jax.tree.map(lambda a, i=i: a[i::2], batch) for i in range(2)]
        return sum(loss_of(params, each, run=run) for each in micro) / 2

    points, gradients = trained(case_of(of_grid("data-expert", accumulate=2), MIXTURE))
    expected_points, expected = steps_of(loss)
    np.testing.assert_allclose(points, expected_points, rtol=1e-5)
    check_equal(gradients, expected)


def steps_of(loss: Callable[..., jax.Array]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What `trained` gives, of a loss on one device."""
    return steps_alone(case_of(ALONE, MIXTURE), jax.jit(jax.value_and_grad(loss)))


def loss_of(params: dict[str, jax.Array], batch: Batch, *, run: Runtime) -> jax.Array:
    logits, load = with_params(abstract_model(MIXTURE), params).logits_and_load(batch.tokens, run)
    assert load is not None
    return cross_entropy(logits, batch.targets) + MIXTURE.balance_coefficient * balance_loss(load)


def compiled(asked: Plan, **changes: Any) -> list[CollectiveRow]:
    """The collectives of a step in f32 on emulated devices."""
    step = step_of(case_of(asked, MIXTURE, **changes))
    text = step.function.lower(*step.arguments).compile().as_text()
    return list(analyze(text, axes=asked.axes).collectives)


def sent(rows: Iterable[CollectiveRow], kind: str, axis: str, dtypes: tuple[str, ...]) -> Fraction:
    """Bytes per device per step that a kind of collective moves over one axis inside the experts."""
    total = Fraction(0)
    for row in rows:
        if row.kind == kind and row.axes == (axis,) and row.dtypes == dtypes and "moe/experts" in row.layer:
            low, high = row.executions
            assert low == high
            total += row.wire_bytes * low
    return total


def exchanged(ways: int, slots: int, element_bytes: int, *, remat: str = "full") -> Fraction:
    """Bytes that one device sends in a training step: in every layer, rows to the experts and answers back,
    forward, backward, and where the backward pass computes again. slots: rows of one exchange.

    GShard (arXiv:2006.16668), section 3.1: two all-to-alls per layer and pass, each (n-1)/n of its rows.
    """
    exchanges = 2 * (3 if remat == "full" else 2)
    return LAYERS * exchanges * Fraction(ways - 1, ways) * slots * EMBED * element_bytes


@pytest.mark.parametrize("remat", [pytest.param("none", marks=pytest.mark.full), "full"])
def test_capacity_moves_its_slots(remat: str) -> None:
    """16 sequences of 16 over 8 devices: 32 tokens each, 2 · 1.25 · 32 / 8 = 10 slots per expert."""
    rows = compiled(of_grid("data-expert", experts="capacity 1.25", remat=remat))
    assert sent(rows, "all-to-all", "expert", ("f32",)) == exchanged(4, EXPERTS * 10, 4, remat=remat)
    check_absent(rows, "expert")


def test_dropless_rows_are_padded_to_the_worst_case_on_cpu() -> None:
    """A device may send all its 32 tokens, each for both experts of another: 4 slots of 64 rows."""
    rows = compiled(of_grid("data-expert"))
    assert sent(rows, "all-to-all", "expert", ("f32",)) == exchanged(4, 4 * 64, 4)
    counts = sent(rows, "all-to-all", "expert", ("s32",))  # how many rows arrive for which expert
    assert counts in [n * LAYERS * Fraction(3, 4) * EXPERTS * 4 for n in (1, 2)]
    check_absent(rows, "expert")


def check_absent(rows: Iterable[CollectiveRow], axis: str) -> None:
    """Over the experts' axis neither kernels nor tokens are gathered; gradients of experts are not summed."""
    for row in rows:
        if axis in (row.axes or ("unknown",)):
            assert row.kind in ("all-to-all", "ragged-all-to-all", "all-reduce"), row
            assert row.kind != "all-reduce" or "moe/experts" not in row.layer, row


@pytest.mark.matrix
def test_what_fsdp_and_tensor_parallelism_move_beside() -> None:
    """fsdp 2, expert 2, tensor 2, sequence parallel: kernels of 4 experts, half of their mlp on a device.

    FSDP (arXiv:1910.02054): kernels are gathered forward and again backward, gradients reduce-scattered once.
    Sequence parallelism (arXiv:2205.04198): tokens are gathered twice and scattered once, and the transposes;
    so with them are the choices of each token and the gradients of their weights.
    """
    rows = compiled(of_grid("fsdp-expert-tensor-sequence"))
    kernels = 3 * (EXPERTS // 2) * EMBED * (MLP // 2) * 4
    half = Fraction(1, 2)
    assert sent(rows, "all-gather", "fsdp", ("f32",)) == LAYERS * 2 * half * kernels
    assert sent(rows, "reduce-scatter", "fsdp", ("f32",)) == LAYERS * half * kernels
    tokens = BATCH * SEQ // 4
    stream, weights = tokens * EMBED * 4, tokens * CHOSEN * 4
    gathers = sent(rows, "all-gather", "tensor", ("f32",))
    scatters = sent(rows, "reduce-scatter", "tensor", ("f32",))
    assert gathers == LAYERS * half * (3 * stream + 2 * weights)
    assert scatters == LAYERS * half * (2 * stream + weights)
    check_absent(rows, "expert")


@pytest.mark.matrix
def test_gradients_scatter_before_they_are_summed_over_other_groups() -> None:
    """data 2, fsdp 2, expert 2: over data goes a half of each kernel's gradient, not all of it.

    HSDP (arXiv:2304.11277, section 3.2.2): reduce-scatter inside, then all-reduce of the shards across.
    """
    asked = on({"data": 2, "fsdp": 2, "expert": 2}, EXPERT | FSDP, {"batch": ("data", "fsdp", "expert")})
    rows = compiled(asked)
    kernels = 3 * (EXPERTS // 2) * EMBED * MLP * 4
    half = Fraction(1, 2)
    assert sent(rows, "reduce-scatter", "fsdp", ("f32",)) == LAYERS * half * kernels
    summed = sum(
        row.wire_bytes * row.executions[0]
        for row in rows
        if row.kind == "all-reduce" and row.axes == ("data",)
    )
    assert summed == LAYERS * 2 * half * kernels / 2
    check_absent(rows, "expert")


WIDE = replace(MIXTURE, name="wide", embed=128, head_dim=16, mlp=256, vocab=512)


@pytest.mark.parametrize(
    "machine",
    [
        pytest.param("h100:1x8", marks=[pytest.mark.gpu, pytest.mark.full]),
        pytest.param("v5e:2x4", marks=[pytest.mark.tpu, pytest.mark.matrix]),
    ],
)
def test_capacity_ahead_of_time(machine: str) -> None:
    """8 sequences of 256 over 8 devices: 256 tokens each, 2 · 1.25 · 256 / 8 = 80 slots per expert, bf16."""
    rows = ahead_of_time(of_grid("data-expert", experts="capacity 1.25"), machine)
    moved = sent(rows, "all-to-all", "expert", ("bf16",))
    assert moved == exchanged(4, EXPERTS * 80, 2) * WIDE.embed / EMBED
    check_absent(rows, "expert")


@pytest.mark.parametrize(
    "machine",
    [
        pytest.param("h100:1x8", marks=[pytest.mark.gpu, pytest.mark.full]),
        pytest.param("v5e:2x4", marks=[pytest.mark.tpu, pytest.mark.full]),
    ],
)
def test_dropless_is_ragged_ahead_of_time(machine: str) -> None:
    """Only the rows that there are travel, and no row is padded: what they are is known at run time alone."""
    rows = ahead_of_time(of_grid("data-expert"), machine)
    ragged = [row for row in rows if row.kind == "ragged-all-to-all"]
    assert ragged and all(row.axes == ("expert",) and row.bound == "upper" for row in ragged)
    assert not sent(rows, "all-to-all", "expert", ("bf16",))
    check_absent(rows, "expert")


@cache
def _rows(experts: str, machine: str) -> list[CollectiveRow]:
    asked = of_grid("data-expert", experts=experts)
    program = scheduled_case(make_case(asked, WIDE, machine, batch=8, seq=256))
    return list(analyze(program).collectives)


def ahead_of_time(asked: Plan, machine: str) -> list[CollectiveRow]:
    return _rows(asked.method.experts, machine)


@pytest.mark.parametrize(
    ("axes", "params", "activations", "model", "changes", "reason", "nearest"),
    [
        pytest.param(
            {"expert": 3},
            EXPERT,
            {"batch": ("expert",)},
            MIXTURE,
            {"batch": 6},
            "8 experts over 3 devices",
            "nearest size that divides: 2",
            id="not-divisible",
        ),
        pytest.param(
            {"expert": 8},
            EXPERT,
            {"seq": ("expert",), "norm_seq": ("expert",), "cache": ("expert",)},
            MIXTURE,
            {"workload": "decode", "batch": 8, "seq": 16},
            "splits no tokens of a decode step",
            "add 'expert' to batch",
            id="decode",
        ),
    ],
)
def test_what_cannot_be(
    axes: dict[str, int],
    params: Rules,
    activations: Rules,
    model: ModelConfig,
    changes: dict[str, Any],
    reason: str,
    nearest: str,
) -> None:
    asked = on(axes, params, activations)
    with pytest.raises(Infeasible, match=reason) as caught:
        make_case(asked, model, f"cpu:{asked.num_devices}", **changes)
    assert nearest in (caught.value.nearest or "")


def test_a_dense_model_has_no_capacity() -> None:
    asked = on({"data": 8}, {}, {"batch": ("data",)}, experts="capacity 1.25")
    with pytest.raises(Infeasible, match="a model without experts"):
        build_step(case_of(asked, SMALL), mesh_of(asked), target="cpu")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"balance": "sequence"}, "balance by sequence or by biases in a pipeline"),
        ({"dense_layers": 1, "dense_mlp": 64}, "1 leading dense layers in a pipeline"),
    ],
    ids=["balance", "dense-layers"],
)
def test_what_a_pipeline_of_experts_cannot_have(changes: dict[str, Any], reason: str) -> None:
    asked = on({"stage": 2}, {"stage": ("stage",)}, {}, pipeline="1f1b", microbatches=2)
    with pytest.raises(Infeasible, match=reason):
        build_step(case_of(asked, replace(MIXTURE, **changes)), mesh_of(asked), target="cpu")


@pytest.mark.parametrize("grid", ["data-expert", pytest.param("two-axes", marks=pytest.mark.full)])
def test_inference_equals_one_device(grid: str) -> None:
    np.testing.assert_allclose(
        inference(of_grid(grid), MIXTURE)[0], inference(ALONE, MIXTURE)[0], rtol=1e-4, atol=1e-5
    )


def test_the_padding_is_noted() -> None:
    asked = of_grid("data-expert")
    assert any("no ragged all-to-all" in note for note in step_of(case_of(asked, MIXTURE)).notes)
    asked = of_grid("data-expert", experts=TIGHT)
    assert not any("ragged" in note for note in step_of(case_of(asked, MIXTURE)).notes)
