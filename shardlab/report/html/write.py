"""A `Report` -> one HTML file. Text is escaped by the templates, its control characters spelled out before.

The page loads nothing: style, script and drawings stand in it, and its Content-Security-Policy lets no other
script run than ours, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from shardlab.errors import ShardlabError
from shardlab.report.html.draw import svg_of
from shardlab.report.html.parts import Block, Chart, Facts, Heat, Listing, Prose, Report
from shardlab.report.page import Table, visible

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_TEMPLATES = {
    Chart: "chart.html",
    Table: "table.html",
    Heat: "heat.html",
    Listing: "listing.html",
    Prose: "prose.html",
    Facts: "facts.html",
}


class ReportToolsMissing(ShardlabError):
    """A package that writes HTML is not installed. The user must act."""

    def __init__(self, package: str) -> None:
        super().__init__(f"--html: {package} is not installed; pip install 'shardlab[report]'")


def check_tools() -> None:
    """Before a long compile, not after it. Raises ReportToolsMissing without the `[report]` extra."""
    for module, package in (("jinja2", "jinja2"), ("vl_convert", "vl-convert-python")):
        if find_spec(module) is None:
            raise ReportToolsMissing(package)


def html_of(report: Report) -> str:
    """The file's text. Raises ReportToolsMissing without the `[report]` extra."""
    check_tools()
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("shardlab.report.html"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalized,
        trim_blocks=True,
        auto_reload=False,
    )
    script = _asset("report.js")
    environment.filters["drawn"] = _Drawn(environment)
    return environment.get_template("report.html").render(
        report=report,
        style=_trusted(_asset("report.css")),
        script=_trusted(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        version=version("shardlab"),
    )


class _Drawn:
    """The filter that gives a block its markup; numbers the blocks, for their ids."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.count = 0

    def __call__(self, block: Block) -> Markup:
        self.count += 1
        number = self.count  # before a table within a chart takes its own
        more: dict[str, Any] = {}
        if isinstance(block, Chart):
            more = {
                "wide": _trusted(svg_of(block.wide)),
                "narrow": _trusted(svg_of(block.narrow)) if block.narrow is not None else "",
                "table": self(block.table) if block.table is not None else "",
            }
        template = self.environment.get_template(_TEMPLATES[type(block)])
        return _trusted(template.render(block=block, id=f"block-{number}", **more))


def _trusted(markup: str) -> Markup:
    """What this package or Vega wrote."""
    from markupsafe import Markup

    return Markup(markup)


def _finalized(value: object) -> object:
    """Control characters of plain text are spelled out; markup of ours stays."""
    return visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _asset(name: str) -> str:
    return (files("shardlab.report.html") / "templates" / name).read_text(encoding="utf-8")
