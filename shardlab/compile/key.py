"""Which cases are one program: the keys under which compiled programs are kept and shared.

The first key needs no jax: it is of the case, the versions and the sources. The second is of the lowered
program, so that sources that were changed and lower to the same are not compiled again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from shardlab.compile.environment import split_flags
from shardlab.compile.step_sources import installed_digest, sources_digest
from shardlab.compile.versions import compiler_versions, digest_of, source_digest, versions
from shardlab.hardware.catalog import load_machine
from shardlab.hardware.data_files import load_gpu_target
from shardlab.hardware.machine import Machine
from shardlab.program import Flags, Program
from shardlab.spec.case import Case
from shardlab.spec.step import AnyCase, StepCase

# Who wrote the plan down, and where, compiles to nothing; the other verbs' defaults are in the case already.
_PLAN_LABELS = {"name", "path", "description", "on", "check", "flags", "axes"}
# Of the versions, what is no part of the program: the sources are hashed, and Python only runs them.
_RUNNERS = ("python", "shardlab")

# `"name"` or `"name"(#loc3)` is one, `"file.py":12:4` is a place, `callsite(…)` are Python's frames.
_LOCATION = re.compile(r'^(#loc\d*) = loc\((?:"(?P<name>(?:[^"\\]|\\.)*)")?(?P<column>:?)')
_REFERENCE = re.compile(r"loc\((#loc\d*)\)")


def program_key(
    case: AnyCase, sources: Sequence[Path] = (), versions_here: Mapping[str, str] | None = None
) -> str:
    """sha256 (hex) over everything that decides the compiled program, and nothing else.

    One GPU program serves every machine of its chip family, however its hosts are laid out: the key holds the
    chip's compile target and the number of devices. A TPU program is for its torus and slices. Compiler
    versions and our own model sources count; of the user's own step its sources and all that is installed.

    sources: files and folders of the user's that build the step beside those. versions_here: of another
    Python that is to compile. Raises UserError for a machine or a step's package that is not known.
    """
    machine = load_machine(case.machine)
    facts = {
        "axes": list(case.plan.axes.items()),
        "plan": case.plan.model_dump(mode="json", exclude=_PLAN_LABELS),
        "flags": split_flags(case.plan.flags, machine.family)[0],
        "target": _target_facts(machine),
        "versions": _without(versions_here or versions(machine.family), _RUNNERS),
        "sources": [source_digest(), digest_of(sources)],
        **(_step_facts(case) if isinstance(case, StepCase) else _model_facts(case)),
    }
    return _hash(facts)


def target_key(machine: Machine, flags: Sequence[str], versions_here: Mapping[str, str]) -> str:
    """What decides the program beside what is lowered: target, flags that are passed, compiler versions."""
    compilers = compiler_versions(versions_here)
    return _hash({"target": _target_facts(machine), "flags": list(flags), "versions": compilers})


def lowered_key(target: str, device_ids: Sequence[int], text: str) -> str:
    """sha256 (hex) of a lowered program, given its target's key.

    text: StableHLO with debug information. The names of operations and arguments count, since layers and
    phases are read from them; files, lines and Python's frames do not.
    """
    digest = hashlib.sha256(json.dumps([target, list(device_ids)]).encode())
    names: dict[str, str] = {}
    for line in text.splitlines():
        if found := _LOCATION.match(line):
            names[found[1]] = "" if found["column"] else found["name"] or ""
    for line in text.splitlines():
        if not line.startswith("#loc"):
            named = _REFERENCE.sub(lambda at: f"loc({json.dumps(names.get(at[1], ''))})", line)
            digest.update(named.encode() + b"\n")
    return digest.hexdigest()


def relabelled(program: Program, case: AnyCase, versions_here: Mapping[str, str] | None = None) -> Program:
    """A kept program as that of another case with the same key, whose labels it takes; not compiled now."""
    family = load_machine(case.machine).family
    passed, withheld = split_flags(case.plan.flags, family)
    rejected = tuple(one for one in program.flags.rejected if one[0] in passed)
    flags = Flags(
        requested=case.plan.flags, effective=program.flags.effective, rejected=(*withheld, *rejected)
    )
    known = dict(versions_here or versions(family))
    name = program.name if isinstance(case, StepCase) else program_name(case)
    return replace(program, name=name, flags=flags, versions=known, compile_s=None)


def program_name(case: AnyCase) -> str:
    """What a case's program is called; each of a step function's own has the name that it was given."""
    return f"{case.plan.name} {case.subject}"


def _model_facts(case: Case) -> dict[str, Any]:
    return {
        "model": asdict(case.model),
        "workload": [case.workload, case.batch, case.seq, case.scan_layers],
    }


def _step_facts(case: StepCase) -> dict[str, Any]:
    return {
        "step": case.step,
        "step_sources": sources_digest(case.step, case.folder),
        "installed": installed_digest(),
        "workload": [case.workload, case.model, case.batch, case.seq],
    }


def _target_facts(machine: Machine) -> dict[str, Any]:
    facts: dict[str, Any] = {"family": machine.family, "devices": machine.num_devices}
    if machine.family in ("gpu", "tpu"):
        facts["compile_as"] = machine.chip.compile_as
    if machine.family == "gpu" and machine.chip.compile_as is not None:
        facts["described_as"] = asdict(load_gpu_target(machine.chip.compile_as))
    if machine.family == "tpu":
        facts["topology"] = [machine.torus, machine.slices]
    return facts


def _without(found: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    return {package: version for package, version in found.items() if package not in names}


def _hash(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
