"""How the HLO texts beside this file were made: small programs, compiled for eight devices.

    python make.py cpu DIRECTORY        eight emulated CPU devices
    python make.py tpu DIRECTORY        v5p 2x2x2, ahead of time (needs the libtpu wheel)
    python make.py gpu DIRECTORY        H100 2x4, ahead of time (needs the CUDA plugin, and shardlab)
    python make.py cpu DIRECTORY reshard_by_replication 2> reshard_by_replication.cpu.log

The last three programs are for ../agreement. The committed texts were made with jax 0.12.0.1 and the libtpu
that it pins; a later compiler may rewrite a program so that what a rule looks for is no longer there, which
is why the texts are kept. Paths are cut to the file's name, and backend configs of TPU and GPU text that no
rule here reads are left out.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Built = tuple[Callable[..., Any], tuple[Any, ...]]


def shaped(mesh: Mesh, spec: P, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def mapped(mesh: Mesh, body: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
    return jax.shard_map(body, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)


def gather_then_convert(mesh: Mesh) -> Built:
    def body(w: Any, x: Any) -> Any:
        full = lax.all_gather(w, ("x", "y"), tiled=True)
        return x @ lax.optimization_barrier(full).astype(jnp.bfloat16)

    return mapped(mesh, body, (P(("x", "y")), P()), P()), (
        shaped(mesh, P(("x", "y")), (1024, 256)),
        shaped(mesh, P(), (8, 1024), jnp.bfloat16),
    )


def convert_then_gather(mesh: Mesh) -> Built:
    def body(w: Any, x: Any) -> Any:
        return x @ lax.all_gather(w.astype(jnp.bfloat16), ("x", "y"), tiled=True)

    return mapped(mesh, body, (P(("x", "y")), P()), P()), (
        shaped(mesh, P(("x", "y")), (1024, 256)),
        shaped(mesh, P(), (8, 1024), jnp.bfloat16),
    )


def gather_twice(mesh: Mesh) -> Built:
    """A barrier between the two: XLA removes equal instructions of equal operands."""

    def body(w: Any, x: Any) -> Any:
        first = lax.all_gather(w, "x", tiled=True)
        later, _ = lax.optimization_barrier((w, first))
        return jnp.tanh(x @ first) @ lax.all_gather(later, "x", tiled=True)

    return mapped(mesh, body, (P("x"), P()), P()), (
        shaped(mesh, P("x"), (256, 256)),
        shaped(mesh, P(), (8, 256)),
    )


def gather_over_two_axes(mesh: Mesh) -> Built:
    """One tensor, gathered over x and over y: different groups, so different results."""

    def body(w: Any) -> Any:
        return lax.all_gather(w, "x", tiled=True), lax.all_gather(w, "y", tiled=True)

    return mapped(mesh, body, (P(("x", "y")),), (P("y"), P("x"))), (shaped(mesh, P(("x", "y")), (512, 256)),)


def gather_then_slice(mesh: Mesh, rows: int = 64) -> Built:
    def body(w: Any) -> Any:
        full = lax.all_gather(w, ("x", "y"), tiled=True)
        return jnp.tanh(lax.dynamic_slice_in_dim(full, lax.axis_index("x") * rows, rows))

    return mapped(mesh, body, (P(("x", "y")),), P("x")), (shaped(mesh, P(("x", "y")), (1024, 256)),)


def gather_then_slice_most(mesh: Mesh) -> Built:
    return gather_then_slice(mesh, 768)


def reduce_then_slice(mesh: Mesh, axis: str = "x") -> Built:
    def body(g: Any) -> Any:
        total = lax.psum(g, "x")
        rows = 1024 // lax.axis_size("x")
        return lax.dynamic_slice_in_dim(total, lax.axis_index("x") * rows, rows) * 2

    return mapped(mesh, body, (P(),), P("x")), (shaped(mesh, P(), (1024, 256)),)


def reduce_then_use_all(mesh: Mesh) -> Built:
    def body(g: Any) -> Any:
        total = lax.psum(g, "x")
        rows = 1024 // lax.axis_size("x")
        return lax.dynamic_slice_in_dim(total, lax.axis_index("x") * rows, rows) * 2, total

    return mapped(mesh, body, (P(),), (P("x"), P())), (shaped(mesh, P(), (1024, 256)),)


def reduce_then_slice_over_other_axis(mesh: Mesh) -> Built:
    def body(g: Any) -> Any:
        total = lax.psum(g, "x")
        rows = 1024 // lax.axis_size("y")
        return lax.dynamic_slice_in_dim(total, lax.axis_index("y") * rows, rows) * 2

    return mapped(mesh, body, (P(),), P("y")), (shaped(mesh, P(), (1024, 256)),)


def gather_in_loop(mesh: Mesh) -> Built:
    """Weights gathered once per microbatch: a loop-invariant operand."""

    def body(w: Any, x: Any) -> Any:
        def micro(total: Any, part: Any) -> Any:
            full = lax.all_gather(w, "x", tiled=True)
            return total + jnp.tanh(part @ full), None

        return lax.scan(micro, jnp.zeros((8, 256)), x)[0]

    return mapped(mesh, body, (P("x"), P()), P()), (
        shaped(mesh, P("x"), (256, 256)),
        shaped(mesh, P(), (4, 8, 256)),
    )


def gather_two_in_loop(mesh: Mesh) -> Built:
    """XLA:GPU combines the two gathers into one."""

    def body(w: Any, v: Any, x: Any) -> Any:
        def micro(total: Any, part: Any) -> Any:
            first, second = (lax.all_gather(one, "x", tiled=True) for one in (w, v))
            return total + jnp.tanh(part @ first) @ second, None

        return lax.scan(micro, jnp.zeros((8, 128)), x)[0]

    return mapped(mesh, body, (P("x"), P("x"), P()), P()), (
        shaped(mesh, P("x"), (256, 256)),
        shaped(mesh, P("x"), (256, 128)),
        shaped(mesh, P(), (4, 8, 256)),
    )


def gather_layers_in_microbatches(mesh: Mesh) -> Built:
    """Every microbatch scans over the layers and gathers each layer's weight again."""

    def body(ws: Any, x: Any) -> Any:
        def layer(h: Any, w: Any) -> Any:
            return jnp.tanh(h @ lax.all_gather(w, "x", tiled=True)), None

        def micro(total: Any, part: Any) -> Any:
            return total + lax.scan(layer, part, ws)[0], None

        return lax.scan(micro, jnp.zeros((8, 256)), x)[0]

    return mapped(mesh, body, (P(None, "x"), P()), P()), (
        shaped(mesh, P(None, "x"), (3, 256, 256)),
        shaped(mesh, P(), (4, 8, 256)),
    )


