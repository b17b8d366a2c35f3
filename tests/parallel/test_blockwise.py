"""`attention = "blockwise"` on every target: memory linear in the sequence, the reference's is quadratic.

That it equals the reference, forward and backward, is in `test_tiles.py`; that it trains so, in
`test_equal.py`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from compiled_plans import compiled_case
from emulated import asked, case_of, plan

from shardlab.errors import Infeasible
from shardlab.model.attention import reference_attention
from shardlab.parallel.kernels import choose_kernel
from shardlab.parallel.tiles import blockwise_attention
from shardlab.spec.case import make_case
from shardlab.spec.models import find_model

Attention = Callable[..., jax.Array]


@pytest.mark.parametrize("target", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("seq", [128, 100])
def test_every_target_has_it(target: str, seq: int) -> None:
    """Of any length and head size, which the fused kernels have not."""
    assert choose_kernel(case_of(asked({"data": 8}, attention="blockwise"), seq=seq), target) == (
        "blockwise",
        (),
    )


def test_it_needs_whole_sequences_or_context_parallelism() -> None:
    split: dict[str, Any] = {"batch": ("data",), "seq": ("seq",)}
    alone = plan({"data": 2, "seq": 4}, {}, split, attention="blockwise")
    with pytest.raises(Infeasible, match="whole sequences") as caught:
        choose_kernel(case_of(alone), "cpu")
    assert "attention = 'auto'" in (caught.value.nearest or "")
    together = plan({"data": 2, "seq": 4}, {}, split, context="ring", attention="blockwise")
    assert choose_kernel(case_of(together), "gpu") == ("blockwise", ())


def temporary_bytes(attention: Attention, length: int) -> int:
    """Of attention and its gradients, one sequence, two heads of 8."""
    one = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
    gradients = jax.grad(lambda *qkv: attention(*qkv).sum(), argnums=(0, 1, 2))
    memory = jax.jit(gradients).lower(one, one, one).compile().memory_analysis()
    return int(memory.temp_size_in_bytes)


def test_memory_is_linear_in_the_sequence() -> None:
    """The reference writes L · L scores of each head down: 2 · 4096² · 4 = 134 MB."""
    at_2k, at_4k = (temporary_bytes(blockwise_attention, length) for length in (2_048, 4_096))
    assert at_4k <= 2.1 * at_2k
    assert at_4k < 2 * 4_096**2 * 4 / 8
    assert temporary_bytes(reference_attention, 4_096) >= 2 * 4_096**2 * 4


@pytest.mark.parametrize(
    "on",
    [
        pytest.param("h100:1x8", marks=[pytest.mark.gpu, pytest.mark.full]),
        pytest.param("v5e:2x4", marks=[pytest.mark.tpu, pytest.mark.full]),
    ],
)
def test_memory_is_linear_ahead_of_time(on: str) -> None:
    """A device's 8 heads of one sequence of 8,192 would have 8 · 8192² · 4 = 2.1 GB of scores in a layer."""
    temp = [temporary_bytes_on(on, seq) for seq in (4_096, 8_192)]
    assert temp[1] <= 2.1 * temp[0]
    assert temp[1] < 8 * 8_192**2 * 4 / 8


def temporary_bytes_on(on: str, seq: int) -> int:
    memory = compiled_case(
        make_case(asked({"data": 8}, attention="blockwise"), find_model("tiny"), on, 8, seq)
    )[0].memory
    assert memory is not None and memory.temp_bytes is not None
    return memory.temp_bytes
