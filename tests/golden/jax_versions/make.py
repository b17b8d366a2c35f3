"""Makes `jax-VERSION.hlo.gz` beside it: shard_map programs as the JAX that runs this script compiles them.

Stand-alone: needs nothing but jax, any of 0.4.26 to 0.12. One file holds all programs, one HLO module each,
after a comment with the versions. A program is named after what it does, outermost first:

    scan_3__while_17_0_m1__over_a_c    a scan of 3 trips round a while loop from 17, above 0, by -1, round
                                       one each of five collectives over mesh axes a and c

The words are in `around` and LOOPS. Mesh: 2 x 2 x 2 emulated CPU devices, axes a, b, c. Each collective works
on the tanh of what the one before gave, last trip's included: XLA can neither merge them nor move them.
"""

import gzip
import inspect
import itertools
import math
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
# LLVM's optimisation comes after everything that the text shows.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

if not hasattr(jax, "shard_map"):
    from jax.experimental.shard_map import shard_map
else:
    shard_map = jax.shard_map

Body = Callable[[Any], Any]

MESH = {"a": 2, "b": 2, "c": 2}
LOCAL_ELEMENTS = 40
SUBSETS = [axes for n in (1, 2, 3) for axes in itertools.combinations(MESH, n)]
OVER_EVERY_SUBSET = [
    "once",
    "scan_2__then__scan_3__then__scan_5",
    "fori_3_20",
    "while_2_21_3",
    "while_19_m4_m5",
    "upto_input",
    "halving_input",
    "cond",
    "scan_5__cond",
]
OVER_SOME_SUBSETS = [
    "chain",
    "bf16",
    "fori_m3_4",
    "doubling_1_100",
    "wrapping_250_4",
    "unroll_2_7",
    "scan_3__while_17_0_m1",
    "scan_3__upto_input",
    "switch_3",
    "fori_3_20__switch_3",
]
NAMES = [
    *(f"{words}__over_{'_'.join(axes)}" for words in OVER_EVERY_SUBSET for axes in SUBSETS),
    *(f"{words}__over_{axes}" for words in OVER_SOME_SUBSETS for axes in ("b", "a_c", "a_b_c")),
    # An axis named before one that is major to it: members of a group stand in another order.
    *(f"once__over_{axes}" for axes in ("b_a", "c_a", "c_b", "b_a_c", "c_b_a")),
]


def number(word: str) -> int:
    """m4 is -4."""
    return -int(word[1:]) if word.startswith("m") else int(word)


def all_kinds(axes: tuple[str, ...], x_N: Any) -> Any:
    """All five collectives over the axes, each on the tanh of what the one before gave: f32[n] to f32[n]."""
    size = math.prod(MESH[axis] for axis in axes)
    x_N = lax.psum(jnp.tanh(x_N), axes)
    x_N = lax.all_to_all(jnp.tanh(x_N), axes, 0, 0, tiled=True)
    in_mesh_order = tuple(sorted(axes))  # JAX 0.12 refuses any other order, in ppermute only
    x_N = lax.ppermute(jnp.tanh(x_N), in_mesh_order, [(i, (i + 1) % size) for i in range(size)])
    x_M = lax.all_gather(jnp.tanh(x_N), axes, tiled=True)
    return lax.psum_scatter(jnp.tanh(x_M), axes, tiled=True)


def chain(axes: tuple[str, ...], x_N: Any) -> Any:
    """A permute that is no ring: nobody sends to the first device, the last sends to nobody."""
    size = math.prod(MESH[axis] for axis in axes)
    return lax.ppermute(jnp.tanh(x_N), axes, [(i, i + 1) for i in range(size - 1)])


def around(word: str, body: Body, axes: tuple[str, ...], inputs: dict[str, Any], x: Any) -> Any:
    """What one word of a name puts round `body`; inputs are the program's replicated scalars."""
    how, *rest = word.split("_")
    numbers = [number(part) for part in rest if part != "input"]
    if how in LOOPS:
        return LOOPS[how](body, inputs, x, *numbers)
    if how == "then":
        return lax.pmax(jnp.tanh(body(x)), axes)
    if how == "bf16":
        return body(x.astype(jnp.bfloat16)).astype(jnp.float32)
    if how == "cond":
        return lax.cond(inputs["flag"], body, lambda x: x + 1, x)
    # Of a switch only the last branch communicates.
    quiet = [lambda x, i=i: x * i for i in range(2, numbers[0] + 1)]
    return lax.switch(inputs["bound"], [*quiet, body], x)


