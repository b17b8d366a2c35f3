"""How long one matrix product takes on a chip, from its shape: tiles, waves and measured tables.

GPU: the result is cut into tiles, and a wave of as many tiles as there are cores takes as long as one of
them, so time rises in steps of m and n (Nvidia, "Matrix Multiplication Background User's Guide": tile and
wave quantization). The best of a library's tiles is taken. What that leaves unexplained at the points of
XLA's measured grid is interpolated between them (log2 of m, n, k and batch) and held beyond them.
TPU: extents are padded to the matrix unit, and the measured curve is one of the cube with as many FLOPs.
CPU: FLOPs over the rate that was measured.
A chip with measured products of its own, but no grid, is scaled by the median of measured / predicted.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import product
from statistics import median

from shardlab.cost.products import MatmulShape
from shardlab.hardware.data_files import load_chip, shipped
from shardlab.hardware.measured import (
    ChipTables,
    MeasuredProduct,
    chip_tables,
    compute_constants,
    product_grid,
    single_products,
)

SUBLANES = 8  # rows to which a TPU pads an array of 32-bit values
_GRID_CHIPS = {"sm_90": ("h100", 989.5e12), "sm_100": ("b200", 2250e12)}  # dense bf16 peaks of the tables
_CURVE_PEAKS = {"tpu7x": 1153.5e12}
_Corner = tuple[int, ...]  # batch, m, n, k


def dtype_class(dtype: str) -> str:
    """Which column of the tables a dtype of HLO belongs to: f8, s8 (narrow integers), bf16 (f16 too), f32."""
    if dtype.startswith(("f8", "f4e", "f6e")):
        return "f8"
    if dtype in ("s8", "u8", "s4", "u4"):
        return "s8"
    return "bf16" if dtype in ("bf16", "f16") else "f32"


@dataclass(frozen=True, slots=True, kw_only=True)
class MatmulTimes:
    """Prices matrix products on one chip. peak_flops_per_s: dense bf16, per JAX device."""

    family: str
    tables: ChipTables
    peak_flops_per_s: float
    scale: Mapping[str, float] = field(default_factory=dict)

    def time_s(self, shape: MatmulShape) -> float:
        """Seconds of one product, launch included."""
        kind = dtype_class(shape.dtype)
        # Integers were not measured: they reach the share of their peak that bf16 reaches.
        return self._unscaled_s(shape, kind) * self.scale.get("bf16" if kind == "s8" else kind, 1.0)

    def peak(self, kind: str) -> float:
        """Operations per second of a `dtype_class` at most."""
        if kind == "s8" and self.tables.s8_over_bf16 is not None:
            return self.peak_flops_per_s * self.tables.s8_over_bf16
        return self.peak_flops_per_s * float(compute_constants()["dtype_peak"][self.family][kind])

    def _unscaled_s(self, shape: MatmulShape, kind: str) -> float:
        if self.family == "cpu":
            flops = 2 * shape.batch * shape.m * shape.n * shape.k
            return float(compute_constants()["cpu"]["kernel_s"]) + flops / self.peak(kind)
        if self.family == "gpu":
            left = _grid_residual(self.tables.matmul, kind, shape.batch, shape.m, shape.n, shape.k)
            return _tiled_s(shape, self.peak(kind), self.tables.cores) * left
        left = _curve_residual(self.tables.matmul, shape)
        return _padded_s(shape, self.peak(kind), self.tables.mxu) * left


@lru_cache(maxsize=64)
def matmul_times(family: str, tables: ChipTables, peak_flops_per_s: float) -> MatmulTimes:
    """The prices of a chip: of one without a grid scaled to the products measured on `tables.gemm`."""
    on, ratios = chip_tables(tables.gemm), dict[str, list[float]]()
    rows = [row for row in single_products() if row.table == tables.gemm]
    if on is not None and tables.gemm in shipped("chips"):
        peak = load_chip(tables.gemm).bf16_flops_per_s or 0.0
        plain = MatmulTimes(family=family, tables=on, peak_flops_per_s=peak)
        for row in rows:
            if not _has_grid(tables, row.dtype):
                ratios.setdefault(row.dtype, []).append(row.time_s / plain.time_s(shape_of(row)))
    scale = {dtype: median(found) for dtype, found in ratios.items()}
    return MatmulTimes(family=family, tables=tables, peak_flops_per_s=peak_flops_per_s, scale=scale)


def _has_grid(tables: ChipTables, dtype: str) -> bool:
    if not tables.measured:
        return False
    return tables.matmul in _CURVE_PEAKS or any(
        row.table == tables.matmul and row.dtype == dtype for row in product_grid()
    )


def shape_of(row: MeasuredProduct) -> MatmulShape:
    """A measured product's shape."""
    return MatmulShape(row.batch, row.m, row.n, row.k, {"f8": "f8e4m3fn"}.get(row.dtype, row.dtype))


