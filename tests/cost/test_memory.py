import pytest

from shardlab.cost.memory import memory_report
from shardlab.hardware.machine import Chip, Domain, Machine
from shardlab.program import Memory, Refusal

GB = 10**9
LINK = (Domain(tier="nvlink", size=8, bytes_per_s=450e9),)
H100 = Chip(name="H100", family="gpu", memory_bytes=80 * GB, pool_fraction=0.75)
V5E = Chip(name="v5e", family="tpu", memory_bytes=16 * GB)
CPU = Chip(name="cpu", family="cpu", memory_bytes=None)


def machine(chip, emulated=False):
    return Machine(spec=chip.name, chip=chip, num_devices=8, domains=LINK, emulated=emulated)


@pytest.mark.parametrize(
    ("peak", "fits", "deficit"),
    [
        pytest.param(10 * GB, "yes", 0, id="fits"),
        pytest.param(55_200_000_000, "yes", 0, id="exactly-92-percent-of-60-GB"),
        pytest.param(55_200_000_001, "tight", 0, id="just-above"),
        pytest.param(60 * GB, "tight", 0, id="exactly-the-pool"),
        pytest.param(60 * GB + 1, "no", 1, id="one-byte-too-many"),
        pytest.param(75 * GB, "no", 15 * GB, id="fits-the-card-but-not-the-pool"),
    ],
)
def test_gpu_limit_is_the_default_pool(peak, fits, deficit):
    report = memory_report(Memory(argument_bytes=5, temp_bytes=6, peak_bytes=peak), None, machine(H100))
    assert (report.peak_bytes, report.limit_bytes) == (peak, 60 * GB)  # 75 % of 80 GB
    assert (report.fits, report.deficit_bytes) == (fits, deficit)
    assert (report.argument_bytes, report.temp_bytes) == (5, 6)
    assert "75%" in report.limit_source


def test_refused_by_the_compiler():
    # CompileTimeHbmOom 33.09G > 15.75G
    refusal = Refusal(needed_bytes=35_530_117_775, limit_bytes=16_911_433_728)
    report = memory_report(None, refusal, machine(V5E))
    assert (report.fits, report.deficit_bytes) == ("no", 35_530_117_775 - 16_911_433_728)
    assert report.limit_bytes == 16_911_433_728
    assert report.argument_bytes is None
    assert "compiler" in report.limit_source


def test_what_the_tpu_compiler_accepted_is_never_said_not_to_fit():
    report = memory_report(Memory(peak_bytes=17 * GB), None, machine(V5E))
    assert (report.fits, report.deficit_bytes) == ("tight", 0)
    assert report.note


def test_emulated_devices_have_no_limit():
    report = memory_report(
        Memory(argument_bytes=1, temp_bytes=2, peak_bytes=3), None, machine(CPU, emulated=True)
    )
    assert (report.peak_bytes, report.limit_bytes, report.deficit_bytes, report.fits) == (3, None, None, None)
    assert "emulated" in report.limit_source


def test_peak_from_its_parts_is_noted():
    memory = Memory(argument_bytes=40 * GB, output_bytes=41 * GB, alias_bytes=38 * GB, temp_bytes=7 * GB)
    report = memory_report(memory, None, machine(H100))
    assert report.peak_bytes == 50 * GB  # 40 + 41 - 38 + 7
    assert (report.fits, "no peak" in report.note) == ("yes", True)


@pytest.mark.parametrize("memory", [None, Memory(), Memory(argument_bytes=5), Memory(temp_bytes=5)])
def test_unknown_memory_is_unknown(memory):
    report = memory_report(memory, None, machine(H100))
    assert (report.peak_bytes, report.deficit_bytes, report.fits) == (None, None, None)
    assert report.note


def test_what_is_offloaded_does_not_fill_the_device():
    # Llama 3 70B on v6e:16x16 with remat = "offload": 3.3 + 17.4 GB on a chip of 31.25 GiB, 50 on its host.
    memory = Memory(argument_bytes=3 * GB, temp_bytes=17 * GB, peak_bytes=53 * GB, host_bytes=50 * GB)
    report = memory_report(memory, None, machine(H100))
    assert (report.peak_bytes, report.needed_bytes, report.fits) == (20 * GB, 20 * GB, "yes")
    assert report.host_bytes == 50 * GB
    assert "host's memory" in report.note


def test_nothing_on_the_host_leaves_the_peak_as_it_is():
    memory = Memory(argument_bytes=3 * GB, temp_bytes=17 * GB, peak_bytes=53 * GB, host_bytes=0)
    report = memory_report(memory, None, machine(H100))
    assert (report.peak_bytes, report.host_bytes, report.note) == (53 * GB, None, "")


def test_gaps_in_the_temporary_block_count():
    # Donated state: arguments 20 + outputs 20 - aliases 20 + temporaries 41 = 61 GB, of a 60 GB pool; live
    # at once: 50.
    memory = Memory(
        argument_bytes=20 * GB,
        output_bytes=20 * GB,
        alias_bytes=20 * GB,
        temp_bytes=41 * GB,
        peak_bytes=50 * GB,
    )
    report = memory_report(memory, None, machine(H100))
    assert (report.peak_bytes, report.fits, report.deficit_bytes) == (50 * GB, "no", 1 * GB)
    assert "61 GB" in report.note


def test_a_peak_without_temporaries_is_not_what_is_needed():
    # XLA:CPU's peak leaves the temporaries out: 187 of 187 + 742 here.
    memory = Memory(argument_bytes=187, output_bytes=180, alias_bytes=180, temp_bytes=742, peak_bytes=187)
    report = memory_report(memory, None, machine(CPU, emulated=True))
    assert (report.peak_bytes, report.needed_bytes) == (187, 929)


def test_gaps_that_change_nothing_are_not_noted():
    memory = Memory(argument_bytes=10 * GB, temp_bytes=12 * GB, peak_bytes=20 * GB)
    report = memory_report(memory, None, machine(H100))
    assert (report.peak_bytes, report.fits, report.note) == (20 * GB, "yes", "")
