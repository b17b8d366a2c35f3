"""Every transfer between devices in a program, once, whatever form it is printed in (HLO.md section 2).

Counted is the instruction that starts a transfer: never a -done or -update, never a clone of it in a later
fusion, never a recv. Equal channel ids mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from shardlab.attribute.edges import CallSite, CallSites, sites_of
from shardlab.attribute.opaque import is_host_callback, opaque_reason, target_of
from shardlab.attribute.payload import (
    Payload,
    element_at,
    logical_payload,
    may_be_widened,
    payload_of,
    sliced_from,
)
from shardlab.hlo.attributes import config_value, errors_at, frontend_attributes, is_true
from shardlab.hlo.instructions import Instructions
from shardlab.hlo.lookup import is_plain, may_mention, of_opcodes
from shardlab.hlo.module import Computation, Instruction, Module
from shardlab.hlo.opcodes import PLAIN
from shardlab.hlo.shape import try_shape_bytes

KINDS = frozenset(
    {
        "all-reduce",
        "all-gather",
        "reduce-scatter",
        "all-to-all",
        "ragged-all-to-all",
        "collective-permute",
        "collective-broadcast",
    }
)
_COLLECTIVE = KINDS | {f"{kind}-start" for kind in KINDS}
_MOVING = _COLLECTIVE | {"send", "custom-call", "custom-call-start"}
_STILL = PLAIN | {"fusion", "call", "while", "conditional", "async-start", "recv"}
MEGASCALE = "xla_megascale_runtime"
_MEGASCALE_KINDS = {
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
_HANDLER, _RENDEZVOUS = "_xla_host_transfer_handler_name", "_xla_host_transfer_rendezvous"
_PAIRS = "_xla_send_recv_source_target_pairs"
_JOINING = frozenset({"replica_groups", "source_target_pairs", "channel_id"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """One transfer as the program holds it.

    computation: where `instruction` stands. around: the fusion, call or async start that runs that
    computation, from the inside out. name: of the start, where there is one. kind: what happens on the wire.
    logical: what the source asked for where XLA:CPU widened it.
    pairs_text: the pairs of a GPU send. target: the devices of a transfer between TPU slices, which goes
    over DCN.
    """

    computation: str
    instruction: Instruction
    around: tuple[Instruction, ...]
    outermost: str
    name: str
    kind: str
    asynchronous: bool
    payload: Payload
    logical: Payload | None = None
    pairs_text: str | None = None
    target: str | None = None


@dataclass(frozen=True, slots=True)
class Uncounted:
    """Something that is not counted as network traffic, or cannot be: `what` it is, its `name`, and `why`."""

    what: str
    name: str
    why: str


Found = Collective | Uncounted


def find_collectives(module: Module, sites: CallSites, backend: str) -> tuple[Found, ...]:
    """All transfers of the computations that ENTRY reaches, callers first, in printed order.

    backend: where a convert before a gather means that XLA widened it (`cpu`), and where it does not (`tpu`,
    `gpu`). Raises ParseError when an operand is not defined.
    """

    @cache
    def is_mentioned(dtype: str) -> bool:
        return any(may_mention(one.instructions, f"{dtype}[") for one in module.computations.values())

    reader = _Finder(module, sites, backend, _received(module, sites), is_mentioned)
    return tuple(found for name in sites.order for found in reader.of_computation(name))


@dataclass(frozen=True, slots=True)
class _Finder:
    module: Module
    sites: CallSites
    backend: str
    received: Mapping[str, Instruction]
    is_mentioned: Callable[[str], bool]

    def of_computation(self, name: str) -> Iterator[Found]:
        """Transfers of one computation."""
        computation = self.module.computations[name]
        instructions = computation.instructions
        if is_plain(instructions):
            return
        moving = of_opcodes(instructions, _MOVING | _strangers(instructions))
        if not moving:
            return
        around = _around(self.sites, name)
        targets = _custom_call_targets(computation)
        for instruction in moving:
            with errors_at(instruction):
                found = self._of_instruction(computation, instruction, around, targets)
            if found is not None:
                yield found

    def _of_instruction(
        self,
        computation: Computation,
        instruction: Instruction,
        around: tuple[CallSite, ...],
        targets: set[str],
    ) -> Found | None:
        """The transfer that one instruction starts, None for all others."""
        opcode = instruction.opcode
        if opcode.removesuffix("-start") in KINDS:
            if _is_clone(instruction, targets):
                return None
            return self._collective(computation, instruction, around, "AsyncCollectiveStart" in targets)
        if opcode == "send":
            return self._send(computation, instruction, around)
        if opcode in ("custom-call", "custom-call-start"):
            return self._custom_call(computation.name, instruction)
        return _unknown(instruction)

    def _collective(
        self,
        computation: Computation,
        instruction: Instruction,
        around: tuple[CallSite, ...],
        started: bool,
    ) -> Found:
        kind = instruction.opcode.removesuffix("-start")
        payload = payload_of(computation, instruction, kind)
        logical = None
        if self.backend not in ("tpu", "gpu") and may_be_widened(payload, self.is_mentioned):
            logical = logical_payload(self.module, computation, instruction, kind)
        if kind == "all-reduce" and _is_scatter_fusion(computation, instruction, around):
            kind = "reduce-scatter"
        return _sized(
            Collective(
                computation=computation.name,
                instruction=instruction,
                around=tuple(site.instruction for site in around),
                outermost=around[-1].caller if around else computation.name,
                name=_name(computation, instruction, around),
                kind=kind,
                asynchronous=_is_asynchronous(instruction, around, started),
                payload=payload,
                logical=logical,
            )
        )

    def _custom_call(self, computation: str, call: Instruction) -> Uncounted | None:
        """What is known of a custom call's own traffic, None when it stays on its device."""
        if is_host_callback(call):
            why = f"to the host ({target_of(call)}): not network traffic"
            return Uncounted("host-transfer", call.name, why)
        why = opaque_reason(call, any(sites_of(computation, call)))
        return Uncounted("custom-call", call.name, why) if why else None

    def _send(
        self, computation: Computation, instruction: Instruction, around: tuple[CallSite, ...]
    ) -> Found:
        frontend = frontend_attributes(instruction)
        handler = frontend.get(_HANDLER)
        if handler == MEGASCALE:
            return self._between_slices(computation, instruction, around, frontend)
        if handler is not None or is_true(instruction, "is_host_transfer"):
            why = f"to the host ({handler or 'no handler named'}): not network traffic"
            return Uncounted("host-transfer", instruction.name, why)
        if _PAIRS not in frontend:
            return Uncounted("send", instruction.name, "its source and target devices are not in the text")
        return _sized(
            Collective(
                computation=computation.name,
                instruction=instruction,
                around=tuple(site.instruction for site in around),
                outermost=around[-1].caller if around else computation.name,
                name=instruction.name,
                kind="send",
                asynchronous=True,
                payload=_sent(computation, instruction),
                pairs_text=frontend[_PAIRS],
            )
        )

    def _between_slices(
        self,
        computation: Computation,
        instruction: Instruction,
        around: tuple[CallSite, ...],
        frontend: Mapping[str, str],
    ) -> Found:
        """A send to the megascale runtime stands for the collective that the runtime carries out."""
        transfer = frontend.get("_xla_megascale_transfer_type", "")
        kind, target = _MEGASCALE_KINDS.get(transfer), frontend.get("_xla_megascale_target")
        if kind is None or target is None:
            return Uncounted(
                "dcn-transfer", instruction.name, f"unknown transfer type {transfer!r}, or no target"
            )
        received = self.received.get(frontend.get(_RENDEZVOUS, ""))
        if kind == "all-gather" and received is None:
            return Uncounted("dcn-transfer", instruction.name, "the recv of this all-gather is missing")
        gathered = (
            try_shape_bytes(element_at(received.shape, (0,))) if received and kind == "all-gather" else 0
        )
        sent = _sent(computation, instruction)
        return _sized(
            Collective(
                computation=computation.name,
                instruction=instruction,
                around=tuple(site.instruction for site in around),
                outermost=around[-1].caller if around else computation.name,
                name=instruction.name,
                kind=kind,
                asynchronous=True,
                payload=Payload(
                    dtypes=sent.dtypes,
                    operand_bytes=sent.operand_bytes,
                    gathered_bytes=gathered,
                    upper_bound=sent.upper_bound,
                ),
                target=target,
            )
        )


