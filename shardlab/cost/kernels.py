"""FLOPs of fused kernels, which HLO shows only as custom calls: cuBLAS, cuDNN, Pallas splash attention.

Flash attention keeps no scores: its backward pass computes them again. Per pair of query and key that the
mask lets meet, forward does 2 products (q·k over D, p·v over D_v), backward 5: q·k again, dv, dp, dq, dk.
Splash does backward in two kernels, dq with 3 products and dkv with 4, both computing q·k and dp.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shardlab.cost.products import (
    MatmulShape,
    NotCountedError,
    convolution_flops,
    extents,
    matmul_shape,
    product_flops,
)
from shardlab.hlo.attributes import config_value, metadata
from shardlab.hlo.module import Instruction, Shape

# The scope that `model/attention.py` puts around a splash kernel with a window.
_SPLASH_WINDOW = re.compile(r"splash_window(\d+)")

# Custom calls that move, allocate or mark, and do no arithmetic worth counting.
NO_FLOPS = frozenset({
    "AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveDone", "AsyncCollectiveStart",
    "ConcatBitcast", "GatherScatterIndicesBitpacked", "GetPartitionId", "LayoutConstraint", "MoveToDevice",
    "MoveToHost", "PadToStatic", "PinToDevice", "SPMDFullToShardShape", "SPMDShardToFullShape", "Sharding",
    "SliceId", "SliceToDynamic", "TopK", "X64Combine", "X64SplitHigh", "X64SplitLow", "ZeroCrop",
    "__cub$DeviceRadixSort", "__gpu$TopK", "annotate_device_placement",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What a fused attention kernel's speed depends on: positions, width of a head, mask (window: of one that
    has one, else 0) and direction."""

    queries: int
    keys: int
    head_dim: int
    causal: bool
    backward: bool
    dtype: str
    window: int = 0


@dataclass(frozen=True, slots=True)
class Work:
    """FLOPs of one execution. note: an assumption that a reader must know, or "".

    shape: what is multiplied, None for a library's convolution. instances: of an attention kernel, heads of
    all sequences.
    """

    kind: Literal["matmul", "attention"]
    flops: int
    note: str = ""
    shape: MatmulShape | AttentionShape | None = None
    instances: int = 1


def kernel_work(call: Instruction, operands: Sequence[Shape | None]) -> Work | None:
    """FLOPs of a custom call; None when it does none. Raises NotCountedError when it is opaque."""
    target = call.attributes.get("custom_call_target", "").strip('"')
    if target in NO_FLOPS:
        return None
    if target.startswith("__cublas$") and "groupedMatmul" not in target:
        return _gemm(call, operands)
    if target.startswith("__cudnn$conv"):
        return Work("matmul", _cudnn_convolution_flops(target, call, operands))
    if target.startswith("__cudnn$fmha"):
        return _cudnn_attention(target, call, operands)
    if target == "tpu_custom_call" and "splash" in call.name + metadata(call).op_name:
        return _splash_attention(call, operands)
    raise NotCountedError("a kernel whose work the program does not show")


def causal_pairs(queries: int, keys: int, window: int = 0) -> int:
    """Pairs with key position <= query position, and less than `window` behind if that is not 0."""
    behind = _pairs_below(queries - window, keys) if window else 0
    return _pairs_below(queries, keys) - behind


def _pairs_below(queries: int, keys: int) -> int:
    """Σ min(q + 1, keys) over the queries."""
    rising = min(max(queries, 0), keys)
    return rising * (rising + 1) // 2 + max(queries - keys, 0) * keys


