"""Machines by name: sizes, domains and torus links by hand; each impossible one with its message."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardlab.errors import UserError
from shardlab.hardware.catalog import ALIASES, load_machine, machine_names
from shardlab.hardware.data_files import load_gpu_target, shipped

GIB = 1 << 30


@pytest.mark.parametrize(
    ("spec", "devices", "domains"),
    [
        pytest.param("h100:64x8", 512, [("nvlink", 8), ("infiniband", 512)], id="hosts of eight"),
        pytest.param("dgx-h100:64x8", 512, [("nvlink", 8), ("infiniband", 512)], id="long name"),
        pytest.param("h100:1x8", 8, [("nvlink", 8)], id="one host has no network"),
        pytest.param("h100:8x1", 8, [("infiniband", 8)], id="one GPU a host has no NVLink"),
        pytest.param("h100:1x1", 1, [("nvlink", 1)], id="a single device keeps a domain"),
        pytest.param("h100:2x4", 8, [("nvlink", 4), ("infiniband", 8)], id="half-used hosts"),
        pytest.param("gb200:18x4", 72, [("nvlink", 72)], id="a rack is one NVLink domain"),
        pytest.param("gb200:36x4", 144, [("nvlink", 72), ("infiniband", 144)], id="two racks"),
        pytest.param("gb200:16x4", 64, [("nvlink", 64)], id="part of a rack"),
        pytest.param("rtx4090:1x2", 2, [("pcie", 2)], id="consumer cards"),
        pytest.param("v5p:8x8x8", 512, [("ici", 512)], id="v5p torus"),
        pytest.param("v5e:16x16*2", 512, [("ici", 256), ("dcn", 512)], id="two slices"),
        pytest.param("v5e:8x4", 32, [("ici", 32)], id="a 2-D slice either way round"),
        pytest.param("tpu7x:4x4x4", 128, [("ici", 128)], id="two devices a chip"),
        pytest.param("v4:4x4x4", 64, [("ici", 64)], id="v4 megacore"),
        pytest.param("cpu:8", 8, [("loopback", 8)], id="emulated"),
        pytest.param("attached:4", 4, [("loopback", 4)], id="attached"),
    ],
)
def test_devices_and_nested_domains(spec: str, devices: int, domains: list[tuple[str, int]]) -> None:
    machine = load_machine(spec)
    assert machine.spec == spec
    assert machine.num_devices == devices
    assert [(domain.tier, domain.size) for domain in machine.domains] == domains


@pytest.mark.parametrize(
    ("spec", "rates"),
    [
        pytest.param("a100:2x8", [300e9, 25e9], id="a100: NVLink 3, 200 Gbit/s"),
        pytest.param("h100:2x8", [450e9, 50e9], id="h100: NVLink 4, 400 Gbit/s"),
        pytest.param("b200:2x8", [900e9, 50e9], id="b200: NVLink 5, 400 Gbit/s"),
        pytest.param("v5e:8x8*2", [45e9, 25e9 / 8], id="v5e: 2 x 100 Gbit/s for 8 chips"),
        pytest.param("v5p:4x4x4*2", [90e9, 50e9 / 8], id="v5p: 50 Gbit/s a chip"),
        pytest.param("v6e:8x8*2", [90e9, 4 * 200e9 / 8 / 8], id="v6e: 4 x 200 Gbit/s for 8 chips"),
        pytest.param(
            "tpu7x:4x4x4*2", [100e9, 100e9 / 8 / 2], id="tpu7x: two devices share a chip's DCN, not its links"
        ),
        pytest.param("rtx4090:2x2", [31e9, None], id="no figure for a network that is not there"),
        pytest.param("cpu:2", [None], id="emulated links have no speed"),
    ],
)
def test_bandwidth_is_one_way_per_device(spec: str, rates: list[float | None]) -> None:
    assert [domain.bytes_per_s for domain in load_machine(spec).domains] == rates


@pytest.mark.parametrize(
    ("spec", "wraps"),
    [
        pytest.param("v5e:16x16", (True, True), id="full pod"),
        pytest.param("v5e:8x16", (False, True), id="only the full axis"),
        pytest.param("v5e:4x4", (False, False), id="lines"),
        pytest.param("v5p:4x4x4", (True, True, True), id="one cube"),
        pytest.param("v5p:4x8x12", (True, True, True), id="whole cubes"),
        pytest.param("v5p:2x4x4", (False, False, False), id="below a cube nothing wraps"),
    ],
)
def test_wraparound(spec: str, wraps: tuple[bool, ...]) -> None:
    machine = load_machine(spec)
    assert machine.wraps == wraps
    assert machine.torus == tuple(int(extent) for extent in spec.partition(":")[2].split("x"))


@pytest.mark.parametrize(
    ("spec", "limit", "source"),
    [
        pytest.param(
            "h100:1x8", 84_942_979_072 * 3 // 4, "JAX's default pool, 75% of the card", id="gpu pool"
        ),
        pytest.param("v5e:4x4", 63 * GIB // 4, "the compiler's own limit", id="v5e 15.75 GiB"),
        pytest.param("v4:4x4x4", 123 * GIB // 4, "the compiler's own limit", id="v4 30.75 GiB"),
        pytest.param("tpu7x:4x4x4", 9474 * GIB // 100, "the compiler's own limit", id="tpu7x half a chip"),
        pytest.param("cpu:8", None, "unknown", id="emulated"),
    ],
)
def test_memory_limit_of_one_device(spec: str, limit: int | None, source: str) -> None:
    chip = load_machine(spec).chip
    assert (chip.memory_limit_bytes, chip.memory_limit_source) == (limit, source)


def test_figures_of_a_chip_are_shared_by_its_devices() -> None:
    chip = load_machine("tpu7x:2x2x1").chip
    assert (chip.xla_devices, chip.bf16_flops_per_s, chip.memory_bytes_per_s) == (2, 2307e12 / 2, 7380e9 / 2)


def test_hosts_slices_and_families() -> None:
    assert load_machine("v5e:16x16*2").hosts == 2 * 256 // 8
    assert load_machine("v5e:16x16*2").devices_per_slice == 256
    assert load_machine("tpu7x:4x4x4").num_chips == 64
    families = [load_machine(spec).family for spec in ("h100:1x8", "v5p:2x2x1", "cpu:8", "attached:8")]
    assert families == ["gpu", "tpu", "cpu", "attached"]
    assert load_machine("cpu:8").emulated
    assert not load_machine("attached:8").emulated


KNOWN = f"known machines: {', '.join(machine_names())}, or the path of a machine file (.toml)"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("h100:4x16", "16 chips on a host that holds 1 to 8; write …:HOSTSx8 with more hosts"),
        ("h100:4x0", "0 chips on a host that holds 1 to 8; write …:HOSTSx8 with more hosts"),
        ("h100:0x8", "0 devices; use 1 to 1048576"),
        ("h100:9999999x8", "79999992 devices; use 1 to 1048576"),
        ("h100:8", "is not HOSTSxCHIPS; write h100:2x8"),
        ("h100", "is not HOSTSxCHIPS; write h100:2x8"),
        ("h100:2x8x8", "is not HOSTSxCHIPS; write h100:2x8"),
        ("h100:2x8*2", "is not HOSTSxCHIPS; write h100:2x8"),
        ("gb200:20x4", "20 hosts do not fill whole nvlink domains of 18 hosts; use 18 or 36 hosts"),
        ("v5e:3x7", "no slice has the shape 3x7; slice shapes: 4x4, 4x8, 2x4, 8x8, 2x2, 8x16, 16x16, 1x1"),
        (
            "v5e:16x32",
            "no slice has the shape 16x32; slice shapes: 16x16, 8x16, 8x8, 4x8, 4x4, 2x4, 2x2, 1x1",
        ),
        (
            "v5p:4x4x6",
            "no slice has the shape 4x4x6; slice shapes: 2x4x4, 2x2x4, 2x2x2, 2x2x1, "
            "or multiples of 4 on every axis up to 8960 chips",
        ),
        (
            "v4:32x16x16",
            "no slice has the shape 32x16x16; slice shapes: 2x4x4, 2x2x4, 2x2x2, 2x2x1, "
            "or multiples of 4 on every axis up to 4096 chips",
        ),
        ("v5e:16x16*0", "0 slices; use 1 to 4096"),
        ("v5e:sixteen", "is not TORUS or TORUS*SLICES; write v5e:16x16"),
        ("cpu", "no number of devices; write cpu:8"),
        ("cpu:0", "no number of devices; write cpu:8"),
        ("cpu:٣", "no number of devices; write cpu:8"),
        ("attached", "no number of devices; write attached:8"),
        ("h10:8x8", f"unknown machine 'h10'; did you mean 'h100'? {KNOWN}"),
        ("", f"unknown machine ''; {KNOWN}"),
    ],
)
def test_impossible_machines(spec: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_machine(spec)
    assert str(caught.value) == f"machine {spec!r}: {message}"


def test_every_shipped_machine_builds_and_every_gpu_can_be_described_to_the_compiler() -> None:
    for name in (*shipped("machines"), *ALIASES):
        full = ALIASES.get(name, name)
        size = {"v4": "4x4x4", "v5p": "4x4x4", "tpu7x": "4x4x4", "v5e": "4x4", "v6e": "4x4"}.get(full, "1x1")
        machine = load_machine(f"{name}:{size}")
        if machine.chip.compile_as is None:
            assert machine.chip.not_compiled_because
        elif machine.family == "gpu":
            target = load_gpu_target(str(machine.chip.compile_as))
            assert target.device_memory_size == machine.chip.memory_bytes


def test_h100_target_is_what_xla_ships() -> None:
    target = load_gpu_target("h100")
    assert (target.compute_major, target.compute_minor, target.core_count) == (9, 0, 132)
    assert (target.memory_bandwidth, target.clock_rate_ghz) == (3_352_320_000_000, 1.98)


def test_a_tpu_is_no_gpu_target() -> None:
    with pytest.raises(UserError, match=r"^chip 'v5p': is not a GPU that XLA can compile for; choose a GPU$"):
        load_gpu_target("v5p")


MACHINE_FILE = """
description = "two boxes under a desk"
chip = "rtx4090"
hosts = 2
chips_per_host = 2
max_chips_per_host = 4
[[domain]]
tier = "pcie"
hosts = 1
bytes_per_s = 20e9
source = "measured"
[[domain]]
tier = "ethernet"
bytes_per_s = 1.25e9
latency_s = 50e-6
source = "10 Gbit/s"
"""


def test_a_machine_file_of_the_users(tmp_path: Path) -> None:
    path = tmp_path / "desk.toml"
    path.write_text(MACHINE_FILE)
    machine = load_machine(str(path))
    assert [(d.tier, d.size, d.bytes_per_s, d.latency_s) for d in machine.domains] == [
        ("pcie", 2, 20e9, None),
        ("ethernet", 4, 1.25e9, 50e-6),
    ]
    assert load_machine(f"{path}:4x4").num_devices == 16


def test_links_are_switched_by_name(tmp_path: Path) -> None:
    path = tmp_path / "desk.toml"
    path.write_text(MACHINE_FILE)
    plain, swapped = load_machine("rtx4090:2x2"), load_machine("rtx4090+pcie4-x8+ethernet-10g:2x2")
    assert [domain.bytes_per_s for domain in plain.domains] == [31e9, None]
    # Eight lanes of sixteen; one port of 10 Gbit/s that two cards share.
    assert [domain.bytes_per_s for domain in swapped.domains] == [15.5e9, 10e9 / 8 / 2]
    assert load_machine(f"{path}+ethernet-1g").domains[1].bytes_per_s == 1e9 / 8 / 2
    assert [d.tier for d in load_machine("h100+ethernet-100g:2x8").domains] == ["nvlink", "ethernet"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rtx4090+pcie4-x9:1x2", "unknown link 'pcie4-x9'; did you mean 'pcie4-x8'?"),
        ("h100+ici-v5p:2x8", "ici joins no chips here; write a machine file"),
        ("v5p+pcie4-x8:4x4x4", "pcie joins no chips here; write a machine file"),
        ("v5p+wan-1g:4x4x4*2", "wan joins no chips here; write a machine file"),
    ],
)
def test_links_that_do_not_fit(spec: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_machine(spec)
    assert str(caught.value).startswith(f"machine {spec!r}: {message}")


def test_sites_share_their_uplink() -> None:
    """Four hosts of eight in a site of 10 Gbit/s; INTELLECT-1: one host in each of 14 sites."""
    sites = load_machine("h100-sites:8x8")
    assert [(domain.tier, domain.size) for domain in sites.domains] == [
        ("nvlink", 8), ("infiniband", 32), ("wan", 64),
    ]  # fmt: skip
    assert sites.domains[2].bytes_per_s == 1.25e9 / 32
    assert [domain.size for domain in load_machine("intellect1").domains] == [8, 112]
    assert load_machine("aws-p5:2x8").price_per_hour_usd == 39.33


def test_a_link_and_figures_of_one_s_own(tmp_path: Path) -> None:
    """A domain takes what its link file says, but what it says itself."""
    path = tmp_path / "mine.toml"
    path.write_text(
        'chip = "h100"\nmax_chips_per_host = 8\n[[domain]]\nlink = "nvlink4"\nhosts = 1\n'
        'bytes_per_s = 400e9\nsource = "measured"\n'
        '[domain.calibration]\nefficiency = 0.9\nsource = "measured"\n'
    )
    (link,) = load_machine(f"{path}:1x8").domains
    named = load_machine("h100:1x8").domains[0]
    assert (link.bytes_per_s, link.calibration.efficiency) == (400e9, 0.9)
    assert (link.latency_s, link.calibration.launch_s) == (named.latency_s, named.calibration.launch_s)
    assert link.source.startswith("measured; ")


def test_mistakes_of_a_link_in_a_machine_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'chip = "h100"\nmax_chips_per_host = 8\n[[domain]]\nlink = "nvlink44"\n'
        "uplink_bytes_per_s = 1e9\nbytes_per_s = 1e9\n[domain.calibration]\nefficiency = 0\n"
    )
    with pytest.raises(UserError) as caught:
        load_machine(f"{path}:2x8")
    listed = ", ".join(shipped("links"))
    assert str(caught.value).splitlines() == [
        f"{path}:8: domain.calibration.efficiency: 0 is not positive",
        f"{path}:7: domain.calibration: 'source' is missing; add source = …",
        f"{path}:6: domain.bytes_per_s: a rate per device beside one per uplink; give one of the two",
        f"{path}:4: domain.link: unknown link 'nvlink44'; did you mean 'nvlink4'? known: {listed}",
    ]


def test_every_mistake_of_a_machine_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "desk.toml"
    path.write_text(
        'chip = "rtx4091"\nhosts = -2\nspeed = 3\n'
        '[[domain]]\ntier = "thunderbolt"\nbytes_per_s = "fast"\n'
        "[torus]\nmax_chips = 4\nshapes = [[2], [2, 2]]\n"
    )
    with pytest.raises(UserError) as caught:
        load_machine(str(path))
    tiers = "nvlink, xgmi, pcie, infiniband, ethernet, ici, dcn, wan, loopback"
    chips = ", ".join(shipped("chips"))
    fix = "write extents of two or three axes each: [[2, 2], [2, 4]]"
    keys = (
        "description, chip, hosts, chips_per_host, max_chips_per_host, source, domain, torus, "
        "power_static_w, power_active_w, price_per_hour_usd, shares_cores"
    )
    assert str(caught.value).splitlines() == [
        f"{path}:3: speed: unknown key; known keys: {keys}",
        f"{path}:2: hosts: -2 is not positive",
        f"{path}: 'max_chips_per_host' is missing; add max_chips_per_host = …",
        f"{path}:1: chip: unknown chip 'rtx4091'; did you mean 'rtx4090'? known: {chips}",
        f"{path}:9: torus.shapes: is not a list of shapes; {fix}",
        f"{path}:6: domain.bytes_per_s: 'fast' is not a number",
        f"{path}:4: domain: 'source' is missing; add source = …",
        f"{path}:5: domain.tier: unknown tier 'thunderbolt'; known: {tiers}",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"chip = ", ":1: not TOML: invalid value", id="syntax"),
        pytest.param(b"\xff\xfe", ": not UTF-8 text; give the path of a TOML file", id="binary"),
        pytest.param(
            b"a" * (1 << 21), ": larger than 1 MiB; this is not a file that a person wrote", id="huge"
        ),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "desk.toml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_machine(str(path))
    assert str(caught.value) == f"{path}{message}"


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path, why in ((tmp_path / "no.toml", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError) as caught:
            load_machine(f"{path}")
        assert str(caught.value) == f"{path}: {why}; give the path of a TOML file"
