"""From what jax compiled to a Program. Runs where jax is: in the compile child, or in the user's process."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from shardlab.compile.logs import refusal
from shardlab.compile.tables import text_of
from shardlab.compile.tpu import device_index
from shardlab.compile.versions import versions
from shardlab.errors import CompileFailed
from shardlab.program import Argument, Memory, Program

_LOWERING_PLATFORMS = {"gpu": "cuda"}
MOVED_LINES_NOTE = (
    "the sources changed and lower to the same program, which was not compiled again: source lines are those "
    "of when it was"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """A Program and jax's own compiled object, None where the compiler refused or had nothing to do. unsplit:
    axes of the mesh that the program's shardings never name, as far as that was looked at."""

    program: Program
    executable: Any | None
    unsplit: frozenset[str] = frozenset()


def compile_lowered(
    lower: Callable[[], Any],
    template: Program,
    compiler_options: Mapping[str, str] | None = None,
    kept: Callable[[str], Program | None] | None = None,
    before: Callable[[Program], None] | None = None,
) -> Compiled:
    """Lower and compile; fill in what `template` does not know yet: text, memory, seconds, or the refusal.

    kept: the program compiled before from StableHLO (text with debug information), if there is one; it is
    not compiled again. before: gets the template when it is. Raises CompileFailed when the compiler gives up
    for another reason than memory.
    """
    started = time.monotonic()
    try:
        lowered = lower()
        found = kept(lowered.as_text(debug_info=True)) if kept is not None else None
        if found is not None:
            return Compiled(program=_as_compiled_before(template, found), executable=None)
        if before is not None:
            before(template)
        executable = lowered.compile(dict(compiler_options) if compiler_options else None)
    except jax.errors.JaxRuntimeError as error:
        refused = refusal(str(error))
        if refused is None:
            raise CompileFailed(template.name, str(error)) from error
        elapsed_s = time.monotonic() - started
        return Compiled(program=replace(template, refusal=refused, compile_s=elapsed_s), executable=None)
    elapsed_s = time.monotonic() - started
    program = replace(
        template,
        hlo_text=text_of(executable),
        memory=memory_of(executable),
        compile_s=elapsed_s,
        arguments=arguments_of(executable),
    )
    return Compiled(program=program, executable=executable)


def _as_compiled_before(template: Program, found: Program) -> Program:
    """What was compiled from the same lowered program; its sources may have other lines by now."""
    return replace(
        template,
        hlo_text=found.hlo_text,
        memory=found.memory,
        arguments=found.arguments,
        warnings=found.warnings,
        notes=(*template.notes, MOVED_LINES_NOTE),
    )


def memory_of(executable: Any) -> Memory | None:
    """The compiler's memory analysis, bytes per device; None where the backend has none.

    A peak of 0 means that the backend does not say.
    """
    stats = executable.memory_analysis()
    if stats is None:
        return None
    return Memory(
        argument_bytes=stats.argument_size_in_bytes,
        output_bytes=stats.output_size_in_bytes,
        alias_bytes=stats.alias_size_in_bytes,
        temp_bytes=stats.temp_size_in_bytes,
        code_bytes=stats.generated_code_size_in_bytes,
        peak_bytes=stats.peak_memory_in_bytes or None,
        host_bytes=(
            stats.host_argument_size_in_bytes
            + stats.host_output_size_in_bytes
            - stats.host_alias_size_in_bytes
            + stats.host_temp_size_in_bytes
        ),
    )


def arguments_of(executable: Any) -> tuple[Argument, ...] | None:
    """The arguments in device memory and how the mesh splits them; None where an argument has no mesh."""
    shardings = jax.tree.leaves(executable.input_shardings, is_leaf=lambda leaf: leaf is None)
    described = jax.tree_util.tree_flatten_with_path(executable.args_info)[0]
    if len(shardings) != len(described):
        return None
    found = []
    for (path, info), sharding in zip(described, shardings, strict=True):
        if sharding is None:  # the program does not use it, and jax leaves it out
            continue
        if not isinstance(sharding, NamedSharding):
            return None
        if sharding.memory_kind != "pinned_host":
            found.append(_argument(f"arguments{jax.tree_util.keystr(path[1:])}", info, sharding))
    return tuple(found)


