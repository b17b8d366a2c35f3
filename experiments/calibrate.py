"""Measures the attached devices: matrix products, memory and collectives; writes them as a machine file.

python experiments/calibrate.py --out=mine.toml && shardlab explain meshes/h100x8-fsdp8.toml --on mine.toml

On whatever JAX sees: GPUs or TPUs of one host, or emulated devices (XLA_FLAGS=
--xla_force_host_platform_device_count=8), whose figures are the processor's. A chip that shardlab has tables
of keeps their curves (--chip): its rates are those at which the curves meet what was measured. Every figure
in the file says what it was measured on, and when. A TPU's file has no torus: carry its rates into a copy of
the shipped machine.
"""

from __future__ import annotations

import datetime
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from absl import app, flags
from timing import timed_s

from shardlab.cost.collective_time import collective_time
from shardlab.cost.compute_time import compute_times, hbm_share
from shardlab.cost.products import MatmulShape
from shardlab.cost.traffic import Joined, Sent
from shardlab.hardware.catalog import load_machine
from shardlab.hardware.data_files import load_chip
from shardlab.hardware.machine import Machine

OUT = flags.DEFINE_string("out", "machine.toml", "The machine file to write.")
CHIP = flags.DEFINE_string("chip", "", "What shardlab calls the chip (h100, v6e): its tables are kept.")
SMALL = flags.DEFINE_bool("small", False, "Small arrays: seconds on a processor, no figures to rely on.")
TIER = flags.DEFINE_string("tier", "", "The link between the devices; nvlink, pcie or ici unless it says so.")
REPEATS = 5
EDGES = {False: (2_048, 4_096, 8_192), True: (256, 512)}
ARRAY_BYTES = {False: 1 << 30, True: 1 << 22}
PAYLOADS = {False: tuple(1 << n for n in (16, 20, 24, 27, 29)), True: (1 << 12, 1 << 16, 1 << 20)}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One measurement. amount: FLOPs, bytes moved, or the bytes that a device sends; payload_bytes: of a
    collective, the full array."""

    what: str
    amount: float
    time_s: float
    payload_bytes: int = 0
    edge: int = 0

    @property
    def rate(self) -> float:
        """Amount per second."""
        return self.amount / self.time_s


def products(small: bool) -> Iterator[Measured]:
    """Square products in bf16 (f32 on a processor) on one device."""
    import jax
    import jax.numpy as jnp

    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    multiply = jax.jit(jnp.matmul)
    for edge in EDGES[small]:
        a, b = (jax.random.normal(jax.random.key(at), (edge, edge), dtype) for at in (0, 1))
        time_s = timed_s(partial(multiply, a, b), REPEATS)
        yield Measured(what=f"product {edge}^3", amount=2.0 * edge**3, time_s=time_s, edge=edge)


def memory(small: bool) -> Iterator[Measured]:
    """A copy that scales: as much read as written."""
    import jax
    import jax.numpy as jnp

    count = ARRAY_BYTES[small] // 4
    array = jnp.ones((count,), jnp.float32)
    time_s = timed_s(partial(jax.jit(lambda a: a * 1.5), array), REPEATS)
    yield Measured(what="copy", amount=8.0 * count, time_s=time_s)


def collectives(small: bool) -> Iterator[Measured]:
    """Over all devices, by kind and size of the full array."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = jax.devices()
    n = len(devices)
    mesh = Mesh(devices, ("all",))
    whole, split = PartitionSpec(), PartitionSpec("all")
    kinds: Mapping[str, tuple[Callable[[Any], Any], Any, Any, float]] = {
        "all-reduce": (lambda a: jax.lax.psum(a, "all"), whole, whole, 2 * (n - 1) / n),
        "all-gather": (lambda a: jax.lax.all_gather(a, "all", tiled=True), split, whole, (n - 1) / n),
        "reduce-scatter": (lambda a: jax.lax.psum_scatter(a, "all", tiled=True), whole, split, (n - 1) / n),
    }
    for kind in COLLECTIVES if n > 1 else ():
        inside, given, got, share = kinds[kind]
        run = jax.jit(jax.shard_map(inside, mesh=mesh, in_specs=given, out_specs=got, check_vma=False))
        for payload in PAYLOADS[small]:
            array = jax.device_put(jnp.ones((payload // 4,), jnp.float32), NamedSharding(mesh, given))
            time_s = timed_s(partial(run, array), REPEATS)
            yield Measured(what=kind, amount=share * payload, time_s=time_s, payload_bytes=payload)


def link_of(found: Sequence[Measured]) -> tuple[float, float]:
    """(launch_s, bytes_per_s) of time_s = launch_s + bytes / bytes_per_s, with the least relative errors.

    Raises ValueError for fewer than two sizes, or times that do not grow with them.
    """
    # Weighted by 1 / time: minimises Σ (launch / t + slope · bytes / t - 1)² (normal equations).
    ones, bytes_ = [1 / m.time_s for m in found], [m.amount / m.time_s for m in found]
    aa, ab, bb = (sum(x * y for x, y in zip(p, q, strict=True))
                  for p, q in ((ones, ones), (ones, bytes_), (bytes_, bytes_)))  # fmt: skip
    determinant = aa * bb - ab * ab
    if len({m.amount for m in found}) < 2 or determinant <= 0:
        raise ValueError("collectives of two sizes or more are needed")
    slope = (aa * sum(bytes_) - ab * sum(ones)) / determinant
    launch_s = (bb * sum(ones) - ab * sum(bytes_)) / determinant
    if slope <= 0:
        raise ValueError("the times of collectives do not grow with what they send")
    return max(launch_s, 1e-9), 1 / slope


def chip_rates(name: str, found: Sequence[Measured], copied: Measured) -> tuple[float, float]:
    """(bf16_flops_per_s, memory_bytes_per_s) of a machine file: of a chip with tables, those at which they
    meet what was measured; else the best that was."""
    if not name:
        return max(m.rate for m in found), copied.rate
    chip = load_chip(name)
    times = compute_times(chip)
    if times is None or chip.bf16_flops_per_s is None:
        return max(m.rate for m in found), copied.rate
    shapes = {m: MatmulShape(1, m.edge, m.edge, m.edge, "bf16") for m in found}
    share = statistics.median(times.matmul.time_s(shape) / m.time_s for m, shape in shapes.items())
    return chip.bf16_flops_per_s * share, copied.rate / hbm_share(times.tables.hbm, 0.5)


def machine_text(found: Mapping[str, Sequence[Measured]], chip_name: str, tier: str, where: str) -> str:
    """The machine file. where: what it was measured on, and when."""
    import jax

    device, n = jax.devices()[0], jax.device_count()
    flops, moved = chip_rates(chip_name, found["products"], found["memory"][0])
    limit = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
    chip = [
        f"name = {json.dumps(str(device.device_kind))}",
        f'family = "{device.platform if device.platform in ("tpu", "cpu") else "gpu"}"',
        *([f'compile_as = "{chip_name}"'] if chip_name else []),
        *([f"memory_bytes = {limit}"] if limit else []),
        f"bf16_flops_per_s = {flops:.4g}",
        f"memory_bytes_per_s = {moved:.4g}",
    ]
    said = ", ".join(f"{m.what} {m.rate / 1e12:.4g} TFLOP/s" for m in found["products"])
    copied = f"measured {where}: copy {found['memory'][0].rate / 1e9:.4g} GB/s"
    source = [
        f"bf16_flops_per_s = {json.dumps(f'measured {where}: {said}')}",
        f"memory_bytes_per_s = {json.dumps(copied)}",
        *([f"memory_bytes = {json.dumps(f'the limit of the pool {where}')}"] if limit else []),
    ]
    domain = [f'tier = "{tier}"']
    if found["collectives"]:
        launch_s, rate = link_of(found["collectives"])
        domain += [f"bytes_per_s = {rate:.4g}", "latency_s = 1e-9"]
        kinds = f"{len(found['collectives'])} collectives over {n} devices"
        domain += [f"source = {json.dumps(f'measured {where}: {kinds}')}", "[domain.calibration]"]
        domain += [f"launch_s = {launch_s:.4g}", f"source = {json.dumps(f'measured {where}')}"]
    else:
        domain += ['source = "one device: no link"']
    head = [
        f"description = {json.dumps(f'{n} x {device.device_kind}, measured {where}')}",
        "hosts = 1",
        f"chips_per_host = {n}",
        f"max_chips_per_host = {n}",
    ]
    parts = (
        head,
        ["[source]", 'max_chips_per_host = "what JAX sees"'],
        ["[chip]", *chip],
        ["[chip.source]", *source],
        ["[[domain]]", *domain],
    )
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def error_lines(machine: Machine, found: Sequence[Measured]) -> Iterator[str]:
    """How far the prices of the machine file are from the collectives that its link comes from."""
    joined = Joined((range(machine.num_devices),))
    for kind in dict.fromkeys(one.what for one in found):
        errors = []
        for one in (m for m in found if m.what == kind):
            priced = collective_time(Sent(kind, one.payload_bytes, Fraction(one.amount)), joined, machine)
            errors += [priced.total_s / one.time_s - 1] if priced is not None else []
        if errors:
            mean = statistics.fmean(map(abs, errors))
            yield f"{kind}: {mean:.0%} off on average, worst {max(errors, key=abs):+.0%}"


def main(argv: Sequence[str]) -> None:
    """Measure, write, read back."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    import jax

    small, device = SMALL.value, jax.devices()[0]
    found = {"products": list(products(small)), "memory": list(memory(small))}
    found["collectives"] = list(collectives(small))
    for one in (m for rows in found.values() for m in rows):
        unit = "FLOP/s" if one.edge else "B/s"
        size = f" of {one.payload_bytes:,} bytes" if one.payload_bytes else ""
        print(f"{one.what}{size}: {one.time_s * 1e6:.1f} us, {one.rate:.3g} {unit}")
    tier = TIER.value or {"tpu": "ici", "gpu": "nvlink"}.get(device.platform, "loopback")
    today = datetime.date.today().isoformat()
    where = f"on {jax.device_count()} x {device.device_kind}, JAX {jax.__version__}, {today}"
    Path(OUT.value).write_text(machine_text(found, CHIP.value, tier, where), encoding="utf-8")
    machine = load_machine(OUT.value)
    print("\n".join(error_lines(machine, found["collectives"])))
    print(f"wrote {OUT.value}: {machine.num_devices} devices, measured {where}")


if __name__ == "__main__":
    app.run(main)
