"""Mesh files that are wrong: every message, compared as a whole, and all of a file's mistakes at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardlab.errors import UserError
from shardlab.spec.models import MODELS
from shardlab.spec.plan import load_plan, plan_from_text

FILE = Path(__file__).with_name("plan_mistakes.txt")
SECTIONS = FILE.read_text(encoding="utf-8").split("\n=== ")[1:]


@pytest.mark.parametrize("section", SECTIONS, ids=[section.splitlines()[0] for section in SECTIONS])
def test_every_mistake_has_its_message(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, _, messages = section.partition("\n")[2].partition("---\n")
    with pytest.raises(UserError) as caught:
        plan_from_text(text, "f")
    assert (
        str(caught.value).splitlines() == messages.replace("{models}", ", ".join(MODELS)).strip().splitlines()
    )


def test_a_file_names_itself(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text("[axes]\nfsdp = 0\n")
    with pytest.raises(UserError) as caught:
        load_plan(path)
    assert str(caught.value) == f"{path}:2: axes.fsdp: size 0; an axis has a size of at least 1"


def test_every_message_is_one_short_line_whatever_the_file_holds() -> None:
    key = '"a\\nb' + "x" * 5_000 + '"'
    deep = ".".join("k" * 100)
    for text in (
        f"{deep}.k.k = 1",
        f"n = 0x{'f' * 9_000}",
        f"{key} = 1",
        f"{deep} = 1",
        f"on = {key}",
        f"[axes]\n{key} = 2",
        f"[params]\n{deep} = 1",
    ):
        with pytest.raises(UserError) as caught:
            plan_from_text(text, "f")
        assert caught.value.problems
        for problem in caught.value.problems:
            assert len(str(problem).splitlines()) == 1
            assert len(str(problem)) < 1_500
