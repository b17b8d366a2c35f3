"""How long one instruction takes on a chip: matrix products, fused attention, memory, and a fixed overhead.

Nothing is priced at a datasheet rate alone: products by measured tables (`cost/matmul_time.py`), whatever
kernel an untuned program names; memory by measured bandwidths, which depend on the share that is read;
fused attention by published kernels, by sequence length, width of a head, mask and direction. A chip
without measurements takes the nearest generation's share of its own datasheet rate and says `extrapolated`.
An instruction takes the longer of its arithmetic and its memory traffic. Elementwise arithmetic is free:
memory bounds it. Source of each constant: `hardware/data/measured`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from shardlab.cost.hbm import Traffic
from shardlab.cost.instructions import InstructionCost
from shardlab.cost.kernels import AttentionShape, Work
from shardlab.cost.matmul_time import MatmulTimes, dtype_class, matmul_times
from shardlab.cost.products import MatmulShape
from shardlab.cost.unfused import unfused_s
from shardlab.hardware.data_files import load_chip, shipped
from shardlab.hardware.machine import Chip
from shardlab.hardware.measured import (
    ChipTables,
    MeasuredAttention,
    attention_kernels,
    bandwidths,
    chip_tables,
    compute_constants,
    cpu_tables,
)

ATTENTION_KERNEL = "cudnn"  # what a `__cudnn$fmha` call runs
UNFUSED = "megatron"  # what it stands in for: Megatron's kernels of 2022 (`cost/unfused.py`)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeTimes:
    """Prices instructions on one chip. attention_kernel: cudnn or flash-attention-2, whose curve is taken, or
    `UNFUSED`."""

    chip: Chip
    tables: ChipTables
    matmul: MatmulTimes
    hbm_bytes_per_s: float
    attention_kernel: str = ATTENTION_KERNEL

    def instruction_s(self, row: InstructionCost) -> float | None:
        """Seconds of one execution; None where its memory traffic is unknown, or how fast the host is."""
        if row.traffic is None or (row.traffic.host_bytes and self.tables.host_gb_per_s is None):
            return None
        dots = self.chip.dot_bf16_flops_per_s
        if dots is not None and is_bare_bf16(row):
            return max(row.flops / dots, self.memory_s(row.traffic))
        return self.work_s(row.products, row.traffic)

    def work_s(self, products: Iterable[Work], traffic: Traffic) -> float:
        """Seconds of a kernel with these products and this traffic."""
        arithmetic_s = sum(self.product_s(work) for work in products)
        memory_s = self.memory_s(traffic)
        touches_memory = self.chip.family == "gpu" or traffic.read_bytes + traffic.written_bytes > 0
        return max(arithmetic_s, memory_s + (self._kernel_s if touches_memory else 0.0))

    def product_s(self, work: Work) -> float:
        """Seconds of one product or attention kernel. A convolution is priced as the cube of its FLOPs."""
        if isinstance(work.shape, MatmulShape):
            return self.matmul.time_s(work.shape)
        if isinstance(work.shape, AttentionShape):
            if self.attention_kernel == UNFUSED:
                return unfused_s(work.shape, work.instances, self.matmul.time_s, self._moving_s)
            padded = work.flops * self._padding(work.shape.head_dim)
            return self._kernel_s + padded / self._attention_rate(work.shape)
        edge = max(1, round((work.flops / 2) ** (1 / 3)))
        return self.matmul.time_s(MatmulShape(1, edge, edge, edge, "bf16"))

    def peak_s(self, flops_by_dtype: Mapping[str, int]) -> float:
        """Seconds of this work at the chip's datasheet peak for each type: what keeps it busy."""
        return sum(flops / self.matmul.peak(dtype_class(dtype)) for dtype, flops in flops_by_dtype.items())

    def memory_s(self, traffic: Traffic) -> float:
        """Seconds that the bytes take, without overhead. What is neither HBM nor the host's is VMEM."""
        moved = traffic.read_bytes + traffic.written_bytes
        share = traffic.read_bytes / moved if moved else 0.0
        reached = 1.0 if self.chip.family == "cpu" else hbm_share(self.tables.hbm, share)
        hbm_s = moved / (self.hbm_bytes_per_s * reached) if moved else 0.0
        vmem = float(compute_constants()["tpu"]["vmem_over_hbm"]) * self.hbm_bytes_per_s
        host_rate = (self.tables.host_gb_per_s or math.inf) * 1e9 / self.chip.xla_devices
        host_s = traffic.host_bytes / host_rate
        return max(hbm_s, (traffic.other_bytes - traffic.host_bytes) / vmem, host_s)

    def _moving_s(self, read_bytes: int, written_bytes: int) -> float:
        """Seconds of a kernel that does no more than move these."""
        return self._kernel_s + self.memory_s(Traffic(read_bytes, written_bytes))

    def _padding(self, head_dim: int) -> float:
        """How much longer than its FLOPs say a TPU's matrix unit is busy with attention: each of its products
        sums over a head or has one as its width, and both are padded to the unit, as of other products."""
        unit = self.tables.mxu or 1
        return -(-head_dim // unit) * unit / head_dim

    @property
    def _kernel_s(self) -> float:
        return float(compute_constants()[self.chip.family]["kernel_s"])

    def _attention_rate(self, shape: AttentionShape) -> float:
        """FLOP/s: the measured share of the measured chip's peak times this chip's."""
        kind = dtype_class(shape.dtype)
        if self.chip.family == "gpu" and kind == "f32":
            kind = "bf16"  # fused kernels exist for 16 bits only
        return self.matmul.peak(kind) * attention_share(shape, self.tables.attention, self.attention_kernel)

    @property
    def basis(self) -> Mapping[str, str]:
        """What each part rests on: `matmul`, `memory`, `attention` -> `measured` or `extrapolated from …`."""
        tables, chip = self.tables, self.chip
        known = load_chip(tables.name) if tables.name in shipped("chips") else chip
        same_peak = known.bf16_flops_per_s == chip.bf16_flops_per_s
        same_rate = known.memory_bytes_per_s == chip.memory_bytes_per_s
        scaled = f", scaled to products measured on {tables.gemm}" if self.matmul.scale else ""
        return {
            "matmul": _basis(tables.measured and same_peak, tables.matmul + scaled),
            "memory": _basis(tables.hbm == tables.name and same_rate, tables.hbm),
            "attention": _basis(tables.attention == tables.name and same_peak, tables.attention),
        }


def is_bare_bf16(row: InstructionCost) -> bool:
    """Whether it is a `dot` of bf16 outside fusions, which XLA:CPU leaves to Eigen."""
    return row.kind == "dot" and all(
        isinstance(work.shape, MatmulShape) and work.shape.dtype == "bf16" for work in row.products
    )


def _basis(measured: bool, source: str) -> str:
    return "measured" if measured else f"extrapolated from {source}"


def compute_times(chip: Chip) -> ComputeTimes | None:
    """The prices of a chip; None where it has no datasheet rates or no tables are near enough.

    A CPU has no tables: the rates in its machine file are measured ones.
    """
    tables = cpu_tables(chip.name) if chip.family == "cpu" else chip_tables(chip.compile_as or chip.name)
    if tables is None or chip.bf16_flops_per_s is None or chip.memory_bytes_per_s is None:
        return None
    return ComputeTimes(
        chip=chip,
        tables=tables,
        matmul=matmul_times(chip.family, tables, chip.bf16_flops_per_s),
        hbm_bytes_per_s=chip.memory_bytes_per_s,
    )


@lru_cache(maxsize=256)
def hbm_share(chip: str, read_share: float) -> float:
    """Measured bandwidth over the datasheet's of a measured chip, by the share of bytes that are read.

    The largest array counts; between the measured shares the line between them, beyond them the nearest.
    """
    rows = [row for row in bandwidths() if row.chip == chip]
    datasheet = load_chip(chip).memory_bytes_per_s
    if not rows or datasheet is None:
        raise ValueError(f"no bandwidth was measured on {chip}")
    best: dict[float, float] = {}
    for row in sorted(rows, key=lambda row: row.array_bytes or 0):
        if row.array_bytes:
            best[row.read_share] = row.bytes_per_s
        else:
            best[row.read_share] = max(best.get(row.read_share, 0.0), row.bytes_per_s)
    return _line(read_share, sorted(best.items())) / datasheet


def attention_share(shape: AttentionShape, chip: str, kernel: str) -> float:
    """A fused attention kernel's FLOP/s over the peak of the chip that it was measured on.

    By sequence length (log2), at the nearest measured head width; backward with a mask as much slower as
    forward is. Length matters by the keys that a block of queries meets: those of a window are as many as of
    a causal mask over twice as much. A chip of which one point is known takes its kernel's curve on H100
    through that point.
    """
    own = _anchor(chip, shape.backward)
    if own is None:
        return _measured_share(shape, chip, kernel)
    at = AttentionShape(own.length, own.length, 128, False, shape.backward, shape.dtype)
    return own.share * _measured_share(shape, "h100", own.kernel) / _measured_share(at, "h100", own.kernel)


@dataclass(frozen=True, slots=True)
class _Anchor:
    kernel: str
    length: int
    share: float


@lru_cache(maxsize=32)
def _anchor(chip: str, backward: bool) -> _Anchor | None:
    """The one point that is known of a chip without a curve."""
    rows = [row for row in attention_kernels() if row.chip == chip and row.backward == backward]
    if not rows or len(rows[0].flops_per_s) > 1:
        return None
    ((length, rate),) = rows[0].flops_per_s.items()
    return _Anchor(rows[0].kernel, length, rate / _peak_of(chip))


def _measured_share(shape: AttentionShape, chip: str, kernel: str) -> float:
    rows = [row for row in attention_kernels() if (row.chip, row.kernel) == (chip, kernel)]
    length = max(shape.queries, shape.keys)
    length = min(length, 2 * shape.window) if shape.window else length
    if shape.backward and shape.causal:
        forward = AttentionShape(shape.queries, shape.keys, shape.head_dim, True, False, shape.dtype)
        full = AttentionShape(shape.queries, shape.keys, shape.head_dim, False, False, shape.dtype)
        masked = _row_rate(rows, forward, length) / _row_rate(rows, full, length)
    else:
        masked = 1.0
    return _row_rate(rows, shape, length) * masked / _peak_of(chip)


def _row_rate(rows: list[MeasuredAttention], shape: AttentionShape, length: int) -> float:
    fitting = [
        row for row in rows if row.backward == shape.backward and (row.backward or row.causal == shape.causal)
    ]
    nearest = min(fitting, key=lambda row: abs(math.log(row.head_dim / max(shape.head_dim, 1))))
    points = [(math.log2(at), rate) for at, rate in sorted(nearest.flops_per_s.items())]
    return _line(math.log2(max(length, 1)), points)


def _peak_of(chip: str) -> float:
    peak = load_chip(chip).bf16_flops_per_s
    if peak is None:
        raise ValueError(f"the peak of {chip} is not known")
    return peak


def _line(value: float, points: Sequence[tuple[float, float]]) -> float:
    """Linear between the points, the nearest beyond them."""
    if value <= points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in pairwise(points):
        if value <= right:
            return low + (high - low) * (value - left) / (right - left)
    return points[-1][1]
