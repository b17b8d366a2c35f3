"""The compile child: `python -m shardlab.compile.child`, one request as a line of JSON on standard input.

The parent has set the environment (flags, number of devices, platforms), which jax reads when it is imported:
hence a process of its own, which a bad flag or a crash of the compiler may kill. It writes `program` or
`outcome.json` (an error as data) into the request's folder, each atomically, and prints whatever the
compilers print.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from shardlab.compile.key import lowered_key
from shardlab.compile.request import (
    KEY_FILE,
    LOWERED,
    MESSAGES_FILE,
    OUTCOME_FILE,
    PROGRAM_FILE,
    PROTO_FILE,
    TEMPLATE_FILE,
    Request,
)
from shardlab.errors import CompileFailed, Infeasible, ShardlabError, TargetMissing, UserError
from shardlab.program import Program, Refusal, save, write_atomically
from shardlab.spec.case import Case
from shardlab.store import Store


def answer(request: Request) -> None:
    """Compile the case and save the program; after a refusal, save again once the largest batch is known."""
    from shardlab.compile.build import compile_here, open_case

    opened = open_case(request.case)
    compiled = compile_here(
        request.case,
        opened,
        _kept(request, opened.device_ids),
        before=partial(save, path=request.folder / TEMPLATE_FILE) if request.scheduled_only else None,
    )
    if request.want_proto and compiled.executable is not None:
        from shardlab.compile.collect import serialized_modules

        write_atomically(request.folder / PROTO_FILE, serialized_modules(compiled.executable))
    save(compiled.program, request.folder / PROGRAM_FILE)
    refused = compiled.program.refusal
    if refused is not None and request.find_largest_batch and isinstance(request.case, Case):
        program = _with_largest_batch(request.case, opened, compiled.program, refused)
        save(program, request.folder / PROGRAM_FILE)


def _kept(request: Request, device_ids: tuple[int, ...]) -> Callable[[str], Program | None] | None:
    """Finds a program by what it lowers to, and tells the parent its key."""
    if request.store is None:
        return None
    folder = request.store

    def say(message: str) -> None:
        with (request.folder / MESSAGES_FILE).open("a", encoding="utf-8") as file:
            file.write(message + "\n")

    def find(text: str) -> Program | None:
        key = lowered_key(request.target_key, device_ids, text)
        write_atomically(request.folder / KEY_FILE, key.encode())
        return Store(folder, say=say).find(LOWERED + key)

    return find


def _with_largest_batch(case: Case, opened: Any, program: Program, refused: Refusal) -> Program:
    from shardlab.compile.build import compile_here
    from shardlab.compile.fit import Try, batch_unit, largest_batch

    def attempt(batch: int) -> Try:
        try:
            tried = compile_here(case.model_copy(update={"batch": batch}), opened).program
        except (CompileFailed, Infeasible):
            return Try(batch=batch, fits=False, needed_bytes=refused.needed_bytes)
        needed = tried.refusal.needed_bytes if tried.refusal else (tried.memory and tried.memory.peak_bytes)
        return Try(batch=batch, fits=tried.refusal is None, needed_bytes=needed or 0)

    first = Try(batch=case.batch, fits=False, needed_bytes=refused.needed_bytes)
    largest = largest_batch(batch_unit(case), first, refused.limit_bytes, attempt)
    return replace(program, refusal=replace(refused, largest_batch=largest))


def outcome_of(error: Exception) -> dict[str, Any]:
    """An error as the JSON that `shardlab.compile.launch` turns back into an exception."""
    if isinstance(error, UserError):
        return {"kind": "user", "problems": [[p.where, p.what, p.fix] for p in error.problems]}
    if isinstance(error, Infeasible):
        return {"kind": "infeasible", "reason": error.reason, "nearest": error.nearest}
    if isinstance(error, TargetMissing):
        return {"kind": "missing", "target": error.target, "why": error.why, "install": error.install}
    if isinstance(error, CompileFailed):
        return {"kind": "failed", "why": error.why}
    return {"kind": "failed", "why": f"{type(error).__name__}: {error}"}


def _die_with_parent() -> None:
    """The parent holds our standard input open while it lives; its end means that nobody waits for the
    answer.
    """

    def wait() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main() -> int:
    """Answer one request: 0 when `program` was written, 1 when `outcome.json` was."""
    request = Request.model_validate_json(sys.stdin.buffer.readline())
    _die_with_parent()
    try:
        answer(request)
    except Exception as error:  # whatever goes wrong here must reach the parent as a sentence
        if not isinstance(error, ShardlabError):
            traceback.print_exc()
        write_atomically(request.folder / OUTCOME_FILE, json.dumps(outcome_of(error)).encode())
        return 1
    return 0


if __name__ == "__main__":
    sys.stdout.flush()
    code = main()
    sys.stderr.flush()
    # Not sys.exit: tearing down compile-only clients takes time and has crashed; everything is on disk.
    os._exit(code)
