"""Compiling through the cache: who is compiled, what is found, and who may not keep anything."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from compile.cases import tiny_case

from shardlab.errors import UserError
from shardlab.lab.cache import Cache, Counts, open_cache
from shardlab.program import Program, Refusal
from shardlab.spec.case import Case
from shardlab.store import Store

REFUSED = Refusal(needed_bytes=2, limit_bytes=1)


class Compiler:
    """Stands in for `compile_case`; notes its calls."""

    def __init__(self, **changes: Any) -> None:
        self.calls: list[tuple[str, bool]] = []
        self.changes = {"compile_s": 1.0} | changes

    def __call__(self, case: Case, *, find_largest_batch: bool, store: Store | None) -> Program:
        self.calls.append((case.plan.name, find_largest_batch))
        return Program(name=case.plan.name, backend="gpu", hlo_text="m", num_devices=8, **self.changes)


def cache_of(folder: Path, compiler: Compiler) -> Cache:
    return Cache(Store(folder), compile_with=compiler)


def test_an_unchanged_case_is_compiled_once_whatever_it_is_called(tmp_path: Path) -> None:
    compiler = Compiler()
    first = cache_of(tmp_path, compiler)
    first.compile(tiny_case("h100:1x8"))
    again = cache_of(tmp_path, compiler)
    found = again.compile(tiny_case("h100:2x4", plan={"name": "other"}))
    again.compile(tiny_case("h100:1x8", batch=8))
    assert compiler.calls == [("tiny-plan", True)] * 2
    assert (found.name, found.compile_s) == ("other tiny", None)
    assert (first.counts, again.counts) == (
        Counts(compiled=1, most_at_once=1),
        Counts(compiled=1, unchanged=1, most_at_once=1),
    )


def test_what_only_had_to_be_lowered_is_counted_as_such(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, Compiler(compile_s=None))
    cache.compile(tiny_case("h100:1x8"))
    assert cache.counts == Counts(lowered=1, most_at_once=1)


def test_a_refusal_is_asked_again_by_who_wants_the_largest_batch_that_compiles(tmp_path: Path) -> None:
    compiler = Compiler(refusal=REFUSED)
    case = tiny_case("v5e:2x4")
    for wanted in (False, False, True, True, False):
        cache_of(tmp_path, compiler).compile(case, find_largest_batch=wanted)
    assert [wanted for _, wanted in compiler.calls] == [False, True]


def test_attached_devices_have_an_environment_that_no_key_holds(tmp_path: Path) -> None:
    compiler = Compiler()
    for _ in range(2):
        cache_of(tmp_path, compiler).compile(tiny_case("attached:8"))
    assert len(compiler.calls) == 2


def test_where_programs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def folder(*args: Any, **named: Any) -> Path | None:
        store = open_cache(*args, **named).store
        return store.folder if store is not None else None

    here = str(tmp_path / "a" / "b")
    assert folder(here, environment={"SHARDLAB_CACHE": "off"}) == Path(here)
    assert folder(environment={"SHARDLAB_CACHE": here}) == Path(here)
    assert folder(environment={"SHARDLAB_CACHE": "off"}) is None
    assert folder(off=True, environment={"SHARDLAB_CACHE": here}) is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    found = folder(environment={})
    assert found is not None and tmp_path in found.parents


def test_a_folder_that_cannot_be_made_is_a_mistake_only_where_it_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--cache .*cannot be written"):
        open_cache(str(tmp_path / "file" / "x"))
    said: list[str] = []
    monkeypatch.setattr("shardlab.lab.cache._system_folder", lambda: tmp_path / "file" / "x")
    assert open_cache(environment={}, say=said.append).store is None
    assert "compiled every time" in said[0]


def test_the_suite_itself_keeps_nothing() -> None:
    assert os.environ["SHARDLAB_CACHE"] == "off"
    assert open_cache().store is None
