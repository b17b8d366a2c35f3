"""A case: plan x model x machine x workload. The unit that is compiled, cached and reported."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from shardlab.spec.models import ModelConfig
from shardlab.spec.plan import Plan

Workload = Literal["train", "prefill", "decode"]


class Case(BaseModel):
    """Everything that decides the compiled program. `machine` is the machine as written; resolve it in `hardware/`.

    batch: global batch in sequences. seq: tokens per sequence. Serialises to JSON for the compile child process.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: Plan
    model: ModelConfig
    machine: str
    batch: int
    seq: int
    workload: Workload = "train"
    scan_layers: bool = True
