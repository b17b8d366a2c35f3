"""2 COMPILE: a case -> Program, ahead of time, for a target this machine need not have.

`compile_case` compiles a case in a child process; `compile_step` compiles any jitted function in this one.
Importing this package imports no jax: only the child, or a caller of `compile_step`, pays for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardlab.compile.key import program_key
from shardlab.compile.launch import compile_case

if TYPE_CHECKING:
    from shardlab.compile.collect import compile_step

__all__ = ["compile_case", "compile_step", "program_key"]


def __getattr__(name: str) -> Any:
    """Load `compile_step`, and with it jax, only when someone asks for it."""
    if name != "compile_step":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from shardlab.compile.collect import compile_step

    return compile_step
