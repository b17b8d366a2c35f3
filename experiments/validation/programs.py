"""Compiled programs of rows: kept in a folder, shared where rows differ in their microbatches alone."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from shardlab import program as programs
from shardlab.compile import compile_case, program_key
from shardlab.errors import CompileFailed, Infeasible, TargetMissing, UserError
from shardlab.program import Program
from shardlab.spec.case import Case
from validation.outcome import NOT_COMPILED


class Programs:
    """A folder of programs, `CASE-KEY.program`: the key is `program_key`, so that a program of other sources
    or compilers is not taken for this one; CASE is the case alone.

    max_compiles: how many more may be compiled. any_sources: programs of other versions of the sources and
    compilers are taken too, and counted in `stale`. failed: why a case did not compile.
    """

    def __init__(self, folder: Path, max_compiles: int, *, any_sources: bool = False) -> None:
        self.folder, self.left, self.any_sources = folder, max_compiles, any_sources
        self.stale: set[str] = set()
        self.failed: dict[str, str] = {}
        self.compiled = 0
        folder.mkdir(parents=True, exist_ok=True)

    def find(self, case: Case, *, compiling: bool = True) -> Program | None:
        """The program of a case, compiled if it may be; None where it is not there."""
        name = case_digest(case)
        path = self.folder / f"{name}-{program_key(case)[:16]}.program"
        if path.exists():
            return programs.load(path)
        others = sorted(self.folder.glob(f"{name}-*.program"), key=lambda other: other.stat().st_mtime)
        if self.any_sources and others:
            self.stale.add(name)
            return programs.load(others[-1])
        if not compiling or self.left <= 0 or name in self.failed:
            return None
        self.left -= 1
        self.compiled += 1
        return self._compile(case, name, path)

    def why_not(self, case: Case) -> str:
        """Why `find` found nothing."""
        why = self.failed.get(case_digest(case))
        return NOT_COMPILED if why is None else f"{NOT_COMPILED}: {why}"

    def _compile(self, case: Case, name: str, path: Path) -> Program | None:
        print(f"compiling {case.plan.name} on {case.machine}", file=sys.stderr, flush=True)
        try:
            program = compile_case(case, find_largest_batch=False)
        except (CompileFailed, TargetMissing, Infeasible, UserError) as error:
            self.failed[name] = "; ".join(str(error).splitlines())
            return None
        programs.save(program, path)
        return program


def case_digest(case: Case) -> str:
    """Of what the case asks for, whatever its row is called: equal for rows that share a program."""
    asked = case.model_dump(mode="json", exclude_defaults=True)  # a new key of plans changes nothing
    asked["plan"] = {key: value for key, value in asked["plan"].items() if key not in ("name", "path")}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
