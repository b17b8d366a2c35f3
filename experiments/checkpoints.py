"""Checkpoints with Orbax: written beside training, atomic, each process its own shards.

A checkpoint appears under its step's number when it is whole, and not before. What cannot be read is skipped
with a message, on all processes together, and the one before it is taken. The state comes back on whatever
mesh the plan has now, as long as its arrays are the same.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shardlab.errors import Problem, UserError

KEPT = 3


class Checkpoints:
    """The checkpoints in a folder. facts: what must be the same for a run to go on from one."""

    def __init__(self, folder: Path, every: int, facts: Mapping[str, Any]) -> None:
        import orbax.checkpoint as ocp

        logging.getLogger("absl").setLevel(logging.ERROR)
        self._folder, self._facts, self._args = folder, dict(facts), ocp.args
        options = ocp.CheckpointManagerOptions(
            save_interval_steps=every, max_to_keep=KEPT, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step: int, state: Any) -> None:
        """Begin to write the state after `step`, if its turn has come; earlier writes are awaited first."""
        items = {"state": self._args.StandardSave(state), "facts": self._args.JsonSave(self._facts)}
        self._manager.save(step, args=self._args.Composite(**items))

    def restore(self, abstract: Any) -> tuple[int, Any] | None:
        """(step, state) of the newest checkpoint that can be read, on the shardings of `abstract`.

        None when there is none. Raises UserError when it is of another run.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            facts = self._read(step, lambda step=step: self._restored(step, facts=self._args.JsonRestore()))
            if facts is None:
                continue
            self._check(step, facts["facts"])
            found = self._read(
                step, lambda step=step: self._restored(step, state=self._args.StandardRestore(abstract))
            )
            if found is not None:
                return step, found["state"]
        return None

    def _restored(self, step: int, **items: Any) -> Any:
        return self._manager.restore(step, args=self._args.Composite(**items))

    def _read(self, step: int, read: Callable[[], Any]) -> Any:
        """What `read` gives; None, with a message, where any process could not."""
        import jax
        import numpy as np
        from jax.experimental import multihost_utils

        try:
            found, why = read(), ""
        except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
            found, why = None, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
        if jax.process_count() > 1:
            read_by = multihost_utils.process_allgather(np.array(found is not None))
            if found is not None and not read_by.all():
                found, why = None, "another process could not read it"
        if found is None:
            sys.stderr.write(f"checkpoint {self._folder / str(step)}: skipped, {why}\n")
        return found

    def _check(self, step: int, facts: Mapping[str, Any]) -> None:
        wrong = [
            Problem(f"--{name}", f"{value}, but checkpoint {self._folder / str(step)} has {facts.get(name)}",
                    "give the same, or another --checkpoints folder")
            for name, value in self._facts.items() if facts.get(name) != value
        ]  # fmt: skip
        if wrong:
            raise UserError(*wrong)

    def close(self) -> None:
        """Wait for what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()


@contextmanager
def open_checkpoints(
    folder: str | None, every: int, facts: Mapping[str, Any]
) -> Iterator[Checkpoints | None]:
    """The checkpoints of a run, awaited at its end; None where no folder was asked for."""
    if folder is None:
        yield None
        return
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(Problem(f"--checkpoints={folder}", os.strerror(error.errno or 0), "")) from None
    checkpoints = Checkpoints(path, every, facts)
    yield checkpoints
    checkpoints.close()
