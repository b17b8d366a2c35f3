"""Measures what `lab.toml` says: this computer's cores, its links, and how gloo waits. Needs quiet cores.

sudo python experiments/wire_calibrate.py            # all; --parts=cores,links,gloo for some
python experiments/wire_calibrate.py --parts=cores   # needs no root

cores: as many processes at once as there are cores, one device on each, compiled as the lab compiles: what an
instruction costs, products, loops, and the rates that a profile of one step shows (`wire_cores.py`).
links: a TCP stream one way, and one both ways at once over the same connection, at each rate and unshaped,
over loopback, and around three and four sites; how long a word waits behind another connection's data. gloo:
single collectives between two sites, and at 100 Mbit/s over two with two devices each and over four, by kind
and size, as multiples of the time of the bytes that a bandwidth-optimal one sends over the busiest link, and
their cost in core time. No step of several devices is run: what the lab predicts of those is not fitted to
them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

from absl import app, flags
from sites import EFFICIENCY, HEADER_BYTES, Sites, check_privileges, on_core
from timing import timed_s
from wire_cores import core_rates
from wire_stream import ring_shares, stream, word_waits_s

from shardlab.errors import ShardlabError

_PARTS = flags.DEFINE_list("parts", ["cores", "links", "gloo"], "What to measure.")
_RATES = flags.DEFINE_list("rates", ["20", "100", "500", "2000"], "Mbit/s of the links.")
_WORKER = flags.DEFINE_string("worker", None, "Internal: what this process measures.")
_AT = flags.DEFINE_string("at", None, "Internal: coordinator, process, processes, devices in each.")
_SIZES = flags.DEFINE_list("sizes", ["65536", "262144", "1048576"], "Bytes that a site sends, of gloo.")
_PORT = 9913
_TIMEOUT_S = 300
_MIB = 1 << 20
_BURST_S = 0.05  # of the link's time


def cores() -> None:
    """All cores at once; the sum of what the processes get."""
    count = os.cpu_count() or 1
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "--worker=cores"]
    running = [
        subprocess.Popen(on_core(index, command), env=environment, text=True, stdout=subprocess.PIPE)
        for index in range(count)
    ]
    told = [json.loads(process.communicate()[0]) for process in running]
    print(f"{count} processes at once")
    for name in told[0]:
        values = [one[name] for one in told]
        if name.endswith("_s") and not name.endswith("per_s"):
            print(f"  {name.removesuffix('_s')}: {median(values) * 1e6:.1f} us")
        else:
            apart = f"{min(values) / 1e9:.2f} to {max(values) / 1e9:.2f}"
            print(f"  {name}: {sum(values) / 1e9:.2f} G/s together, {apart} each")


def links() -> None:
    """What streams reach of each rate, and how many headers they have."""
    with Sites(2, None) as sites:
        for local in (False, True):
            one, two = (stream(sites, 64 * _MIB, both=both, local=local).time_s for both in (False, True))
            where = "loopback" if local else "unshaped link"
            rates = [64 * _MIB / took_s / 1e6 for took_s in (one, two)]
            print(f"{where}: {rates[0]:.1f} MB/s one way, {rates[1]:.1f} each way at once")
    for rate in map(float, _RATES.value):
        size = int(min(rate * 125_000 * 2, 128 * _MIB))
        with Sites(2, rate) as sites:
            one, two = (stream(sites, size, both=both) for both in (False, True))
            behind_s = word_waits_s(sites, int(rate * 125_000 * _BURST_S))
        shares = [size * 8 / each.time_s / 1e6 / rate for each in (one, two)]
        left = one.sent_bytes - HEADER_BYTES * one.frames
        print(
            f"{rate:g} Mbit/s: {size:,} bytes left as {one.sent_bytes:,} in {one.frames:,} frames, less "
            f"{HEADER_BYTES} each {left:,}, {one.again_bytes:,} of them again; "
            f"{one.received_bytes / size:.4f} of it came back; {shares[0]:.3f} of the rate one way, "
            f"{shares[1]:.3f} each way at once; behind {_BURST_S * 1e3:g} ms of another connection's data "
            f"a word waits {behind_s * 1e3:.1f}",
            flush=True,
        )
        for around in (3, 4):
            with Sites(around, rate) as sites:
                each = ring_shares(sites, size)
            print(f"  around {around} sites: {min(each):.3f} to {max(each):.3f}", flush=True)


def gloo_times() -> dict[str, list[float]]:
    """`KIND, BYTES` -> seconds of one execution, and its core time in this process."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from processes import Processes, join, let_gloo_wait_its_turn

    coordinator, *numbers = _AT.value.split(",")
    index, count, devices = map(int, numbers)
    join(Processes(coordinator=coordinator, index=index, count=count), emulated_devices=count * devices)
    let_gloo_wait_its_turn()
    mesh, n = Mesh(jax.devices(), ("all",)), count * devices
    whole, split = PartitionSpec(), PartitionSpec("all")
    kinds: dict[str, tuple[Callable[[Any], Any], Any, Any, float]] = {  # and the part of S that a site sends
        "all-reduce": (lambda a: jax.lax.psum(a, "all"), whole, whole, 2 * (n - 1) / n),
        "all-gather": (lambda a: jax.lax.all_gather(a, "all", tiled=True), split, whole, (n - 1) / n),
        "reduce-scatter": (lambda a: jax.lax.psum_scatter(a, "all", tiled=True), whole, split, (n - 1) / n),
        "all-to-all": (
            lambda a: jax.lax.all_to_all(a.reshape(n, -1), "all", 0, 0, tiled=True).reshape(-1),
            whole,
            split,
            devices * (n - devices) / n,
        ),
        "collective-permute": (
            lambda a: jax.lax.ppermute(a, "all", [(i, (i + 1) % n) for i in range(n)]),
            split,
            split,
            1 / n,
        ),
    }
    for kind in ("all-gather", "reduce-scatter", "all-to-all", "collective-permute"):
        inside, *rest = kinds[kind]
        kinds[f"{kind} after an all-reduce"] = (partial(after_all_reduce, inside), *rest)
    found = {}
    for kind, (inside, given, got, share) in kinds.items():
        run = jax.jit(jax.shard_map(inside, mesh=mesh, in_specs=given, out_specs=got, check_vma=False))
        for size in map(int, _SIZES.value):
            elements = int(size / share) // (4 * n * n) * n * n
            array = jax.make_array_from_callback(
                (elements,),
                NamedSharding(mesh, given),
                lambda at, length=elements: jnp.ones(len(range(*at[0].indices(length)))),
            )
            busy_s = time.process_time()
            took_s = timed_s(partial(run, array), 9)
            found[f"{kind}, {size}"] = [took_s, (time.process_time() - busy_s) / 10]
    return found


