"""The Why record: pure values."""

from __future__ import annotations

from dataclasses import dataclass

from shardlab.analysis import CollectiveRow
from shardlab.audit import Finding

UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Change:
    """One array of a collective: its shape on a device and how it is split, before and after.

    arrays: names of what it is, where its layer and shape say so; () where they do not.
    """

    before_shape: str
    before: str
    after_shape: str
    after: str
    arrays: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Why:
    """One collective. text: as compiled, without what says nothing here. line: of the text, 0 where there is
    none.

    changes: its arrays. rules: of the plan, as the mesh file writes them; rules_reason: how they were found,
    or why they are unknown. model_known: whether its arrays could be looked for among a model's parameters.
    warnings: of the partitioner. findings: of the audit at this collective. remedies: what would remove it,
    or make it smaller.
    """

    row: CollectiveRow
    text: str
    line: int
    changes: tuple[Change, ...]
    rules: tuple[str, ...]
    rules_reason: str
    model_known: bool
    warnings: tuple[str, ...]
    findings: tuple[Finding, ...]
    remedies: tuple[str, ...]
