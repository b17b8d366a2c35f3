"""Record which programs a JAX trainer runs and how often, with no change to it. One file, nothing but Python.

    shardlab record -- python train.py …              # where shardlab is installed
    python record.py --out recorded -- python train.py …   # elsewhere; then: shardlab analyze recorded

Works with JAX from 0.4.26 on and Python from 3.9 on, in the trainer's own environment: the command gets a
`sitecustomize`, a copy of this file, by PYTHONPATH. When JAX is imported, the object through which it runs
every compiled program is replaced by one that counts. JAX's fast paths, which would run programs past Python,
ask whether they see that object, and are told no: so no call is missed, and each takes about 0.2 ms more.

A process writes `recording-HOST-PID.json` (the schema is in `shardlab/recording.py`) and the HLO of each
program on several devices, named after its content. Counts are on disk within a second, so that a process
that is killed leaves them; what goes wrong in here is written there too, and never reaches the trainer.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

VARIABLE = "SHARDLAB_RECORD"  # the folder to write to
SCHEMA = "shardlab.recording/1"
RUNNER = "jax._src.interpreters.pxla"  # where JAX runs compiled programs, in `ExecuteReplicated`
WRITE_EVERY_S = 1.0
_COUNT = re.compile(r"\b(num_partitions|replica_count)=(\d+)")
_ELIDED = re.compile(r"= [a-z][a-z0-9]*\[([0-9,]*)\]\S* constant\(\{\.\.\.\}\)")
MAX_TABLE_ENTRIES = 1000000
_NAME = re.compile(r"HloModule ([^\s,]+)")
_MEMORY = {
    "argument_bytes": "argument_size_in_bytes",
    "output_bytes": "output_size_in_bytes",
    "alias_bytes": "alias_size_in_bytes",
    "temp_bytes": "temp_size_in_bytes",
    "code_bytes": "generated_code_size_in_bytes",
    "peak_bytes": "peak_memory_in_bytes",
}


class Recorder:
    """What one process ran. Every method is called from whichever thread runs a program."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.facts: dict[str, Any] = {}
        self.written_s = 0.0
        self.start()

    def start(self) -> None:
        """Also in a forked process, which has run nothing yet."""
        self.lock = threading.Lock()
        self.programs: dict[
            str, dict[str, Any]
        ] = {}  # by the file with its HLO, what the manifest says of it
        self.small: dict[str, dict[str, Any]] = {}  # by name, of those on one device
        self.problems: list[str] = []
        self.path = self.folder / f"recording-{socket.gethostname()}-{os.getpid()}.json"

    def describe(self, executable: Any) -> dict[str, Any]:
        """The entry whose `runs` an executable counts in."""
        text = text_of(executable.hlo_modules())
        head = text.partition("\n")[0]
        devices = 1
        for _, count in _COUNT.findall(head):
            devices *= int(count)
        name = (_NAME.match(head) or ["", "program"])[1]
        if devices == 1:
            return self.small.setdefault(name, {"name": name, "runs": 0})
        file = f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.hlo"
        if file not in self.programs:
            write(self.folder / file, text.encode())
            self.programs[file] = {
                "name": name,
                "file": file,
                "runs": 0,
                "num_devices": devices,
                "mesh": None,
                "memory": memory_of(executable),
            }
        return self.programs[file]

    def entry_of(self, executable: Any) -> dict[str, Any] | None:
        """`describe`, once for each executable; None when it cannot be described."""
        try:
            with self.lock:
                return self.describe(executable)
        except Exception as error:
            self.fail(f"a program could not be described: {type(error).__name__}: {error}")
            return None

    def ran(self, entry: dict[str, Any], executable: Any, arrays: tuple[Any, ...]) -> None:
        """One more run. arrays: what went in and came out, for the mesh."""
        try:
            with self.lock:
                entry["runs"] += 1
                if "mesh" in entry and entry["mesh"] is None:
                    entry["mesh"] = mesh_of(arrays, entry["num_devices"], executable)
                if time.monotonic() - self.written_s > WRITE_EVERY_S:
                    self.save(finished=False)
        except Exception as error:
            self.fail(f"a run could not be counted: {type(error).__name__}: {error}")

    def fail(self, what: str) -> None:
        """Say it in the manifest, once."""
        if what not in self.problems:
            self.problems.append(what)

    def save(self, finished: bool) -> None:
        """Write the manifest. A process that ran nothing writes none."""
        self.written_s = time.monotonic()
        if not (self.programs or self.small or self.problems):
            return
        if not self.facts:
            self.facts = facts()
        document = {
            "schema": SCHEMA,
            "finished": finished,
            **self.facts,
            "programs": list(self.programs.values()),
            "on_one_device": list(self.small.values()),
            "problems": self.problems,
        }
        write(self.path, json.dumps(document, indent=1).encode())

    def end(self) -> None:
        """At the end of the process."""
        try:
            with self.lock:
                self.save(finished=True)
        except Exception as error:
            sys.stderr.write(f"shardlab record: {error}\n")


