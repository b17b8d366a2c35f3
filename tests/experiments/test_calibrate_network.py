"""The README's table of errors is what the model does, and constants are the best near them; INTELLECT-1."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from validation.sites import implied_rates

from shardlab.cost.traffic import traffic_of
from shardlab.cost.wire import wire_of
from shardlab.hardware.catalog import load_machine

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "calibrate_network", ROOT / "experiments" / "calibrate_network.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_readme_states_the_errors_that_the_model_has(program: ModuleType) -> None:
    """Every line as computed now; every row of the data is in one, but those that are said to be left out."""
    rows = program.read()
    errors = list(program.fit_errors(rows))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [line for line in program.table_lines(errors) if line not in readme] == []
    left_out = [row for row in rows if row.key in program.EXCLUDED]
    assert {row.hardware for row in left_out} == {"V100"}
    assert sum(one.rows for one in errors) + len(left_out) == len(rows)


@pytest.mark.parametrize("link", ["nvlink3", "ici-tpu7x", "ici-v5e", "ici-v6e", "dcn-v6e", "efa-p6"])
def test_no_constant_is_better_a_tenth_away(program: ModuleType, link: str) -> None:
    chosen = [row for row in program.read() if row.key in program.FITTED[link]]
    tier, values = program.shipped_constants(link)
    here = program.loss(chosen, tier, values)
    for name, value in values.items():
        for factor in (0.9, 1.1):
            assert here < program.loss(chosen, tier, {**values, name: factor * value}), (name, factor)


@pytest.mark.parametrize(
    ("row", "gbit_per_s"), [("USA", "1.4"), ("USA + Europe", "0.39"), ("global", "0.32")]
)
def test_intellect1_implies_its_link_rates(program: ModuleType, row: str, gbit_per_s: str) -> None:
    rate = dict(implied_rates())[row]
    assert f"{rate * 8 / 1e9:.2g}" == gbit_per_s


@pytest.mark.parametrize(("link", "seconds"), [("usa", 103), ("europe", 382), ("global", 469)])
def test_a_machine_of_sites_gives_the_times_back(link: str, seconds: float) -> None:
    """10e9 int8 values, an eighth by each of a node's GPUs, over 14 nodes, and 26 waits of 50 ms."""
    machine = load_machine(f"intellect1+wan-intellect1-{link}:14x8")
    groups = [tuple(range(gpu, 112, 8)) for gpu in range(8)]
    share = 10**10 // 8
    wire = wire_of(kind="all-reduce", operand_bytes=share, result_bytes=share, groups=groups, pairs=())
    made = traffic_of(
        kind="all-reduce",
        payload_bytes=share,
        wire_bytes=wire.wire_bytes,
        groups=groups,
        pairs=(),
        machine=machine,
        device_ids=None,
    )
    assert made.tier == "wan"
    assert made.time_s == pytest.approx(seconds + 26 * 0.05, rel=1e-3)
