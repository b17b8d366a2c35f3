"""Saved programs by key, in a folder that several processes may use at once.

FOLDER/objects/<sha256>: a saved program, called after its bytes, so that damage is seen. FOLDER/keys/<key>:
the sha256 of the program under that key. Both are written atomically and never changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from shardlab.errors import UserError
from shardlab.program import Program, from_bytes, to_bytes, write_atomically

MAX_BYTES = 2 << 30
_LEFTOVER_S = 24 * 3600.0  # the age of a temporary file that a killed writer left
_DIGEST = re.compile(r"[0-9a-f]{64}")


def to_standard_error(message: str) -> None:
    """One line."""
    print(message, file=sys.stderr, flush=True)


class Store:
    """Programs by key. What cannot be read or written is said and does without; it never raises.

    max_bytes: of all programs together; those not used for longest go first. say: gets one line per message.
    """

    def __init__(
        self, folder: Path, *, max_bytes: int = MAX_BYTES, say: Callable[[str], None] = to_standard_error
    ) -> None:
        self.folder, self.max_bytes, self.say = folder, max_bytes, say
        self.objects, self.keys = folder / "objects", folder / "keys"

    def find(self, key: str) -> Program | None:
        """The program under a key; None where there is none, or a damaged one (said, and removed)."""
        try:
            digest = (self.keys / key).read_text(encoding="ascii", errors="replace").strip()
            path = self.objects / digest if _DIGEST.fullmatch(digest) else self.keys / key
            data = path.read_bytes()
        except OSError:
            return None
        if hashlib.sha256(data).hexdigest() != digest:
            self._damaged(key, path, "its bytes are not those that were written")
            return None
        try:
            program = from_bytes(data, str(path))
        except UserError as error:
            self._damaged(key, path, error.problems[0].what)
            return None
        with contextlib.suppress(OSError):
            path.touch()  # prune keeps what was used last
        return program

    def keep(self, key: str, program: Program) -> None:
        """Put a program under a key."""
        data = to_bytes(program)
        digest = hashlib.sha256(data).hexdigest()
        try:
            for folder in (self.objects, self.keys):
                folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.objects / digest, data)
            write_atomically(self.keys / key, f"{digest}\n".encode())
        except OSError as error:
            self.say(f"{self.folder}: nothing is kept: {error.strerror or error}")

    def prune(self) -> None:
        """Remove programs beyond `max_bytes`, the keys of what is gone, and what killed writers left."""
        now, room = time.time(), self.max_bytes
        for path, modified, size in sorted(_files(self.objects), key=lambda file: -file[1]):
            leftover = _DIGEST.fullmatch(path.name) is None
            room -= 0 if leftover else size
            if now - modified > _LEFTOVER_S if leftover else room < 0:
                _remove(path)
        for path, modified, _ in _files(self.keys):
            leftover = path.name.startswith(".")
            if now - modified > _LEFTOVER_S if leftover else not self._has_program(path):
                _remove(path)

    def _has_program(self, key: Path) -> bool:
        try:
            return (self.objects / key.read_text(encoding="ascii", errors="replace").strip()).exists()
        except OSError:
            return True  # another process removed it

    def _damaged(self, key: str, path: Path, why: str) -> None:
        self.say(f"{path}: damaged, removed and made again: {why}")
        for file in (path, self.keys / key):
            _remove(file)


def _files(folder: Path) -> list[tuple[Path, float, int]]:
    """(path, seconds since the epoch when last used, bytes) of each file that is still there."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            known = path.stat()
            found.append((path, known.st_mtime, known.st_size))
    return found


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
