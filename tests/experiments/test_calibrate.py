"""The machine file of what is attached: eight emulated devices here; its figures against what they mean."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import calibrate
import pytest
from absl.testing import flagsaver
from calibrate import Measured, chip_rates, error_lines, link_of, machine_text

from shardlab.cost.compute_time import compute_times
from shardlab.cost.products import MatmulShape
from shardlab.hardware.catalog import load_machine
from shardlab.hardware.data_files import load_chip


def collective(payload: int, launch_s: float, rate: float, kind: str = "all-reduce") -> Measured:
    sent = payload * 7 / 8 * (2 if kind == "all-reduce" else 1)
    return Measured(what=kind, amount=sent, time_s=launch_s + sent / rate, payload_bytes=payload)


def test_a_link_that_obeys_the_formula_is_found() -> None:
    found = [collective(1 << n, 20e-6, 300e9) for n in (10, 20, 30)]
    assert link_of(found) == (pytest.approx(20e-6), pytest.approx(300e9))


@pytest.mark.parametrize(
    "found",
    [[collective(1 << 20, 1e-5, 1e9)], [Measured(what="x", amount=a, time_s=1 / a) for a in (1.0, 2.0, 4.0)]],
    ids=["one size", "larger is faster"],
)
def test_a_link_that_cannot_be_told_is_an_error(found: list[Measured]) -> None:
    with pytest.raises(ValueError, match="collectives"):
        link_of(found)


def test_a_known_chip_that_does_what_its_tables_say_keeps_its_rates() -> None:
    """A stream at the measured 2.9 TB/s of a copy, and products as fast as the tables: H100 as shipped; half
    as fast, half of it."""
    chip = load_chip("h100")
    times = compute_times(chip)
    assert times is not None and chip.bf16_flops_per_s is not None and chip.memory_bytes_per_s is not None
    for slower in (1, 2):
        found = [
            Measured(
                what="", amount=2.0 * e**3, edge=e,
                time_s=slower * times.matmul.time_s(MatmulShape(1, e, e, e, "bf16")),
            )
            for e in (2_048, 8_192)
        ]  # fmt: skip
        rates = chip_rates("h100", found, Measured(what="copy", amount=2.9e12, time_s=slower))
        assert rates == pytest.approx((chip.bf16_flops_per_s / slower, chip.memory_bytes_per_s / slower))


def test_eight_emulated_devices_make_a_machine_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.toml"
    if not calibrate.flags.FLAGS.is_parsed():
        calibrate.flags.FLAGS(sys.argv[:1])
    with flagsaver.flagsaver(out=str(file), small=True, chip="", tier=""):
        calibrate.main(["calibrate.py"])
    printed = capsys.readouterr().out
    machine = load_machine(str(file))
    (link,) = machine.domains
    assert (machine.num_devices, machine.family, link.tier) == (8, "cpu", "loopback")
    assert printed.count(" us, ") == 2 + 1 + 3 * 3
    # The best product and the copy are the chip's rates, to the four digits of the file.
    best = max(float(line.split()[-2]) for line in printed.splitlines() if "FLOP/s" in line)
    assert machine.chip.bf16_flops_per_s == pytest.approx(best, rel=6e-3)
    assert link.bytes_per_s is not None and link.calibration.launch_s is not None
    assert "measured on 8 x cpu" in link.source
    assert "off on average" in printed


def test_the_file_prices_what_it_was_made_of(tmp_path: Path) -> None:
    """Collectives that obey launch + bytes / rate come back without error, an all-gather that takes twice as
    long as that is half of it."""
    found = [collective(1 << n, 20e-6, 300e9) for n in (16, 20, 24, 28)]
    product = Measured(what="product 256^3", amount=2.0 * 256**3, time_s=1e-3, edge=256)
    copy = Measured(what="copy", amount=1e9, time_s=1e-2)
    measured = {"products": [product], "memory": [copy], "collectives": found}
    file = tmp_path / "mine.toml"
    file.write_text(machine_text(measured, "", "nvlink", "on a desk, 2026-01-01"), encoding="utf-8")
    machine = load_machine(str(file))
    gathers = [collective(1 << n, 20e-6, 300e9, "all-gather") for n in (16, 20, 24, 28)]
    slow = [replace(one, time_s=2 * one.time_s) for one in gathers]
    lines = list(error_lines(machine, [*found, *slow]))
    assert lines == [
        "all-reduce: 0% off on average, worst +0%",
        "all-gather: 50% off on average, worst -50%",
    ]
