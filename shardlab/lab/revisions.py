"""`diff` between git revisions: which plans changed, each revision's programs, a Diff per plan and machine.

A repository that is shardlab itself builds the programs of each revision with that revision's own sources, in
processes with that tree first on their path; every other one with the shardlab that is installed. What was
compiled is read by this shardlab on both sides, so that a difference is one of programs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TextIO

from shardlab.compile.step_sources import sources_digest, step_sources
from shardlab.compile.versions import source_digest
from shardlab.errors import Problem, UserError
from shardlab.hardware.catalog import load_machine
from shardlab.hardware.toml_file import Table, parse_toml, read_text
from shardlab.lab import git
from shardlab.lab.cache import Cache
from shardlab.lab.cases import ATTACHED, Cases, Question, comparison_cases
from shardlab.lab.check import FOLDER
from shardlab.lab.git import Tree
from shardlab.lab.limits import moved_limits
from shardlab.lab.progress import Progress, progress_on
from shardlab.lab.review import of_its_own
from shardlab.lab.run import run_cases
from shardlab.lab.sources import Answer, Job, explain_all
from shardlab.review import Side, diff
from shardlab.review.change import Change, PlanDiff
from shardlab.review.check import BUDGETS
from shardlab.review.sides import side_of_report
from shardlab.spec.models import find_model
from shardlab.spec.plan import load_plan
from shardlab.spec.plan_file import files_of, read_plan_text
from shardlab.spec.step import StepCase

OWN = ""  # the machine that a plan itself names


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is compiled of each tree, and how."""

    question: Question
    progress: TextIO
    cache: Cache

    @property
    def machines(self) -> tuple[str, ...]:
        """Those that the user named, or each plan's own."""
        return self.question.machines or (OWN,)


def diff_revisions(base: str, head: str | None, paths: Sequence[str], asked: Asked) -> Change:
    """The change between two revisions: `A..B`, `A...B`, or `A` against the working tree, as `git.opened`.

    paths: folders and mesh files, `meshes/` when there are none. Raises UserError with mistakes of the
    command line and of the head's plans; the base's are an answer.
    """
    _check_names(asked.question)
    here = Path()
    root = git.repository_root(here)
    with git.opened(root, base, head, here) as trees:
        wanted = git.relative_paths(root, paths or (FOLDER,), here, trees)
        plans = sorted({plan for tree in trees for plan in _plans(tree, wanted)})
        if not plans:
            what = f"no mesh file in {trees[0].name} or {trees[1].name}"
            fix = "name where they are: shardlab diff A..B -- PATH"
            raise UserError(Problem(", ".join(wanted), what, fix))
        everything = _builders_differ(trees)
        touched = [plan for plan in plans if everything or _differs(plan, trees, asked.question.step)]
        jobs, notes = _jobs(touched, trees, asked.machines)
        old, new = (_answers(tree, jobs, asked) for tree in trees)
        _raise_mistakes(old, new, jobs)
        return Change(
            base=trees[0].title,
            head=trees[1].title,
            diffs=tuple(_plan_diff(job, old[job], new[job]) for job in jobs),
            same=tuple(plan for plan in plans if plan not in touched),
            limits=tuple(moved_limits(trees, plans)),
            notes=(*notes, *_not_followed(trees, wanted)),
        )


def _check_names(question: Question) -> None:
    """Before anything is read: a name that no plan can make up for."""
    for machine in question.machines:
        if machine != ATTACHED:
            load_machine(machine)
    if question.model is not None:
        find_model(question.model)


def _plans(tree: Tree, paths: Sequence[str]) -> Iterator[str]:
    """Mesh files: those named, and under folders every TOML file with axes, its own or of what it extends.
    One that is no TOML counts, so that its mistake is said."""
    for file in git.under(tree.files, paths):
        name = PurePosixPath(file)
        is_toml = name.suffix == ".toml" and name.name != BUDGETS
        if is_toml and (file in paths or _has_axes(tree.folder / file)):
            yield file


