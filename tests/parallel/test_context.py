"""Context parallel attention on eight emulated devices: it trains as one device does, and shares the work."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from emulated import (
    GROUPED,
    SMALL,
    TENSOR,
    Rules,
    case_of,
    check_equal,
    mesh_of,
    plan,
    step_of,
)

from shardlab.errors import Infeasible
from shardlab.parallel.context import gathered_meetings, hop_meetings, in_step_order, positions_of
from shardlab.parallel.kernels import choose_kernel
from shardlab.parallel.shardings import shardings_of
from shardlab.parallel.tiles import Meetings, Pairs, triangle
from shardlab.spec.case import make_case
from shardlab.spec.context import zigzag_order
from shardlab.spec.models import ModelConfig
from shardlab.spec.plan import Plan

DATA: Rules = {"batch": ("data",)}
GPT2 = replace(
    SMALL, name="gpt2", norm="layernorm", activation="gelu", positions="learned", tied_embeddings=True
)
KINDS = ("all-gather", "ring", "ulysses", "ring+ulysses")
# axes, params, activations beside seq, method beside context
Grid = tuple[dict[str, int], Rules, Rules, dict[str, Any]]
ONE_AXIS: dict[str, Grid] = {
    "2-data4": ({"data": 4, "split": 2}, {}, DATA, {}),
    "4-data2": ({"data": 2, "split": 4}, {}, DATA, {}),
    "8": ({"split": 8}, {}, {}, {}),
    "4-tensor2": ({"split": 4, "tensor": 2}, TENSOR, {}, {}),
    "4-fsdp2": (
        {"fsdp": 2, "split": 4},
        {"embed": ("fsdp", "split")},
        {"batch": ("fsdp",)},
        {"remat": "none"},
    ),
    "2-data2-tensor2-sequence": (
        {"data": 2, "split": 2, "tensor": 2},
        TENSOR | {"embed": ("split",)},
        DATA | {"norm_seq": ("split", "tensor")},
        {"accumulate": 2},
    ),
    "1": ({"data": 8, "split": 1}, {}, DATA, {}),
}
TWO_AXES: dict[str, Grid] = {
    "2x4": ({"ring": 2, "ulysses": 4}, {}, {}, {}),
    "4x2": ({"ring": 4, "ulysses": 2}, {}, {}, {"remat": "none"}),
    "2x2-data2": ({"data": 2, "ring": 2, "ulysses": 2}, {"embed": ("data",)}, DATA, {}),
    "2x2-tensor2-sequence": (
        {"ring": 2, "ulysses": 2, "tensor": 2},
        TENSOR,
        {"norm_seq": ("ring", "ulysses", "tensor")},
        {},
    ),
}
MARKS = {
    ("ring", "2-data2-tensor2-sequence"): pytest.mark.matrix,
    ("ulysses", "4-tensor2"): (),
    ("ring+ulysses", "2x2-tensor2-sequence"): pytest.mark.matrix,
}
GRIDS = {
    kind: TWO_AXES if "+" in kind else ONE_AXIS for kind in ("all-gather", "ring", "ulysses", "ring+ulysses")
}


def asked(kind: str, grid: str) -> Plan:
    axes, params, activations, method = GRIDS[kind][grid]
    split = ("ring", "ulysses") if "+" in kind else ("split",)
    return plan(axes, params, {"seq": split, **activations}, context=kind, **method)


@pytest.mark.parametrize(
    ("kind", "grid"),
    [
        pytest.param(k, g, id=f"{k}-{g}", marks=MARKS.get((k, g), pytest.mark.full))
        for k, grids in GRIDS.items()
        for g in grids
    ],
)
def test_every_form_trains_as_one_device(kind: str, grid: str) -> None:
    """Two KV heads: Ulysses over 4 x tensor 2 repeats them."""
    check_equal(case_of(asked(kind, grid), GROUPED))


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["ring", pytest.param("all-gather", marks=pytest.mark.full)])
def test_learned_positions_follow_the_tokens(kind: str) -> None:
    check_equal(case_of(asked(kind, "4-data2"), GPT2))


def visible(ways: int, half: int) -> set[tuple[int, int]]:
    """Pairs of tiles that a causal mask shows, by position."""
    tiles = 2 * ways * half
    return {(q, k) for q in range(tiles) for k in range(q + 1)}


def met_by(meetings: Meetings, rank: int, source: int, ways: int, half: int) -> list[tuple[int, int]]:
    """Pairs of tiles by position. source: the device whose keys these are, 0 for all devices'."""
    order, share = zigzag_order(2 * ways * half, ways), 2 * half

    def positions(pairs: Pairs) -> list[tuple[int, int]]:
        queries, keys = (np.asarray(a).tolist() for a in pairs)
        return [
            (order[rank * share + q], order[source * share + k]) for q, k in zip(queries, keys, strict=True)
        ]

    assert meetings.edges == ()  # rings refuse windows
    diagonal, full = map(positions, meetings[:2])
    assert all(q == k for q, k in diagonal)
    assert all(q > k for q, k in full)
    return diagonal + full


WAYS_AND_HALF = pytest.mark.parametrize(("ways", "half"), [(2, 1), (2, 3), (3, 2), (4, 1), (7, 1)])