def gather_scanned_layers(mesh: Mesh) -> Built:
    """Each trip gathers the weight of another layer."""

    def body(ws: Any, x: Any) -> Any:
        def layer(h: Any, w: Any) -> Any:
            return jnp.tanh(h @ lax.all_gather(w, "x", tiled=True)), None

        return lax.scan(layer, x, ws)[0]

    return mapped(mesh, body, (P(None, "x"), P()), P()), (
        shaped(mesh, P(None, "x"), (4, 256, 256)),
        shaped(mesh, P(), (8, 256)),
    )


def reduce_padded_shard(mesh: Mesh) -> Built:
    def body(w: Any) -> Any:
        rows = w.shape[0]
        padded = jnp.zeros((rows * lax.axis_size("x"), 256), w.dtype)
        padded = lax.dynamic_update_slice_in_dim(padded, w, lax.axis_index("x") * rows, 0)
        return jnp.tanh(lax.psum(padded, "x"))

    return mapped(mesh, body, (P("x"),), P()), (shaped(mesh, P("x"), (1024, 256)),)


def reduce_updated_array(mesh: Mesh) -> Built:
    """The array that the shard is written into is not zero: a true sum."""

    def body(w: Any, base: Any) -> Any:
        updated = lax.dynamic_update_slice_in_dim(base, w, lax.axis_index("x") * w.shape[0], 0)
        return jnp.tanh(lax.psum(updated, "x"))

    return mapped(mesh, body, (P("x"), P()), P()), (
        shaped(mesh, P("x"), (1024, 256)),
        shaped(mesh, P(), (1024, 256)),
    )


