"""Names that somebody else chose, markup and all, come out of reports as they are, and break no table."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from command_line import mistakes, run

MARKUP = "[red]x[/red]|<script>alert(1)</script>&amp*b*`c`"  # no semicolon: XLA joins names with it
HOSTILE = (
    MARKUP + "\\033[31m" + "\\342\\200\\256"
)  # as HLO escapes it: a colour, and a bidirectional override
SHOWN = MARKUP + "\\x1b[31m" + "\\u202e"
TEXT = f"""HloModule [red]|<b>m</b>, num_partitions=2

%add {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}}

ENTRY %main {{
  %p = f32[4]{{0}} parameter(0)
  %k = f32[4]{{0}} custom-call(%p), custom_call_target="{HOSTILE}"
  ROOT %r = f32[4]{{0}} all-reduce(%k), channel_id=1, replica_groups=mesh['{MARKUP}'=2] {{'{MARKUP}'}},
    use_global_device_ids=true, to_apply=%add,
    metadata={{op_name="jit(f)/{HOSTILE}/psum" source_file="/tmp/{HOSTILE}.py" source_line=3}}
}}
"""


@pytest.fixture
def hostile(tmp_path: Path) -> str:
    path = tmp_path / "m.hlo"
    path.write_text(TEXT)
    return str(path)


def test_a_terminal_gets_no_markup_and_no_control_character(
    hostile: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert run("analyze", hostile, "--audit") == 0
    out = capsys.readouterr().out
    assert out.count("[red]x[/red]") >= 3  # layer, source line, ledger
    assert "[red]|<b>m</b>" in out
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", out)
    assert SHOWN in out


def test_markdown_stays_a_table(hostile: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every row has as many cells as its head; a pipe within a name is escaped; html is code or escaped."""
    assert run("analyze", hostile, "--markdown", "--audit") == 0
    out = capsys.readouterr().out
    tables = [block.splitlines() for block in out.split("\n\n") if block.startswith("| ")]
    assert len(tables) >= 5
    for head, *rows in tables:
        for row in rows:
            assert len(re.findall(r"(?<!\\)\|", row)) == len(re.findall(r"(?<!\\)\|", head)), row
    # without code spans and our own line breaks, no angle bracket and no square bracket is live
    prose = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)|<br>|^- \*\*module\*\*: ", "", out, flags=re.MULTILINE)
    assert not re.search(r"(?<!\\)[<\[]", prose), prose
    assert "\x1b" not in out


def test_json_holds_the_names_themselves(hostile: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("analyze", hostile, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    (row,) = document["collectives"]
    true_name = MARKUP + "\x1b[31m\u202e"
    assert row["op_name"] == f"jit(f)/{true_name}/psum"
    assert document["module"]["name"] == "[red]|<b>m</b>"


@pytest.mark.parametrize("damage", ["all-reduce(%gone)", "all-reduce(%k"])
def test_errors_show_names_as_they_are(damage: str, hostile: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(hostile).write_text(TEXT.replace("all-reduce(%k)", damage))
    assert run("analyze", hostile) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "\x1b" not in err


def test_an_error_that_names_the_module_spells_out_its_control_characters(
    hostile: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(hostile).write_text(TEXT.replace("HloModule [red]", "HloModule \x1b[31m\u202e"))
    (line,) = mistakes(capsys, "analyze", hostile, "--axes", "x=3")
    assert "module \\x1b[31m\\u202e|<b>m</b> is compiled for 2" in line
    assert line.isprintable()
