"""Why a collective is there: what it does to its arrays, the rule behind it, what would remove it."""

from shardlab.why.build import why, why_json
from shardlab.why.records import Change, Why

__all__ = ["Change", "Why", "why", "why_json"]
