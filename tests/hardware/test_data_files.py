"""The shipped data: every figure has a source, and copies of published tables are what they say."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from shardlab.hardware.data_files import DATA, load_chip

CHIPS = sorted((DATA / "chips").glob("*.toml"))
MACHINES = sorted((DATA / "machines").glob("*.toml"))


def read(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", CHIPS, ids=lambda path: path.stem)
def test_every_figure_of_a_chip_has_a_source(path: Path) -> None:
    table = read(path)
    figures = {key for key, value in table.items() if isinstance(value, (int, float))}
    assert figures == set(table["source"])
    assert all(table["source"].values())
    if table["family"] == "gpu":
        assert table["gpu_target"]["source"]


@pytest.mark.parametrize("path", MACHINES, ids=lambda path: path.stem)
def test_every_figure_of_a_machine_has_a_source(path: Path) -> None:
    table = read(path)
    assert table["source"]["max_chips_per_host"]
    assert all(domain["source"] for domain in table["domain"])
    assert "torus" not in table or table["torus"]["source"]


@pytest.mark.parametrize("path", [*CHIPS, *MACHINES], ids=lambda path: path.stem)
def test_keys_carry_their_units(path: Path) -> None:
    table = read(path)
    unitless = {
        "xla_devices",
        "pool_fraction",
        "max_chips_per_host",
        "max_chips",
        "cube",
        "wrap_extent",
        "hosts",
        "slices",
    }
    tables = [table, table.get("torus", {}), *table.get("domain", [])]
    figures = {key for part in tables for key, value in part.items() if isinstance(value, (int, float))}
    assert all(key.endswith(("_bytes", "_per_s", "_s", "_w")) for key in figures - unitless)


# bf16 dense TFLOP/s and memory GB/s per chip: vendors' pages and XLA's target descriptions, as quoted in the
# files.
PUBLISHED = {
    "a100": (312, 2039.04),
    "a100-40": (312, 1555.2),
    "h100": (989.5, 3352.32),
    "h200": (989, 4800),
    "b200": (2250, 7672.32),
    "gb200": (2500, 7928.064),
    "rtx4090": (165.2, 1008),
    "rtx3090": (71, 936),
    "v4": (275, 1200),
    "v5e": (197, 819),
    "v5p": (459, 2765),
    "v6e": (918, 1638),
    "tpu7x": (2307, 7380),
}


@pytest.mark.parametrize("path", CHIPS, ids=lambda path: path.stem)
def test_published_peaks(path: Path) -> None:
    chip = load_chip(path.stem)
    tflops, gb_per_s = PUBLISHED[path.stem]
    assert chip.bf16_flops_per_s is not None
    assert chip.memory_bytes_per_s is not None
    assert chip.bf16_flops_per_s * chip.xla_devices == pytest.approx(tflops * 1e12, rel=1e-12)
    assert chip.memory_bytes_per_s * chip.xla_devices == pytest.approx(gb_per_s * 1e9, rel=1e-12)
