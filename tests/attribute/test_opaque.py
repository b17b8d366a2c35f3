"""Which custom calls are on the ledger: all whose target is not known to stay on its device."""

from __future__ import annotations

import pytest
from samples import sample

from shardlab.analysis import LedgerEntry, analyze
from shardlab.hlo.reader import parse

PALLAS = ', backend_config={"custom_call_config":{"body":"TUzvUgE="%s}}'


def ledger(target: str, rest: str = "") -> list[LedgerEntry]:
    """The ledger of a program of 2 devices: one all-reduce of what the custom call gives."""
    text = f"""HloModule m, num_partitions=2
add {{
  a = f32[] parameter(0)
  b = f32[] parameter(1)
  ROOT c = f32[] add(a, b)
}}
ENTRY main {{
  p = f32[4]{{0}} parameter(0)
  k = f32[4]{{0}} custom-call(p), custom_call_target="{target}"{rest}
  ROOT r = f32[4]{{0}} all-reduce(k), channel_id=1, replica_groups={{{{0,1}}}}, use_global_device_ids=true,
    to_apply=add
}}
"""
    return list(analyze(text).ledger)


@pytest.mark.parametrize(
    ("target", "rest"),
    [
        ("mosaic_gpu_v2", ""),
        ("nvshmem_put", ", called_computations={add}"),
        ("my_ffi_kernel", ""),
        ("__gpu$xla.gpu.ptx", ""),
        ("SparseDenseMatmulOp", ""),
        ("topk", ""),
        ("Sharding2", ""),
        ("my_lapack_spotrf_ffi", ""),
        ("", ""),
        ("tpu_custom_call", ""),
        ("tpu_custom_call", PALLAS % ',"has_communication":true'),
    ],
)
def test_a_kernel_that_is_not_known_may_communicate(target: str, rest: str) -> None:
    (entry,) = ledger(target, rest)
    assert (entry.what, entry.name) == ("custom-call", "k")
    assert entry.why.startswith("opaque: ")


@pytest.mark.parametrize(
    ("target", "rest"),
    [
        ("__cublas$gemm", ""),
        ("SliceId", ""),
        ("ZeroCrop", ""),
        ("__cublas$lt$matmul$f8", ""),
        ("__cudnn$fmhaSoftmaxBackward", ""),
        ("__cub$DeviceRadixSort", ""),
        ("xla.gpu.ext.cub_sort_keys", ""),
        ("__gpu$xla.gpu.triton", ""),
        ("__gpu$TopK", ""),
        ("TopK", ""),
        ("Sharding", ""),
        ("AllocateBuffer", ""),
        ("SliceId", ""),
        ("ZeroCrop", ", output_to_operand_aliasing={{}: (0, {})}"),
        ("ConcatBitcast", ""),
        ("MoveToHost", ""),
        ("annotate_device_placement", ""),
        ("lapack_spotrf_ffi", ""),
        ("cusolver_potrf_ffi", ""),
        ("cu_threefry2x32_ffi", ""),
        ("__onednn$matmul", ""),
        ("tpu_custom_call", PALLAS % ""),
        ("tpu_custom_call", PALLAS % ',"has_communication":false'),
        ("TODO(b/522284627)", ", called_computations={add}"),
    ],
)
def test_a_kernel_that_is_known_to_stay_on_its_device_is_not_listed(target: str, rest: str) -> None:
    assert ledger(target, rest) == []


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("prefix", ["xla_ffi_", "xla_ffi_partitioned_", "xla_"])
def test_a_python_callback_is_a_host_transfer_as_it_is_on_tpu(prefix: str, device: str) -> None:
    (entry,) = ledger(f"{prefix}python_{device}_callback")
    assert (entry.what, entry.name) == ("host-transfer", "k")
    assert "not network traffic" in entry.why


def test_the_tpu_samples_hold_custom_calls_that_the_ledger_passes_over() -> None:
    held = {
        call.attributes["custom_call_target"].strip('"')
        for name in ("tpu7x_4x4x4.scan4", "v5e_4x4.scan8")
        for module in parse(sample(f"{name}.hlo").decode())
        for computation in module.computations.values()
        for call in computation.instructions.values()
        if call.opcode in ("custom-call", "custom-call-start")
    }
    assert held >= {"AllocateBuffer", "AsyncCollectiveStart", "AsyncCollectiveDone"}


def test_more_than_one_device_and_nothing_that_communicates_is_on_the_ledger() -> None:
    text = "HloModule m, num_partitions={}\nENTRY main {{\n  ROOT p = f32[4]{{0}} parameter(0)\n}}\n"
    (entry,) = analyze(text.format(2)).ledger
    assert (entry.what, entry.why) == ("module", "compiled for 2 devices, but no collective was found")
    assert analyze(text.format(1)).ledger == ()
