"""6 COMPARE, one before and one after: what a change does to a step (`shardlab.diff/1`)."""

from shardlab.review.build import diff
from shardlab.review.document import diff_json
from shardlab.review.records import Amounts, Diff, Flow, Row, Side

__all__ = ["Amounts", "Diff", "Flow", "Row", "Side", "diff", "diff_json"]