def _sized(collective: Collective) -> Found:
    """A collective whose size is unknown cannot be counted."""
    payload = collective.payload
    if payload.operand_bytes is None or payload.gathered_bytes is None:
        why = "the size of what it carries is unknown (an unbounded extent or an unknown type)"
        return Uncounted(collective.kind, collective.name, why)
    return collective


def _strangers(instructions: Mapping[str, Instruction]) -> set[str]:
    """Opcodes of which it is not known that they move nothing, or how they are counted."""
    printed = (
        instructions.opcodes
        if isinstance(instructions, Instructions)
        else {one.opcode for one in instructions.values()}
    )
    return {name for name in printed if name not in _STILL and not name.endswith(("-done", "-update"))}


def _unknown(stranger: Instruction) -> Uncounted | None:
    """An operation that nobody has heard of, but that names groups, pairs or a channel: a new collective."""
    if not _JOINING & stranger.attributes.keys():
        return None
    return Uncounted(
        stranger.opcode, stranger.name, "an operation between devices that shardlab does not know"
    )


def _received(module: Module, sites: CallSites) -> dict[str, Instruction]:
    """The recvs of transfers between slices by the name at which they meet their send."""
    found: dict[str, Instruction] = {}
    for name in sites.order:
        for instruction in of_opcodes(module.computations[name].instructions, ("recv",)):
            frontend = frontend_attributes(instruction)
            if frontend.get(_HANDLER) == MEGASCALE:
                found[frontend.get(_RENDEZVOUS, "")] = instruction
    return found


