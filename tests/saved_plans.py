"""Plans of meshes/ compiled once and saved, and their reports; tests/golden/README.md says how."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from shardlab.case_report import CaseReport, report_case
from shardlab.hardware.catalog import load_machine
from shardlab.lab.cases import Question, comparison_cases, load_plans
from shardlab.program import load

TESTS = Path(__file__).parent
LLAMA_70B = TESTS / "golden" / "report" / "llama3-70b.h100x512-fsdp64-tensor8.program"


@cache
def llama_70b() -> CaseReport:
    """Llama 3 70B on 64 x 8 H100s, FSDP 64 x tensor 8, batch 64."""
    mesh = str(TESTS.parent / "meshes" / "h100x512-fsdp64-tensor8.toml")
    question = Question(model="llama3-70b", machines=(), batch=None, seq=None, workload=None)
    (case,) = comparison_cases(load_plans([mesh]), question).cases
    return report_case(case, load(LLAMA_70B), load_machine(case.machine))
