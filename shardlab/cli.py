"""The command line: verbs over the rest. Reads flags, calls one function per verb, prints what it returns.

Exit codes: 0 ran; 1 ran, and `check` found something worse, or `--strict` something that was not counted; 2
could not run, with one line per mistake on standard error. What a verb needs is imported by that verb:
`analyze --json` starts without jax, rich and pydantic.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from shardlab.arguments import parse_axes, parse_device_ids, parser, with_paths
from shardlab.errors import Problem, ShardlabError, UserError
from shardlab.output import (
    check_html,
    check_writable,
    columns,
    one_line_each,
    print_analysis,
    print_json,
    print_page,
    print_reasons,
    write_html,
    write_program,
    write_trace,
)

if TYPE_CHECKING:
    from shardlab.lab.cache import Cache
    from shardlab.lab.cases import Question
    from shardlab.program import Program
    from shardlab.spec.plan import Plan

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code and never raises for a mistake of the user's."""
    _never_fail_to_print()
    try:
        args = parser().parse_args(with_paths(sys.argv[1:] if argv is None else argv))
        code = VERBS[args.verb](args)
        sys.stdout.flush()
        return code
    except ShardlabError as error:
        print(one_line_each(error), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has gone. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _never_fail_to_print() -> None:
    """A name that standard output's encoding lacks is written as `\\u2013`, not answered with a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def run_analyze(args: argparse.Namespace) -> int:
    """`shardlab analyze`: exit 1 only with --strict and a ledger that is not empty."""
    from shardlab.lab.recorded import with_steps

    return _analyze(args, with_steps(args.paths, args.steps))


def run_record(args: argparse.Namespace) -> int:
    """`shardlab record`: the analysis of what the command ran; exit 2 when the command failed."""
    from shardlab.lab.recorded import record_command

    output = sys.stderr if args.json else None  # the document is alone on standard output
    program, status = record_command(args.command, args.out, args.steps, output=output, progress=sys.stderr)
    code = _analyze(args, [program])
    return 2 if status else code


def _analyze(args: argparse.Namespace, sources: Sequence[str | Program]) -> int:
    from shardlab.analysis import attribute, merge

    check_html(args.html)
    machine = None
    if args.on:
        from shardlab.hardware.catalog import load_machine

        machine = load_machine(args.on)
    plan = _plan(args.mesh)
    axes = dict(plan.axes) if plan is not None else parse_axes(args.axes)
    parts = attribute(sources, axes, parse_device_ids(args.device_ids), machine)
    kept = tuple(parts) if args.order or args.audit or args.html or args.why else ()
    orders = findings = reasons = None
    if args.order:
        from shardlab.order import best_orders

        orders = best_orders(kept, machine)
    if args.audit or args.html:
        from shardlab.audit import audit_parts

        findings = audit_parts(kept, machine)
    if args.why:
        from shardlab.why import why

        reasons = why(kept, args.why, plan=plan, machine=machine)
    analysis = merge([part.per_step for part in kept or parts])
    if args.html:
        from shardlab.report.html.case import analysis_report

        write_html(analysis_report(analysis, findings, orders), args.html)
    print_analysis(args, analysis, findings if args.audit else None, orders, reasons)
    return 1 if args.strict and analysis.ledger else 0


def run_explain(args: argparse.Namespace) -> int:
    """`shardlab explain`: one case. Infeasible or too large is an answer; not compiled is exit 2."""
    from shardlab.case_document import to_json
    from shardlab.lab.study import explain_plan, orders_of, stragglers_of, why_of
    from shardlab.order import orders_member

    for path in filter(None, (args.hlo, args.save, args.trace)):
        check_writable(path)
    check_html(args.html)
    machines = (args.on,) if args.on else ()
    with _cache(args) as cache:
        report = explain_plan(args.mesh, _question(args, machines), progress=sys.stderr, steps=cache.steps())
    write_program(report.program, args.hlo, args.save)
    if args.trace:
        write_trace(report, args.trace)
    orders = orders_of(report) if args.order else None
    slow = stragglers_of(report, args.straggler) if args.straggler else None
    if args.straggler and slow is None:
        print("--straggler: not predicted, the plan has no step time", file=sys.stderr)
    reasons = why_of(report, args.why) if args.why else None
    if args.why and reasons is None:
        print(f"--why: {args.why} is not explained, there is no compiled program", file=sys.stderr)
    if args.html:
        from shardlab.report.html.case import case_report

        write_html(case_report(report, orders), args.html)
    if args.json:
        from shardlab.why import why_json

        document = to_json(report, instructions=True) | orders_member(orders) | why_json(reasons)
        print_json(document | ({"straggler": slow.to_json()} if slow is not None else {}))
    elif reasons is not None:
        print_reasons(reasons, args.markdown)
    else:
        from shardlab.report.explain import explain_page
        from shardlab.report.order import with_orders
        from shardlab.report.straggler import with_stragglers

        page = with_stragglers(with_orders(explain_page(report), orders), slow)
        print_page(page, args.markdown)
    return 0


def run_compare(args: argparse.Namespace) -> int:
    """`shardlab compare`: every plan on every machine, one batch for all."""
    from shardlab.compare import comparison_json
    from shardlab.lab.study import compare_plans

    check_html(args.html)
    machines = tuple(name.strip() for name in args.on.split(",")) if args.on else ()
    with _cache(args) as cache:
        comparison = compare_plans(
            args.meshes,
            _question(args, machines),
            progress=sys.stderr,
            jobs=args.jobs,
            steps=cache.steps(),
        )
    if args.html:
        from shardlab.report.html.comparison import comparison_report

        write_html(comparison_report(comparison), args.html)
    if args.json:
        print_json(comparison_json(comparison))
    else:
        from shardlab.report.comparison import WIDE_COLUMNS, comparison_page

        width = WIDE_COLUMNS if args.markdown else columns()
        print_page(comparison_page(comparison, width), args.markdown)
    return 0


def run_fit(args: argparse.Namespace) -> int:
    """`shardlab fit`: what does not fit is an answer."""
    from shardlab.lab.fit import fit_model
    from shardlab.report.fit import fit_json, fit_page

    machines = (args.on,) if args.on else ()
    with _cache(args) as cache:
        steps = cache.steps(find_largest_batch=False)
        fit = fit_model(_question(args, machines), args.mesh, progress=sys.stderr, steps=steps)
    if args.json:
        print_json(fit_json(fit))
    else:
        print_page(fit_page(fit), args.markdown)
    return 0


def run_search(args: argparse.Namespace) -> int:
    """`shardlab search`: the comparison of what was tried; the best plan as a mesh file with --save."""
    from shardlab.compare import comparison_json
    from shardlab.lab.grids import search_grids
    from shardlab.lab.search import search_plans
    from shardlab.program import write_atomically

    if args.save:
        check_writable(args.save)
    if args.axes and not args.step:
        raise UserError(Problem("--axes", "is for --step", "a model's plans have the axes that they need"))
    with _cache(args) as cache:
        question, steps = _question(args, (args.on,)), cache.steps()
        if args.step:
            names = [name.strip() for name in args.axes.split(",")] if args.axes else []
            found = search_grids(question, names, progress=sys.stderr, jobs=args.jobs, steps=steps)
        else:
            found = search_plans(question, progress=sys.stderr, jobs=args.jobs, steps=steps)
    best = next(iter((*found.comparison.ranked, *found.comparison.emulated)), None)
    if args.save and best is not None:
        write_atomically(Path(args.save), found.texts[best.case.plan.name].encode())
    elif args.save:
        print(f"{args.save}: not written, no plan has an answer", file=sys.stderr)
    if args.json:
        print_json(comparison_json(found.comparison))
    else:
        from shardlab.report.comparison import WIDE_COLUMNS, comparison_page

        width = WIDE_COLUMNS if args.markdown else columns()
        print_page(comparison_page(found.comparison, width), args.markdown)
    return 0


def run_diff(args: argparse.Namespace) -> int:
    """`shardlab diff`: exit 0 whether or not they differ."""
    check_html(args.html)
    machines = tuple(name.strip() for name in args.on.split(",")) if args.on else ()
    question = _question(args, machines)
    if args.paths is not None or args.head is None:
        return _diff_revisions(args, question)
    return _diff_files(args, question)


def _diff_files(args: argparse.Namespace, question: Question) -> int:
    from shardlab.lab.review import diff_of
    from shardlab.report.diff import TERMINAL_ROWS, diff_comment, diff_page
    from shardlab.review import diff_json

    with _cache(args) as cache:
        axes, steps = parse_axes(args.axes), cache.steps()
        found = diff_of(args.base, args.head, question, axes=axes, progress=sys.stderr, steps=steps)
    if args.html:
        from shardlab.report.html.review import diff_report

        write_html(diff_report(found), args.html)
    if args.json:
        print_json(diff_json(found))
    elif args.markdown:
        sys.stdout.write(diff_comment(found))
    else:
        print_page(diff_page(found, TERMINAL_ROWS), markdown=False)
    return 0


def _diff_revisions(args: argparse.Namespace, question: Question) -> int:
    from shardlab.lab.revisions import Asked, diff_revisions
    from shardlab.report.change import change_comment, change_pages
    from shardlab.review.change import change_json

    with _cache(args) as cache:
        asked = Asked(question=question, progress=sys.stderr, cache=cache)
        change = diff_revisions(args.base, args.head, args.paths or (), asked)
    if args.html:
        from shardlab.report.html.review import change_report

        write_html(change_report(change), args.html)
    if args.json:
        print_json(change_json(change) | {"programs": cache.counts.to_json()})
    elif args.markdown:
        sys.stdout.write(change_comment(change))
    else:
        first, *details = change_pages(change)
        print_page(first, markdown=False)
        for page in details:
            print()
            print_page(page, markdown=False)
    return 0


def run_check(args: argparse.Namespace) -> int:
    """`shardlab check`: exit 1 when a plan is worse than its baseline, above its budget, or cannot be."""
    from shardlab.compile.interpreter import Interpreter
    from shardlab.lab.check import check_plans, plans_to_check
    from shardlab.lab.compilers import Compilers
    from shardlab.lab.limits import limits_since
    from shardlab.review.check import check_json

    plans = plans_to_check(args.meshes)
    limits = limits_since(args.since, plans) if args.since else ()
    with _cache(args) as cache:
        checks = check_plans(
            plans,
            update=args.update,
            tolerance=args.tolerance,
            step=args.step,
            progress=sys.stderr,
            jobs=args.jobs,
            steps=cache.steps(),
            compilers=Compilers(pythons=[*map(Interpreter, args.python)], steps_of=cache.steps_in),
        )
    if args.since and args.update:  # baselines are others now
        limits = limits_since(args.since, plans)
    if args.json:
        document = check_json(checks, args.tolerance) | {"programs": cache.counts.to_json()}
        print_json(document | ({"limits": list(limits)} if args.since else {}))
    else:
        from shardlab.report.check import check_page

        print_page(check_page(checks, args.tolerance, limits), args.markdown)
    return 1 if any(check.broken for check in checks) else 0


def run_doctor(args: argparse.Namespace) -> int:
    """`shardlab doctor`: a missing target is an answer, exit 0."""
    from shardlab.compile.doctor import targets

    found = targets(deep=args.deep)
    if args.json:
        print_json({"schema": "shardlab.doctor/1", "targets": [asdict(status) for status in found]})
    else:
        from shardlab.report.doctor import doctor_page

        print_page(doctor_page(found), markdown=False)
    return 0


def _plan(path: str | None) -> Plan | None:
    if path is None:
        return None
    from shardlab.spec.plan import load_plan

    return load_plan(path)


@contextmanager
def _cache(args: argparse.Namespace) -> Iterator[Cache]:
    """The cache that the flags name; bounded when the run is over."""
    from shardlab.lab.cache import open_cache

    cache = open_cache(args.cache, off=args.no_cache)
    yield cache
    cache.prune()


def _question(args: argparse.Namespace, machines: tuple[str, ...]) -> Question:
    from shardlab.lab.cases import Question

    return Question(
        model=args.model,
        machines=machines,
        batch=args.batch,
        seq=args.seq,
        workload=args.workload,
        step=getattr(args, "step", None),
    )


def run_completion(args: argparse.Namespace) -> int:
    """`shardlab completion`: the script on standard output, for the shell to source."""
    from shardlab.completion import completion_script

    sys.stdout.write(completion_script(parser(), args.shell))
    return 0


VERBS = {
    "analyze": run_analyze,
    "explain": run_explain,
    "compare": run_compare,
    "fit": run_fit,
    "search": run_search,
    "diff": run_diff,
    "check": run_check,
    "record": run_record,
    "doctor": run_doctor,
    "completion": run_completion,
}
