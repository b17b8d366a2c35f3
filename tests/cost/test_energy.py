"""Power of nodes: two MLPerf submissions give the line, the others are held against it."""

from __future__ import annotations

import pytest

from shardlab.cost.energy import Energy, power_line, step_energy
from shardlab.cost.flops import model_flops
from shardlab.hardware.catalog import load_machine
from shardlab.hardware.data_files import load_chip
from shardlab.hardware.measured import MeasuredPower, node_powers
from shardlab.spec.models import MODELS

MACHINES = {"immersion": "hgx-h100-immersion", "air": "h100"}
H100 = [row for row in node_powers() if row.chip == "h100"]
TOLERANCE = 0.15


def training_flops(row: MeasuredPower) -> float:
    """GPT-3 trains every weight. LoRA's base weights are frozen: their products run forward and for the
    gradient of their inputs, two of the three times; attention has no weights and runs all three."""
    if row.workload == "gpt3":
        return model_flops(MODELS["gpt3-175b"], row.batch, row.seq, "train")
    config = MODELS["llama2-70b"]
    whole = model_flops(config, row.batch, row.seq, "train")
    # Causal: half of the pairs; scores and values, 2 FLOPs a pair and dimension each, three times.
    attention = 6 * config.layers * config.heads * config.head_dim * row.seq**2 * row.batch
    return (whole - attention) * 2 / 3 + attention


def busy(row: MeasuredPower) -> float:
    """Share of the f8 peak, in which all of these trained."""
    peak = 2 * (load_chip("h100").bf16_flops_per_s or 0)
    return training_flops(row) / row.accelerators / row.step_time_s / peak


def test_the_machines_figures_are_the_line_through_the_two_fitted_rows() -> None:
    fitted = sorted((busy(row), row.node_power_w) for row in H100 if row.scored == "fitted")
    assert len(fitted) == 2
    assert fitted[0][0] == min(map(busy, H100))
    assert fitted[1][0] == max(map(busy, H100))
    static, active = power_line(*fitted)
    machine = load_machine("hgx-h100-immersion:1x8")
    assert (machine.power_static_w, machine.power_active_w) == (round(static), round(active))
    air = load_machine("h100:1x8")
    fans = (3_400 + 3_800) / 2 - (2_300 + 2_800) / 2  # readings outside the timed runs of the same logs
    assert (air.power_static_w, air.power_active_w) == (round(static) + fans, round(active))


SCORED = [row for row in H100 if row.scored == "scored"]


@pytest.mark.parametrize("row", SCORED, ids=[f"{row.system}-{row.workload}" for row in SCORED])
def test_the_other_nodes_are_within_15_percent(row: MeasuredPower) -> None:
    machine = load_machine(f"{MACHINES[row.cooling]}:{row.nodes}x8")
    energy = step_energy(machine, row.step_time_s, busy(row), row.batch * row.seq)
    assert energy.energy_j is not None
    measured_j = row.node_power_w * row.nodes * row.step_time_s
    assert energy.energy_j == pytest.approx(measured_j, rel=TOLERANCE)


def test_seven_rows_are_scored() -> None:
    assert len(SCORED) == 7 == len(H100) - 2


def test_energy_and_price_are_of_all_hosts() -> None:
    machine = load_machine("aws-p5:2x8")  # has a price and no power
    assert machine.price_per_hour_usd is not None
    energy = step_energy(machine, 1.8, 0.4, 1_000)
    price = 2 * machine.price_per_hour_usd / 2_000
    assert energy == Energy(
        price_usd=pytest.approx(price), usd_per_million_tokens=pytest.approx(price * 1_000)
    )
    immersed = step_energy(load_machine("hgx-h100-immersion:2x8"), 2.0, 0.5, 100)
    watts = 3_576 + 8_145 / 2
    assert immersed.node_power_w == pytest.approx(watts)
    assert immersed.energy_j == pytest.approx(2 * 2.0 * watts)
    assert immersed.joules_per_token == pytest.approx(2 * 2.0 * watts / 100)
