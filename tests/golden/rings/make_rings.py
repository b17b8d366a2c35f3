"""Compile the loops of permutes beside this file: 4 emulated CPU devices, `python make_rings.py`.

Written for JAX 0.12; k f32[16, 64] goes around, q f32[8, 64] stays (per device).
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

DUMPS = tempfile.mkdtemp()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=4 --xla_dump_to={DUMPS}"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax import Array, lax  # noqa: E402
from jax.sharding import PartitionSpec  # noqa: E402

HERE = Path(__file__).parent
RING = [(i, (i + 1) % 4) for i in range(4)]
CHAIN = [(i, i + 1) for i in range(3)]


def attend(k: Array, q: Array, hops: int, pairs: list[tuple[int, int]]) -> Array:
    """Use k, hand it on, use the next one, …"""

    def body(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        k, sums = carry
        return lax.ppermute(k, "x", pairs), sums + jnp.tanh(q @ k.T)

    return lax.fori_loop(0, hops, body, (k, jnp.zeros((8, 16))))[1]


def gather(k: Array, q: Array) -> Array:
    """As ring attention does: every device sees every k."""
    return attend(k, q, 4, RING)


def window(k: Array, q: Array) -> Array:
    """Two hops of a ring of four: not every device sees every k."""
    return attend(k, q, 2, RING)


def chain(k: Array, q: Array) -> Array:
    """An open chain: what leaves the last device is lost."""
    return attend(k, q, 4, CHAIN)


def scatter(k: Array, q: Array) -> Array:
    """Sums go around and take up each device's part."""
    return lax.fori_loop(
        0, 4, lambda i, sums: lax.ppermute(sums, "x", RING) + jnp.tanh(q * i) @ k.T, jnp.zeros((8, 16))
    )


def halo(k: Array, q: Array) -> Array:
    """A stencil: add the neighbour's value to one's own."""
    return lax.fori_loop(0, 4, lambda _, x: x + lax.ppermute(x, "x", RING), q)


def pipeline(k: Array, q: Array) -> Array:
    """A stage with a residual, then on to the next stage."""
    return lax.fori_loop(0, 4, lambda _, x: lax.ppermute(x + jnp.tanh(x @ k.T @ k), "x", RING), q)


def main() -> None:
    """Write what each compiles to, and the compiler's own dump of two of them."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = PartitionSpec("x")
    shapes = jax.ShapeDtypeStruct((64, 64), jnp.float32), jax.ShapeDtypeStruct((32, 64), jnp.float32)
    for step in (gather, window, chain, scatter, halo, pipeline):
        mapped = jax.shard_map(step, mesh=mesh, in_specs=(split, split), out_specs=split, check_vma=False)
        text = jax.jit(mapped).lower(*shapes).compile().as_text()
        (HERE / f"{step.__name__}.hlo").write_text(text.replace(str(HERE) + "/", ""))
        for dump in Path(DUMPS).glob(f"*jit_{step.__name__}.cpu_after_optimizations.txt"):
            if step in (gather, scatter):
                (HERE / f"{step.__name__}.dump.txt").write_text(dump.read_text().replace(str(HERE) + "/", ""))


if __name__ == "__main__":
    main()
