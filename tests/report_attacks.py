"""Names that try to be markup or script, and a report full of them."""

from __future__ import annotations

from dataclasses import replace

from case_reports import analysis, case, collective, plan, report

from shardlab.analysis import LedgerEntry, ModuleFacts
from shardlab.audit import Finding
from shardlab.case_report import CaseReport

ATTACKS = (
    "<script>window.pwned=1</script>",
    "</script><script>window.pwned=1</script>",
    '"><img src=x onerror="window.pwned=1">',
    "' onmouseover='window.pwned=1",
    "</style><svg onload=window.pwned=1>",
    "</title><a href='javascript:window.pwned=1'>x</a>",
    "{{ 7*7 }}{% raw %}",
    "<!--",
    "]]>&lt;script&gt;",
)
SHOWN_CONTROL = "\x1b[31m\u202eevil\u2066\x00"


def hostile(text: str) -> CaseReport:
    """A report in which every name that a program or a user chooses is this text."""
    row = collective(
        text, axes=(text,), axes_reason=text, kind="all-gather", phase="forward", layer=text, source=text,
        op_name=text, dtypes=(text,), realizes=text, module=text,
    )  # fmt: skip
    entry = LedgerEntry(what=text, name=text, why=text)
    facts = ModuleFacts(name=text, backend="gpu", num_devices=8, scheduled=True)
    found = replace(
        analysis(row),
        modules=(facts,),
        mesh={text: 8},
        ledger=(entry,),
        made_by={"versions": {text: text}, "flags": [text]},
    )
    finding = Finding(
        rule=text, instruction=text, axes=(text,), wire_bytes=None, source=text, evidence=text, remedy=text
    )
    named = plan("p").model_copy(update={"name": text, "description": text})
    asked = case().model_copy(update={"plan": named})
    return report(case=asked, analysis=found, findings=(finding,), notes=(text,))
