"""Revisions as trees: nothing of the user's is touched, and names that mean harm are mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
from lab.repositories import commit, git, repository

from shardlab.errors import UserError
from shardlab.lab.git import WORKING_TREE, opened, relative_paths, repository_root


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    return repository(
        tmp_path / "repo", {"a/x": "one\n", "gone": "1\n"}, {"a/x": "two\n", "gone": None, "new": "1\n"}
    )


def state(repo: Path) -> list[str]:
    """What a user would notice: status, branches, worktrees, and every file of git's own."""
    inside = sorted(str(path) for path in (repo / ".git").rglob("*") if "objects" not in path.parts)
    return [git(repo, "status", "--porcelain"), git(repo, "worktree", "list"), *inside]


def test_both_ends_are_read_and_the_users_tree_is_not_touched(repo: Path) -> None:
    (repo / "a/x").write_text("not committed\n")
    before = state(repo)
    with opened(repo, "v0..v1", None) as (old, new):
        assert (old.folder / "a/x").read_text() == "one\n"
        assert (new.folder / "a/x").read_text() == "two\n"
        assert (old.files, new.files) == ({"a/x", "gone"}, {"a/x", "new"})
        folders = old.folder, new.folder
        assert old.title == f"v0 ({git(repo, 'rev-parse', 'v0')[:7]})"
    assert not any(folder.exists() for folder in folders)
    assert state(repo) == before
    assert (repo / "a/x").read_text() == "not committed\n"


@pytest.mark.parametrize(
    ("base", "head", "names"),
    [
        ("v0..v1", None, ["v0", "v1"]),
        ("v0..", None, ["v0", "HEAD"]),
        ("..v0", None, ["HEAD", "v0"]),
        ("v0", None, ["v0", WORKING_TREE]),
        ("v0", "main", ["v0", "main"]),
    ],
)
def test_the_ways_to_name_two_revisions(repo: Path, base: str, head: str | None, names: list[str]) -> None:
    with opened(repo, base, head) as trees:
        assert [tree.name for tree in trees] == names


def test_three_dots_start_where_the_two_parted(repo: Path) -> None:
    git(repo, "checkout", "-q", "-b", "topic", "v0")
    commit(repo, {"a/x": "topic\n"})
    with opened(repo, "main...topic", None) as (old, new):
        assert (old.folder / "a/x").read_text() == "one\n"
        assert (new.folder / "a/x").read_text() == "topic\n"
    git(repo, "checkout", "-q", "--orphan", "alone")
    commit(repo, {})
    with pytest.raises(UserError, match="no commit in common"), opened(repo, "main...alone", None):
        pass


def test_the_working_tree_has_what_git_would_add(repo: Path) -> None:
    (repo / ".gitignore").write_text("ignored\n")
    for name in ("ignored", "added"):
        (repo / name).write_text("")
    (repo / "new").unlink()
    with opened(repo, "v1", None) as (_, now):
        assert now.files == {".gitignore", "a/x", "added"}
        assert (now.folder, now.commit, now.title) == (repo, None, "working tree")


def test_what_an_archive_or_a_sparse_checkout_would_leave_out_is_there(repo: Path) -> None:
    commit(repo, {".gitattributes": "a/x export-ignore\n"})
    git(repo, "sparse-checkout", "set", "nothing")
    with opened(repo, "v1..HEAD", None) as (_, new):
        assert (new.folder / "a/x").read_text() == "two\n"


def test_links_and_submodules_are_named_and_not_followed(repo: Path, tmp_path: Path) -> None:
    other = repository(tmp_path / "other", {"mesh.toml": ""})
    git(repo, "submodule", "add", "-q", str(other), "sub")
    (repo / "link.toml").symlink_to("/etc/passwd")
    commit(repo, {})
    with opened(repo, "v1..HEAD", None) as trees:
        assert (trees[1].links, trees[1].submodules) == ({"link.toml"}, {"sub"})
        assert "link.toml" not in trees[1].files
        with pytest.raises(UserError, match=r"is in the submodule sub.*; run it in there: cd sub"):
            relative_paths(repo, ["sub/mesh.toml"], repo, trees)
    with opened(repo, "v1", None) as (_, now):
        assert (now.links, now.submodules) == ({"link.toml"}, {"sub"})


@pytest.mark.parametrize("name", ["-x", "--output=/tmp/x", "v1\n", "nope", "v1:a/x", "v0..nope", "-x..v1"])
def test_what_is_no_revision_is_a_mistake(repo: Path, name: str) -> None:
    with pytest.raises(UserError, match="is no revision"), opened(repo, name, None):
        pass


def test_both_ends_mistakes_are_said_at_once(repo: Path) -> None:
    with pytest.raises(UserError) as raised, opened(repo, "nope..-x", None):
        pass
    assert len(raised.value.problems) == 2
    assert "git fetch" in raised.value.problems[0].fix


@pytest.mark.parametrize("path", ["..", "/etc", "a/../../x", "../repository"])
def test_a_path_outside_is_a_mistake(repo: Path, path: str) -> None:
    with opened(repo, "v0..v1", None) as trees, pytest.raises(UserError, match="outside the repository"):
        relative_paths(repo, [path], repo, trees)


def test_paths_are_of_where_the_user_stands(repo: Path) -> None:
    with opened(repo, "v0..v1", None) as trees:
        assert relative_paths(repo, ["x", ".", "../gone"], repo / "a", trees) == ("a/x", "a", "gone")
        with pytest.raises(UserError, match="is neither in v0 nor v1"):
            relative_paths(repo, ["y"], repo / "a", trees)


def test_no_repository_and_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(UserError, match="is in no git repository"):
        repository_root(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="git: is not installed"):
        repository_root(tmp_path)
