"""The GitHub Action, its steps run in a repository of two commits; `gh` is a script that notes its calls."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lab.repositories import git, repository

ROOT = Path(__file__).parents[1]
ACTIONS = ROOT / ".github" / "actions"
PLAN = """\
on = "cpu:8"
[axes]
data = {data}
fsdp = {fsdp}
[params]
embed = ["fsdp"]
[activations]
batch = ["data", "fsdp"]
[compiler]
flags = ["--xla_backend_optimization_level=0"]
[check]
model = "tiny"
batch = 8
seq = 8
"""
BASE, HEAD = PLAN.format(data=1, fsdp=8), PLAN.format(data=2, fsdp=4)
BUDGET = '[plan]\n"wire_bytes.total" = "1 kB"\n'
MARKER = "<!-- shardlab review -->"


def steps(action: str) -> dict[str, dict[str, Any]]:
    """The steps that run something, by name."""
    document = yaml.safe_load((ACTIONS / action / "action.yml").read_text())
    return {step["name"]: step for step in document["runs"]["steps"] if "run" in step}


def ran(
    step: dict[str, Any], folder: Path, path: list[Path], **values: str
) -> subprocess.CompletedProcess[str]:
    """One step as a runner runs it: its `env` with the expressions given in `values`, its script by bash."""
    env = {name: values.get(name, text) for name, text in step["env"].items()}
    left = {name: text for name, text in env.items() if "${{" in text}
    assert not left, left
    assert "${{" not in step["run"]  # what a pull request names never becomes part of a script
    search = os.pathsep.join([*map(str, path), os.environ["PATH"]])
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
        cwd=folder,
        env={**os.environ, **env, "PATH": search, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `shardlab`, as pip installs it, and what its compiles leave."""
    folder = tmp_path_factory.mktemp("bin")
    script(folder / "shardlab", f'#!/bin/sh\nexec "{sys.executable}" -m shardlab "$@"\n')
    return folder


def reviewed(folder: Path, commands: Path, **values: str) -> tuple[Path, int, str]:
    """The review of the repository's two commits: what it wrote, the exit code of the last step, its log."""
    asked = {
        "ACTION": str(ACTIONS / "review"),
        "BASE": "v0",
        "HEAD": "v1",
        "PLANS": "meshes/",
        "MACHINES": "",
        "CHECK": "true",
        "PULL_REQUEST": "7",
        "SHARDLAB_CACHE": str(commands / "programs"),
    } | values
    review = ran(steps("review")["Review"], folder, [commands], **asked)
    assert review.returncode == 0, review.stderr
    budget = ran(steps("review")["Budget"], folder, [commands])
    return folder / ".shardlab" / "review", budget.returncode, review.stderr


@pytest.mark.matrix
def test_a_change_above_its_budget_is_told_and_fails(tmp_path: Path, commands: Path) -> None:
    folder = repository(
        tmp_path,
        {"meshes/plan.toml": BASE},
        {"meshes/plan.toml": HEAD, "meshes/budgets.toml": BUDGET},
    )
    update = [str(commands / "shardlab"), "check", "meshes/plan.toml", "--update"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "SHARDLAB_CACHE": str(commands / "programs")}
    subprocess.run(update, cwd=folder, env=env, check=False)  # 1: above its budget from the start
    written, code, _ = reviewed(folder, commands)
    comment = (written / "comment.md").read_text()
    assert comment.startswith(MARKER)
    assert (code, (written / "pull_request").read_text()) == (1, "7\n")
    assert "above a budget" in comment
    assert "plan" in comment
    assert (written / "report.html").read_text().startswith("<!")


@pytest.mark.matrix
def test_without_a_baseline_the_comment_says_so_and_the_job_fails(tmp_path: Path, commands: Path) -> None:
    folder = repository(tmp_path, {"meshes/plan.toml": BASE}, {"meshes/plan.toml": HEAD})
    written, code, _ = reviewed(folder, commands)
    assert code == 2
    assert "could not be checked" in (written / "comment.md").read_text()


def test_a_plan_with_a_mistake_is_told_where_it_is(tmp_path: Path, commands: Path) -> None:
    folder = repository(tmp_path, {"meshes/plan.toml": BASE}, {"meshes/plan.toml": "[axes]\nfsdp = 0\n"})
    written, code, log = reviewed(folder, commands, CHECK="false")
    assert code == 2
    assert "plan.toml:2" in (written / "comment.md").read_text()
    assert "plan.toml:2" in log


GH = f"""#!{sys.executable}
import json, os, pathlib, sys
calls = pathlib.Path(os.environ["CALLS"])
body = [pathlib.Path(a.removeprefix("body=@")).read_text() for a in sys.argv if a.startswith("body=@")]
calls.write_text((calls.read_text() if calls.exists() else "") + json.dumps([sys.argv[1:], body]) + "\\n")
if sys.argv[2].endswith("/pulls/7"):
    print("abc")
if sys.argv[2] == "--paginate":
    print(os.environ["BEFORE"])
"""


def commented(tmp_path: Path, number: str, head: str, before: str) -> tuple[int, str, list[Any]]:
    """Exit code, standard error, and the calls of `gh` that write."""
    review, calls = tmp_path / ".shardlab" / "review", tmp_path / "calls"
    script(tmp_path / "bin" / "gh", GH)
    review.mkdir(parents=True)
    (review / "pull_request").write_text(number)
    (review / "comment.md").write_text(f"{MARKER}\nWorse")
    step = steps("comment")["Comment"]
    step["env"] |= {"CALLS": str(calls), "BEFORE": before}
    values = {"ACTION": str(ACTIONS / "comment"), "GH_TOKEN": "t", "REPOSITORY": "o/r", "HEAD": head}
    done = ran(step, tmp_path, [tmp_path / "bin"], **values)
    made = [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []
    return done.returncode, done.stderr, [call for call in made if "--method" in call[0]]


@pytest.mark.parametrize(
    ("before", "method", "where"),
    [
        pytest.param("", "POST", "repos/o/r/issues/7/comments", id="first"),
        pytest.param("41\n42", "PATCH", "repos/o/r/issues/comments/41", id="again"),
    ],
)
def test_there_is_one_comment(tmp_path: Path, before: str, method: str, where: str) -> None:
    code, error, ((arguments, body),) = commented(tmp_path, "7\n", "abc", before)
    assert (code, error) == (0, "")
    assert arguments[:4] == ["api", "--method", method, where]
    assert body == [f"{MARKER}\nWorse"]


@pytest.mark.parametrize(
    ("number", "head", "says"),
    [
        pytest.param("7", "another", "is at abc, and the review is of another", id="another-pull-request"),
        pytest.param("7/../../x", "abc", "names no pull request", id="no-number"),
        pytest.param("", "abc", "names no pull request", id="empty"),
    ],
)
def test_what_the_change_wrote_is_not_believed(tmp_path: Path, number: str, head: str, says: str) -> None:
    code, error, wrote = commented(tmp_path, number, head, "")
    assert (code, wrote) == (1, [])
    assert says in error


def test_the_job_that_runs_the_change_has_no_token_that_writes() -> None:
    review, comment = (
        yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())
        for name in ("review", "comment")
    )
    assert review["permissions"] == {"contents": "read"}
    assert "secrets." not in json.dumps(review)
    (checkout,) = (step for step in comment["jobs"]["comment"]["steps"] if "checkout" in step.get("uses", ""))
    assert "with" not in checkout  # the default branch, not the change
    assert git(ROOT, "--version").startswith("git")
