"""Mesh files on disk: TOML, `extends`, and at which line of which file each key was written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shardlab.errors import Problem, UserError
from shardlab.hardware.toml_file import (
    KeyPath,
    Table,
    at,
    key_lines,
    parse_toml,
    quoted,
    read_text,
)

MAX_EXTENDS = 8
_MERGED_DEPTH = 3  # blocks.moe.params is the deepest table


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanText:
    """A mesh file with those that it extends merged in; `origins`: the `file:line: key` of each key."""

    table: Table
    origins: Mapping[KeyPath, str]
    where: str

    def locate(self, key: KeyPath) -> str:
        """`file:line: key` of a key, or of the nearest table around it."""
        for n in range(len(key), 0, -1):
            if key[:n] in self.origins:
                place = self.origins[key[:n]]
                return place if n == len(key) else at(place.rsplit(": ", 1)[0], key, {})
        return at(self.where, key, {})


def read_plan_text(text: str, where: str, folder: Path | None) -> PlanText:
    """The file and what it extends, the file's own keys winning; `[axes]` replaces the other's as a whole.

    folder: where relative paths start; None when the text is in no file. Raises UserError.
    """
    files = _chain(text, where, folder)
    table: Table = {}
    origins: dict[KeyPath, str] = {}
    for file_where, file_text, file_table in reversed(files):
        lines = key_lines(file_text)
        origins |= {key: at(file_where, key, {key: line}) for key, line in lines.items()}
        _merge(table, {key: value for key, value in file_table.items() if key != "extends"})
    return PlanText(table=table, origins=origins, where=where)


def files_of(path: Path) -> tuple[Path, ...]:
    """The files that a mesh file is made of: itself, what it extends, its flags, its machine.

    Those behind a mistake are left out; who loads the plan says what is wrong.
    """
    try:
        tables = _chain(read_text(path), str(path), path.parent)
    except UserError:
        return (path,)
    found = [Path(where) for where, _, _ in tables]
    for _, _, table in tables:
        compiler, machine = table.get("compiler"), table.get("on")
        flags = compiler.get("flags") if isinstance(compiler, dict) else None
        if isinstance(flags, str):
            found.append(path.parent / flags)
        if isinstance(machine, str) and machine.partition(":")[0].endswith(".toml"):
            found.append(path.parent / machine.partition(":")[0])
    return tuple(found)


def read_flags_file(path: Path) -> tuple[str, ...]:
    """Flags separated by blanks or lines; `#` starts a comment. Raises UserError."""
    lines = (line.partition("#")[0] for line in read_text(path, "file of flags").splitlines())
    return tuple(flag for line in lines for flag in line.split())


def _chain(text: str, where: str, folder: Path | None) -> list[tuple[str, str, Table]]:
    """This file, what it extends, what that extends, and so on."""
    files = [(where, text, parse_toml(text, where))]
    seen = {Path(where).resolve()} if folder is not None else set()
    while "extends" in files[-1][2]:
        here, here_text, table = files[-1]
        base = _base(table["extends"], at(here, ("extends",), key_lines(here_text)), folder)
        if base.resolve() in seen or len(files) > MAX_EXTENDS:
            problem = Problem(
                at(here, ("extends",), key_lines(here_text)), "goes in circles", "remove one extends"
            )
            raise UserError(problem)
        seen.add(base.resolve())
        base_text = read_text(base)
        files.append((str(base), base_text, parse_toml(base_text, str(base))))
        folder = base.parent
    return files


def _base(value: object, where: str, folder: Path | None) -> Path:
    if not isinstance(value, str):
        raise UserError(Problem(where, f"{quoted(value)} is not a path", 'write extends = "other.toml"'))
    if folder is None:
        raise UserError(
            Problem(where, "a text that is in no file cannot extend one", "load the file by its path")
        )
    return folder / value


def _merge(table: Table, over: Table, depth: int = 1) -> None:
    """Put `over` on top of `table`: tables key by key, everything else as a whole."""
    for key, value in over.items():
        below = table.get(key)
        whole = depth >= _MERGED_DEPTH + 1 or (depth == 1 and key == "axes")
        if isinstance(value, dict) and isinstance(below, dict) and not whole:
            _merge(below, value, depth + 1)
        else:
            table[key] = value
