"""The second counter must itself be right: small modules written by hand, and real ones with known totals.

Expected bytes are hand arithmetic. F32_1K is 4096 bytes; the mesh is data 2 x model 4, id = 4 * data + model.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path

import pytest
from second_counter import count
from second_counter.hand_built import (
    BF16,
    CHANNEL,
    F32,
    GLOBAL_IDS,
    PRED,
    S4,
    TOKEN,
    Builder,
    array,
    field,
    packed,
    pairs,
    v1,
    v2,
    v3,
)
from second_counter_cases import DCN_MESH, MESH, MODEL, MODEL_PARTITIONS, count_of, exactly, with_op

GOLDEN = Path(__file__).parent / "golden" / "second_counter"


# --- groups

GROUPS = {
    "v1": (v1((0, 1, 2, 3), (4, 5, 6, 7)), "model", 6144),
    "v1_legacy_field": (v1((0, 4), (1, 5), (2, 6), (3, 7), number=49), "data", 4096),
    "v1_shuffled": (v1((2, 0, 3, 1), (7, 5, 4, 6)), "model", 6144),
    "v1_of_one": (v1(*((i,) for i in range(8))), None, 0),
    "v1_uneven": (v1((0, 1, 2), (3, 4, 5, 6, 7)), "unknown", Fraction(2 * 4, 5) * 4096),
    "v1_half_of_an_axis": (v1((0, 2), (1, 3), (4, 6), (5, 7)), "model:(1)2", 4096),
    "v2_plain": (v2(2, 4, [8]), "model", 6144),
    "v2_transposed": (v2(4, 2, [2, 4], [1, 0]), "data", 4096),
    "v2_nested": (v2(4, 2, [2, 4], [1, 0], nested=True), "data", 4096),
    "v2_pairs": (v2(4, 2, [8]), "model:(2)2", 4096),
    "v2_strided_pairs": (v2(4, 2, [2, 2, 2], [0, 2, 1]), "model:(1)2", 4096),
    "v3": (v3(MESH, [1]), "model", 6144),
    "v3_both_axes": (v3(MESH, [1, 0]), "data+model", 7168),
    "v3_minor_half": (v3(MESH, [(1, 2, 2)]), "model:(2)2", 4096),
    "v3_major_half": (v3(MESH, [(1, 1, 2)]), "model:(1)2", 4096),
    "v3_foreign_mesh": (v3({"p": 4, "q": 2}, [0]), "data+model:(1)2", 6144),
    "v3_device_ids": (v3({"x": 4, "y": 2}, [1], [0, 4, 1, 5, 2, 6, 3, 7]), "data", 4096),
    # the same ids, 0 … 7 as 2 x 4 and read transposed
    "v3_device_ids_iota": (v3({"x": 4, "y": 2}, [1], iota=([2, 4], [1, 0])), "data", 4096),
}


@pytest.mark.parametrize(("groups", "axes", "wire"), GROUPS.values(), ids=GROUPS)
def test_groups(groups: bytes, axes: str | None, wire: int) -> None:
    result = count_of(with_op("all-reduce", extra=CHANNEL + GLOBAL_IDS + groups))
    assert result.by_axes == ({} if axes is None else exactly({axes: wire}))


def test_without_channel_the_ids_are_replicas() -> None:
    assert count_of(with_op("all-reduce", extra=v1((0,)))).by_axes == {}


def test_channel_without_global_ids_spans_all_partitions() -> None:
    assert count_of(with_op("all-reduce", extra=CHANNEL + v1((0,)))).by_axes == exactly({"data+model": 7168})


# --- forms


def start_done(opcode: str) -> Callable[[Builder, int], object]:
    def add(b: Builder, x: int) -> None:
        start = b.add(f"{opcode}-start", operands=[x], extra=MODEL)
        b.add(f"{opcode}-done", operands=[start])

    return add


def wrapped(opcode: str = "all-gather") -> Builder:
    inner = Builder(2)
    inner.add(opcode, array(F32, 4096), [inner.parameter()], extra=MODEL)
    return inner


def async_calls(b: Builder, x: int) -> None:
    start = b.add("async-start", operands=[x], called=[2])
    update = b.add("async-update", operands=[start])
    b.add("async-done", operands=[update])


def permute_in_place(b: Builder, x: int) -> None:
    offsets = b.constant(0)
    b.add(
        "collective-permute",
        operands=[x, x, offsets, offsets],
        extra=CHANNEL + pairs((0, 1)) + packed(20, [256]),
    )


def send(attributes: Mapping[str, str], *, host: bool = False) -> Callable[[Builder, int], object]:
    def add(b: Builder, x: int) -> None:
        token = b.add("after-all", field(2, TOKEN))
        extra = CHANNEL + (field(47, 1) if host else b"")
        sent = b.add("send", operands=[x, token], attributes=attributes, extra=extra)
        b.add("send-done", operands=[sent], attributes=attributes, extra=extra)
        received = b.add("recv", operands=[token], attributes=attributes, extra=extra)
        b.add("recv-done", operands=[received], attributes=attributes, extra=extra)

    return add


def megascale(kind: str, target: str = "{1,2}x{0:7}") -> Callable[[Builder, int], object]:
    attributes = {
        "_xla_host_transfer_handler_name": "xla_megascale_runtime",
        "_xla_megascale_transfer_type": kind,
        "_xla_megascale_target": target,
    }
    return send(attributes, host=True)


FORMS = {
    "all_reduce": (with_op("all-reduce", extra=MODEL), {"all-reduce": 6144}),
    "all_gather": (with_op("all-gather", extra=MODEL), {"all-gather": 12288}),
    "reduce_scatter": (with_op("reduce-scatter", extra=MODEL), {"reduce-scatter": 3072}),
    "all_to_all": (with_op("all-to-all", extra=MODEL_PARTITIONS), {"all-to-all": 3072}),
    "all_to_all_tuple": (
        lambda b, x: b.add("all-to-all", operands=[x] * 4, extra=MODEL_PARTITIONS),
        {"all-to-all": 12288},
    ),
    "ragged": (
        lambda b, x: b.add("ragged-all-to-all", operands=[x] * 6, extra=MODEL_PARTITIONS),
        {"ragged-all-to-all": 4096},
    ),
    "broadcast": (with_op("collective-broadcast", extra=MODEL_PARTITIONS), {"collective-broadcast": 4096}),
    "broadcast_dynamic_root": (
        lambda b, x: b.add(
            "collective-broadcast", operands=[x, b.constant(0)], extra=MODEL_PARTITIONS + field(100, 1)
        ),
        {"collective-broadcast": 4096},
    ),
    "permute": (
        with_op("collective-permute", extra=CHANNEL + pairs((0, 1), (1, 0))),
        {"collective-permute": 4096},
    ),
    "permute_to_itself": (with_op("collective-permute", extra=CHANNEL + pairs((0, 0), (1, 1))), {}),
    "permute_in_place": (permute_in_place, {"collective-permute": 1024}),
    "native_all_reduce": (start_done("all-reduce"), {"all-reduce": 6144}),
    "native_all_gather": (start_done("all-gather"), {"all-gather": 12288}),
    "combined": (
        lambda b, x: b.add("all-reduce", operands=[x, b.constant(1)], extra=MODEL),
        {"all-reduce": 6150},
    ),
    "gpu_send": (send({"_xla_send_recv_source_target_pairs": "{{0,4},{1,5}}"}), {"send": 4096}),
    "host_callback": (send({"_xla_host_transfer_handler_name": "pjrt_rendezvous"}, host=True), {}),
    "async": (async_calls, {"all-gather": 12288}),
    "fusion": (lambda b, x: b.add("fusion", operands=[x], called=[2]), {"all-gather": 12288}),
    "called_twice": (
        lambda b, x: [b.add("call", operands=[x], called=[2]) for _ in range(2)],
        {"all-gather": 24576},
    ),
    "custom_call": (with_op("custom-call", called=[2]), {"all-gather": 12288}),
    "dead_code": (lambda b, x: b.add("copy", operands=[x]), {}),
}


@pytest.mark.parametrize(("add", "kinds"), FORMS.values(), ids=FORMS)
def test_forms(add: Callable[[Builder, int], object], kinds: Mapping[str, int]) -> None:
    result = count_of(add, wrapped())
    assert result.by_kind == exactly(kinds)
    assert result.opaque == ()


DCN = {  # two slices: k = 2
    "all_reduce": (megascale("ALL_REDUCE"), "all-reduce", 4096),
    "all_gather": (megascale("ALL_GATHER"), "all-gather", 4096),
    "reduce_scatter": (megascale("REDUCE_SCATTER"), "reduce-scatter", 2048),
    "all_to_all": (megascale("ALL_TO_ALL"), "all-to-all", 2048),
    "listed": (
        megascale("ALL_REDUCE", "{" + ",".join(f"{{{100000 + i},{200000 + i}}}" for i in range(8)) + "}"),
        "all-reduce",
        4096,
    ),
    "one_to_one": (
        megascale("ONE_TO_ONE", "{{100000->200000},{200000->100000}}"),
        "collective-permute",
        4096,
    ),
}


@pytest.mark.parametrize(("add", "kind", "wire"), DCN.values(), ids=DCN)
def test_transfers_between_slices(add: Callable[[Builder, int], object], kind: str, wire: int) -> None:
    result = count_of(add, mesh=DCN_MESH)
    assert result.by_axes == exactly({"dcn": wire})
    assert result.by_kind == exactly({kind: wire})


def test_collectives_inside_a_slice_of_several() -> None:
    assert count_of(with_op("all-reduce", extra=MODEL), mesh=DCN_MESH).by_axes == exactly({"model": 6144})


@pytest.mark.parametrize(
    ("shape", "wire"),
    [
        (array(S4, 15, bits=4), 3 * 8),
        (array(S4, 15), 3 * 15),
        (array(BF16, 3, 5), 3 * 30),
        (array(PRED, 7), 3 * 7),
        (array(F32), 3 * 4),
    ],
    ids=["s4_packed", "s4_in_bytes", "bf16", "pred", "scalar"],
)
def test_operand_bytes(shape: bytes, wire: int) -> None:
    result = count_of(lambda b, _: b.add("all-gather", operands=[b.parameter(shape, 1)], extra=MODEL))
    assert result.total == (wire, wire)


def test_tpu_chain_counts_its_start_only() -> None:
    """An async collective fusion repeats one all-gather in its start, in matmul fusions and in its done."""
    config = {"async_collective_fusion_config": {"flag_start": "-1", "flag_end": "-1"}}
    later = {"async_collective_fusion_config": {"flag_start": "2", "flag_end": "8"}}
    parts = []
    for identity, target, flags in (
        (2, "AsyncCollectiveStart", config),
        (3, None, later),
        (4, "AsyncCollectiveDone", None),
    ):
        part = Builder(identity)
        gathered = part.add("all-gather", operands=[part.parameter()], extra=MODEL, config=flags)
        if target:
            part.add("custom-call", operands=[gathered], extra=field(28, target))
        parts.append(part)
    result = count_of(lambda b, x: [b.add("fusion", operands=[x], called=[i]) for i in (2, 3, 4)], *parts)
    assert result.by_kind == exactly({"all-gather": 12288})


@pytest.mark.parametrize(
    ("name", "kind", "wire"),
    [("all-reduce-scatter.1", "reduce-scatter", 3072), ("fused", "all-reduce", 6144)],
)
def test_all_reduce_scatter_fusion(name: str, kind: str, wire: int) -> None:
    body = Builder(2, name)
    reduced = body.add("all-reduce", operands=[body.parameter()], extra=MODEL)
    body.add("dynamic-slice", array(F32, 256), [reduced])
    result = count_of(with_op("fusion", called=[2], extra=field(11, "kCustom")), body)
    assert result.by_kind == exactly({kind: wire})


def test_remote_dma_kernel_is_opaque() -> None:
    result = count_of(with_op("custom-call", config={"custom_call_config": {"has_communication": True}}))
    assert len(result.opaque) == 1
    assert result.by_axes == {}


def test_sparse_core_offload() -> None:
    """The start has no operands: the collective is two calls down."""
    outer = Builder(3)
    outer.add("custom-call", operands=[outer.parameter()], called=[2])

    def add(b: Builder, x: int) -> None:
        start = b.add("async-start", called=[3])
        b.add("async-done", operands=[b.add("async-update", operands=[start, x])])

    assert count_of(add, wrapped("all-reduce"), outer).by_kind == exactly({"all-reduce": 6144})


# --- real modules

MIB = 1 << 20
# FSDP(data) x TP(model) MLPs with remat: per layer two weights, each gathered twice; one activation
# all-reduce forward and one backward; two gradient reduce-scatters of the gathered weight.
REAL = {
    "cpu_permuted_mesh.pb": (MESH, {"all-reduce": 768}),
    "cpu_shard_map_ops.hlo.pb.gz": (
        MESH,
        # psums of 512 bytes over model, data, and both; then one of each other kind
        {
            "all-reduce": 768 + 512 + 896,
            "all-gather": 1536,
            "reduce-scatter": 256,
            "all-to-all": 384,
            "collective-permute": 512,
        },
    ),
    "gpu_h100_1x2x8.scan6.hlo.pb.gz": (
        {"data": 4, "model": 4},
        {
            "all-gather": 12 * 3 * MIB,
            "all-reduce": 12 * MIB * 3 // 2,
            "reduce-scatter": 6 * 4 * MIB * 3 // 4,
        },
    ),
    "tpu_v5e_4x4.scan8.pb.gz": (
        {"data": 4, "model": 4},
        {
            "all-gather": 32 * 3 * 2 * MIB,
            "all-reduce": 16 * MIB // 2 * 3 // 2,
            # half of the scatters are padded from 2048 to 2112 rows, and a halo permute of 48 rows follows
            "reduce-scatter": 8 * (8388608 + 8650752) * 3 // 4,
            "collective-permute": 8 * 196608,
        },
    ),
    "tpu_v5e_4x4_x2slices.scan8.pb.gz": (
        {"dcn": 2, "data": 4, "model": 4},
        {
            "all-gather": 32 * 3 * 2 * MIB,
            # in a slice as above; between slices one all-reduce per weight and layer, of its shard
            "all-reduce": 16 * MIB // 2 * 3 // 2 + 2 * 8 * 2 * MIB,
            "reduce-scatter": 8 * (8388608 + 8650752) * 3 // 4,
            "collective-permute": 8 * 196608,
        },
    ),
    "tpu_tpu7x_4x4x4.scan8.pb.gz": (
        {"data": 32, "model": 4},
        {
            "all-gather": 32 * 31 * MIB // 4,
            "all-reduce": 16 * MIB // 2 * 3 // 2,
            "reduce-scatter": 16 * 8 * MIB * 31 // 32,
        },
    ),
}


@pytest.mark.parametrize(("name", "mesh", "kinds"), [(n, *r) for n, r in REAL.items()], ids=REAL)
def test_real_modules(name: str, mesh: Mapping[str, int], kinds: Mapping[str, int]) -> None:
    data = (GOLDEN / name).read_bytes()
    proto = gzip.decompress(data) if name.endswith(".gz") else data
    num_devices = 1
    for size in mesh.values():
        num_devices *= size
    result = count(proto, num_devices, mesh)
    assert result.by_kind == exactly(kinds)
    assert all(printed in (None, derived) for printed, derived in result.loops.values())


def test_nothing_but_a_module_is_read() -> None:
    with pytest.raises(ValueError, match="neither"):
        count(b"\x12\x03abc", 8, MESH)
