"""Budgets and baselines of two revisions: what a change allows from now on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from shardlab.errors import UserError
from shardlab.lab import git
from shardlab.lab.git import Tree
from shardlab.review.baseline import Baseline, baseline_path, read_baseline
from shardlab.review.change import moved_budgets, raised_baseline
from shardlab.review.check import BUDGETS, Budget, read_budgets


def limits_since(revision: str, paths: Sequence[str]) -> tuple[str, ...]:
    """`moved_limits` of mesh files between a revision and the working tree. Raises UserError as `git.opened`
    does."""
    here = Path()
    root = git.repository_root(here)
    with git.opened(root, revision, None) as trees:
        plans = git.relative_paths(root, paths, here, trees)
        return tuple(moved_limits(trees, plans))


def moved_limits(trees: Sequence[Tree], plans: Sequence[str]) -> Iterator[str]:
    """A sentence per budget that was moved and per baseline that was raised, of plans that are in both trees.
    plans: paths in the repository."""
    both = [plan for plan in plans if all(plan in tree.files for tree in trees)]
    for folder in sorted({str(PurePosixPath(plan).parent) for plan in both}):
        here = {PurePosixPath(plan).stem for plan in both if str(PurePosixPath(plan).parent) == folder}
        before, after = (_budgets(tree, folder, here) for tree in trees)
        yield from moved_budgets(before, after)
    for plan in both:
        found = [_baseline(tree, plan) for tree in trees]
        if found[0] is not None and found[1] is not None:
            yield from raised_baseline(PurePosixPath(plan).stem, found[0], found[1])
        elif found[0] is not None:
            yield f"baseline of {PurePosixPath(plan).stem} removed in this change"


def _budgets(tree: Tree, folder: str, plans: set[str]) -> dict[str, Budget]:
    """Of these plans; {} where the file has mistakes, which `check` names."""
    if str(PurePosixPath(folder) / BUDGETS) not in tree.files:
        return {}
    try:
        found = read_budgets(tree.folder / folder)
    except UserError:
        return {}
    return {plan: budget for plan, budget in found.items() if plan in plans}


def _baseline(tree: Tree, plan: str) -> Baseline | None:
    path = baseline_path(plan)
    if path.as_posix() not in tree.files:
        return None
    try:
        return read_baseline(tree.folder / path)
    except UserError:
        return None
