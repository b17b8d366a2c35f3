"""Machines as nested domains of chips: what a plan is put on. Pure records; `catalog.py` loads them from data
files.

Device ids: 0 … num_devices-1. GPUs and emulated devices count host by host. TPU ids are slice * devices per
slice + the id within the slice, which counts the torus with x fastest (what libtpu does).
"""

from __future__ import annotations

from dataclasses import dataclass

NETWORKS = frozenset({"infiniband", "ethernet", "wan"})  # tiers, over cards and switches


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """One accelerator. Every figure's source stands in the data file beside it.

    Memory, bandwidth and FLOP/s are per JAX device: the chip's, divided by xla_devices (JAX devices per
    chip).
    memory_bytes: usable device memory as the compiler sees it; pool_fraction: what JAX's allocator takes of
    it.
    dot_bf16_flops_per_s: of bf16 products that XLA:CPU leaves as a bare `dot`, which Eigen runs, without a
    bf16 kernel; None: as fast as the others.
    compile_as: the compile target (`h100`), None when no compiler here has one, `not_compiled_because` says
    why. power_w: per chip.
    """

    name: str
    family: str  # gpu | tpu | cpu
    memory_bytes: int | None
    pool_fraction: float = 1.0
    bf16_flops_per_s: float | None = None
    memory_bytes_per_s: float | None = None
    xla_devices: int = 1
    compile_as: str | None = None
    not_compiled_because: str = ""
    memory_source: str = ""
    power_w: float | None = None
    dot_bf16_flops_per_s: float | None = None

    @property
    def memory_limit_bytes(self) -> int | None:
        """What a program may use of one device: memory_bytes x pool_fraction, rounded down; None: unknown."""
        return None if self.memory_bytes is None else int(self.memory_bytes * self.pool_fraction)

    @property
    def memory_limit_source(self) -> str:
        """Where the limit comes from, for reports."""
        if self.memory_bytes is None:
            return "unknown"
        pool = f"JAX's default pool, {self.pool_fraction:.0%} of the card"
        return "the compiler's own limit" if self.pool_fraction == 1.0 else pool


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuTarget:
    """What XLA's GPU compiler wants to know of a GPU it cannot see: the fields of `GpuTargetConfigProto`.

    Names and units are the proto's: sizes in bytes, memory_bandwidth in bytes/s, clock_rate_ghz in GHz.
    """

    device_description_str: str
    compute_major: int
    compute_minor: int
    core_count: int
    fpus_per_core: int
    shared_memory_per_core: int
    shared_memory_per_block_optin: int
    l2_cache_size: int
    memory_bandwidth: int
    clock_rate_ghz: float
    device_memory_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What measured collectives say of a link beyond its rate and its latency per step.

    `cost.collective_time` has the formulas. The defaults are a link that is as fast as its datasheet.
    efficiency: the share of bytes_per_s that large messages reach. launch_s: before the first byte; None
    where nobody measured it, and then it is not part of the time.
    fill: seconds lost while a pipeline of chunks fills, in √(latency · transfer time). own_piece: time for a
    device's own piece of the array, as a share of the time to send one.
    switch_latency_s, switch_efficiency: reductions inside the switch (NVLS), bytes of the array per second
    over bytes_per_s; None where there are none. chunk_bytes, chunk_s: a network sends in chunks, each
    prepared for this long.
    """

    efficiency: float = 1.0
    launch_s: float | None = None
    fill: float = 0.0
    own_piece: float = 0.0
    switch_latency_s: float | None = None
    switch_efficiency: float | None = None
    chunk_bytes: int | None = None
    chunk_s: float | None = None


AS_RATED = Calibration()


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """One level of the nest: `size` devices that reach each other over `tier`.

    bytes_per_s: one way, per device; for ICI per link direction of a chip. None when unknown (emulated,
    attached, or a network that the machine's description does not name).
    pair_bytes_per_s: what two devices alone reach where each pair has wires of its own (a full mesh).
    latency_s: per step of a collective.
    """

    tier: str  # nvlink xgmi pcie infiniband ethernet ici dcn wan loopback
    size: int
    bytes_per_s: float | None
    latency_s: float | None = None
    pair_bytes_per_s: float | None = None
    calibration: Calibration = AS_RATED
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Chips and how they are joined; `domains` from the innermost (fastest) outwards, sizes dividing each
    other.

    spec: as the user wrote it (`h100:64x8`, `v5e:16x16*2`, `cpu:8`).
    shared_cores: cores that the hosts take in turn where they are parts of one computer; None: they are not.
    torus: TPU torus extents of one slice in chips, () otherwise; wraps: which of them have wraparound links.
    power_static_w, power_active_w, price_per_hour_usd: of one host with its chips, where a source says
    (`cost/energy.py` says what the first two mean).
    """

    spec: str
    chip: Chip
    num_devices: int
    domains: tuple[Domain, ...]
    hosts: int = 1
    slices: int = 1
    torus: tuple[int, ...] = ()
    wraps: tuple[bool, ...] = ()
    emulated: bool = False
    attached: bool = False
    shared_cores: int | None = None
    power_static_w: float | None = None
    power_active_w: float | None = None
    price_per_hour_usd: float | None = None

    @property
    def num_chips(self) -> int:
        """Chips over all slices and hosts."""
        return self.num_devices // self.chip.xla_devices

    @property
    def devices_per_slice(self) -> int:
        """JAX devices in one TPU slice; all of them where there are no slices."""
        return self.num_devices // self.slices

    @property
    def family(self) -> str:
        """The compile family: `gpu`, `tpu`, `cpu` or `attached`."""
        return "attached" if self.attached else self.chip.family
