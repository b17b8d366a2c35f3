"""TPU chains: one transfer, started in a fusion, carried by matrix products, and ended in another fusion.

XLA prints a clone of the collective in each of them and drops its metadata. The products that carry it are
other work that runs meanwhile; who uses what the last fusion returns says whose transfer it was.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from shardlab.hlo.attributes import frontend_attributes
from shardlab.hlo.lookup import fusions, of_opcodes
from shardlab.hlo.module import Computation, Instruction, Module

DONE = "AsyncCollectiveDone"
_Key = tuple[str, str, str]


@dataclass(slots=True)
class Chains:
    """Finds where chains end; remembers the ends per computation."""

    module: Module
    _ends: dict[str, dict[_Key, Instruction]] = field(default_factory=dict)

    def end(self, outermost: Computation, collective: Instruction) -> Instruction | None:
        """The fusion of `outermost` that ends the transfer that `collective` starts; None for no chain."""
        if outermost.name not in self._ends:
            self._ends[outermost.name] = self._ends_of(outermost)
        return self._ends[outermost.name].get(_key(collective))

    def _ends_of(self, outermost: Computation) -> dict[_Key, Instruction]:
        ends: dict[_Key, Instruction] = {}
        for name, callee in fusions(outermost.instructions):
            body = self.module.computations[callee].instructions
            calls = of_opcodes(body, ("custom-call",))
            if any(call.attributes.get("custom_call_target", "").strip('"') == DONE for call in calls):
                fusion = outermost.instructions[name]
                ends |= {_key(one): fusion for one in body.values() if "channel_id" in one.attributes}
        return ends


def _key(collective: Instruction) -> _Key:
    """Clones of one transfer share kind, channel and chain; channels alone are not unique."""
    chain = frontend_attributes(collective).get("chain_id", "")
    return collective.opcode, collective.attributes.get("channel_id", ""), chain