def causal_blocks(query_blocks: int, key_blocks: int) -> int:
    """Blocks of a square score matrix that hold a pair with key <= query; they are computed whole."""
    return sum(-(-(i + 1) * key_blocks // query_blocks) for i in range(query_blocks))


def window_blocks(blocks: int, tile: int, window: int) -> int:
    """Square tiles of a causal score matrix that hold a pair less than `window` apart."""
    return causal_pairs(blocks, blocks, -(-(window - 1) // tile) + 1)


def first_array(shape: Shape) -> Shape:
    """The first array of a result, which may come with workspace in a tuple. Raises NotCountedError."""
    while shape.leaves:
        shape = shape.leaves[0]
    if shape.dtype == "tuple":
        raise NotCountedError("a result without arrays")
    return shape


def _gemm(call: Instruction, operands: Sequence[Shape | None]) -> Work:
    numbers = config_value(call, "gemm_backend_config", "dot_dimension_numbers", "lhs_contracting_dimensions")
    if not isinstance(numbers, list) or not operands:
        raise NotCountedError("a matrix product without dimension numbers")
    batched = config_value(call, "gemm_backend_config", "dot_dimension_numbers", "lhs_batch_dimensions")
    out, contracting = extents(first_array(call.shape)), _ints(numbers)
    flops = product_flops(out, extents(operands[0]), contracting)
    batch = _ints(batched) if isinstance(batched, list) else ()
    return Work("matmul", flops, shape=matmul_shape(out, operands[0], batch, contracting))


def _cudnn_convolution_flops(target: str, call: Instruction, operands: Sequence[Shape | None]) -> int:
    """All three directions do the forward convolution's work: find its input, kernel and output."""
    if len(operands) < 2:
        raise NotCountedError("a convolution without operands")
    result = first_array(call.shape)
    if target == "__cudnn$convBackwardInput":
        return convolution_flops(call, result, operands[1], operands[0])
    if target == "__cudnn$convBackwardFilter":
        return convolution_flops(call, operands[0], result, operands[1])
    return convolution_flops(call, operands[0], operands[1], result)


def _cudnn_attention(target: str, call: Instruction, operands: Sequence[Shape | None]) -> Work:
    """cuDNN flash attention: q, k, v are [B, L, H, D]; the scores' shape [B, H, L, T] is in its config."""
    scores = config_value(call, "cudnn_fmha_backend_config", "intermediate_tensor_shape", "dimensions")
    if not isinstance(scores, list) or len(scores) != 4 or len(operands) < 3:
        raise NotCountedError("fused attention without the shape of its scores")
    batch, heads, queries, keys = _ints(scores)
    D, Dv = extents(operands[0])[-1], extents(operands[2])[-1]
    mask = str(config_value(call, "cudnn_fmha_backend_config", "mask_type") or "")
    window = _ints([config_value(call, "cudnn_fmha_backend_config", "sliding_window_length") or 0])[0]
    causal = "CAUSAL" in mask
    pairs = causal_pairs(queries, keys, window) if causal else queries * keys
    per_pair = 3 * D + 2 * Dv if "Backward" in target else D + Dv
    note = (
        "cuDNN causal attention: only pairs with key <= query are counted; whole tiles may run"
        if causal
        else ""
    )
    dtype = operands[0].dtype if operands[0] is not None else ""
    shape = AttentionShape(queries, keys, D, causal, "Backward" in target, dtype, window)
    return Work("attention", 2 * batch * heads * pairs * per_pair, note, shape, batch * heads)


def _splash_attention(call: Instruction, operands: Sequence[Shape | None]) -> Work:
    """Pallas splash attention: q [.., H, L, D], k and v [.., T, D] after the block mask s8[.., query
    blocks, key blocks].

    q's shape gives the heads (k and v may have fewer). The mask's values are not in the text: a position
    operand means that the kernel computes the mask itself, which is taken as causal, within the window that
    the operation's name says (`splash_window4096`). Segment ids, the only other s32 arrays, are two.
    """
    arrays = [
        extents(s) for s in operands if s is not None and s.dtype.startswith(("bf", "f")) and len(s.dims) > 2
    ]
    masks = [extents(s) for s in operands if s is not None and s.dtype in ("s8", "s32") and len(s.dims) == 3]
    positions = [s for s in operands if s is not None and s.dtype == "s32" and len(s.dims) == 2]
    if len(arrays) < 3 or not masks:
        raise NotCountedError("splash attention without q, k, v and a block mask")
    q, k, v = arrays[:3]
    D, Dv = q[-1], v[-1]
    query_blocks, key_blocks = masks[0][-2:]
    if not query_blocks or not key_blocks:
        raise NotCountedError("splash attention with an empty block mask")
    causal = len(positions) % 2 == 1 and q[-2] == k[-2]
    windowed = _SPLASH_WINDOW.search(metadata(call).op_name)
    window = int(windowed[1]) if causal and windowed else 0
    if window:
        # The grid holds as many blocks as one query, or one key, meets: the other side has all. Tiles of a
        # kernel with a window are square.
        query_blocks = key_blocks = max(query_blocks, key_blocks)
        blocks = window_blocks(query_blocks, q[-2] // query_blocks, window)
    else:
        blocks = causal_blocks(query_blocks, key_blocks) if causal else query_blocks * key_blocks
    pairs = q[-2] * k[-2] * blocks // (query_blocks * key_blocks)
    said = f"a window of {window}" if window else "causal"
    note = f"splash attention: taken as {said}, tiles on the diagonal counted whole" if causal else ""
    flops = 2 * math.prod(q[:-2]) * pairs * _splash_products(call, D, Dv)
    dtype = next((s.dtype for s in operands if s is not None and s.dtype.startswith(("bf", "f"))), "")
    shape = AttentionShape(q[-2], k[-2], D, causal, "_fwd" not in call.name, dtype, window)
    return Work("attention", flops, note, shape)


def _splash_products(call: Instruction, D: int, Dv: int) -> int:
    """Depths summed per pair by this kernel's products. A fused dkv kernel has dq as a third result."""
    if "_dq" in call.name:
        return 2 * D + Dv
    if "_dkv" in call.name:
        fused = sum(len(leaf.dims) > 2 for leaf in call.shape.leaves) > 2
        return (3 if fused else 2) * D + 2 * Dv
    if "_fwd" in call.name:
        return D + Dv
    raise NotCountedError("splash attention: not known as forward, dq or dkv")


def _ints(values: Sequence[object]) -> tuple[int, ...]:
    """Integers of a JSON list; proto int64 are strings there. Raises NotCountedError."""
    try:
        return tuple(int(str(value)) for value in values)
    except ValueError:
        raise NotCountedError("a dimension that is no number") from None
