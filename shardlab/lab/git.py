"""Git revisions as folders to read: nothing of the user's repository is checked out, changed or locked.

Names come from a command line or a pull request: one that git could take for an option is refused, and so is
a path outside the repository.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from shardlab.errors import Problem, UserError

WORKING_TREE = "working tree"
_SUBMODULE, _SYMLINK = "160000", "120000"
_QUIET = {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "GIT_LFS_SKIP_SMUDGE": "1", "LC_ALL": "C"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """The files of a revision, readable under `folder`.

    name: as the user wrote it. commit: None for the working tree. files: paths from the root of the
    repository. here: the folder in it in which the user stands. links, submodules: what is there and is not
    followed.
    """

    name: str
    commit: str | None
    folder: Path
    files: frozenset[str]
    here: str = "."
    links: frozenset[str] = frozenset()
    submodules: frozenset[str] = frozenset()

    @property
    def title(self) -> str:
        """`main (9c36d94)`."""
        return self.name if self.commit is None else f"{self.name} ({self.commit[:7]})"


def repository_root(folder: Path) -> Path:
    """The root of the repository around `folder`. Raises UserError: no git, no repository."""
    where = str(folder.resolve())
    try:
        return Path(_git(folder, "rev-parse", "--show-toplevel").strip())
    except GitFailed as error:
        if "not a git repository" in str(error):
            fix = "run it inside one, or give two files: shardlab diff BASE HEAD"
            raise UserError(Problem(where, "is in no git repository", fix)) from None
        raise UserError(Problem(where, str(error), "git must be able to read it")) from None


@contextmanager
def opened(root: Path, base: str, head: str | None, here: Path | None = None) -> Iterator[tuple[Tree, Tree]]:
    """Two revisions as trees; they are gone afterwards. base: may be `A..B` (an end that is empty is HEAD) or
    `A...B` (from where the two parted), and then head is None. head: the working tree when None. here: a
    folder inside the repository.

    Raises UserError for what git does not know, with all mistakes.
    """
    names = _ends(base, head)
    commits = _resolved(root, names)
    if "..." in base and head is None:
        commits[0] = _parting(root, names, commits)
    with tempfile.TemporaryDirectory(prefix="shardlab-revisions-") as scratch:
        made = [
            _tree(root, Path(scratch) / end, name, commit)
            for end, name, commit in zip(("base", "head"), names, commits, strict=True)
        ]
        place = (here or root).resolve().relative_to(root).as_posix()
        yield replace(made[0], here=place), replace(made[1], here=place)


def relative_paths(root: Path, paths: Sequence[str], here: Path, trees: Sequence[Tree]) -> tuple[str, ...]:
    """The user's paths from the root of the repository, `.` for all of it.

    Raises UserError for those outside, inside a submodule, or in neither tree.
    """
    found, problems = [], []
    for path in paths:
        whole = Path(os.path.normpath(here.resolve() / path))
        if not whole.is_relative_to(root):
            what = f"is outside the repository {root}"
            problems.append(Problem(path, what, "name mesh files or folders inside it"))
            continue
        name = whole.relative_to(root).as_posix()
        problem = _unreadable(path, name, trees)
        problems += [problem] if problem is not None else []
        found.append(name)
    if problems:
        raise UserError(*problems)
    return tuple(found)


def under(files: frozenset[str], paths: Sequence[str]) -> list[str]:
    """The files that are one of the paths, or inside one; sorted."""
    return sorted(file for file in files if any(PurePosixPath(file).is_relative_to(path) for path in paths))


class GitFailed(Exception):
    """What git said, in one line."""


def _git(folder: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """Its standard output. Raises GitFailed, and UserError where there is no git."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env={**os.environ, **_QUIET, **(environment or {})},
            capture_output=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except OSError as error:
        what = "is not installed" if isinstance(error, FileNotFoundError) else str(error)
        raise UserError(Problem("git", what, "install it, or give two files")) from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["git failed and said nothing"]
        raise GitFailed(said[0].removeprefix("fatal: "))
    return done.stdout.decode("utf-8", errors="surrogateescape")


