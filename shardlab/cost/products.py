"""Multiply-adds of matrix products and convolutions from their shapes, counted as two FLOPs each.

The TPU compiler prints every matrix product as a convolution: batch dimensions become spatial ones with
dilation, and the many kernel positions that meet only padding or holes do no work. The count is XLA's own
(`HloCostAnalysis::HandleDot`, `HandleConvolution` in xla/service/hlo_cost_analysis.cc).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from shardlab.hlo.module import Instruction, Shape

MAX_WINDOW = 1 << 20  # positions of one kernel dimension that are looked at; real ones are a few thousand

_INT = re.compile(r"-?[0-9]+")
_FIELD = re.compile(r"([a-z_]+)=([-0-9x_]+)")
_LABELS = re.compile(r"([0-9a-z?]+)_([0-9a-z?]+)->([0-9a-z?]+)")


class NotCountedError(ValueError):
    """The work of an instruction cannot be told from its text; the message says why."""


@dataclass(frozen=True, slots=True)
class MatmulShape:
    """`batch` products of [m, k] by [k, n]; dtype: of the operands as the program has them."""

    batch: int
    m: int
    n: int
    k: int
    dtype: str


@dataclass(frozen=True, slots=True)
class WindowDim:
    """One dimension of a convolution's window."""

    size: int
    stride: int = 1
    pad_low: int = 0
    base_dilation: int = 1
    window_dilation: int = 1


def extents(shape: Shape | None) -> tuple[int, ...]:
    """Extents of an array. Raises NotCountedError when it is no array or has an unbounded extent."""
    if shape is None or shape.leaves or shape.dtype in ("tuple", "token", "opaque"):
        raise NotCountedError("an operand is not an array")
    if any(extent is None for extent in shape.dims):
        raise NotCountedError("an extent is unbounded")
    return tuple(extent for extent in shape.dims if extent is not None)


def product_flops(out: Sequence[int], lhs: Sequence[int], contracting: Sequence[int]) -> int:
    """2 · (elements of the result) · (elements summed for each). contracting: dimensions of `lhs` that are
    summed."""
    if any(not 0 <= dim < len(lhs) for dim in contracting):
        raise NotCountedError(f"contracting dimensions {list(contracting)} of an array of rank {len(lhs)}")
    return 2 * math.prod(out) * math.prod(lhs[dim] for dim in contracting)


def dot_flops(dot: Instruction, lhs: Shape | None) -> int:
    """FLOPs of a `dot`. Raises NotCountedError."""
    contracting = integers(dot.attributes.get("lhs_contracting_dims", ""))
    return product_flops(extents(dot.shape), extents(lhs), contracting)


def dot_shape(dot: Instruction, lhs: Shape | None) -> MatmulShape:
    """The extents that a `dot` multiplies. Raises NotCountedError."""
    batched = integers(dot.attributes.get("lhs_batch_dims", ""))
    contracting = integers(dot.attributes.get("lhs_contracting_dims", ""))
    return matmul_shape(extents(dot.shape), lhs, batched, contracting)


