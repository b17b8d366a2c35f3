"""Microbenchmarks as records: matrix products, memory and attention kernels that others measured.

The tables in `data/measured` name their sources; `cost.compute_time` interpolates them.
"""

from __future__ import annotations

import csv
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from shardlab.hardware.data_files import DATA

MEASURED = DATA / "measured"
ATTENTION_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True, slots=True)
class MeasuredProduct:
    """`batch` matrix products of [m, k] by [k, n], and the FLOP/s of all of them together.

    table: the grid or chip that it belongs to.
    """

    table: str
    dtype: str  # bf16 (fp16 too), f32, f8
    batch: int
    m: int
    n: int
    k: int
    flops_per_s: float

    @property
    def time_s(self) -> float:
        """Seconds that it took."""
        return 2 * self.batch * self.m * self.n * self.k / self.flops_per_s


@dataclass(frozen=True, slots=True)
class MeasuredBandwidth:
    """A kernel that only moves memory. read_share: bytes read of all bytes moved.

    array_bytes: of the array that is copied; None where the source says no more than that it is large.
    """

    chip: str
    operation: str
    read_share: float
    array_bytes: int | None
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class MeasuredAttention:
    """A fused attention kernel: FLOP/s by sequence length; of a causal mask the half of the pairs counts."""

    chip: str
    kernel: str
    backward: bool
    causal: bool
    head_dim: int
    flops_per_s: Mapping[int, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChipTables:
    """Which tables a chip is priced with.

    cores: streaming multiprocessors of a GPU. mxu: edge of a TPU's matrix unit. matmul: the grid (GPU) or
    the chip (TPU) whose curve is taken; measured: whether that is this chip's own. gemm, hbm, attention:
    the chip whose rows in these tables are taken. host_gb_per_s: to the host's memory, one way, per
    chip; None where no source says. s8_over_bf16: peak of 8-bit integers as a multiple of the bf16 peak;
    None for the family's.
    """

    name: str
    matmul: str
    hbm: str
    attention: str
    gemm: str
    cores: int = 0
    mxu: int = 0
    measured: bool = False
    host_gb_per_s: float | None = None
    s8_over_bf16: float | None = None
    source: str = ""


@cache
def product_grid() -> tuple[MeasuredProduct, ...]:
    """XLA's table of matrix products on a grid, sm_90 and sm_100."""
    return tuple(
        MeasuredProduct(
            row["table"],
            row["dtype"],
            int(row["batch"]),
            int(row["m"]),
            int(row["n"]),
            int(column[1:]),
            float(value) * 1e9,
        )
        for row in _rows("gpu_matmul_grid.csv")
        for column, value in row.items()
        if column[0] == "k"
    )


@cache
def single_products() -> tuple[MeasuredProduct, ...]:
    """Matrix products of any shape, `table` is the chip."""
    return tuple(
        MeasuredProduct(
            row["chip"],
            row["dtype"],
            1,
            int(row["m"]),
            int(row["n"]),
            int(row["k"]),
            float(row["tflops_per_s"]) * 1e12,
        )
        for row in _rows("gemm.csv")
    )


@cache
def bandwidths() -> tuple[MeasuredBandwidth, ...]:
    """Memory bandwidths per JAX device."""
    return tuple(
        MeasuredBandwidth(
            row["chip"],
            row["operation"],
            float(row["read_share"]),
            int(row["array_bytes"]) if row["array_bytes"] else None,
            float(row["gb_per_s"]) * 1e9,
        )
        for row in _rows("hbm.csv")
    )


@cache
def attention_kernels() -> tuple[MeasuredAttention, ...]:
    """Fused attention kernels."""
    return tuple(
        MeasuredAttention(
            row["chip"],
            row["kernel"],
            row["pass"] == "backward",
            row["causal"] == "yes",
            int(row["head_dim"]),
            {n: float(row[f"s{n}"]) * 1e12 for n in ATTENTION_LENGTHS if row[f"s{n}"]},
        )
        for row in _rows("attention.csv")
    )


@cache
def compute_constants() -> Mapping[str, Any]:
    """`compute.toml`: the constants beside the tables, as tables."""
    return tomllib.loads((MEASURED / "compute.toml").read_text("utf-8"))


def chip_tables(name: str) -> ChipTables | None:
    """Which tables price the chip with this compile target or name; None where nothing is near enough."""
    chips = compute_constants()["chip"]
    known = next((key for key in chips if key == name), None)
    if known is None:
        words = name.lower().replace("-", " ").split()
        known = next((key for key in chips if key in words), None)
    if known is None:
        return None
    return ChipTables(**({"name": known, "gemm": known} | chips[known]))


def cpu_tables(name: str) -> ChipTables:
    """Of CPU hosts, whose machine file has what was measured on them."""
    return ChipTables(name=name, matmul=name, hbm=name, attention=name, gemm=name, measured=True)


def _rows(file: str) -> list[dict[str, str]]:
    lines = (MEASURED / file).read_text("utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPower:
    """Mean power of a node during training. cooling: `immersion` nodes have no fans, `air` cooled ones do.

    scored: `fitted` for what the machines' figures were taken from, `scored` for what they are held against,
    `no figures` for chips without any.
    """

    system: str
    cooling: str
    workload: str
    chip: str
    nodes: int
    accelerators: int
    node_power_w: float
    step_time_s: float
    batch: int
    seq: int
    scored: str
    source: str


@cache
def node_powers() -> tuple[MeasuredPower, ...]:
    """The measured nodes."""
    numbers: dict[str, type[float]] = {"nodes": int, "accelerators": int, "batch": int, "seq": int}
    numbers |= {"node_power_w": float, "step_time_s": float}
    return tuple(
        MeasuredPower(**{key: numbers.get(key, str)(value) for key, value in row.items()})  # type: ignore[arg-type]
        for row in _rows("node_power.csv")
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepErrors:
    """|predicted / measured - 1| of published steps on one chip; worst_error_pct: with its sign."""

    rows: int
    mean_error_pct: float
    worst_error_pct: float
    sources: str
    date: str


@cache
def step_errors() -> Mapping[str, StepErrors]:
    """By the chip, as `chips/NAME.toml` names it. `experiments/validate.py --error_classes` writes them."""
    return {
        row["chip"]: StepErrors(
            rows=int(row["rows"]),
            mean_error_pct=float(row["mean_error_pct"]),
            worst_error_pct=float(row["worst_error_pct"]),
            sources=row["sources"],
            date=row["date"],
        )
        for row in _rows("step_errors.csv")
    }