def after_all_reduce(inside: Callable[[Any], Any], array: Any) -> Any:
    """A collective that begins on all ranks when a small all-reduce has ended there."""
    import jax

    return inside(array + 0 * jax.lax.psum(array[:256], "all")[0])


def gloo() -> None:
    """Single collectives at each rate: how many times as long as their bytes on the link."""
    networks = [(2, 1, rate) for rate in [*map(float, _RATES.value), None]]
    for count, devices, rate in [*networks, (2, 2, 100.0), (4, 1, 100.0)]:
        with Sites(count, rate) as sites:
            running = []
            for site in range(count):
                command = [sys.executable, __file__, "--worker=gloo", f"--sizes={','.join(_SIZES.value)}",
                           f"--at={sites.address(0)}:{_PORT},{site},{count},{devices}"]  # fmt: skip
                environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
                running.append(sites.start(site, command, stdout=subprocess.PIPE, env=environment))
            told = [json.loads(process.communicate(timeout=_TIMEOUT_S)[0]) for process in running]
        print(f"gloo {count} x {devices}, {f'{rate:g} Mbit/s' if rate else 'unshaped'}", flush=True)
        for name in told[0]:
            took_s, busy_s = (max(one[name][i] for one in told) for i in (0, 1))
            size = int(name.rpartition(" ")[2])
            bytes_s = size / ((rate or 1) * 125_000 * EFFICIENCY)
            turns = f", {took_s / bytes_s:.3f} of its bytes' time" if rate else ""
            print(f"  {name}: {took_s * 1e3:.2f} ms{turns}, {busy_s / size * 1e9:.2f} ns of core a byte")


def main(argv: Sequence[str]) -> None:
    """Measure what was asked for."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if _WORKER.value:
        told = core_rates() if _WORKER.value == "cores" else gloo_times()
        print(json.dumps(told), flush=True)
        time.sleep(2)  # the other may still need this one
        os._exit(0)
    try:
        if set(_PARTS.value) & {"links", "gloo"}:
            check_privileges()
        for part in _PARTS.value:
            {"cores": cores, "links": links, "gloo": gloo}[part]()
    except ShardlabError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    app.run(main)
