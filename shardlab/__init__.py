"""shardlab: what a sharding plan costs, read from the compiled program.

Its names are loaded when first asked for: importing shardlab is cheap, and no jax.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardlab.analysis import Analysis, analyze
    from shardlab.review import diff
    from shardlab.spec.plan import load_plan as load_mesh
    from shardlab.spec.step import StepProgram

__all__ = ["Analysis", "StepProgram", "analyze", "diff", "load_mesh"]

_HOME = {
    "analyze": ("shardlab.analysis", "analyze"),
    "Analysis": ("shardlab.analysis", "Analysis"),
    "diff": ("shardlab.review", "diff"),
    "load_mesh": ("shardlab.spec.plan", "load_plan"),
    "StepProgram": ("shardlab.spec.step", "StepProgram"),
}


def __getattr__(name: str) -> Any:
    """Load a public name from the module that holds it. Raises AttributeError for any other name."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, member = _HOME[name]
    return getattr(import_module(module), member)


def __dir__() -> list[str]:
    return sorted(__all__)
