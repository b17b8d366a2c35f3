"""Text that others wrote, made safe to show: on a terminal, and as a fragment of HTML in a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def visible(text: str) -> str:
    """The text with control and format characters (escape sequences, bidirectional overrides) spelled out."""
    return "".join(char if char.isprintable() else _spelled(char) for char in text)


def _spelled(char: str) -> str:
    point = ord(char)
    if point <= 0xFF:
        return f"\\x{point:02x}"
    return f"\\u{point:04x}" if point <= 0xFFFF else f"\\U{point:08x}"


def html_text(text: str) -> str:
    """The text as HTML shows it."""
    return escape(visible(text))


def html_fragment(title: str, lines: Iterable[str], tables: Iterable[str]) -> str:
    """A title, lines of text and tables, for a notebook's cell; no style but alignment."""
    shown = "".join(f"<br>{html_text(line)}" for line in lines if line)
    return f"<div><p><strong>{html_text(title)}</strong>{shown}</p>{''.join(tables)}</div>"


def html_table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], figures: int) -> str:
    """A table whose last `figures` columns are figures; "" without rows."""
    first_figure = len(header) - figures

    def row(cells: Sequence[str], tag: str) -> str:
        aligned = ("left" if number < first_figure else "right" for number in range(len(cells)))
        scope = ' scope="col"' if tag == "th" else ""
        parts = zip(cells, aligned, strict=True)
        return "".join(
            f'<{tag}{scope} style="text-align:{at}">{html_text(text)}</{tag}>' for text, at in parts
        )

    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows)
    if not body:
        return ""
    head = f"<thead><tr>{row(header, 'th')}</tr></thead>"
    return f"<table><caption>{html_text(caption)}</caption>{head}<tbody>{body}</tbody></table>"
