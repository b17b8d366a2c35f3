"""Which cases are one program: the key under which a compiled program is kept and shared."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

from shardlab.compile.environment import split_flags
from shardlab.compile.versions import source_digest, versions
from shardlab.hardware.catalog import load_machine
from shardlab.hardware.machine import Machine
from shardlab.spec.case import Case

# Who wrote the plan down, and where, compiles to nothing; the other verbs' defaults are in the case already.
_PLAN_LABELS = {"name", "path", "description", "on", "check", "flags", "axes"}


def program_key(case: Case) -> str:
    """sha256 (hex) over everything that decides the compiled program, and nothing else.

    One GPU program serves every machine of its chip family, however its hosts are laid out: the key holds the
    chip's compile target and the number of devices. A TPU program is for its torus and slices. Compiler
    versions and our own model sources count. Raises UserError for a machine that is not known.
    """
    machine = load_machine(case.machine)
    facts = {
        "axes": list(case.plan.axes.items()),
        "plan": case.plan.model_dump(mode="json", exclude=_PLAN_LABELS),
        "flags": split_flags(case.plan.flags, machine.family)[0],
        "model": asdict(case.model),
        "workload": [case.workload, case.batch, case.seq, case.scan_layers],
        "target": _target_facts(machine),
        "versions": versions(machine.family),
        "sources": source_digest(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _target_facts(machine: Machine) -> dict[str, Any]:
    facts: dict[str, Any] = {"family": machine.family, "devices": machine.num_devices}
    if machine.family in ("gpu", "tpu"):
        facts["compile_as"] = machine.chip.compile_as
    if machine.family == "tpu":
        facts["topology"] = [machine.torus, machine.slices]
    return facts
