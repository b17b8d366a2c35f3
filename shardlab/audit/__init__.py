"""Findings in a compiled program: traffic that another plan or source would save, with evidence."""

from shardlab.audit.findings import Finding, finding_json
from shardlab.audit.run import RULES, audit, audit_parts

__all__ = ["RULES", "Finding", "audit", "audit_parts", "finding_json"]
