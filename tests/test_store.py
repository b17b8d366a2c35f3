"""Programs by key in a folder: what comes back, what damage does, and what is pruned."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shardlab.program import Program, to_bytes
from shardlab.store import Store


def program(name: str, size: int = 0) -> Program:
    """size: of the text, which compresses to half of it."""
    return Program(name=name, backend="cpu", hlo_text=os.urandom(size // 2).hex(), num_devices=2)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, said: list[str]) -> Store:
    return Store(tmp_path, say=said.append)


def only(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_what_is_kept_is_found_under_each_of_its_keys(store: Store, said: list[str]) -> None:
    made = program("step")
    assert store.find("a") is None
    store.keep("a", made)
    store.keep("b", made)
    assert store.find("a") == store.find("b") == made
    assert only(store.objects).read_bytes() == to_bytes(made)
    assert said == []


@pytest.mark.parametrize(
    "harm",
    [
        lambda store: only(store.objects).write_bytes(b"half"),
        lambda store: only(store.objects).write_bytes(only(store.objects).read_bytes()[:-1] + b"\0"),
        lambda store: only(store.objects).write_bytes(to_bytes(program("another"))),
        lambda store: (store.keys / "a").write_text("../../etc/passwd\n"),
        lambda store: (store.keys / "a").write_bytes(b"\xff\0"),
    ],
    ids=["cut", "one byte", "another program", "another path", "no text"],
)
def test_a_damaged_entry_is_said_removed_and_made_again(store: Store, said: list[str], harm: object) -> None:
    store.keep("a", program("step"))
    harm(store)  # type: ignore[operator]
    assert store.find("a") is None
    (line,) = said
    assert "damaged, removed and made again" in line
    assert store.find("a") is None
    assert len(said) == 1
    store.keep("a", program("step"))
    assert store.find("a") is not None


def test_an_entry_of_another_format_is_damaged_too(store: Store, said: list[str]) -> None:
    import hashlib

    store.keep("a", program("step"))
    data = b'{"schema": "shardlab.program/9"}'
    digest = hashlib.sha256(data).hexdigest()
    (store.objects / digest).write_bytes(data)
    (store.keys / "a").write_text(digest)
    assert store.find("a") is None
    assert "not a saved program" in said[0]


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    store = Store(tmp_path, max_bytes=12_000)
    for age_s, name in ((300, "used"), (200, "old"), (100, "new")):
        store.keep(name, program(name, 10_000))
        digest = (store.keys / name).read_text().strip()
        then = time.time() - age_s
        os.utime(store.objects / digest, (then, then))
    assert store.find("used") is not None  # now the last one used
    leftover, fresh = store.objects / ".x.abc", store.objects / ".x.def"
    for path in (leftover, fresh):
        path.write_text("half")
    os.utime(leftover, (0, 0))
    store.prune()
    assert sorted(path.name for path in store.keys.iterdir()) == ["new", "used"]
    assert sum(path.stat().st_size for path in store.objects.iterdir()) <= 12_000
    assert (leftover.exists(), fresh.exists()) == (False, True)


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "objects").write_text("a file")
    store = Store(tmp_path, say=said.append)
    store.keep("a", program("step"))
    assert store.find("a") is None
    assert "nothing is kept" in said[0]


KEEP_MANY = """
import os, sys
from pathlib import Path
from shardlab.program import Program
from shardlab.store import Store

store = Store(Path(sys.argv[1]), max_bytes=20_000)
for number in range(30):
    text = os.urandom(1_000).hex()
    store.keep(f"k{number % 5}", Program(name="step", backend="cpu", hlo_text=text, num_devices=2))
    store.prune()
    store.find(f"k{(number + 1) % 5}")
"""


def test_processes_share_a_folder(tmp_path: Path) -> None:
    """Nothing but whole programs is ever found, whoever writes and prunes meanwhile."""
    running = [subprocess.Popen([sys.executable, "-c", KEEP_MANY, str(tmp_path)]) for _ in range(2)]
    assert [one.wait(timeout=60) for one in running] == [0, 0]
    said: list[str] = []
    store = Store(tmp_path, say=said.append)
    assert any(store.find(f"k{number}") for number in range(5))
    assert said == []
