"""Rematerialisation by name: which activations of a layer are kept for the backward pass, on the device or on
its host; all others are found again from the layer's input. (MaxText's `remat_policy: custom`.)"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from shardlab.errors import Problem
from shardlab.hardware.toml_file import KeyPath, did_you_mean
from shardlab.spec.models import ModelConfig
from shardlab.spec.plan_schema import Method, NamedRemat

# What has a name: the parts of a layer as parameters name them, and MaxText's name for it.
ACTIVATIONS: Mapping[str, str] = {
    "input": "decoder_layer_input",  # of the layer; kept on the device unless it is offloaded
    "query": "query_proj",  # as attention takes them: with rotary positions
    "key": "key_proj",
    "value": "value_proj",
    "attention": "context",  # what the kernel gives; of splash with its row sums, so that it is not run again
    "output": "out_proj",
    "gate": "mlpwi_0",
    "up": "mlpwi_1",
    "down": "mlpwo",
}
_MLP = ("gate", "up", "down")


def offloads(method: Method) -> bool:
    """Whether something is kept in the host's memory."""
    remat = method.remat
    return bool(remat.offload) if isinstance(remat, NamedRemat) else remat == "offload"


def remat_problems(method: Method, where: Callable[[KeyPath], str]) -> list[Problem]:
    """Names that no activation has, or that stand twice, and what pipelines do not do."""
    problems: list[tuple[KeyPath, str, str]] = []
    remat, key = method.remat, ("method", "remat")
    if isinstance(remat, NamedRemat):
        lists = {"keep": remat.keep, "offload": remat.offload}
        if remat.model_fields_set and not any(lists.values()):
            problems.append((key, "names no activation", 'name one, or say remat = "full"'))
        seen: set[str] = set()
        for place, names in lists.items():
            for name in names:
                if name not in ACTIVATIONS:
                    fix = did_you_mean(name, tuple(ACTIVATIONS), "activations")
                    problems.append(((*key, place), f"{name!r} is no activation of a layer", fix))
                elif name in seen:
                    problems.append(((*key, place), f"names {name!r} twice", "name it once"))
                seen.add(name)
    if method.pipeline != "none" and offloads(method):
        what = "'offload' with a pipeline, whose stages keep things in the device's memory"
        problems.append((key, what, 'use "full", "selective", "matmuls" or keep'))
    return [Problem(where(key), what, fix) for key, what, fix in problems]


def remat_obstacles(method: Method, model: ModelConfig) -> dict[str, str]:
    """Names that this model's layers do not have: reason -> what it has."""
    if not isinstance(method.remat, NamedRemat):
        return {}
    has_mlp = not model.num_experts or bool(model.shared_experts or model.dense_layers)
    absent = set() if has_mlp else set(_MLP)
    if model.activation == "gelu":
        absent.add("gate")
    has = tuple(name for name in ACTIVATIONS if name not in absent)
    return {
        f"remat names {name!r}, which no layer of {model.name} has": f"it has {', '.join(has)}"
        for name in (*method.remat.keep, *method.remat.offload)
        if name in absent
    }
