"""What is alive at the peak: by hand on small programs, and against what the compilers reserve."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import pytest

from shardlab.attribute.calls import call_graph
from shardlab.cost.liveness import OWNERS, Peak, temporaries_at_peak
from shardlab.hlo.reader import parse

HEAD = "HloModule m, is_scheduled=true\n\n"
ARRAY = "f32[256]{0}"  # 1,024 bytes
FORWARD, BACKWARD = (
    'metadata={op_name="jit(s)/jvp(f)/mul"}',
    'metadata={op_name="jit(s)/transpose(jvp(f))/mul"}',
)
OPTIMIZER = 'metadata={op_name="jit(s)/optimizer/add"}'


def peak_of(text: str, backend: str = "gpu") -> Peak | None:
    (module,) = parse(text)
    return temporaries_at_peak(module, call_graph(module), backend)


def entry(*lines: str) -> str:
    return HEAD + "ENTRY e {\n  p = f32[256]{0} parameter(0)\n  " + "\n  ".join(lines) + "\n}\n"


def test_a_value_lives_to_its_last_use_and_the_result_is_no_temporary() -> None:
    # a and b live at b; c takes the memory of a, which dies there; the result d is not a temporary.
    text = entry(
        f"a = {ARRAY} negate(p)",
        f"b = {ARRAY} negate(p)",
        f"c = {ARRAY} add(a, b)",
        f"ROOT d = {ARRAY} add(c, b)",
    )
    assert peak_of(text) == Peak(dict.fromkeys(OWNERS, 0) | {"temporaries": 2048}, "b")


def test_another_size_takes_no_memory_over() -> None:
    text = entry("a = f32[512]{0} pad(p)", f"b = {ARRAY} slice(a)", f"ROOT c = {ARRAY} negate(b)")
    peak = peak_of(text)
    assert peak is not None
    assert peak.total_bytes == 2048 + 1024


def test_owners_follow_from_phases() -> None:
    # kept (forward to backward), gradient (backward to optimizer) and scratch are all alive at `scratch`.
    text = entry(
        f"kept = {ARRAY} negate(p), {FORWARD}",
        f"gradient = {ARRAY} negate(kept), {BACKWARD}",
        f"scratch = {ARRAY} negate(p), {BACKWARD}",
        f"used = {ARRAY} add(scratch, kept), {BACKWARD}",
        f"ROOT r = {ARRAY} add(gradient, used), {OPTIMIZER}",
    )
    peak = peak_of(text)
    assert peak is not None
    assert peak.instruction == "scratch"
    assert peak.by_owner == {"activations": 1024, "gradients": 1024, "collectives": 0, "temporaries": 1024}


def test_what_a_collective_receives_has_its_owner_and_its_operand_is_not_copied() -> None:
    text = entry(
        "s = (f32[256]{0}, f32[2048]{0}) all-gather-start(p), replica_groups=[1,8]<=[8], dimensions={0}",
        "d = f32[2048]{0} all-gather-done(s)",
        f"ROOT r = {ARRAY} slice(d), slice={{[0:256]}}",
    )
    peak = peak_of(text)
    assert peak is not None
    assert peak.by_owner == dict.fromkeys(OWNERS, 0) | {"collectives": 8192}


def test_host_memory_and_vmem_are_not_hbm() -> None:
    text = entry(
        "h = f32[256]{0:S(5)} copy(p)", "v = f32[256]{0:S(1)} negate(p)", f"ROOT r = {ARRAY} negate(v)"
    )
    tpu, gpu = peak_of(text, "tpu"), peak_of(text, "gpu")
    assert tpu is not None and gpu is not None
    assert (tpu.total_bytes, gpu.total_bytes) == (0, 1024)  # S(1) of a GPU lies in HBM


def test_unscheduled_text_has_no_peak() -> None:
    assert peak_of("HloModule m\n\nENTRY e {\n  ROOT p = f32[2]{0} parameter(0)\n}\n") is None


BRANCHES = (
    HEAD
    + """\
quiet {
  ROOT same = f32[256]{0} parameter(0)
}

busy {
  sum = f32[256]{0} parameter(0)
  scratch = f32[512]{0} pad(sum)
  part = f32[256]{0} slice(scratch)
  ROOT more = f32[256]{0} add(sum, part)
}

ENTRY e {
  p = f32[256]{0} parameter(0)
  which = s32[] constant(0)
  sum.0 = f32[256]{0} negate(p)
  sum.1 = f32[256]{0} conditional(which, sum.0, sum.0), branch_computations={quiet, busy}
  ROOT r = f32[256]{0} negate(sum.1)
}
"""
)


def test_a_branch_hands_back_its_operands_memory_and_its_result_is_counted_once() -> None:
    # sum.0 (1,024 bytes) becomes `more`, and so sum.1; while `part` is made, `scratch` (2,048) lives as well.
    peak = peak_of(BRANCHES)
    assert peak is not None
    assert (peak.total_bytes, peak.instruction) == (1024 + 2048 + 1024, "part")


WIDTH, BATCH, LAYERS = 256, 64, 12


@cache
def loop_of_layers() -> jax.stages.Compiled:
    """The gradient of a scan that keeps what each layer was given: [LAYERS, BATCH, WIDTH] in f32."""

    def loss(weights_NxWxW: jax.Array, x_BxW: jax.Array) -> jax.Array:
        def layer(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
            return jnp.sin(x @ weight), None

        out, _ = jax.lax.scan(jax.checkpoint(layer), x_BxW, weights_NxWxW)
        return jnp.sum(out**2)

    shapes = ((LAYERS, WIDTH, WIDTH), (BATCH, WIDTH))
    weights, x = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)

    def step(w: jax.Array, x: jax.Array) -> jax.Array:
        gradient = jax.grad(loss)(w, x)
        with jax.named_scope("optimizer"):
            return w - gradient / (1 + jnp.sqrt(jnp.sum(gradient**2)))

    return jax.jit(step, donate_argnums=0).lower(weights, x).compile()


def test_a_scan_keeps_its_activations_and_gradients() -> None:
    peak = peak_of(loop_of_layers().as_text(), "cpu")
    assert peak is not None
    kept, gradients = 4 * LAYERS * BATCH * WIDTH, 4 * LAYERS * WIDTH * WIDTH
    assert kept <= peak.by_owner["activations"] <= kept + 4 * BATCH * WIDTH  # and the last layer's result
    assert peak.by_owner["gradients"] == gradients


def test_the_peak_is_what_the_compiler_reserves() -> None:
    compiled = loop_of_layers()
    peak, stats = peak_of(compiled.as_text(), "cpu"), compiled.memory_analysis()
    assert peak is not None
    assert peak.total_bytes == pytest.approx(stats.temp_size_in_bytes, rel=0.05)