def _has_axes(path: Path) -> bool:
    try:
        return bool({"axes", "extends"} & parse_toml(read_text(path), str(path)).keys())
    except UserError:
        return True


def _own_sources(tree: Tree) -> Path | None:
    """The shardlab package in a tree, None where the tree is another project's."""
    package = {"shardlab/__init__.py", "shardlab/cli.py", "shardlab/compile/child.py"}
    return tree.folder / "shardlab" if package <= tree.files else None


def _builders_differ(trees: Sequence[Tree]) -> bool:
    packages = [_own_sources(tree) for tree in trees]
    return len({package and source_digest(package) for package in packages}) > 1


def _differs(plan: str, trees: Sequence[Tree], step: str | None) -> bool:
    """Whether a plan's files, with those that it names, are not the same in both; nor the sources of the
    user's own step."""
    contents = []
    for tree in trees:
        files = files_of(tree.folder / plan) if plan in tree.files else ()
        known = [path.read_bytes() if path.is_file() else b"" for path in files]
        contents.append((known, _sources_of(step or _own_step(tree, plan), tree)))
    return contents[0] != contents[1]


def _own_step(tree: Tree, plan: str) -> str | None:
    """The step that a plan names in [check]."""
    check = _table(tree, plan).get("check")
    step = check.get("step") if isinstance(check, dict) else None
    return step if isinstance(step, str) else None


def _sources_of(step: str | None, tree: Tree) -> str:
    """The digest of the user's own step in a tree; "" without one."""
    try:
        return "" if step is None else _step_digest(step, _home(tree))
    except UserError:
        return ""


_step_digest = functools.cache(sources_digest)


def _home(tree: Tree) -> str:
    """Where the user stands, in a tree: packages are looked for there first."""
    return str(tree.folder / tree.here) if (tree.folder / tree.here).is_dir() else str(tree.folder)


def _table(tree: Tree, plan: str) -> Table:
    """What a mesh file says, with what it extends; {} where it cannot be read."""
    path = tree.folder / plan
    try:
        return read_plan_text(read_text(path), str(path), path.parent).table
    except UserError:
        return {}


def _jobs(
    plans: Sequence[str], trees: Sequence[Tree], machines: Sequence[str]
) -> tuple[list[Job], list[str]]:
    """Plans on machines with as many devices, on either side, and a note for each of the others. Raises
    UserError where that leaves nothing."""
    jobs: list[Job] = []
    notes = []
    for plan in plans:
        for machine in machines:
            sizes = {_devices(tree, plan) for tree in trees if plan in tree.files}
            wanted = None if machine in (OWN, ATTACHED) else load_machine(machine).num_devices
            if wanted is None or sizes & {None, wanted}:
                jobs.append((plan, machine))
            else:
                has = " and ".join(str(size) for size in sorted(filter(None, sizes)))
                notes.append(f"{plan}: {has} devices, not put on {machine}, which has {wanted}")
    if plans and not jobs:
        raise UserError(Problem("--on", notes[0], "name machines with as many devices as the plans"))
    return jobs, notes


def _devices(tree: Tree, plan: str) -> int | None:
    """Of a plan's mesh; None where its file does not say."""
    axes = _table(tree, plan).get("axes")
    sizes = list(axes.values()) if isinstance(axes, dict) else []
    return math.prod(sizes) if sizes and all(isinstance(size, int) for size in sizes) else None


def _answers(tree: Tree, jobs: Sequence[Job], asked: Asked) -> dict[Job, Answer]:
    """A side for each job, or the mistakes that kept it from being compiled, with the revision's name."""
    known: dict[Job, Answer] = {
        job: Side(name=f"{tree.name}:{job[0]}", analysis=None, why_not="there is no such plan", absent=True)
        for job in jobs
        if job[0] not in tree.files
    }
    left = [job for job in jobs if job not in known]
    with progress_on(asked.progress, len(left)) as progress:
        if _own_sources(tree) is not None:
            folder = asked.cache.store.folder if asked.cache.store is not None else None
            known |= explain_all(tree.folder, left, asked.question, folder, progress)
        else:
            known |= _compiled(tree, left, asked, progress)
    return {job: _as_named(tree, job, answer) for job, answer in known.items()}


