"""How far the prices of compute are from the tables they rest on: `python -m shardlab.cost.fit_errors`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from shardlab.cost.compute_time import hbm_share
from shardlab.cost.matmul_time import grid_skip_errors, matmul_times, shape_of
from shardlab.hardware.data_files import load_chip, shipped
from shardlab.hardware.measured import (
    bandwidths,
    chip_tables,
    compute_constants,
    product_grid,
    single_products,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FitError:
    """|predicted / measured - 1| over a table's rows.

    held_out: whether a row that is compared took no part in its own price.
    """

    table: str
    rows: int
    mean: float
    worst: float
    held_out: bool


def fit_errors() -> tuple[FitError, ...]:
    """The error of every measured table. Of a grid: each inner point as priced from its neighbours alone."""
    grids = sorted({(row.table, row.dtype) for row in product_grid()})
    chips = sorted({(row.table, row.dtype) for row in single_products() if row.table in shipped("chips")})
    memories = sorted({row.chip for row in bandwidths()})
    return (
        *(_error(f"{table} {dtype} grid", grid_skip_errors(table, dtype), True) for table, dtype in grids),
        *(_products_error(chip, dtype) for chip, dtype in chips),
        *(_bandwidth_error(chip) for chip in memories),
    )


def _products_error(chip: str, dtype: str) -> FitError:
    tables, peak = chip_tables(chip), load_chip(chip).bf16_flops_per_s
    if tables is None or peak is None:
        raise ValueError(f"no tables price {chip}")
    times = matmul_times(load_chip(chip).family, tables, peak)
    rows = [row for row in single_products() if (row.table, row.dtype) == (chip, dtype)]
    errors = [abs(times.time_s(shape_of(row)) / row.time_s - 1) for row in rows]
    used = dtype in times.scale or tables.matmul == chip
    return _error(f"{chip} {dtype} products", errors, not used)


def _bandwidth_error(chip: str) -> FitError:
    """Bytes over the rate of the largest array, and the overhead of a kernel where the size is known."""
    known, errors = load_chip(chip), []
    overhead_s = float(compute_constants()[known.family]["kernel_s"])
    for row in bandwidths():
        if row.chip == chip:
            rate = (known.memory_bytes_per_s or 0.0) * hbm_share(chip, row.read_share)
            moved = 2 * (row.array_bytes or 0)
            predicted = moved / (moved / rate + overhead_s) if moved else rate
            errors.append(abs(row.bytes_per_s / predicted - 1))
    return _error(f"{chip} memory", errors, False)


def _error(table: str, errors: Sequence[float], held_out: bool) -> FitError:
    return FitError(table=table, rows=len(errors), mean=mean(errors), worst=max(errors), held_out=held_out)


def print_fit_errors() -> None:
    """One line per table."""
    for one in fit_errors():
        how = "held out" if one.held_out else "fitted"
        print(f"{one.table:22} {one.rows:4} rows  mean {one.mean:6.1%}  worst {one.worst:6.1%}  {how}")


if __name__ == "__main__":
    print_fit_errors()
