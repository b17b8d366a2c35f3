"""What the parent asks of a compile child, and the files that the child answers with. No jax."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from shardlab.spec.step import AnyCase

# In the request's folder: the saved program, its module as a proto, or an error as JSON; the key of what was
# lowered, and what the store had to say.
PROGRAM_FILE, PROTO_FILE, OUTCOME_FILE = "program", "module.pb", "outcome.json"
KEY_FILE, MESSAGES_FILE = "lowered-key", "messages"
TEMPLATE_FILE = "template"  # the program as far as it is known before it is compiled
LOWERED = "lowered-"  # before a key in the store


class Request(BaseModel):
    """What the parent asks for; `folder` is an empty folder that the answer goes to.

    store: of programs by what they lower to, in which the child looks before it compiles; target_key: of the
    target, for that key. scheduled_only: the parent stops the child when the module is scheduled.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    case: AnyCase
    folder: Path
    want_proto: bool = False
    find_largest_batch: bool = True
    store: Path | None = None
    target_key: str = ""
    scheduled_only: bool = False
