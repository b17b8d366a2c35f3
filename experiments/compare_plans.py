"""Compare sharding plans of one model, on one machine or several: one report.

python experiments/compare_plans.py --meshes=meshes/cpu8-fsdp.toml,meshes/cpu8-data.toml --model=gpt2-124m
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import app, flags

from shardlab.compare import Comparison
from shardlab.errors import ShardlabError
from shardlab.lab.cases import Question
from shardlab.lab.study import compare_plans
from shardlab.output import check_html, write_html
from shardlab.report.comparison import comparison_page
from shardlab.report.html.comparison import comparison_report
from shardlab.report.markdown import to_markdown

MESHES = flags.DEFINE_list("meshes", None, "Mesh files (TOML), separated by commas.", required=True)
MODEL = flags.DEFINE_string("model", "gpt2-124m", "Named model configuration.")
BATCH = flags.DEFINE_integer(
    "batch", None, "Global batch in sequences; by default the smallest all plans take."
)
SEQUENCE = flags.DEFINE_integer("sequence", None, "Tokens per sequence; by default what the plans ask for.")
HTML = flags.DEFINE_string("html", None, "Also write the report for the browser: one file.")
ON = flags.DEFINE_list("on", [], "Machines, separated by commas; each plan's own unless said.")


def run() -> Comparison:
    """Every plan on every machine, one batch for all."""
    question = Question(model=MODEL.value, machines=tuple(ON.value), batch=BATCH.value, seq=SEQUENCE.value)
    return compare_plans(MESHES.value, question, progress=sys.stderr)


def main(argv: Sequence[str]) -> None:
    """Print the report as Markdown."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    try:
        check_html(HTML.value)
        comparison = run()
        if HTML.value:
            write_html(comparison_report(comparison), HTML.value)
        sys.stdout.write(to_markdown(comparison_page(comparison)))
    except ShardlabError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    app.run(main)
