"""Machines whose links are as fast as their datasheets say and wait for nothing: times by hand are bytes over
bandwidth. What latency and measured efficiency add is tested in cost/test_collective_time.py.
"""

from __future__ import annotations

from dataclasses import replace

from shardlab.hardware.catalog import load_machine
from shardlab.hardware.machine import Calibration, Machine


def bare(spec: str) -> Machine:
    """The machine without latency, launches or calibration."""
    machine = load_machine(spec)
    links = (replace(one, latency_s=None, calibration=Calibration()) for one in machine.domains)
    return replace(machine, domains=tuple(links))
