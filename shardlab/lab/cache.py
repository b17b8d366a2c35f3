"""Compiling through a cache: what lowers to a known program is not compiled, what did not change not even
lowered.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from shardlab.compile import compile_case, program_key
from shardlab.compile.interpreter import HERE, Interpreter
from shardlab.compile.key import relabelled
from shardlab.errors import Problem, UserError
from shardlab.lab.run import Steps
from shardlab.program import Program
from shardlab.spec.step import AnyCase, StepCase
from shardlab.store import Store, to_standard_error

VARIABLE = "SHARDLAB_CACHE"
OFF = "off"
_CASE, _REFUSED = "case-", "-refused"
Compile = Callable[..., Program]


@dataclass(slots=True)
class Counts:
    """What a run did: programs compiled, found by what they lower to, found without importing jax; and how
    many children worked side by side at most."""

    compiled: int = 0
    lowered: int = 0
    unchanged: int = 0
    most_at_once: int = 0

    def to_json(self) -> dict[str, int]:
        """The member `programs` of documents."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True)
class Cache:
    """Compiles cases behind two keys, and counts.

    store: None keeps nothing. sources: files of the user's that build the step, for the first key. python: of
    the environment that compiles.
    """

    store: Store | None = None
    sources: Sequence[Path] = ()
    compile_with: Compile = compile_case
    python: Interpreter = HERE
    counts: Counts = field(default_factory=Counts)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _running: int = 0

    def steps(self, *, find_largest_batch: bool = True) -> Steps:
        """For `run_cases`."""
        return Steps(
            key=self.key,
            compile=partial(self.compile, find_largest_batch=find_largest_batch),
        )

    def steps_in(self, python: Interpreter) -> Steps:
        """For `run_cases` with another environment's compiler; counted with the others."""
        compile_there = partial(self.compile_with, python=python)
        there = replace(self, python=python, compile_with=compile_there)
        return Steps(key=there.key, compile=partial(there.compile, find_largest_batch=False))

    def key(self, case: AnyCase) -> str:
        """The first key of a case."""
        family = case.load_machine().family
        return program_key(case, self.sources, self.python.versions(family))

    def compile(self, case: AnyCase, *, find_largest_batch: bool = True) -> Program:
        """As `compile_case`. A program that is not compiled now has no `compile_s`."""
        store = None if case.load_machine().family == "attached" else self.store  # its environment counts too
        if self.python != HERE and isinstance(case, StepCase):
            store = None  # what is installed there may be in the user's step, and is not in its key
        key = _CASE + self.key(case)
        found = store.find(key) if store is not None else None
        if found is None and store is not None and not find_largest_batch:
            found = store.find(key + _REFUSED)
        if found is not None:
            self._count("unchanged")
            return relabelled(found, case, self.python.versions(case.load_machine().family))
        with self._one_more():
            program = self.compile_with(case, find_largest_batch=find_largest_batch, store=store)
        self._count("compiled" if program.compile_s is not None else "lowered")
        if store is not None:
            unsought = program.refusal is not None and not find_largest_batch
            store.keep(key + _REFUSED if unsought else key, program)
        return program

    def prune(self) -> None:
        """Bound what is kept; once, after a run."""
        if self.store is not None and self.counts.compiled + self.counts.lowered:
            self.store.prune()

    def _count(self, what: str) -> None:
        with self._lock:
            setattr(self.counts, what, getattr(self.counts, what) + 1)

    @contextmanager
    def _one_more(self) -> Iterator[None]:
        with self._lock:
            self._running += 1
            self.counts.most_at_once = max(self.counts.most_at_once, self._running)
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1


def open_cache(
    folder: str | None = None,
    *,
    off: bool = False,
    environment: Mapping[str, str] = os.environ,
    say: Callable[[str], None] = to_standard_error,
) -> Cache:
    """The cache in `folder`, else in $SHARDLAB_CACHE (`off`: none), else where this system keeps caches.

    Raises UserError when a folder that the user named cannot be written; the system's is then done without.
    """
    if off or (folder is None and environment.get(VARIABLE) == OFF):
        return Cache()
    named = folder or environment.get(VARIABLE)
    path = Path(named) if named else _system_folder()
    try:
        path.mkdir(parents=True, exist_ok=True)
        usable = os.access(path, os.W_OK | os.X_OK)
    except OSError:
        usable = False
    if usable:
        return Cache(Store(path, say=say))
    if named:
        where = "--cache" if folder else VARIABLE
        raise UserError(Problem(f"{where} {path}", "cannot be written", "name another folder, or --no-cache"))
    say(f"{path}: cannot be written, so programs are compiled every time; name a folder with --cache")
    return Cache()


def _system_folder() -> Path:
    import platformdirs

    return platformdirs.user_cache_path("shardlab", appauthor=False)