def scan(body: Body, x: Any, length: int, unroll: int = 1) -> Any:
    return lax.scan(lambda x, _: (body(x), None), x, None, length=length, unroll=unroll)[0]


def fori(body: Body, x: Any, start: int, stop: Any) -> Any:
    return lax.fori_loop(start, stop, lambda _, x: body(x), x)


def counted(body: Body, x: Any, start: Any, test: Body, step: Body) -> Any:
    """A while loop over (counter, x)."""
    return lax.while_loop(lambda s: test(s[0]), lambda s: (step(s[0]), body(s[1])), (start, x))[1]


def strided(body: Body, x: Any, start: int, stop: int, step: int) -> Any:
    test = (lambda i: i < stop) if step > 0 else (lambda i: i > stop)
    return counted(body, x, start, test, lambda i: i + step)


LOOPS = {
    "scan": lambda body, inputs, x, length: scan(body, x, length),
    "unroll": lambda body, inputs, x, unroll, length: scan(body, x, length, unroll),
    "fori": lambda body, inputs, x, start, stop: fori(body, x, start, stop),
    "while": lambda body, inputs, x, start, stop, step: strided(body, x, start, stop, step),
    "doubling": lambda body, inputs, x, start, stop: counted(
        body, x, start, lambda i: i < stop, lambda i: i * 2
    ),
    "wrapping": lambda body, inputs, x, start, stop: counted(
        body, x, jnp.uint8(start), lambda i: i != stop, lambda i: i + jnp.uint8(1)
    ),
    "upto": lambda body, inputs, x: fori(body, x, 0, inputs["bound"]),
    "halving": lambda body, inputs, x: counted(
        body, x, inputs["error"], lambda error: error > 0.01, lambda error: error * 0.5
    ),
}


def build(name: str) -> Callable[[dict[str, Any], Any], Any]:
    """The program of a name, on the inputs and one device's x."""
    *words, over = name.split("__")
    axes = tuple(over.split("_")[1:])

    def run(inputs: dict[str, Any], x: Any, words: tuple[str, ...] = tuple(words)) -> Any:
        if words == ("chain",):
            return chain(axes, x)
        if words in ((), ("once",)):
            return all_kinds(axes, x)
        return around(words[0], lambda x: run(inputs, x, words[1:]), axes, inputs, x)

    return run


def compiled_text(name: str) -> str:
    """The compiled HLO of one program."""
    mesh = Mesh(np.array(jax.devices()).reshape(tuple(MESH.values())), tuple(MESH))
    split, replicated = PartitionSpec(tuple(MESH)), PartitionSpec()
    check = "check_vma" if "check_vma" in inspect.signature(shard_map).parameters else "check_rep"
    run = shard_map(build(name), mesh=mesh, in_specs=(replicated, split), out_specs=split, **{check: False})

    def program(inputs: dict[str, Any], x: Any) -> Any:
        return run(inputs, x)

    program.__name__ = name
    scalar = NamedSharding(mesh, replicated)
    inputs = {
        key: jax.ShapeDtypeStruct((), dtype, sharding=scalar)
        for key, dtype in (("bound", jnp.int32), ("error", jnp.float32), ("flag", jnp.bool_))
    }
    elements = LOCAL_ELEMENTS * math.prod(MESH.values())
    x = jax.ShapeDtypeStruct((elements,), jnp.float32, sharding=NamedSharding(mesh, split))
    return jax.jit(program).lower(inputs, x).compile().as_text()


def main() -> None:
    """Write the file of this JAX."""
    jax.config.update("jax_hlo_source_file_canonicalization_regex", ".*/")
    made_by = f"// jax {jax.__version__}, jaxlib {jaxlib.__version__}, Python {platform.python_version()}\n"
    text = made_by + "".join(compiled_text(name).rstrip() + "\n\n" for name in NAMES)
    path = Path(__file__).with_name(f"jax-{jax.__version__}.hlo.gz")
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


if __name__ == "__main__":
    main()