def matmul_shape(
    out: Sequence[int], lhs: Shape | None, batched: Sequence[int], contracting: Sequence[int]
) -> MatmulShape:
    """From the result's extents, the first operand, and which of its dimensions are batch and summed."""
    dims = extents(lhs)
    if any(not 0 <= dim < len(dims) for dim in (*batched, *contracting)):
        raise NotCountedError(f"dimensions {[*batched, *contracting]} of an array of rank {len(dims)}")
    batch, k = (math.prod(dims[dim] for dim in group) for group in (batched, contracting))
    m = math.prod(dims) // max(batch * k, 1)
    return MatmulShape(batch, m, math.prod(out) // max(batch * m, 1), k, lhs.dtype if lhs else "")


def convolution_shape(
    conv: Instruction, lhs: Shape | None, kernel: Shape | None, out: Shape | None
) -> MatmulShape:
    """The matrix product that a convolution is: what each spatial dimension stands for follows from where
    it is longer than 1 (the TPU compiler's products), else its positions are summed. Raises NotCountedError.
    """
    labels = _LABELS.fullmatch(conv.attributes.get("dim_labels", "").strip())
    if labels is None:
        raise NotCountedError("a convolution without dimension labels")
    inputs, kernels, outputs = (
        _labelled(text, extents(shape))
        for text, shape in zip(labels.groups(), (lhs, kernel, out), strict=True)
    )
    spatial = sorted(label for label in outputs if label.isdigit())
    window = window_dims(conv.attributes.get("window", ""), len(spatial))
    batch, m, n, k = 1, outputs.get("b", 1), outputs.get("f", 1), kernels.get("i", 1)
    for dim, label in zip(window, spatial, strict=True):
        before, after = inputs.get(label, 1), outputs[label]
        if after == dim.size == before > 1:
            batch *= after
        elif after == dim.size:
            n *= after
        else:
            m, k = m * after, k * max(1, valid_positions(before, after, dim) // max(after, 1))
    return MatmulShape(batch, m, n, k, lhs.dtype if lhs else "")


def convolution_flops(conv: Instruction, lhs: Shape | None, kernel: Shape | None, out: Shape | None) -> int:
    """FLOPs of a convolution: only kernel positions that meet a real input element count. Raises
    NotCountedError."""
    labels = _LABELS.fullmatch(conv.attributes.get("dim_labels", "").strip())
    if labels is None:
        raise NotCountedError("a convolution without dimension labels")
    inputs, kernels, outputs = (
        _labelled(text, extents(shape))
        for text, shape in zip(labels.groups(), (lhs, kernel, out), strict=True)
    )
    spatial = sorted(label for label in outputs if label.isdigit())
    window = window_dims(conv.attributes.get("window", ""), len(spatial))
    try:
        work = 2 * kernels["i"] * outputs["f"] * outputs["b"]
        for dim, label in zip(window, spatial, strict=True):
            work *= valid_positions(inputs[label], outputs[label], dim)
    except KeyError as missing:
        raise NotCountedError(f"a convolution without dimension {missing}") from None
    return work


def valid_positions(input_extent: int, output_extent: int, window: WindowDim) -> int:
    """Pairs of output and kernel position that meet an input element, along one dimension.

    Output position o and kernel position k meet base position o·stride + k·dilation - pad_low; it holds an
    element when it is a multiple of the base dilation, not below 0 and not beyond the last element.
    """
    if window.size > MAX_WINDOW:
        raise NotCountedError(f"a window of {window.size} positions")
    last = (input_extent - 1) * window.base_dilation
    step = math.gcd(window.stride, window.base_dilation)
    period = window.base_dilation // step
    inverse = pow(window.stride // step, -1, period) if period > 1 else 0
    total = 0
    for k in range(window.size if input_extent else 0):
        offset = k * window.window_dilation - window.pad_low
        if offset % step:
            continue
        first = max(0, -(offset // window.stride))
        end = min(output_extent - 1, (last - offset) // window.stride)
        residue = -offset // step * inverse % period  # o with o·stride ≡ -offset (mod base dilation)
        first += (residue - first) % period
        total += max(0, (end - first) // period + 1)
    return total


def window_dims(text: str, rank: int) -> list[WindowDim]:
    """`{size=2x4 stride=1x3 pad=0_0x1_1 lhs_dilate=2x4}` per dimension. Raises NotCountedError."""
    fields = {name: value.split("x") for name, value in _FIELD.findall(text)}
    if len(fields.get("size", ())) != rank or any(len(values) != rank for values in fields.values()):
        raise NotCountedError(f"a window {text!r} that does not have {rank} dimensions")
    try:
        return [
            WindowDim(
                size=_field(fields, "size", i, 1),
                stride=_field(fields, "stride", i, 1),
                pad_low=int(fields["pad"][i].split("_")[0]) if "pad" in fields else 0,
                base_dilation=_field(fields, "lhs_dilate", i, 1),
                window_dilation=_field(fields, "rhs_dilate", i, 1),
            )
            for i in range(rank)
        ]
    except (ValueError, IndexError):
        raise NotCountedError(f"a window {text!r} that cannot be read") from None


def integers(text: str) -> tuple[int, ...]:
    """The integers of `{0,2}`."""
    return tuple(int(match) for match in _INT.findall(text))


def _field(fields: dict[str, list[str]], name: str, index: int, default: int) -> int:
    value = int(fields[name][index]) if name in fields else default
    if value < 1:
        raise ValueError(name)
    return value


def _labelled(labels: str, dims: tuple[int, ...]) -> dict[str, int]:
    if len(labels) != len(dims):
        raise NotCountedError(f"dimension labels {labels!r} for rank {len(dims)}")
    return dict(zip(labels, dims, strict=True))
