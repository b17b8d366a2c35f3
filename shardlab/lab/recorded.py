"""What `record` runs: a command, and the step that its programs were."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from shardlab.errors import Problem, UserError
from shardlab.program import Program
from shardlab.record import run
from shardlab.recording import is_recording, read_recording


def record_command(
    command: Sequence[str], out: str, steps: int | None, *, output: TextIO | None, progress: TextIO
) -> tuple[Program, int]:
    """The step that a command's processes ran, and the command's exit status.

    out: a new folder. steps: as for `read_recording`. output: where its standard output goes, None for ours.
    Raises UserError when the folder is in use, the command cannot be started, or nothing was recorded.
    """
    words = list(command[1:] if command[:1] == ["--"] else command)
    if not words:
        raise UserError(Problem("record", "no command", "shardlab record -- python train.py"))
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        # Processes of another run would look like processes of this one's job.
        raise UserError(Problem(out, "is there already", "remove it, or give another folder with --out"))
    try:
        status = run(words, out, stdout=output)
    except OSError as error:
        what = error.strerror or str(error)
        raise UserError(Problem(words[0], what, "give a command that can be run")) from None
    program = read_recording(out, steps)
    print(f"recorded in {out}; again with: shardlab analyze {out}", file=progress)
    if status:
        print(f"the command exited with {status}; this is what it ran until then", file=progress)
    return program, status


def with_steps(paths: Sequence[str], steps: int | None) -> list[str | Program]:
    """What `analyze` reads: of recordings the step, given how many ran. Raises UserError where `steps` means
    nothing."""
    if steps is None:
        return list(paths)
    wrong = [path for path in paths if not is_recording(Path(path))]
    if wrong:
        what = "--steps is for what shardlab record wrote"
        raise UserError(*(Problem(path, what, "give the folder of a recording") for path in wrong))
    return [read_recording(path, steps) for path in paths]
