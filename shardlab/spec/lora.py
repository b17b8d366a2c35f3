"""LoRA: which projections get adapters, as parameters beside the frozen kernels.

Source: Hu et al., arXiv:2106.09685, section 4.1: y = W x + (alpha / rank) · out(in(x)), with `in` random and
`out` zero at the start; query and value projections are its own choice (section 5.1). The frozen weights are
bf16, and have neither gradient nor optimizer state.
"""

from __future__ import annotations

from collections.abc import Callable

from shardlab.errors import Problem
from shardlab.hardware.toml_file import KeyPath, did_you_mean
from shardlab.spec.params import ParamSpec
from shardlab.spec.plan_schema import Method

TARGETS = ("query", "key", "value", "output", "gate", "up", "down")
INWARD, OUTWARD = "lora_in", "lora_out"
_STACKED = ("stage", "layers")


def is_adapter(path: str) -> bool:
    """Whether a parameter is one of an adapter's two."""
    return path.endswith((INWARD, OUTWARD))


def is_trained(path: str, method: Method) -> bool:
    """Whether a step updates this parameter: with LoRA only adapters are."""
    return method.lora is None or is_adapter(path)


def trained_specs(table: tuple[ParamSpec, ...], method: Method) -> tuple[ParamSpec, ...]:
    """Those parameters that a step updates."""
    return tuple(spec for spec in table if is_trained(spec.path, method))


def num_inputs(axes: tuple[str | None, ...]) -> int:
    """How many of a projection's dimensions (without stacked ones) are summed: heads and head_dim, or one."""
    return 2 if axes[0] == "heads" else 1


def adapter_table(table: tuple[ParamSpec, ...], method: Method) -> tuple[ParamSpec, ...]:
    """The adapters of a model with these parameters: of each targeted kernel [*inputs, *outputs] an inward
    one [*inputs, rank] and an outward one [rank, *outputs]. Kernels of experts have none."""
    if method.lora is None:
        return ()
    found = []
    for spec in table:
        owner, _, name = spec.path.rpartition("/")
        if name != "kernel" or "/moe/" in spec.path or owner.rpartition("/")[2] not in method.lora_targets:
            continue
        stack = sum(axis in _STACKED for axis in spec.axes)
        middle = stack + num_inputs(spec.axes[stack:])
        inward = ParamSpec(
            f"{owner}/{INWARD}", (*spec.shape[:middle], method.lora), (*spec.axes[:middle], None)
        )
        outward = ParamSpec(
            f"{owner}/{OUTWARD}",
            (*spec.shape[:stack], method.lora, *spec.shape[middle:]),
            (*spec.axes[:stack], None, *spec.axes[middle:]),
        )
        found += [inward, outward]
    return tuple(found)


def lora_problems(method: Method, where: Callable[[KeyPath], str]) -> list[Problem]:
    """Numbers and names that mean nothing, and what does not go together."""
    problems: list[tuple[str, str, str]] = []
    if method.lora is None:
        problems += [
            (key, "belongs to LoRA, and lora is not given", f"remove {key}, or say lora = 16")
            for key in ("lora_alpha", "lora_targets")
            if key in method.model_fields_set
        ]
    elif method.lora < 1:
        problems.append(("lora", f"rank {method.lora}", "use 1 or more"))
    elif method.pipeline != "none":
        fix = 'remove it, or use pipeline = "none"'
        problems.append(("lora", "adapters in a pipeline are not built yet", fix))
    if method.lora_alpha is not None and method.lora_alpha < 1:
        problems.append(("lora_alpha", f"{method.lora_alpha}", "use 1 or more"))
    if not method.lora_targets:
        problems.append(("lora_targets", "no projection", "leave it out for query and value"))
    problems += [
        ("lora_targets", f"{name!r} is no projection", did_you_mean(name, TARGETS, "projections"))
        for name in method.lora_targets
        if name not in TARGETS
    ]
    return [Problem(where(("method", key)), what, fix) for key, what, fix in problems]
