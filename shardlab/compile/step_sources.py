"""Which files a step function is built from, found without importing it: for the key of a cached program."""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import distributions
from pathlib import Path

from shardlab.errors import Problem, UserError

_MAX_BYTES = 1 << 20  # of a file; data sets are no sources


def step_sources(step: str, folder: str | Path) -> tuple[Path, ...]:
    """The files of the step's top-level package, and of what its Python files import from beside it.

    step: `package.module:make_step`; folder: where it is looked for before everything installed. Beside it is
    the folder that holds the top-level package: installed packages count by version (`installed_digest`).
    Of a package all files below 1 MiB count, configurations too; what a step reads from elsewhere does not.
    Raises UserError when there is no such package.
    """
    top = step.partition(":")[0].partition(".")[0]
    home = _home(top, folder)
    if home is None:
        what = f"no module {top!r} in {Path(folder).resolve()} or among what is installed"
        raise UserError(Problem(step, what, "run it where `import` finds it, or set PYTHONPATH"))
    found: dict[Path, None] = {}
    seen, waiting = {top}, [top]
    while waiting:
        for path in _files(waiting.pop(), home):
            found[path] = None
            new = set(_imported(path)) - seen if path.suffix == ".py" else set()
            seen |= new
            waiting += sorted(new)
    return tuple(sorted(found))


def sources_digest(step: str, folder: str | Path) -> str:
    """sha256 (hex) over `step_sources`, by their place beside each other."""
    digest = hashlib.sha256()
    paths = step_sources(step, folder)
    home = _home(step.partition(":")[0].partition(".")[0], folder)
    for path in paths:
        digest.update(path.relative_to(home or path).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def installed_digest() -> str:
    """sha256 (hex) over the name and version of every installed distribution: any may be in a user's step."""
    names = sorted({f"{one.name}=={one.version}" for one in distributions()})
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _home(top: str, folder: str | Path) -> Path | None:
    """The folder that holds the top-level package or module."""
    spec = PathFinder.find_spec(top, [str(Path(folder).resolve()), *sys.path])
    places = _places(spec) if spec is not None else []
    return places[0].parent if places else None


def _places(spec: ModuleSpec) -> list[Path]:
    """The folders of a package (a namespace may have several), or the file of a module."""
    if spec.submodule_search_locations is not None:
        return [Path(place).resolve() for place in spec.submodule_search_locations]
    return [Path(spec.origin).resolve()] if spec.has_location and spec.origin else []


def _files(top: str, home: Path) -> Iterator[Path]:
    """Files of a top-level name that lies in `home`; none for what is installed elsewhere."""
    if (home / f"{top}.py").is_file():
        yield home / f"{top}.py"
    for path in sorted((home / top).rglob("*")):
        hidden = any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(home).parts)
        if not hidden and path.is_file() and path.stat().st_size <= _MAX_BYTES:
            yield path


def _imported(path: Path) -> Iterator[str]:
    """Top-level names that a file imports, wherever in it the import stands."""
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]