def _tiled_s(shape: MatmulShape, peak: float, cores: int) -> float:
    """The tile model of `compute.toml`."""
    model = compute_constants()["gpu_tile_model"]
    best = math.inf
    for tile_m, tile_n in model["tiles"]:
        tiles = -(-shape.m // tile_m) * -(-shape.n // tile_n) * shape.batch
        waves = -(-tiles // cores)
        one_s = 2 * tile_m * tile_n * (shape.k + model["prologue_k"]) / (peak / cores)
        best = min(best, waves * one_s * (1 + model["edge"] * (1 / tile_m + 1 / tile_n)))
    return float(model["launch_s"]) + best


@cache
def _residuals(table: str, dtype: str) -> tuple[tuple[int, ...], tuple[int, ...], Mapping[_Corner, float]]:
    """log(measured / tile model) at each point of a grid, with the extents and batches that it has."""
    chip, peak = _GRID_CHIPS[table]
    cores = int(compute_constants()["chip"][chip]["cores"])
    rate = peak * float(compute_constants()["dtype_peak"]["gpu"][dtype])
    rows = [row for row in product_grid() if row.table == table and row.dtype == dtype]
    left: dict[_Corner, float] = {
        (row.batch, row.m, row.n, row.k): math.log(row.time_s / _tiled_s(shape_of(row), rate, cores))
        for row in rows
    }
    return tuple(sorted({row.m for row in rows})), tuple(sorted({row.batch for row in rows})), left


@lru_cache(maxsize=4096)
def _grid_residual(table: str, dtype: str, batch: int, m: int, n: int, k: int) -> float:
    """measured / tile model, interpolated. A dtype without a grid takes that of bf16."""
    if not any(row.table == table and row.dtype == dtype for row in product_grid()):
        dtype = "bf16"
    extents, batches, left = _residuals(table, dtype)
    sides = [_between(batch, batches), *(_between(extent, extents) for extent in (m, n, k))]
    total = 0.0
    for corner in product(*sides):
        weight = math.prod(part for _, part in corner)
        if weight:
            total += weight * left[tuple(point for point, _ in corner)]
    return math.exp(total)


def grid_skip_errors(table: str, dtype: str) -> list[float]:
    """|predicted / measured - 1| of each inner point of a grid, priced from its neighbours along one extent.

    Between the two neighbours in log2, as a shape that is not in the table would be.
    """
    extents, _, left = _residuals(table, dtype)
    errors = []
    for corner, found in left.items():
        for axis in (1, 2, 3):
            at = extents.index(corner[axis])
            if 0 < at < len(extents) - 1:
                between = 0.0
                for step in (-1, 1):
                    beside = list(corner)
                    beside[axis] = extents[at + step]
                    between += left[tuple(beside)] / 2
                errors.append(abs(math.exp(between - found) - 1))
    return errors


def _between(value: float, points: Sequence[int]) -> tuple[tuple[int, float], tuple[int, float]]:
    """The points around a value and their weights, linear in its logarithm; the last one beyond the ends."""
    at = bisect_right(points, value) - 1
    if at < 0 or at >= len(points) - 1:
        end = points[0] if at < 0 else points[-1]
        return (end, 1.0), (end, 0.0)
    low, high = points[at], points[at + 1]
    share = math.log(value / low) / math.log(high / low)
    return (low, 1 - share), (high, share)


def _padded_s(shape: MatmulShape, peak: float, mxu: int) -> float:
    m, n, k = (-(-extent // unit) * unit for extent, unit in zip(
        (shape.m, shape.n, shape.k), (SUBLANES, mxu, mxu), strict=True))  # fmt: skip
    return float(compute_constants()["tpu"]["kernel_s"]) + 2 * shape.batch * m * n * k / peak


@cache
def _curve(table: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """log(measured / padded) of a TPU's cubes, by the edge."""
    mxu, peak = int(compute_constants()["chip"][table]["mxu"]), _CURVE_PEAKS[table]
    rows = sorted((row for row in single_products() if row.table == table), key=lambda row: row.m)
    left = [math.log(row.time_s / _padded_s(shape_of(row), peak, mxu)) for row in rows]
    return tuple(row.m for row in rows), tuple(left)


def _curve_residual(table: str, shape: MatmulShape) -> float:
    edges, left = _curve(table)
    edge = max(1.0, (shape.batch * shape.m * shape.n * shape.k) ** (1 / 3))
    by_edge = dict(zip(edges, left, strict=True))
    return math.exp(sum(by_edge[point] * weight for point, weight in _between(edge, edges)))