def _argument(path: str, info: Any, sharding: NamedSharding) -> Argument:
    names = [entry if isinstance(entry, tuple) else (entry,) for entry in sharding.spec if entry]
    item_bytes = int(info.dtype.itemsize)
    return Argument(
        path=path,
        dtype=str(info.dtype),
        shape=tuple(info.shape),
        total_bytes=math.prod(info.shape) * item_bytes,
        split_over=tuple(str(axis) for entry in names for axis in entry),
        device_bytes=math.prod(sharding.shard_shape(tuple(info.shape))) * item_bytes,
    )


def serialized_modules(executable: Any) -> bytes:
    """The optimised module as a serialised HloModuleProto. Raises CompileFailed when there is more than
    one.
    """
    modules = executable.runtime_executable().hlo_modules()
    if len(modules) != 1:
        raise CompileFailed("proto", f"the program has {len(modules)} modules, a proto file holds one")
    return bytes(modules[0].as_serialized_hlo_module_proto())


def compile_step(
    fn: Any,
    *abstract_args: Any,
    mesh: Mesh | None = None,
    name: str | None = None,
    compiler_options: Mapping[str, str] | None = None,
) -> Program:
    """Compile any jitted function in this process, for the devices of `mesh` (the arguments' mesh if None).

    abstract_args: arrays or jax.ShapeDtypeStruct, with shardings unless `fn` has its own. A function that is
    not jitted is. Raises CompileFailed. What the compiler prints goes to standard error, and is not in the
    Program.
    """
    jitted = fn if hasattr(fn, "trace") else jax.jit(fn)
    mesh = mesh if mesh is not None else _mesh_of(abstract_args)
    devices = list(mesh.devices.flat) if mesh is not None else jax.devices()[:1]
    family = str(devices[0].platform)
    platform = _LOWERING_PLATFORMS.get(family, family)
    template = Program(
        name=name or str(getattr(fn, "__name__", "step")),
        backend=family,
        hlo_text="",
        num_devices=len(devices),
        mesh=dict(mesh.shape) if mesh is not None else None,
        device_ids=_device_ids(devices),
        device_coords=_device_coords(devices),
        versions=versions(family),
        autotuned=_autotuned(family, devices[0]),
        notes=("compiler warnings were not collected",),
    )
    traced = jitted.trace(*abstract_args)
    return compile_lowered(
        lambda: traced.lower(lowering_platforms=(platform,)), template, compiler_options
    ).program


def _mesh_of(abstract_args: tuple[Any, ...]) -> Mesh | None:
    for leaf in jax.tree.leaves(abstract_args):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return sharding.mesh
    return None


def _device_ids(devices: list[Any]) -> tuple[int, ...]:
    slices = {getattr(device, "slice_index", None) for device in devices}
    return tuple(device_index(device, len(devices) // len(slices)) for device in devices)


def _device_coords(devices: list[Any]) -> tuple[tuple[int, ...], ...] | None:
    """Torus coordinates by device id; None when the mesh is a part of the machine, whose other ids have
    none.
    """
    ids = _device_ids(devices)
    if sorted(ids) != list(range(len(ids))) or not all(hasattr(device, "coords") for device in devices):
        return None
    by_id = dict(zip(ids, devices, strict=True))
    return tuple(tuple(by_id[i].coords) for i in range(len(ids)))


def _autotuned(family: str, device: Any) -> bool | None:
    """A GPU that is there is autotuned on; a compile-only one has no client that could run anything."""
    if family != "gpu":
        return None
    return device in jax.devices() if jax.default_backend() == "gpu" else False
