"""Stages 3 + 4 + 5 on one program: the Analysis record, to and from JSON (`shardlab.analysis/1`)."""

from shardlab.analysis.build import Attributed, Source, analyze, attribute, merge
from shardlab.analysis.document import analysis_from_json
from shardlab.analysis.records import (
    Analysis,
    ByteRange,
    CollectiveRow,
    LedgerEntry,
    ModuleFacts,
    Range,
    Totals,
    axes_key,
)

__all__ = [
    "Analysis",
    "Attributed",
    "ByteRange",
    "CollectiveRow",
    "LedgerEntry",
    "ModuleFacts",
    "Range",
    "Source",
    "Totals",
    "analysis_from_json",
    "analyze",
    "attribute",
    "axes_key",
    "merge",
]