def _ends(base: str, head: str | None) -> list[str]:
    if head is not None or ".." not in base:
        return [base, WORKING_TREE if head is None else head]
    first, _, last = base.partition("..." if "..." in base else "..")
    return [first or "HEAD", last or "HEAD"]


def _resolved(root: Path, names: Sequence[str]) -> list[str | None]:
    commits: list[str | None] = []
    problems = []
    for name in names:
        if name == WORKING_TREE:
            commits.append(None)
            continue
        if name.startswith("-") or not name.isprintable():
            problems.append(Problem(name, "is no revision", "name a branch, a tag or a commit"))
            continue
        try:
            commits.append(_git(root, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}").strip())
        except GitFailed:
            problems.append(_unknown(name))
    if problems:
        raise UserError(*problems)
    return commits


def _unknown(name: str) -> Problem:
    if Path(name).exists():
        return Problem(name, "is a file, and no revision", "name the other file too: shardlab diff BASE HEAD")
    fix = "see git branch -a; a shallow clone has it after git fetch origin BRANCH"
    return Problem(name, "is no revision that git knows here", fix)


def _parting(root: Path, names: Sequence[str], commits: Sequence[str | None]) -> str:
    first, last = (commit or "HEAD" for commit in commits)
    try:
        return _git(root, "merge-base", first, last).strip()
    except GitFailed:
        what = "these two have no commit in common here"
        fix = "fetch more of the history (git fetch --unshallow), or write A..B"
        raise UserError(Problem("...".join(names), what, fix)) from None


def _tree(root: Path, folder: Path, name: str, commit: str | None) -> Tree:
    listed = _listed_now(root) if commit is None else _listed(root, commit)
    files = {path for mode, path in listed if mode not in (_SUBMODULE, _SYMLINK)}
    if commit is None:
        folder = root
        files = {path for path in files if (root / path).is_file() and not (root / path).is_symlink()}
    else:
        _write_out(root, commit, folder)
    return Tree(
        name=name,
        commit=commit,
        folder=folder,
        files=frozenset(files),
        links=frozenset(path for mode, path in listed if mode == _SYMLINK),
        submodules=frozenset(path for mode, path in listed if mode == _SUBMODULE),
    )


def _listed(root: Path, commit: str) -> list[tuple[str, str]]:
    """(mode, path) of everything in a commit."""
    entries = _git(root, "ls-tree", "-r", "-z", "--full-tree", commit).split("\0")
    return [(entry.split(" ", 1)[0], entry.split("\t", 1)[1]) for entry in entries if entry]


def _listed_now(root: Path) -> list[tuple[str, str]]:
    """(mode, path) of what git tracks, and of what it would if it were added."""
    known = [entry for entry in _git(root, "ls-files", "-s", "-z").split("\0") if entry]
    new = [path for path in _git(root, "ls-files", "-o", "-z", "--exclude-standard").split("\0") if path]
    tracked = [(entry.split(" ", 1)[0], entry.split("\t", 1)[1]) for entry in known]
    return [*tracked, *((_SYMLINK if (root / path).is_symlink() else "100644", path) for path in new)]


def _write_out(root: Path, commit: str, folder: Path) -> None:
    """The commit's files in a new folder, through an index of its own: no hook runs, and neither attributes
    of archives nor a sparse checkout leave files out."""
    folder.mkdir()
    index = {"GIT_INDEX_FILE": str(folder.with_suffix(".index"))}
    try:
        _git(root, "read-tree", commit, environment=index)
        _git(root, "checkout-index", "-a", "-q", f"--prefix={folder}/", environment=index)
    except GitFailed as error:
        raise UserError(Problem(commit[:12], f"cannot be read: {error}", "see: git fsck")) from None


def _unreadable(path: str, name: str, trees: Sequence[Tree]) -> Problem | None:
    for tree in trees:
        for submodule in tree.submodules:
            if PurePosixPath(name).is_relative_to(submodule):
                what = f"is in the submodule {submodule}, which has revisions of its own"
                return Problem(path, what, f"run it in there: cd {submodule}")
    if not any(under(tree.files | tree.links | tree.submodules, [name]) for tree in trees):
        titles = " nor ".join(tree.name for tree in trees)
        return Problem(path, f"is neither in {titles}", "name a folder or mesh files that are")
    return None
