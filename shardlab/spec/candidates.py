"""Mesh files that a machine's shape suggests for a model: what `search` compiles, and `fit` begins with.

Tensor parallelism stays inside the fastest domain (Megatron, arXiv:2104.04473, section 5.1: "tensor model
parallelism should generally be used up to degree g when using g-GPU servers"); the rest is FSDP over all, or
inside a host or slice with copies across (HSDP), a pipeline across hosts, experts over an axis of their own.
Each is the text of a mesh file, so that what is found can be kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import gcd, prod

from shardlab.hardware.machine import Machine
from shardlab.spec.case import Case
from shardlab.spec.models import ModelConfig
from shardlab.spec.plan import Plan, plan_from_text
from shardlab.spec.sharding import array_sharding

MAX_TENSOR = 16  # wider products per device are too thin on every machine we know of
PIPELINE_STAGES = (4, 8)
F32_BYTES = 4

# (mesh axis of the rule, table, logical axes that it splits)
_RULES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "fsdp": {"params": ("embed",)},
    "tensor": {"params": ("heads", "kv_heads", "mlp", "vocab"), "activations": ("norm_seq",)},
    "expert": {"params": ("expert",)},
    "stage": {"params": ("stage",)},
}
_BATCH = ("data", "fsdp", "expert")  # the axes that split the batch, major to minor


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan, and the text of its mesh file."""

    plan: Plan
    text: str


def candidates(model: ModelConfig, machine: Machine, remat: str = "full") -> tuple[Candidate, ...]:
    """Plans for all devices of the machine, in a fixed order, the plainest first.

    remat: the rematerialisation of all of them. Whether each can be put on the model (heads, batch) is for
    `make_case` to say.
    """
    grids = dict.fromkeys(_without_ones(grid) for grid in _grids(model, machine))
    return tuple(candidate(dict(grid), machine.spec, remat) for grid in grids)


def _without_ones(grid: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """The grid less axes of one device, which do nothing."""
    return tuple((name, size) for name, size in grid.items() if size > 1)


def candidate(axes: Mapping[str, int], on: str, remat: str, microbatches: int | None = None) -> Candidate:
    """The mesh file of a grid whose axes mean what they are called: data, fsdp, tensor, expert, stage."""
    axes = dict(_without_ones(axes)) or {"fsdp": 1}
    lines = [f'on = "{on}"', "[axes]", *(f"{name} = {size}" for name, size in axes.items())]
    tables: dict[str, list[str]] = {"params": [], "activations": []}
    for name in axes:
        for table, logical in _RULES.get(name, {}).items():
            tables[table] += [f'{axis} = ["{name}"]' for axis in logical]
    batch = ", ".join(f'"{name}"' for name in _BATCH if name in axes)
    tables["activations"].insert(0, f"batch = [{batch}]")
    for table, rules in tables.items():
        lines += [f"[{table}]", *rules] if rules else []
    lines += ["[method]", f'remat = "{remat}"']
    if "stage" in axes:
        lines += ['pipeline = "1f1b"', f"microbatches = {microbatches or 2 * axes['stage']}"]
    text = "\n".join(lines) + "\n"
    name = "-".join([f"{axis}{size}" for axis, size in axes.items()] + ([] if remat == "full" else [remat]))
    return Candidate(plan_from_text(text, name), text)


def _grids(model: ModelConfig, machine: Machine) -> Iterator[dict[str, int]]:
    """Grids, major to minor; each multiplies to the machine's devices."""
    devices, parts = machine.num_devices, max(machine.hosts, machine.slices)
    for tensor in _tensor_sizes(model, machine):
        rest = devices // tensor
        yield {"fsdp": rest, "tensor": tensor}
        if parts > 1 and rest % parts == 0 and rest > parts:
            yield {"data": parts, "fsdp": rest // parts, "tensor": tensor}
        for stages in PIPELINE_STAGES if machine.family == "gpu" and not model.num_experts else ():
            if parts % stages == 0 and rest % stages == 0 and stages <= model.layers:
                yield {"data": rest // stages, "stage": stages, "tensor": tensor}
    for expert in _halvings(gcd(model.num_experts, devices)) if model.num_experts else ():
        yield {"fsdp": devices // expert, "expert": expert}


def _tensor_sizes(model: ModelConfig, machine: Machine) -> list[int]:
    """Powers of two that the model divides by and that stay inside the fastest domain; 1 first."""
    inner = next((domain.size for domain in machine.domains if domain.size > 1), 1)
    widest = gcd(gcd(model.heads, model.mlp), gcd(model.padded_vocab, machine.num_devices))
    return [size for size in reversed(_halvings(widest)) if size <= min(inner, MAX_TENSOR)]


def _halvings(value: int) -> list[int]:
    """Powers of two that divide it, the largest first, with 1."""
    return [1 << power for power in range(value.bit_length(), -1, -1) if value and value % (1 << power) == 0]


def state_bytes(case: Case) -> int:
    """Bytes per device of a training step's parameters and Adam's two moments, all of one type: a lower bound
    of what it needs, known before anything is compiled. Raises Infeasible as `array_sharding` does."""
    plan, total = case.plan, 0
    item_bytes = F32_BYTES if plan.method.state == "f32" else F32_BYTES // 2
    for spec in case.parameters():
        for rules, arrays in ((plan.params, 1), (plan.optimizer, 2)):
            split = array_sharding(spec.shape, spec.axes, rules, plan.axes, what=spec.path)
            ways = prod(plan.axes[axis] for axes in split for axis in axes)
            total += arrays * item_bytes * spec.size // ways
    return total
