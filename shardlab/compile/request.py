"""What the parent asks of a compile child, and the files that the child answers with. No jax."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from shardlab.spec.case import Case

# In the request's folder: the saved program, its module as a proto, or an error as JSON.
PROGRAM_FILE, PROTO_FILE, OUTCOME_FILE = "program", "module.pb", "outcome.json"


class Request(BaseModel):
    """What the parent asks for; `folder` is an empty folder that the answer goes to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    case: Case
    folder: Path
    want_proto: bool = False
    find_largest_batch: bool = True
