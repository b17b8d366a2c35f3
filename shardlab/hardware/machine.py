"""Machines as nested domains of chips: what a plan is put on. Pure records; `catalog.py` loads them from data files.

Device ids: 0 … num_devices-1. GPUs and emulated devices count host by host. TPU ids are slice * devices per slice +
the id within the slice, which counts the torus with x fastest (what libtpu does).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """One accelerator. Every figure's source stands in the data file beside it.

    memory_bytes: usable device memory as the compiler sees it; pool_fraction: what JAX's allocator takes of it.
    xla_devices: JAX devices per chip. compile_as: the compile target (`h100`), None when no compiler here has one.
    """

    name: str
    family: str  # gpu | tpu | cpu
    memory_bytes: int | None
    pool_fraction: float = 1.0
    bf16_flops_per_s: float | None = None
    memory_bytes_per_s: float | None = None
    xla_devices: int = 1
    compile_as: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """One level of the nest: `size` devices that reach each other over `tier`.

    bytes_per_s: one way, per device; for ICI per link direction of a chip. None when unknown (emulated).
    """

    tier: str  # nvlink pcie infiniband ethernet ici dcn wan loopback
    size: int
    bytes_per_s: float | None
    latency_s: float | None = None
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Chips and how they are joined; `domains` from the innermost (fastest) outwards, sizes dividing each other.

    spec: as the user wrote it (`h100:64x8`, `v5e:16x16*2`, `cpu:8`).
    torus: TPU torus extents of one slice in chips, () otherwise; wraps: which of them have wraparound links.
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

    @property
    def family(self) -> str:
        """The compile family: `gpu`, `tpu`, `cpu` or `attached`."""
        return "attached" if self.attached else self.chip.family
