"""Which attention kernel a case gets, and how often KV heads are repeated for it."""

from dataclasses import replace

import pytest
from emulated import GROUPED, PLANS, SMALL, TENSOR, case_of, plan

from shardlab.parallel.kernels import choose_kernel, kv_repeats

SUITED = replace(SMALL, head_dim=64)


@pytest.mark.parametrize(
    ("target", "seq", "head_dim", "kernel", "note"),
    [
        pytest.param("cpu", 128, 64, "reference", "", id="cpu"),
        pytest.param("gpu", 128, 64, "cudnn", "", id="gpu"),
        pytest.param("gpu", 100, 64, "cudnn", "", id="gpu-any-length"),
        pytest.param("gpu", 128, 12, "reference", "multiples of 8", id="gpu-odd-head"),
        pytest.param("gpu", 128, 264, "reference", "up to 256", id="gpu-huge-head"),
        pytest.param("tpu", 128, 64, "splash", "", id="tpu"),
        pytest.param("tpu", 100, 64, "reference", "tiles of 128", id="tpu-odd-length"),
    ],
)
def test_kernel_of_a_target(target: str, seq: int, head_dim: int, kernel: str, note: str) -> None:
    case = case_of(PLANS["data"], replace(SUITED, head_dim=head_dim), seq=seq)
    chosen, notes = choose_kernel(case, target)
    assert chosen == kernel
    assert (note in notes[0]) if note else notes == ()


@pytest.mark.parametrize(
    ("machine", "kernel"), [("h100:1x8", "cudnn"), ("b200:1x8", "cudnn"), ("a100:1x8", "reference")]
)
def test_large_heads_need_a_hopper(machine: str, kernel: str) -> None:
    """Gemma's are 256 wide."""
    case = case_of(PLANS["data"], replace(SUITED, head_dim=256), seq=128, machine=machine)
    chosen, notes = choose_kernel(case, "gpu")
    assert chosen == kernel
    assert ("on Hopper" in notes[0]) if kernel == "reference" else notes == ()


@pytest.mark.parametrize("target", ["cpu", "gpu", "tpu"])
def test_unfused_attention_runs_anywhere(target: str) -> None:
    asked = plan({"data": 2, "seq": 4}, {}, {"batch": ("data",), "seq": ("seq",)}, attention="unfused")
    assert choose_kernel(case_of(asked, SUITED, seq=100), target) == ("unfused", ())


def test_a_split_sequence_needs_the_reference() -> None:
    split = plan({"data": 2, "seq": 4}, {}, {"batch": ("data",), "seq": ("seq",)})
    chosen, notes = choose_kernel(case_of(split, SUITED, seq=128), "gpu")
    assert chosen == "reference"
    assert "whole sequences" in notes[0]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ways", "repeats"),
    [(8, 8, 8, 1), (8, 2, 2, 1), (8, 2, 4, 2), (8, 2, 8, 4), (12, 4, 6, 3), (12, 3, 1, 1)],
)
def test_kv_heads_are_repeated_until_the_devices_divide_them(
    heads: int, kv_heads: int, ways: int, repeats: int
) -> None:
    model = replace(GROUPED, heads=heads, kv_heads=kv_heads)
    found = kv_repeats(case_of(plan({"tensor": ways}, TENSOR, {}), model))
    assert found == repeats
    assert kv_heads * found % ways == 0
