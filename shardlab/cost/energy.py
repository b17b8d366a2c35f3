"""Power, energy and money of a step: what nodes draw while idle, and more the harder their chips multiply.

A node draws `power_static_w`, and `power_active_w` times the share of the chips' peak that the step's
products reach, each against the peak of its own type. Waiting on the network costs nearly as much as working
(Fernandez et al., arXiv:2411.13055: throughput per GPU fell by 37 %, power by 6 %), hence the large static
part. Both figures of the H100 machines lie on the line through two of the MLPerf submissions in
`hardware/data/measured/node_power.csv`, those with the least and the most FLOP/s per GPU; the others are the
test (`tests/cost/test_energy.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from shardlab.hardware.machine import Machine

SECONDS_PER_HOUR = 3_600


@dataclass(frozen=True, slots=True, kw_only=True)
class Energy:
    """Of one step on all hosts; None where the machine has no figure for it.

    node_power_w: mean of one host with its chips, switches outside it left out. price_usd: at the machine's
    price per hour.
    """

    node_power_w: float | None = None
    energy_j: float | None = None
    joules_per_token: float | None = None
    price_usd: float | None = None
    usd_per_million_tokens: float | None = None


def step_energy(machine: Machine, step_time_s: float, busy: float, tokens: int | None) -> Energy:
    """busy: share of the chips' peak that the step's products reach, 0 to 1 (`peak_s` of them over the step
    time). tokens: of the global batch; of a decode step one per sequence; None where nobody knows."""
    found = Energy()
    static, active = machine.power_static_w, machine.power_active_w
    if static is not None and active is not None:
        power = static + active * busy
        energy_j = power * machine.hosts * step_time_s
        found = Energy(node_power_w=power, energy_j=energy_j, joules_per_token=_per(energy_j, tokens))
    if machine.price_per_hour_usd is None:
        return found
    price = machine.price_per_hour_usd * machine.hosts * step_time_s / SECONDS_PER_HOUR
    return Energy(
        node_power_w=found.node_power_w,
        energy_j=found.energy_j,
        joules_per_token=found.joules_per_token,
        price_usd=price,
        usd_per_million_tokens=_per(price * 1e6, tokens),
    )


def _per(amount: float, tokens: int | None) -> float | None:
    return None if tokens is None else amount / tokens


def power_line(least: tuple[float, float], most: tuple[float, float]) -> tuple[float, float]:
    """(static, active) watts of the line through two nodes' (busy share, watts)."""
    active = (most[1] - least[1]) / (most[0] - least[0])
    return least[1] - active * least[0], active