def facts() -> dict[str, Any]:
    """What made the programs; JAX runs one, so its backend is there."""
    jax = sys.modules["jax"]
    device = jax.local_devices()[0]
    return {
        "pid": os.getpid(),
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
        "backend": device.platform,
        "device_kind": device.device_kind,
        "versions": {
            "jax": jax.__version__,
            "jaxlib": getattr(sys.modules.get("jaxlib"), "__version__", "unknown"),
            "python": ".".join(map(str, sys.version_info[:3])),
        },
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def text_of(modules: list[Any]) -> str:
    """HLO text; where branches are chosen, with the tables that may choose them, which XLA leaves out."""
    text = "\n\n".join(module.to_string() for module in modules)
    sizes = [dims.split(",") for dims in _ELIDED.findall(text)]
    entries = sum(functools.reduce(lambda size, dim: size * int(dim or 1), dims, 1) for dims in sizes)
    if " conditional(" not in text or not 0 < entries <= MAX_TABLE_ENTRIES:
        return text
    for place in ("jaxlib._hlo", "jaxlib._jax", "jaxlib.xla_extension"):
        options = getattr(sys.modules.get(place), "HloPrintOptions", None)
        if options is not None:
            whole = options()
            whole.print_large_constants = True
            return "\n\n".join(module.to_string(whole) for module in modules)
    return text


def memory_of(executable: Any) -> dict[str, int]:
    """The compiler's own memory analysis; what it does not say is absent."""
    try:
        stats = executable.get_compiled_memory_stats()
    except Exception:  # each jaxlib raises its own class; memory is then unknown, and the trainer goes on
        return {}
    found = {name: getattr(stats, member, None) for name, member in _MEMORY.items()}
    if not found["argument_bytes"] and not found["output_bytes"]:
        return {}  # this backend does not say
    found["peak_bytes"] = found["peak_bytes"] or None
    return {name: size for name, size in found.items() if size is not None}


def mesh_of(arrays: tuple[Any, ...], num_devices: int, executable: Any) -> dict[str, Any] | None:
    """The mesh of the first array that lies on as many devices; None where no array says."""
    for array in arrays:
        mesh: Any = getattr(getattr(array, "sharding", None), "mesh", None)
        devices = getattr(mesh, "devices", None)
        if devices is None or devices.size != num_devices:
            continue
        ids = [device.id for device in devices.flat]
        local = [device.id for device in executable.local_devices()]
        if [one for one in ids if one in set(local)] != local:
            continue  # the program numbers its devices otherwise than this mesh does
        named = zip(mesh.axis_names, devices.shape)  # noqa: B905  # Python 3.9 has no `strict`
        axes = {str(name): int(size) for name, size in named}
        return {"axes": axes, "device_ids": ids}
    return None


def write(path: Path, data: bytes) -> None:
    """A reader never sees half a file."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    temporary.write_bytes(data)
    temporary.replace(path)


def count_runs(runner: Any, recorder: Recorder) -> None:
    """Put a counting class in the place of the one that runs programs."""
    original: Any = getattr(runner, "ExecuteReplicated", None)
    if original is None:
        recorder.fail("this JAX runs programs in a way that is not known; use XLA_FLAGS=--xla_dump_to=DIR")
        return

    class Counting(original):  # type: ignore[misc]
        """Runs a program, and counts it."""

        def __call__(self, *args: Any) -> Any:
            if not hasattr(self, "_shardlab_entry"):
                self._shardlab_entry = recorder.entry_of(self.xla_executable)
            results = original.__call__(self, *args)
            if self._shardlab_entry is not None:
                recorder.ran(self._shardlab_entry, self.xla_executable, (*args, *results))
            return results

    class ExecuteReplicated:
        """What JAX makes and asks for by the original's name: it gets a `Counting`, which is no instance of
        this class, and so takes no fast path."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return Counting(*args, **kwargs)

    runner.ExecuteReplicated = ExecuteReplicated


class Finder:
    """Finds the runner as everybody else does, and changes it as soon as it is imported."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Of the meta path protocol."""
        if name != RUNNER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                count_runs(module, self.recorder)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install(folder: str) -> None:
    """Record what this process runs. JAX must not be imported yet."""
    recorder = Recorder(folder)
    sys.meta_path.insert(0, Finder(recorder))
    atexit.register(recorder.end)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=recorder.start)


def run_shadowed(own_folder: Path) -> None:
    """The user's own sitecustomize, if they have one, which ours stands before."""
    places = [place for place in sys.path if Path(place).resolve() != own_folder]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", places)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


def run(command: list[str], folder: str, stdout: Any = None) -> int:
    """Run a command and record the Python processes that it starts; returns its exit status. Raises OSError
    when it cannot be started."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="shardlab-record-") as own:
        shutil.copyfile(__file__, Path(own) / "sitecustomize.py")
        paths = [own, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            VARIABLE: str(Path(folder).resolve()),
            "PYTHONPATH": os.pathsep.join(paths),
        }
        return subprocess.call(command, env=environment, stdout=stdout)


def main(argv: list[str] | None = None) -> int:
    """`python record.py [--out DIR] -- COMMAND`"""
    parser = argparse.ArgumentParser(prog="record.py", description="Record the programs that a trainer runs.")
    parser.add_argument("--out", default="recorded", metavar="DIR", help="folder to write to")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="after --")
    args = parser.parse_args(argv)
    status = run(args.command, args.out)
    print(f"recorded in {args.out}; read it with: shardlab analyze {args.out}", file=sys.stderr)
    return status


if __name__ == "sitecustomize":
    if os.environ.get(VARIABLE):
        install(os.environ[VARIABLE])
    run_shadowed(Path(__file__).resolve().parent)
elif __name__ == "__main__":
    sys.exit(main())