def reshard_by_replication(mesh: Mesh) -> Built:
    """XLA warns: "Involuntary full rematerialization"."""
    before, after = P("y", None, "x"), P(None, ("x", "y"), None)

    def step(a: Any) -> Any:
        b = lax.with_sharding_constraint(jnp.sin(a), NamedSharding(mesh, before))
        return lax.with_sharding_constraint(b * 2, NamedSharding(mesh, after))

    return step, (shaped(mesh, before, (8, 16, 4)),)


def gather_ahead(mesh: Mesh, *, keep: bool = False) -> Built:
    """Each trip gathers the weight of the next layer: what it gathers is used one trip later."""

    def body(ws: Any, x: Any) -> Any:
        def times(h: Any, full: Any) -> Any:
            return jnp.tanh(h @ lax.optimization_barrier(full).astype(jnp.bfloat16))

        def layer(carry: Any, w: Any) -> Any:
            h, full = carry
            return (times(h, full), lax.all_gather(w, "x", tiled=True)), None

        first = lax.all_gather(ws[0], "x", tiled=True)
        (h, last), _ = lax.scan(layer, (x, first), ws[1:])
        return (times(h, last), last) if keep else times(h, last)

    outputs = (P(), P()) if keep else P()
    return mapped(mesh, body, (P(None, "x"), P()), outputs), (
        shaped(mesh, P(None, "x"), (4, 256, 256)),
        shaped(mesh, P(), (8, 256), jnp.bfloat16),
    )


def gather_ahead_and_keep(mesh: Mesh) -> Built:
    """The last gathered weight is a result too, in f32."""
    return gather_ahead(mesh, keep=True)


def gather_then_slice_in_loop(mesh: Mesh, rows: int = 8) -> Built:
    """Gathered before the loop, of which each of 4 trips takes other rows."""

    def body(w: Any, x: Any) -> Any:
        full = lax.optimization_barrier(lax.all_gather(w, "x", tiled=True))

        def trip(h: Any, start: Any) -> Any:
            return jnp.tanh(h + lax.dynamic_slice_in_dim(full, start * rows, rows).sum(0)), None

        return lax.scan(trip, x, jnp.arange(4))[0]

    return mapped(mesh, body, (P("x"), P()), P()), (
        shaped(mesh, P("x"), (256, 256)),
        shaped(mesh, P(), (8, 256)),
    )


def gather_then_slice_all_in_loop(mesh: Mesh) -> Built:
    """A quarter on each of 4 trips: together everything."""
    return gather_then_slice_in_loop(mesh, 64)


def gather_in_chain(mesh: Mesh, *, whole: bool = False) -> Built:
    """Large enough for libtpu to carry the gather by a chain of fusions, beside products, on v5e."""

    def body(ws: Any, x: Any) -> Any:
        def layer(h: Any, w: Any) -> Any:
            full = lax.optimization_barrier(lax.all_gather(w, "x", tiled=True))
            part = full if whole else lax.dynamic_slice_in_dim(full, lax.axis_index("y") * 256, 256)
            h = jnp.tanh(h @ ws[0].T @ ws[1])
            return h + (h @ part.T).sum(-1, keepdims=True), None

        return lax.scan(layer, x, ws)[0]

    return mapped(mesh, body, (P(None, "x"), P()), P()), (
        shaped(mesh, P(None, "x"), (8, 2048, 2048), jnp.bfloat16),
        shaped(mesh, P(), (512, 2048), jnp.bfloat16),
    )


