"""What one process of the wire lab gets of this computer's cores; `wire_calibrate.py` runs several."""

from __future__ import annotations

import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
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
_STEPS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRates:
    """Of a step of one device: its seconds, and what its products but the bare `dot`s, those, and everything
    else reach in it. Names are those of a machine file."""

    step_s: float
    bf16_flops_per_s: float
    dot_bf16_flops_per_s: float
    memory_bytes_per_s: float


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
    return found | asdict(OneDeviceStep("data").rates())


class OneDeviceStep:
    """One of the lab's plans on one device, which no link joins to others."""

    def __init__(self, plan: str) -> None:
        import jax
        import jax.numpy as jnp
        import numpy as np

        from shardlab.parallel.step import build_step, init_state
        from shardlab.spec.case import make_case
        from shardlab.spec.plan import plan_from_text

        made = PLANS[plan]
        case = make_case(plan_from_text(made.text(1)), made.model, "cpu:1", made.batch, made.seq)
        axes = tuple(case.plan.axes)
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape([1] * len(axes)), axes)
        step = build_step(case, mesh, target="cpu", compute_dtype=jnp.bfloat16)
        self._compiled = step.function.lower(*step.arguments).compile()
        self._state = init_state(case, mesh, 0)
        self._batch = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), step.arguments[1])
        self._work = work_of(self._compiled.as_text())

    def _run(self) -> Any:
        self._state, metrics = self._compiled(self._state, self._batch)
        return metrics

    def rates(self) -> StepRates:
        """Now: seconds without a profile, and the parts by XLA's own profile of each instruction."""
        import jax

        step_s = timed_s(self._run, _STEPS)
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(_STEPS):
                    jax.block_until_ready(self._run())
            (profile,) = Path(folder).rglob("*.xplane.pb")
            return rates_of(self._work, instruction_seconds(profile), _STEPS, step_s)


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


def work_of(text: str) -> dict[str, tuple[str, int]]:
    """Instruction of an executable -> which rate is its, and its FLOPs, or bytes where it has none."""
    (module,) = parse(text)
    found = {}
    for row in step_cost(module, "cpu").instructions:
        bare, other = "dot_bf16_flops_per_s", "bf16_flops_per_s" if row.flops else "memory_bytes_per_s"
        rate = bare if is_bare_bf16(row) else other
        found[row.name.lstrip("%")] = rate, row.flops or row.hbm_bytes or 0
    return found


def rates_of(
    work: Mapping[str, tuple[str, int]], spent_s: Mapping[str, list[float]], steps: int, step_s: float
) -> StepRates:
    """Each instruction is taken as often as it ran in `steps` at its median, and all of them scaled so that a
    step takes `step_s`: in a profile each takes longer."""
    done, took_s = defaultdict[str, int](int), defaultdict[str, float](float)
    for name, (rate, amount) in work.items():
        runs = spent_s.get(name, [])
        done[rate] += len(runs) * amount
        took_s[rate] += len(runs) * median(runs) if runs else 0.0
    scale = step_s * steps / sum(took_s.values())
    return StepRates(step_s=step_s, **{rate: done[rate] / (took_s[rate] * scale) for rate in done})
