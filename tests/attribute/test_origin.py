"""Phases, layers and source lines from names that JAX 0.12 wrote (llama-like model, scan, remat, AdamW)."""

from __future__ import annotations

import pytest

from shardlab.attribute.origin import layer_of, origin_of, phase_of
from shardlab.hlo.reader import parse

STEP = "jit(train_step)"


@pytest.mark.parametrize(
    ("op_name", "phase", "recompute", "layer"),
    [
        (f"{STEP}/jvp(embedding)/shard_map/psum_invariant", "forward", False, "embedding"),
        (
            f"{STEP}/jvp(layers)/while/body/eval_jaxpr/mlp/down/sharding_constraint",
            "forward",
            False,
            "layers/mlp/down",
        ),
        (f"{STEP}/transpose(jvp(head))/dot_general", "backward", False, "head"),
        (
            f"{STEP}/transpose(jvp(layers))/while/body/eval_jaxpr/checkpoint/mlp/up/dot_general",
            "backward",
            False,
            "layers/mlp/up",
        ),
        (
            f"{STEP}/transpose(jvp(layers))/while/body/eval_jaxpr/checkpoint/rematted_computation/mlp/gate/dot_general",
            "backward",
            True,
            "layers/mlp/gate",
        ),
        (f"{STEP}/optimizer/reduce_sum", "optimizer", False, "optimizer"),
        (
            f"{STEP}/jvp(layers)/mlp/mul;{STEP}/transpose(jvp(layers))/mlp/add",
            "backward",
            False,
            "layers/mlp",
        ),
        (f"{STEP}/reduce_sum", "other", False, ""),
        ("x", "other", False, ""),
        ("", "other", False, ""),
        ("jit(step)/jvp()/while/body/jit(dynamic_index_in_dim)/squeeze", "forward", False, ""),
        ("jit(step)/vmap(jvp(layers))/cond/branch_1_fun/attention/add", "forward", False, "layers/attention"),
        # combined: the latest phase, the scopes that all share
        (
            f"{STEP}/transpose(jvp(layers))/while/body/eval_jaxpr/checkpoint/mlp/(up/dot_general:gate/dot_general)",
            "backward",
            False,
            "layers/mlp",
        ),
        (
            f"{STEP}/(transpose(jvp(embedding))/shard_map/psum_invariant:jvp(loss)/reduce_sum)",
            "backward",
            False,
            "",
        ),
        (f"{STEP}/layers/(optimizer/add:transpose(jvp(norm))/mul)", "optimizer", False, "layers"),
    ],
)
def test_names_of_a_training_step(op_name: str, phase: str, recompute: bool, layer: str) -> None:
    assert phase_of(op_name, training=True) == (phase, recompute)
    assert layer_of(op_name) == layer


def test_without_differentiation_everything_in_a_scope_is_forward() -> None:
    assert phase_of("jit(prefill)/layers/while/body/attention/dot_general", training=False) == (
        "forward",
        False,
    )
    assert phase_of("x", training=False) == ("other", False)


@pytest.mark.parametrize("name", ["(" * 20_000, "a(" * 20_000 + ")" * 20_000, "/(a:b)" * 200, ":" * 5_000])
def test_names_that_nobody_wrote_do_not_hang(name: str) -> None:
    phase, _ = phase_of(name, training=True)
    assert phase in ("other", "forward", "backward", "optimizer")
    assert isinstance(layer_of(name), str)


TABLES = """HloModule m, num_partitions=2

FileNames
1 "/home/me/train.py"

FunctionNames
1 "step"

FileLocations
1 {file_name_id=1 function_name_id=1 line=24 end_line=24 column=2 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}

ENTRY %main {
  %x = f32[] parameter(0)
  ROOT %y = f32[] negate(%x), metadata={METADATA}
}
"""


@pytest.mark.parametrize(
    ("metadata", "source"),
    [
        ('op_name="jit(f)/neg" stack_frame_id=1', "train.py:24"),
        ('op_name="jit(f)/neg" source_file="/a/b/model.py" source_line=7', "model.py:7"),
        ('op_name="jit(f)/neg" source_file="C:\\\\\\\\w\\\\\\\\model.py" source_line=7', "model.py:7"),
        ('op_name="jit(f)/neg"', ""),
    ],
    ids=["tables", "in-line", "windows", "none"],
)
def test_source_lines(metadata: str, source: str) -> None:
    (module,) = parse(TABLES.replace("METADATA", metadata.replace("\\\\\\\\", "\\\\")))
    instruction = module.computations["main"].instructions["y"]
    origin = origin_of(module, (instruction,), False, lambda: "")
    assert (origin.source, origin.op_name, origin.phase) == (source, "jit(f)/neg", "forward")


def test_a_neighbour_gives_phase_and_layer_but_not_its_name() -> None:
    (module,) = parse(TABLES.replace("METADATA", 'op_name="x"'))
    instruction = module.computations["main"].instructions["y"]
    origin = origin_of(module, (instruction,), True, lambda: "jit(f)/transpose(jvp(layers))/mlp/dot_general")
    assert (origin.phase, origin.layer, origin.op_name) == ("backward", "layers/mlp", "x")
