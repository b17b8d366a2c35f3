"""Custom calls whose traffic, if they have any, the program does not show.

A call is opaque unless its target is in the table below, or it names the computations that it runs, which are
then walked like any other. Only what is known not to talk to other devices is in the table.
"""

from __future__ import annotations

import re

from shardlab.hlo.attributes import backend_config_text
from shardlab.hlo.module import Instruction

_TPU_KERNEL = "tpu_custom_call"
# GPU libraries that talk to other devices whatever computations they are handed.
_TALKING = re.compile(r"mosaic_gpu|nvshmem|nccl", re.IGNORECASE)
_HAS_COMMUNICATION = re.compile(r'"has_communication"\s*:\s*true')
# Python callbacks: xla_python_cpu_callback, xla_ffi_partitioned_python_gpu_callback, … (JAX: callback.py).
_HOST_CALLBACK = re.compile(r"xla_(ffi_)?(partitioned_)?python_\w+_callback")

# Exact names. XLA markers and buffers: XLA hlo/ and service/ (custom_call_target), libtpu's names.
# Linear algebra and sampling: JAX lax/linalg.py, lax/ann.py, tpu/linalg/eigh.py, _export.py's list of stable
# targets; the rest are what jaxlib's plugins register.
_LOCAL = frozenset({
    # markers of sharding, layout and memory, which leave no code behind
    "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "InspectSharding", "LayoutConstraint",
    "annotate_device_placement", "shape_assertion", "dce_sink", "GetPartitionId",
    "SliceId",
    # buffers, copies on the device or to its own host, and ends of a transfer that is counted where it starts
    "AllocateBuffer", "CreateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone",
    "MoveToHost", "MoveToDevice", "PinToDevice", "PinToDeviceSram", "AssumeGatherIndicesInBound",
    "GatherScatterIndicesBitpacked", "PadToStatic", "SliceToDynamic", "X64Combine", "X64SplitHigh",
    "X64SplitLow",
    # zeroes what pads a shard to whole tiles before it leaves its TPU slice, in place (libtpu 0.0.50)
    "ZeroCrop",
    # arithmetic on one device
    "TopK", "ApproxTopK", "PartialReduce", "Eigh", "Qr", "LuDecomposition",
    "ProductOfElementaryHouseholderReflectors", "InvertDiagBlocksLowerTriangular",
    "InvertDiagBlocksUpperTriangular", "ResizeBilinear", "ResizeBilinearGrad", "ResizeNearest",
    "ResizeNearestGrad", "__gpu$TopK", "__gpu$xla.gpu.triton", "triton_kernel_call", "triton_kernel_call_ffi",
    "tridiagonal_solve_perturbed_ffi", "cpu_csr_sparse_dense_ffi",
})  # fmt: skip
# Families of names: NVIDIA's libraries as XLA (`__cublas$gemm`, `__cudnn$fmha…`, `__cub$DeviceRadixSort`,
# `xla.gpu.ext.cub_sort_keys`) and jaxlib's plugins (`cusolver_potrf_ffi`, `cu_threefry2x32_ffi`) name them,
# AMD's in jaxlib, and on CPU LAPACK, BLAS, oneDNN and the FFT library.
_LOCAL_FAMILIES = (
    "__cublas$", "__cudnn$", "__cub$", "__cusolver$", "xla.gpu.ext.cub_", "cublas_", "cusolver_",
    "cusparse_", "cudnn_rnn", "cuhybrid_", "cu_threefry2x32", "cu_lu_pivots_to_permutation",
    "cu_cholesky_update", "hipblas_", "hipsolver_", "hipsparse_", "hip_threefry2x32",
    "hip_lu_pivots_to_permutation", "lapack_", "blas_", "__onednn$",
    "ducc_fft", "dynamic_ducc_fft",
)  # fmt: skip


def target_of(call: Instruction) -> str:
    """The target of a custom call, unquoted; empty when it has none."""
    return call.attributes.get("custom_call_target", "").strip('"')


def is_host_callback(call: Instruction) -> bool:
    """Whether a custom call runs a Python function of its own host: not network traffic."""
    return _HOST_CALLBACK.fullmatch(target_of(call)) is not None


def opaque_reason(call: Instruction, runs_computations: bool) -> str:
    """Why a custom call may move bytes that the program does not show; empty when it does not.

    runs_computations: whether it names computations that it runs, which are counted where they stand.
    """
    target = target_of(call)
    if _HAS_COMMUNICATION.search(backend_config_text(call)):
        return f"opaque: a kernel ({target}) that talks to other devices; its bytes are not in the program"
    if _TALKING.search(target):
        return f"opaque: {target} may communicate"
    # A Pallas TPU kernel says in its configuration when it talks to other devices (JAX: tpu_custom_call.py).
    says = target == _TPU_KERNEL and "custom_call_config" in backend_config_text(call)
    known = target in _LOCAL or target.startswith(_LOCAL_FAMILIES)
    return "" if known or says or runs_computations else f"opaque: {target or 'no target'} may communicate"
