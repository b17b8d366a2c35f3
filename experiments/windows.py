"""Text as training windows: read once, shuffled by grain, each process reading the rows that it holds.

Window i of a step is the same for every plan and every number of processes: grain's shuffle is a function of
the seed and the window's index alone, and a process asks for the indices of its own rows.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shardlab.errors import Problem, UserError


def read_text(path: str | None, max_bytes: int) -> np.ndarray:
    """Bytes to train on, uint8: of one file, of a folder's .py and .txt files in order, or of the standard
    library.

    Raises UserError when there is nothing to read.
    """
    root = Path(path) if path else Path(sysconfig.get_path("stdlib"))
    chunks, size = [], 0
    for file in text_files(root):
        chunk = file.read_bytes()[: max_bytes - size]
        chunks.append(chunk)
        size += len(chunk)
        if size >= max_bytes:
            break
    if not size:
        raise UserError(Problem(f"--text={root}", "nothing to read", "give a text file or a folder of them"))
    return np.frombuffer(b"".join(chunks), np.uint8)


def text_files(root: Path) -> Iterator[Path]:
    """The file itself, or the .py and .txt files below a folder, sorted; installed packages are left out."""
    if root.is_file():
        yield root
        return
    for file in sorted(root.rglob("*")):
        if file.suffix in (".py", ".txt") and file.is_file() and "site-packages" not in file.parts:
            yield file


class Windows:
    """Every window of `seq` + 1 bytes in a text, int32 [L + 1], as grain reads them."""

    def __init__(self, text: np.ndarray, seq: int) -> None:
        if text.size <= seq + 1:
            what = f"{text.size} bytes are less than --seq + 2"
            raise UserError(Problem("--text", what, "give more text"))
        self._text, self._seq = text, seq

    def __len__(self) -> int:
        return int(self._text.size - self._seq)

    def __getitem__(self, start: Any) -> np.ndarray:
        return self._text[int(start) : int(start) + self._seq + 1].astype(np.int32)


def windows_of_steps(
    windows: Windows, *, batch: int, seed: int, rows: Sequence[int], first_step: int
) -> Iterator[np.ndarray]:
    """int32 [len(rows), L + 1] of each step from `first_step` on (steps count from 1), without end.

    rows: which of the `batch` sequences of a step are wanted here. Every epoch is shuffled anew.
    """
    import grain  # imports jax, whose environment must be set before

    shuffled = grain.MapDataset.source(windows).seed(seed).shuffle().repeat()
    count = len(rows)

    def window(i: int) -> np.ndarray:
        return shuffled[(first_step - 1 + i // count) * batch + rows[i % count]]

    mine = grain.MapDataset.range(0, 2**48 // batch * count).map(window).batch(count)
    return iter(mine.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))
