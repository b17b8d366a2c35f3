"""What one process of the wire lab gets of this computer's cores; `wire_calibrate.py` runs several."""

from __future__ import annotations

import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from timing import timed_s
from wire_plans import PLANS

from shardlab.cost.compute_time import is_bare_bf16
from shardlab.cost.instructions import step_cost
from shardlab.hlo.reader import parse

_REPEATS = 7
_CHAIN = 20  # instructions of one kind that wait for each other in a measured program
_STEPS = 20


def core_rates() -> dict[str, float]:
    """What one process gets: FLOP/s of products, bytes/s of loops, seconds of a tiny instruction.

    Each runs inside a loop of the program, whose iterations wait for each other and cannot be fused.
    """
    import jax
    import jax.numpy as jnp

    def each_s(one: Callable[[Any], Any], start: Any, count: int) -> float:
        run = jax.jit(lambda x: jax.lax.fori_loop(0, count, lambda _, x: one(x), x))
        return timed_s(partial(run, start), _REPEATS) / count

    def tiny(x: Any) -> Any:
        for _ in range(_CHAIN):
            x = x @ x  # products are not fused with each other
        return x

    found = {"instruction_s": each_s(tiny, jnp.eye(8), 50) / _CHAIN}
    for dtype, m, k in (("bf16", 512, 128), ("bf16", 512, 512), ("f32", 512, 128), ("f32", 512, 512)):
        given = jnp.bfloat16 if dtype == "bf16" else jnp.float32
        weight, rows = jnp.full((k, k), 1 / k, given), jnp.ones((m, k), given)
        flops = 2 * m * k * k
        found[f"product {dtype} {m}x{k}x{k}"] = flops / each_s(lambda x, w=weight: x @ w, rows, 50)
    loops: dict[str, tuple[Callable[[Any], Any], int]] = {  # and how many arrays its kernels read and write
        "scale": (lambda x: x * 1.5, 2),
        "exp": (lambda x: jnp.exp(-x), 2),
        "sum and add": (lambda x: x + x.sum(-1, keepdims=True), 3),
        "transpose": (lambda x: x.T, 2),
        "scale bf16": (lambda x: x * jnp.bfloat16(1.5), 2),
    }
    for name, (one, touched) in loops.items():
        array = jnp.ones((512, 512), jnp.bfloat16 if name.endswith("bf16") else jnp.float32)
        found[f"loop {name}"] = touched * array.nbytes / each_s(one, array, 50)
    return found | step_rates()


def step_rates() -> dict[str, float]:
    """Of a step of the plan `data` on one device, which no link joins to others: its time, and the rates of
    its bare `dot`s, its other products and the rest, by XLA's own profile of each instruction."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from shardlab.parallel.step import build_step, init_state
    from shardlab.spec.case import make_case
    from shardlab.spec.plan import plan_from_text

    made = PLANS["data"]
    case = make_case(plan_from_text(made.text(1)), made.model, "cpu:1", made.batch, made.seq)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    step = build_step(case, mesh, target="cpu", compute_dtype=jnp.bfloat16)
    compiled = step.function.lower(*step.arguments).compile()
    state = init_state(case, mesh, 0)
    batch = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), step.arguments[1])

    def run() -> Any:
        nonlocal state
        state, metrics = compiled(state, batch)
        return metrics

    step_s = timed_s(run, _STEPS)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(_STEPS):
                jax.block_until_ready(run())
        (profile,) = Path(folder).rglob("*.xplane.pb")
        spent_s = instruction_seconds(profile)
    return {"step_s": step_s} | rates_of(compiled.as_text(), spent_s)


def instruction_seconds(profile: Path) -> dict[str, list[float]]:
    """Instruction -> seconds of each of its executions."""
    import jax

    found = defaultdict[str, list[float]](list)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of JAX's own types
        for plane in jax.profiler.ProfileData.from_file(str(profile)).planes:
            for event in (event for line in plane.lines for event in line.events):
                name = dict(event.stats).get("hlo_op")
                if name is not None:
                    found[str(name)].append(event.duration_ns / 1e9)
    return found


def rates_of(text: str, spent_s: Mapping[str, list[float]]) -> dict[str, float]:
    """FLOP/s and bytes/s of an executable's instructions, each taken as often as it ran at its median."""
    (module,) = parse(text)
    done, took_s = defaultdict[str, float](float), defaultdict[str, float](float)
    for row in step_cost(module, "cpu").instructions:
        runs = spent_s.get(row.name.lstrip("%"), [])
        part = "bare bf16 dots" if is_bare_bf16(row) else "products" if row.flops else "loops"
        kind = f"step, {part}"
        done[kind] += len(runs) * (row.flops or row.hbm_bytes or 0)
        took_s[kind] += len(runs) * median(runs) if runs else 0.0
    return {kind: done[kind] / took_s[kind] for kind in done}
