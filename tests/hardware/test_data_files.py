"""The shipped data: every figure has a source, and copies of published tables are what they say."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from shardlab.hardware.data_files import DATA, load_chip, load_link
from shardlab.hardware.file_checks import link_problems
from shardlab.hardware.toml_file import key_lines

CHIPS = sorted((DATA / "chips").glob("*.toml"))
LINKS = sorted((DATA / "links").glob("*.toml"))
MACHINES = sorted((DATA / "machines").glob("*.toml"))


def read(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", CHIPS, ids=lambda path: path.stem)
def test_every_figure_of_a_chip_has_a_source(path: Path) -> None:
    table = read(path)
    figures = {key for key, value in table.items() if isinstance(value, (int, float))}
    assert figures == set(table["source"])
    assert all(table["source"].values())
    if "compile_as" not in table:
        assert table["not_compiled_because"]
    elif table["family"] == "gpu":
        assert table["gpu_target"]["source"]


@pytest.mark.parametrize("path", MACHINES, ids=lambda path: path.stem)
def test_every_figure_of_a_machine_has_a_source(path: Path) -> None:
    table = read(path)
    assert {key for key, value in table.items() if isinstance(value, (int, float))} == set(table["source"])
    assert all(table["source"].values())
    assert all("link" in domain or domain["source"] for domain in table["domain"])
    assert "torus" not in table or table["torus"]["source"]


@pytest.mark.parametrize("path", LINKS, ids=lambda path: path.stem)
def test_every_figure_of_a_link_has_a_source(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert link_problems(read(path), path.name, key_lines(text)) == []
    rule = load_link(path.stem)
    assert rule.bytes_per_s or rule.uplink_bytes_per_s
    assert rule.latency_s is None or "latency" in rule.source
    fitted = read(path).get("calibration", {"source": "none"})
    assert fitted["source"]


@pytest.mark.parametrize("path", [*CHIPS, *LINKS, *MACHINES], ids=lambda path: path.stem)
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
        "chips_per_host",
        "slices",
        # shares of one
        "efficiency",
        "fill",
        "own_piece",
        "switch_efficiency",
    }
    tables = [table, table.get("torus", {}), table.get("calibration", {}), *table.get("domain", [])]
    figures = {key for part in tables for key, value in part.items() if isinstance(value, (int, float))}
    assert all(key.endswith(("_bytes", "_per_s", "_s", "_w", "_usd")) for key in figures - unitless)


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
    "rtx5090": (209.5, 1792),
    "h800": (989, 3352.32),
    "h100-96": (989, 2400),
    "mi300x": (1307, 5300),
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
