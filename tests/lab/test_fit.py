"""What fits, with compiles whose memory is a known line: answers stand where it meets the limit."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlab.capacity import Fit
from shardlab.case_report import CaseReport
from shardlab.cost.memory import memory_report
from shardlab.errors import UserError
from shardlab.hardware.catalog import load_machine
from shardlab.lab.cases import Question
from shardlab.lab.fit import fit_model
from shardlab.lab.run import Steps
from shardlab.program import Memory, Program, Refusal
from shardlab.report.fit import fit_json, fit_page
from shardlab.report.markdown import to_markdown
from shardlab.spec.case import Case
from shardlab.spec.models import MODELS

KEPT = {"none": 10, "matmuls": 4, "full": 1}  # bytes per token and remat, in units
MACHINE, MODEL_NAME = "v5e:2x4", "llama3-8b"
LIMIT = load_machine(MACHINE).chip.memory_limit_bytes or 0


class Compiler:
    """Needs `state` bytes and `each` per token, times what the policy keeps; refuses, as libtpu does, what is
    more than the limit."""

    def __init__(self, state: int, each: int) -> None:
        self.state, self.each = state, each
        self.compiled: list[tuple[str, str, int, int]] = []

    def needed(self, remat: str, batch: int, seq: int) -> int:
        return self.state + self.each * KEPT[remat] * batch * seq

    def compile(self, case: Case) -> Program:
        remat = case.plan.method.remat
        self.compiled.append((case.plan.name, remat, case.batch, case.seq))
        needed = self.needed(remat, case.batch, case.seq)
        fits = needed <= LIMIT
        return Program(
            name="p",
            backend="tpu",
            hlo_text="",
            num_devices=8,
            memory=Memory(argument_bytes=0, temp_bytes=needed, peak_bytes=needed) if fits else None,
            refusal=None if fits else Refusal(needed_bytes=needed, limit_bytes=LIMIT),
        )

    def report(self, case: Case, program: Program) -> CaseReport:
        fit = memory_report(program.memory, program.refusal, load_machine(case.machine))
        return CaseReport(case=case, program=program, memory=fit)

    def fit(self, **asked: object) -> Fit:
        steps = Steps(key=lambda case: case.model_dump_json(), compile=self.compile, report=self.report)
        question = replace(Question(model=MODEL_NAME, machines=(MACHINE,)), **asked)  # type: ignore[arg-type]
        return fit_model(question, progress=io.StringIO(), steps=steps)


def largest(limit: int, state: int, slope: int, unit: int) -> int | None:
    """The largest multiple of `unit` below the line, by arithmetic."""
    count = (limit - state) // (slope * unit)
    return count * unit if count > 0 else None


@settings(deadline=None, derandomize=True)
@given(st.integers(0, LIMIT * 2), st.integers(1, 10**6))
def test_the_largest_batch_is_where_the_line_meets_the_limit(state: int, each: int) -> None:
    compiler = Compiler(state, each)
    fit = compiler.fit(seq=512)
    # FSDP over 8 devices takes batches in eights; full rematerialisation needs least.
    assert fit.largest_batch == largest(LIMIT, state, each * 512, 8)
    assert len(compiler.compiled) == len(set(compiler.compiled))  # nothing is compiled twice
    seq = largest(LIMIT, state, each * 8, 128)
    context = MODELS[MODEL_NAME].context
    assert fit.longest_seq == (None if seq is None else min(seq, context))


def test_each_change_says_what_it_buys(tmp_path) -> None:
    compiler = Compiler(state=10**9, each=300)
    path = tmp_path / "plan.toml"
    path.write_text(
        f'on = "{MACHINE}"\n[axes]\nfsdp = 8\n[params]\nembed = ["fsdp"]\n[activations]\nbatch = ["fsdp"]\n'
        '[method]\nremat = "none"\n'
    )
    steps = Steps(key=lambda case: case.model_dump_json(), compile=compiler.compile, report=compiler.report)
    question = Question(model=MODEL_NAME, batch=8, seq=1024)
    fit = fit_model(question, str(path), progress=io.StringIO(), steps=steps)
    tokens = 300 * 8 * 1024
    assert [(row.change, row.saved_bytes) for row in fit.rows] == [
        ("as asked", 0),
        ("remat = matmuls", 6 * tokens),
        ("remat = full", 9 * tokens),
    ]
    assert fit.remat == "full"
    document = json.loads(json.dumps(fit_json(fit)))
    assert document["largest_batch"] == largest(LIMIT, 10**9, 300 * 1024, 8)
    assert "with remat = full" in to_markdown(fit_page(fit))


def test_what_never_fits_has_advice_and_no_answer() -> None:
    fit = Compiler(state=3 * LIMIT, each=1).fit(batch=8, seq=512)
    assert (fit.remat, fit.largest_batch, fit.longest_seq) == (None, None, None)
    assert "4 times the devices" in fit.advice[0]  # a little over three limits
    assert "largest_batch" not in fit_json(fit)
    assert any(row.change.startswith("grid ") for row in fit.rows)


@pytest.mark.parametrize(
    ("asked", "where"),
    [
        pytest.param({"machines": ("cpu:8",)}, "--on", id="no-limit"),
        pytest.param({"machines": ()}, "--on", id="no-machine"),
        pytest.param({"model": None}, "--model", id="no-model"),
    ],
)
def test_mistakes_point(asked: dict[str, object], where: str) -> None:
    with pytest.raises(UserError) as raised:
        Compiler(1, 1).fit(**asked)
    assert [problem.where for problem in raised.value.problems] == [where]