def gather_in_chain_whole(mesh: Mesh) -> Built:
    return gather_in_chain(mesh, whole=True)


def accumulate_sums(mesh: Mesh) -> Built:
    """A gradient summed over devices on each microbatch."""

    def body(w: Any, x: Any) -> Any:
        def micro(total: Any, part: Any) -> Any:
            return total + lax.psum(jnp.tanh(part.T @ (part @ w)), "x"), None

        return lax.scan(micro, jnp.zeros((256, 256)), x)[0]

    return mapped(mesh, body, (P(), P(None, "x")), P()), (
        shaped(mesh, P(), (256, 256)),
        shaped(mesh, P(None, "x"), (4, 32, 256)),
    )


def reduce_three(mesh: Mesh) -> Built:
    """Three sums that no one waits for in between."""

    def body(a: Any, b: Any, c: Any) -> Any:
        return tuple(lax.psum(jnp.tanh(one @ one.T), "x") for one in (a, b, c))

    return mapped(mesh, body, (P("x"),) * 3, (P(),) * 3), tuple(
        shaped(mesh, P("x"), (rows * 4, 256)) for rows in (8, 16, 24)
    )


def gather_three(mesh: Mesh) -> Built:
    def body(a: Any, b: Any, c: Any) -> Any:
        return tuple(jnp.tanh(lax.all_gather(one, "x", tiled=True)) for one in (a, b, c))

    return mapped(mesh, body, (P("x"),) * 3, (P(),) * 3), tuple(
        shaped(mesh, P("x"), (rows * 4, 256)) for rows in (8, 16, 24)
    )


PROGRAMS: tuple[Callable[[Mesh], Built], ...] = (
    gather_then_convert, convert_then_gather, gather_twice, gather_over_two_axes, gather_then_slice,
    gather_then_slice_most, reduce_then_slice, reduce_then_use_all, reduce_then_slice_over_other_axis,
    gather_in_loop, gather_layers_in_microbatches, gather_scanned_layers,
    reduce_padded_shard, reduce_updated_array, reshard_by_replication,
    gather_two_in_loop, gather_ahead, gather_ahead_and_keep,
    gather_then_slice_in_loop, gather_then_slice_all_in_loop,
    gather_in_chain, gather_in_chain_whole, accumulate_sums, reduce_three, gather_three,
)  # fmt: skip


CHAINED = ("gather_in_chain", "gather_in_chain_whole")


def mesh_of(target: str, name: str) -> Mesh:
    if target == "cpu":
        devices = jax.devices("cpu")
    elif target == "gpu":
        from shardlab.compile.gpu import open_target
        from shardlab.hardware.catalog import load_machine

        devices = list(open_target(load_machine("h100:2x4")).devices)
    else:
        topology = "v5e:2x4" if name in CHAINED else "v5p:2x2x2"
        devices = topologies.get_topology_desc(topology, "tpu").devices
        devices = sorted(devices, key=lambda device: device.id)
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def main(target: str, directory: str) -> None:
    only = sys.argv[3:]
    for program in PROGRAMS:
        if only and program.__name__ not in only:
            continue
        step, arguments = program(mesh_of(target, program.__name__))
        lowered = (
            jax.jit(step).trace(*arguments).lower(lowering_platforms=("cuda" if target == "gpu" else target,))
        )
        text = lowered.compile().as_text()
        text = re.sub(r'"[^"\n]*/([^/"\n]+\.py)"', r'"\1"', text)
        if target != "cpu":
            text = re.sub(r", backend_config=\{(?!.*async_collective_fusion_config).*", "", text)
        (Path(directory) / f"{program.__name__}.{target}.hlo").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
