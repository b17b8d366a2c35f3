"""Writers of a page: names from a program are data, not markup, whoever wrote them."""

from __future__ import annotations

import io

import pytest

from shardlab.report.markdown import code_span, plain, to_markdown
from shardlab.report.page import Column, Line, Page, Table, cell, code, visible
from shardlab.report.terminal import print_page


def page(text: str) -> Page:
    table = Table(
        title="T", columns=(Column("name", keep=False),), rows=((code(text),), (cell(text, "bad"),))
    )
    return Page(title="Page", facts=(("label", text),), tables=(table,), notes=(text,))


def printed(text: str, width: int = 100) -> str:
    stream = io.StringIO()
    print_page(page(text), stream, width)
    return stream.getvalue()


@pytest.mark.parametrize(
    "text",
    ["[bold red]all-gather[/]", "[/nothing]", ":smile:", "[link=http://x]y[/link]", "a\\[b"],
    ids=["style", "stray-close", "emoji", "link", "backslash"],
)
def test_a_terminal_shows_rich_markup_as_it_is(text: str) -> None:
    assert printed(text).count(text) == 4  # fact, two cells, note


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\nb\tc", "a\\x0ab\\x09c"),
        ("\u202eevil", "\\u202eevil"),
        ("\U000e0001tag", "\\U000e0001tag"),
        ("Träger 名前", "Träger 名前"),
    ],
    ids=["escape", "newline-tab", "bidi", "tag", "letters"],
)
def test_control_characters_are_spelled_out(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert printed(text).count(shown) == 4
    assert "\x1b" not in printed(text)


def test_a_stream_that_is_no_terminal_gets_no_colour() -> None:
    assert "\x1b" not in printed("plain")


@pytest.mark.parametrize("width", [40, 80, 120])
def test_no_line_is_wider_than_the_terminal_and_no_text_is_lost(width: int) -> None:
    name = "jit(step)/transpose(jvp())/while/body/" + "x" * 100
    text = printed(name, width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert text.replace("\n", "").replace(" ", "").count("x") >= 400


@pytest.mark.parametrize(
    ("text", "markdown"),
    [
        ("a|b", "a\\|b"),
        ("<script>", "\\<script\\>"),
        ("*x* _y_", "\\*x\\* \\_y\\_"),
        ("[x](http://y)", "\\[x\\]\\(http://y\\)"),
        ("ping @owner", "ping @<!-- -->owner"),
        ("line\nbreak", "line\\\\x0abreak"),
    ],
    ids=["pipe", "html", "emphasis", "link", "mention", "newline"],
)
def test_markdown_text_is_escaped(text: str, markdown: str) -> None:
    assert plain(text) == markdown


@pytest.mark.parametrize(
    ("text", "span"),
    [("a|b", "`a\\|b`"), ("a`b", "`` a`b ``"), ("a``b`", "``` a``b` ```"), ("<b>", "`<b>`")],
    ids=["pipe", "backtick", "two-backticks", "html"],
)
def test_markdown_names_are_code(text: str, span: str) -> None:
    assert code_span(text) == span


def test_markdown_of_a_page() -> None:
    columns = (Column("plan"), Column("sent", "right"))
    rows = (((Line("fsdp_8", "strong"), Line("FSDP")), cell("7 GB")),)
    shown = Page(
        title="Two plans",
        facts=(("mesh", "fsdp 8"),),
        tables=(Table(title="Ranked", columns=columns, rows=rows, caption="per device"),),
        notes=("batch 8",),
    )
    assert to_markdown(shown) == (
        "## Two plans\n\n- **mesh**: fsdp 8\n\n### Ranked\n\n"
        "| plan | sent |\n| --- | ---: |\n| **fsdp\\_8**<br>FSDP | 7 GB |\n\nper device\n\n- batch 8\n"
    )