def _sent(computation: Computation, instruction: Instruction) -> Payload:
    """A send carries its first operand; the second is a token."""
    return payload_of(computation, instruction, "send")


def _around(sites: CallSites, name: str) -> tuple[CallSite, ...]:
    """The fusion, call or async start that runs a computation, and what runs that, as long as it is only
    one.
    """
    chain: list[CallSite] = []
    callers = sites.by_callee.get(name, ())
    while len(callers) == 1 and callers[0].role in ("call", "async") and len(chain) < 8:
        chain.append(callers[0])
        callers = sites.by_callee.get(callers[0].caller, ())
    return tuple(chain)


def _is_clone(instruction: Instruction, targets: set[str]) -> bool:
    """A TPU fusion that carries an all-gather further, or ends it, repeats it; only the start's copy
    counts.
    """
    if "AsyncCollectiveStart" in targets:
        return False
    flags = config_value(instruction, "async_collective_fusion_config")
    carried = isinstance(flags, dict) and str(flags.get("flag_start")) != "-1"
    return carried or "AsyncCollectiveDone" in targets


def _custom_call_targets(computation: Computation) -> set[str]:
    calls = of_opcodes(computation.instructions, ("custom-call",))
    return {target_of(call) for call in calls}


def _is_scatter_fusion(
    computation: Computation, instruction: Instruction, around: tuple[CallSite, ...]
) -> bool:
    """A TPU kCustom fusion of an all-reduce and a slice of it runs as a reduce-scatter."""
    if not around or not around[0].instruction.opcode.startswith("fusion"):
        return False
    return around[0].instruction.attributes.get("kind") == "kCustom" and sliced_from(computation, instruction)


def _is_asynchronous(instruction: Instruction, around: tuple[CallSite, ...], started: bool) -> bool:
    """started: whether the computation begins a TPU chain of fusions that carry the transfer."""
    if config_value(instruction, "collective_backend_config", "is_sync") is True:
        return False
    starts = started or instruction.opcode.endswith("-start")
    for site in around:
        if config_value(site.instruction, "collective_backend_config", "is_sync") is True:
            return False
        starts = starts or site.role == "async"
    return starts


def _name(computation: Computation, instruction: Instruction, around: tuple[CallSite, ...]) -> str:
    """The async start's name when it starts this collective alone, so that text and dump say the same."""
    start = next((site.instruction for site in around if site.role == "async"), None) if around else None
    if start is None:
        return instruction.name
    together = of_opcodes(computation.instructions, _COLLECTIVE)
    return start.name if len(together) == 1 else instruction.name
