"""Compiled programs of rows: kept in a store (`shardlab --cache`), shared where rows ask for the same."""

from __future__ import annotations

import sys
from pathlib import Path

from shardlab.compile import compile_case, program_key
from shardlab.errors import CompileFailed, Infeasible, TargetMissing, UserError
from shardlab.lab.cache import Cache
from shardlab.program import Program
from shardlab.spec.case import Case
from shardlab.store import Store
from validation.outcome import NOT_COMPILED

MAX_BYTES = 20 << 30


class _NotNow(Exception):
    """No more programs may be compiled."""


class Programs:
    """Programs by what they are compiled from: the case, the versions and our sources, or what it lowers to.

    max_compiles: how many more cases may be lowered and, where the program is not there, compiled. compiled:
    how many were compiled. failed: why a case did not compile, by its key.
    """

    def __init__(self, folder: Path, max_compiles: int) -> None:
        self.left = max_compiles
        self.failed: dict[str, str] = {}
        self.cache = Cache(store=Store(folder, max_bytes=MAX_BYTES), compile_with=self._compile)

    @property
    def compiled(self) -> int:
        """How many programs were compiled."""
        return self.cache.counts.compiled

    def find(self, case: Case, *, compiling: bool = True) -> Program | None:
        """The program of a case, compiled if it may be; None where it is not there."""
        key = program_key(case)
        if key in self.failed:
            return None
        left, self.left = self.left, self.left if compiling else 0
        try:
            return self.cache.compile(case, find_largest_batch=False)
        except _NotNow:
            return None
        except (CompileFailed, TargetMissing, Infeasible, UserError) as error:
            self.failed[key] = "; ".join(str(error).splitlines())
            return None
        finally:
            self.left = self.left if compiling else left

    def why_not(self, case: Case) -> str:
        """Why `find` found nothing."""
        why = self.failed.get(program_key(case))
        return NOT_COMPILED if why is None else f"{NOT_COMPILED}: {why}"

    def _compile(self, case: Case, **options: object) -> Program:
        if self.left <= 0:
            raise _NotNow
        self.left -= 1
        print(f"compiling {case.plan.name} on {case.machine}", file=sys.stderr, flush=True)
        return compile_case(case, scheduled_only=True, **options)  # type: ignore[arg-type]