def _compiled(
    tree: Tree, jobs: Sequence[Job], asked: Asked, progress: Progress
) -> Iterator[tuple[Job, Answer]]:
    """Compiled with the shardlab that is installed."""
    wanted = [(job, _cases(tree, job, asked.question)) for job in jobs]
    cases = [case for _, found in wanted if isinstance(found, Cases) for case in found.cases]
    reports = iter(run_cases(cases, None, progress, asked.cache.steps()))
    for job, found in wanted:
        if isinstance(found, UserError):
            yield job, found
            continue
        try:
            yield job, side_of_report(next(reports) if found.cases else found.rejected[0])
        except UserError as error:
            yield job, error


def _cases(tree: Tree, job: Job, question: Question) -> Cases | UserError:
    plan_file, machine = job
    machines = () if machine == OWN else (machine,)
    try:
        plan = load_plan(tree.folder / plan_file)
        question = replace(question, machines=machines, folder=_home(tree))
        cases = comparison_cases([plan], of_its_own(plan, question))
        for case in cases.cases:
            if isinstance(case, StepCase):
                step_sources(case.step, case.folder)  # a step that is not in this tree
        return cases
    except UserError as error:
        return error


def _as_named(tree: Tree, job: Job, answer: Answer) -> Answer:
    """With the revision's name where the tree happens to be on disk."""
    place = f"{tree.folder}/"
    if isinstance(answer, Side):  # a machine file beside the plan has its place in the case
        machine = answer.case.get("machine")
        case = dict(answer.case) | ({"machine": str(machine).replace(place, "")} if machine else {})
        return replace(answer, name=f"{tree.name}:{job[0]}", case=case)
    name = "" if tree.commit is None else f"{tree.name}:"
    texts = ([one.where, one.what, one.fix] for one in answer.problems)
    return UserError(*(Problem(*(text.replace(place, name) for text in three)) for three in texts))


def _raise_mistakes(old: dict[Job, Answer], new: dict[Job, Answer], jobs: Sequence[Job]) -> None:
    """What the head cannot do and the base could, or had not: a mistake of the change. What neither can is
    one only where nothing else is left."""
    failed = {job: answer for job in jobs if isinstance(answer := new[job], UserError)}
    new_failures = [error for job, error in failed.items() if isinstance(old[job], Side)]
    mistakes = new_failures or (failed.values() if len(failed) == len(jobs) else ())
    if mistakes:
        raise UserError(*dict.fromkeys(problem for error in mistakes for problem in error.problems))


def _plan_diff(job: Job, old: Answer, new: Answer) -> PlanDiff:
    sides = [_side(job, answer) for answer in (old, new)]
    machines = [side.case["machine"] for side in reversed(sides) if "machine" in side.case]
    return PlanDiff(plan=job[0], machine=str(machines[0]) if machines else job[1], found=diff(*sides))


def _side(job: Job, answer: Answer) -> Side:
    if isinstance(answer, Side):
        return answer
    why = "; ".join(str(problem) for problem in answer.problems)
    return Side(name=job[0], analysis=None, why_not=f"mistakes: {why}")


def _not_followed(trees: Sequence[Tree], wanted: Sequence[str]) -> Iterator[str]:
    links = {path for tree in trees for path in git.under(tree.links, wanted)}
    submodules = {path for tree in trees for path in git.under(tree.submodules, wanted)}
    for path in sorted(links):
        if path.endswith(".toml"):
            yield f"{path}: a symbolic link, not followed"
    for path in sorted(submodules):
        yield f"{path}: a submodule, not looked into"