@WAYS_AND_HALF
def test_hops_of_a_ring_meet_every_visible_pair_once_and_share_the_work(ways: int, half: int) -> None:
    met: list[tuple[int, int]] = []
    for hop in range(ways):
        counts = set()
        for rank in range(ways):
            meetings = hop_meetings(half, np.bool_(rank >= hop)) if hop else triangle(2 * half)
            met += (found := met_by(meetings, rank, (rank - hop) % ways, ways, half))
            counts.add(len(found))
        assert len(counts) == 1
    assert Counter(met) == Counter(visible(ways, half))


@WAYS_AND_HALF
def test_gathered_keys_meet_every_visible_pair_once_and_share_the_work(ways: int, half: int) -> None:
    found = [met_by(gathered_meetings(half, ways, np.int32(r)), r, 0, ways, half) for r in range(ways)]
    assert Counter(pair for pairs in found for pair in pairs) == Counter(visible(ways, half))
    assert len({len(pairs) for pairs in found}) == 1


def test_zigzag_order_by_hand() -> None:
    assert zigzag_order(8, 2) == (0, 1, 6, 7, 2, 3, 4, 5)
    assert zigzag_order(6, 1) == tuple(range(6))
    four = asked("ring", "4-data2")
    positions = positions_of(four, shardings_of(four, mesh_of(four)))
    assert positions is not None
    assert positions(24).tolist() == list(zigzag_order(24, 4))
    assert in_step_order(np.arange(24)[None], four).tolist() == [list(zigzag_order(24, 4))]
    eight = asked("ulysses", "8")
    assert positions_of(eight, shardings_of(eight, mesh_of(eight))) is None


@pytest.mark.parametrize(
    ("kind", "axes", "model", "seq", "workload", "reason", "nearest"),
    [
        pytest.param(
            "ulysses", {"split": 3}, SMALL, 12, "train", "8 heads over 3 devices (split) by Ulysses",
            "divides: 2", id="heads",
        ),
        pytest.param(
            "ulysses", {"split": 8, "tensor": 2}, SMALL, 16, "train", "4 heads (of 8, tensor 2) over 8",
            "divides: 4", id="heads-and-tensor",
        ),
        pytest.param(
            "ring", {"split": 4}, SMALL, 20, "train", "20 tokens in 8 zig-zag chunks", "16 or 24", id="length"
        ),
        pytest.param(
            "all-gather", {"split": 4}, SMALL, 4, "train", "4 tokens in 8 zig-zag chunks", "divides: 8",
            id="short",
        ),
        pytest.param(
            "ring", {"split": 4}, SMALL, 20, "prefill", "20 tokens in 8 zig-zag chunks", "16 or 24",
            id="prefill",
        ),
        pytest.param(
            "ulysses", {"split": 4}, SMALL, 16, "decode", "new tokens are not split", 'cache = ["split"]',
            id="decode",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_answered_with_the_nearest(
    kind: str, axes: dict[str, int], model: ModelConfig, seq: int, workload: Any, reason: str, nearest: str
) -> None:
    params = TENSOR if "tensor" in axes else {}
    wanted = plan(axes, params, {"seq": ("split",)}, context=kind)
    devices = int(np.prod(list(axes.values())))
    with pytest.raises(Infeasible) as caught:
        make_case(wanted, model, f"cpu:{devices}", 16, seq, workload)
    assert reason in caught.value.reason
    assert nearest in caught.value.nearest


def test_ulysses_alone_keeps_the_fused_kernel() -> None:
    model = replace(SMALL, head_dim=64)
    assert choose_kernel(case_of(asked("ulysses", "8"), model, seq=128), "gpu") == ("cudnn", ())
    assert choose_kernel(case_of(asked("ulysses", "8"), model, seq=128), "cpu") == ("blockwise", ())
    kernel, notes = choose_kernel(case_of(asked("ring", "8"), model, seq=128), "gpu")
    assert kernel == "blockwise"
    assert "merges blocks" in notes[0]


def test_repeated_kv_heads_are_said() -> None:
    case = case_of(asked("ulysses", "4-tensor2"), GROUPED)
    assert case.notes()[-1] == "2 KV heads over 8 devices (Ulysses 4): the KV heads are repeated"
    assert not any("Ulysses" in note for note in case_of(asked("ulysses", "8"), SMALL).notes())


def temporary_bytes(kind: str, seq: int) -> int:
    case = case_of(asked(kind, "8"), replace(SMALL, layers=1, context=seq), seq=seq, batch=1)
    step = step_of(case)
    return int(step.function.lower(*step.arguments).compile().memory_analysis().temp_size_in_bytes)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["ring", *(pytest.param(k, marks=pytest.mark.full) for k in KINDS[::2])])
def test_long_sequences_take_linear_memory(kind: str) -> None:
    """65,536 tokens over 8 devices: a device's own scores of one head alone would be 8,192² · 4 = 268 MB."""
    at_32k, at_64k = (temporary_bytes(kind, seq) for seq in (32_768, 65_536))
    assert at_64k < 2.1 * at_32k
    assert at_64k < 268_000_000
