"""Mesh files: a plan as one frozen value. `load_plan` reads TOML and reports every mistake of the file at once."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

# Logical axis -> mesh axes, major to minor. A logical axis that is absent is replicated.
Rules = dict[str, tuple[str, ...]]

PARAM_AXES = ("embed", "heads", "kv_heads", "head_dim", "mlp", "vocab", "layers", "expert", "stage")
ACTIVATION_AXES = (
    "batch", "seq", "norm_seq", "kv_seq", "embed", "heads", "kv_heads", "mlp", "vocab", "expert", "cache",
)  # fmt: skip


class Method(BaseModel):
    """What rules cannot say."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pipeline: Literal["none", "gpipe", "1f1b", "interleaved", "zb-h1"] = "none"
    microbatches: int | None = None
    virtual_stages: int | None = None
    accumulate: int = 1
    context: Literal["none", "all-gather", "ring", "ulysses", "ring+ulysses"] = "none"
    experts: str = "dropless"
    remat: Literal["none", "full", "matmuls", "offload"] = "full"
    attention: Literal["auto", "reference", "cudnn", "splash"] = "auto"


class Check(BaseModel):
    """What `shardlab check` compiles the plan with; defaults for the other verbs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = None
    batch: int | None = None
    seq: int | None = None


class Plan(BaseModel):
    """One mesh file. `axes` is ordered major to minor. `params`, `activations`, `optimizer` are complete:
    what follows from another table (heads of activations, optimizer from params) has been filled in.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    path: str = ""
    description: str = ""
    on: str | None = None
    order: Literal["make_mesh", "row-major"] | tuple[int, ...] = "make_mesh"
    axes: dict[str, int]
    params: Rules = {}
    activations: Rules = {}
    optimizer: Rules = {}
    blocks: dict[str, dict[str, Rules]] = {}
    method: Method = Method()
    flags: tuple[str, ...] = ()
    check: Check = Check()
