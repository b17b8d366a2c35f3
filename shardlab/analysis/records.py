"""The Analysis record and what it is made of: pure values.

All byte figures are per device. `Range` is `(min, max)`; a max of None is unknown (a loop that cannot be
bounded).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

Range = tuple[int, int | None]
ByteRange = tuple[Fraction, Fraction | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRuns:
    """How often some devices run a collective, where devices differ. devices: flattened ids, as `0-3,8`."""

    executions: Range
    devices: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveRow:
    """One collective of the compiled program. Bytes are per execution (DESIGN section 3 gives the formulas).

    axes: mesh axes that vary inside a group, in mesh order, sub-axes as `fsdp:(8)8`; () for groups of one;
        None with `axes_reason` when nothing fits.
    executions: (min, max) per step, over all devices. by_device: of each device, where devices differ and
        that is known (a pipeline's schedule); None otherwise.
    traffic: bytes each device sends per tier, None without a machine.
    time_s: one execution with nothing else on the links (`cost.collective_time`); None where a bandwidth is
        unknown. latency_s: the part of it in which the links carry nothing. tier_s: seconds that each tier's
        links are busy; tiers work at once.
    bound: "upper" where only a bound is known. phase: forward | backward | optimizer | other.
    """

    name: str
    kind: str
    axes: tuple[str, ...] | None
    axes_reason: str | None = None
    tier: str | None = None
    group_size: int
    num_groups: int
    executions: Range
    by_device: tuple[DeviceRuns, ...] | None = None
    asynchronous: bool
    dtypes: tuple[str, ...]
    payload_bytes: int
    wire_bytes: Fraction
    fabric_bytes: Fraction
    logical_payload_bytes: int | None = None
    logical_wire_bytes: Fraction | None = None
    traffic: Mapping[str, Fraction] | None = None
    tier_s: Mapping[str, float] | None = None
    latency_s: float | None = None
    time_s: float | None = None
    algorithm: Mapping[str, str] | None = None
    bound: str | None = None
    realizes: str | None = None
    phase: str = "other"
    recompute: bool = False
    op_name: str = ""
    layer: str = ""
    source: str = ""
    module: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerEntry:
    """Something that was not counted, or not exactly, and why."""

    what: str
    name: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Sums over the step: executions x bytes; a conditional adds its branches' minimum and maximum.

    by_*: key -> {"payload_bytes": range, "wire_bytes": range}; keys of by_axes join axes with `+`, `unknown`
    for None,
        `none` for ().
    traffic: tier -> range, empty without a machine.
    """

    payload_bytes: ByteRange
    wire_bytes: ByteRange
    by_kind: Mapping[str, Mapping[str, ByteRange]] = field(default_factory=dict)
    by_axes: Mapping[str, Mapping[str, ByteRange]] = field(default_factory=dict)
    by_phase: Mapping[str, Mapping[str, ByteRange]] = field(default_factory=dict)
    by_layer: Mapping[str, Mapping[str, ByteRange]] = field(default_factory=dict)
    traffic: Mapping[str, ByteRange] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleFacts:
    """The `module` member of the JSON. runs_per_step: in the JSON only where it is not 1."""

    name: str
    backend: str
    num_devices: int
    scheduled: bool
    runs_per_step: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """What one compiled program communicates."""

    modules: tuple[ModuleFacts, ...]
    mesh: Mapping[str, int] | None
    machine: str | None
    collectives: tuple[CollectiveRow, ...]
    totals: Totals
    ledger: tuple[LedgerEntry, ...]
    made_by: Mapping[str, object] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The document of `analyze --json`: `shardlab.analysis/1`, whole numbers as integers."""
        from shardlab.analysis.document import analysis_to_json

        return analysis_to_json(self)

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> Analysis:
        """The Analysis that `to_json` wrote. Raises UserError when the document is something else."""
        from shardlab.analysis.document import analysis_from_json

        return analysis_from_json(document)

    def _repr_html_(self) -> str:
        """For notebooks."""
        from shardlab.analysis.notebook import analysis_html

        return analysis_html(self)


def axes_key(axes: tuple[str, ...] | None) -> str:
    """The key of a set of axes in totals and budgets: joined by `+`, `unknown` for None, `none` for ()."""
    return "unknown" if axes is None else "+".join(axes) or "none"
