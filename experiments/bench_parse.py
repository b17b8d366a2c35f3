"""How fast `shardlab.analyze` reads HLO text, against XLA's own C++ text parser: ratios within one run.

Times are processor seconds: other work on the machine does not count.

python experiments/bench_parse.py --megabytes=10 --largest=200 --dump=some_70b.hlo

Two texts, both compiled here for eight emulated CPU devices: a training step of Llama 3 8B with its layers
unrolled, and the densest that we know, a toy of matrices so small that every 2 kB of text hold a collective,
whose computations are cloned, and all called, until it is as large as asked. XLA's parser runs in a child
process, since it may abort; it does not read GPU or TPU text of its own release, so that `--dump` compares
MB/s with what XLA reaches on the CPU text.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from absl import app, flags

MEGABYTES = flags.DEFINE_float("megabytes", 10.0, "Size of the text that both parsers read.", lower_bound=0.1)
LARGEST = flags.DEFINE_float("largest", 0.0, "Also read a text of this many MB (0: four times --megabytes).")
LAYERS = flags.DEFINE_integer("layers", 12, "Layers of the model that is compiled.", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 5, "Readings of each text; the fastest counts.", lower_bound=1)
MODEL_LAYERS = flags.DEFINE_integer("model_layers", 32, "Layers of the compiled Llama.", lower_bound=1)
DUMPS = flags.DEFINE_multi_string("dump", [], "HLO text of a GPU or TPU, to be read as well.")
DEVICES = flags.DEFINE_integer("devices", 9000, "Devices of the module with listed groups.", lower_bound=2)

_COMPILE = """
import sys, jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
layers = int(sys.argv[1])
def loss(weights, x_BxD):
    for up_DxF, down_FxD in weights:
        x_BxD = x_BxD + jnp.tanh(x_BxD @ up_DxF) @ down_FxD
    return jnp.sum(x_BxD * x_BxD)
def put(shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))
weights = [(put((64, 256), "data", "model"), put((256, 64), "model", "data"))] * layers
print(jax.jit(jax.grad(loss)).lower(weights, put((16, 64), "data")).compile().as_text())
"""
_XLA = """
import sys, time
from jaxlib import _hlo
text = open(sys.argv[1]).read()
best = float("inf")
for _ in range(int(sys.argv[2])):
    start = time.process_time()
    _hlo.hlo_module_from_text(text)
    best = min(best, time.process_time() - start)
print(best)
"""
_MEMORY = """
import json, sys, tracemalloc
import shardlab
tracemalloc.start()
text = open(sys.argv[1]).read()
shardlab.analyze(text, json.loads(sys.argv[2]))
print(tracemalloc.get_traced_memory()[1])
"""
_HEAD = re.compile(r"^(?:ENTRY )?%([\w.\-]+) \(.*\) -> .* \{$", re.MULTILINE)
_NAME = re.compile(r"%([\w.\-]+)")
_PARAMETER = re.compile(r"= (\S+) parameter\(([0-9]+)\)")
_MESH = {"data": 2, "model": 4}


def child(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints for `code`. Raises RuntimeError with its errors when it fails."""
    host = {"JAX_PLATFORMS": "cpu"}
    host["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **host, "PYTHONPATH": path}
    )
    if done.returncode:
        raise RuntimeError(f"a child process failed ({done.returncode}): {done.stderr[-500:]}")
    return done.stdout


def cloned(text: str, size: float) -> str:
    """`text` with its computations cloned until it has `size` characters; a new ENTRY calls every clone."""
    heads = list(_HEAD.finditer(text))
    names = {head.group(1) for head in heads}
    entry = next(head for head in heads if head.group().startswith("ENTRY"))
    first, body = text[: heads[0].start()], text[heads[0].start() :].rstrip().replace("\nENTRY ", "\n")

    def clone(number: int) -> str:
        return _NAME.sub(lambda m: f"{m.group()}.c{number}" if m.group(1) in names else m.group(), body)

    copies = max(1, round((size - len(first)) / len(clone(100))))
    return (
        first + "\n\n".join([*map(clone, range(copies)), _entry(entry, text[entry.end() :], copies)]) + "\n"
    )


def _entry(head: re.Match[str], body: str, copies: int) -> str:
    """An entry computation with the signature of `head` that calls each of its clones; body: what follows."""
    signature = head.group().removeprefix(f"ENTRY %{head.group(1)} ").removesuffix(" {")
    result = signature.split(" -> ", 1)[1]
    shapes = _PARAMETER.findall(body)
    lines = [f"  %in.{number} = {shape} parameter({number})" for shape, number in shapes]
    operands = ", ".join(f"%in.{number}" for number in range(len(shapes)))
    for number in range(copies):
        root = "ROOT " if number == copies - 1 else ""
        called = f"{head.group(1)}.c{number}"
        lines.append(f"  {root}%call.{number} = {result} call({operands}), to_apply=%{called}")
    return "\n".join([f"ENTRY %all {signature} {{", *lines, "}"])


def listed_groups(devices: int, count: int = 20) -> str:
    """A module whose `count` all-reduces list all groups of `devices` devices, two by two."""
    half = devices // 2
    groups = ",".join(f"{{{i},{i + half}}}" for i in range(half))
    rest = f"replica_groups={{{groups}}}, use_global_device_ids=true, to_apply=%add"
    rows = [f"  %ar.{i} = f32[64]{{0}} all-reduce(%p), channel_id={i + 1}, {rest}" for i in range(count)]
    add = ["%add (a: f32[], b: f32[]) -> f32[] {", "  %a = f32[] parameter(0)", "  %b = f32[] parameter(1)"]
    add += ["  ROOT %s = f32[] add(%a, %b)", "}", ""]
    main = ["ENTRY %main (p: f32[64]) -> f32[64] {", "  %p = f32[64]{0} parameter(0)", *rows]
    main += ["  ROOT %r = f32[64]{0} copy(%ar.0)", "}", ""]
    header = f"HloModule listed, is_scheduled=true, num_partitions={2 * half}"
    return "\n".join([header, "", *add, *main])


def best(run: Callable[[], object], repeats: int) -> float:
    """Processor seconds, of this process and its children, of the fastest of `repeats` runs."""
    seconds = []
    for _ in range(repeats):
        start = _processor_seconds()
        run()
        seconds.append(_processor_seconds() - start)
    return max(min(seconds), 1e-6)  # what is too short for the clock is not nothing


def _processor_seconds() -> float:
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def analyze_seconds(text: str, mesh: Mapping[str, int] | None, repeats: int) -> float:
    """Seconds that `shardlab.analyze` takes for `text`. Raises RuntimeError when it finds no collective."""
    import shardlab

    if not shardlab.analyze(text, mesh).collectives:
        raise RuntimeError("no collective was found: the benchmark would measure nothing")
    return best(lambda: shardlab.analyze(text, mesh), repeats)


def llama_text(layers: int) -> tuple[str, dict[str, int]]:
    """A compiled training step of Llama 3 8B with `layers` unrolled layers, and its mesh."""
    from shardlab.compile.launch import compile_case
    from shardlab.spec.case import make_case
    from shardlab.spec.models import MODELS
    from shardlab.spec.plan import load_plan

    plan = load_plan(Path(__file__).parents[1] / "meshes" / "cpu8-data2-fsdp2-tensor2.toml")
    model = replace(MODELS["llama3-8b"], layers=layers)
    case = make_case(plan, model, "cpu:8", batch=8, seq=2048, scan_layers=False)
    return compile_case(case).hlo_text, dict(plan.axes)


def against_xla(what: str, path: Path, text: str, mesh: Mapping[str, int], repeats: int) -> float:
    """Both parsers on one text; the memory that ours takes. Returns our seconds."""
    path.write_text(text)
    xla = float(child(_XLA, str(path), str(repeats)))
    _report(f"{what}: XLA hlo_module_from_text", text, xla)
    once = analyze_seconds(text, mesh, repeats)
    _report(f"{what}: shardlab.analyze", text, once, f"{once / xla:.2f} of XLA's time")
    memory = int(child(_MEMORY, str(path), json.dumps(mesh)))
    times = memory / len(text)
    print(f"{what + ': peak memory':<42} {memory / 1e6:8.1f} MB: {times:.2f} of the text, itself included")
    return once


def _report(what: str, text: str, seconds: float, note: str = "") -> None:
    megabytes = len(text) / 1e6
    print(
        f"{what:<42} {megabytes:8.1f} MB {seconds:8.3f} s {megabytes / seconds:8.1f} MB/s  {note}", flush=True
    )


def process_seconds(path: Path, repeats: int) -> float:
    """Seconds of a whole `shardlab analyze PATH`, process start included."""
    root = str(Path(__file__).parents[1])
    command = [sys.executable, "-m", "shardlab", "analyze", str(path), "--axes", "data=2,model=4"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    return best(lambda: subprocess.run(command, check=True, capture_output=True, env=environment), repeats)


def bench(folder: Path) -> None:
    """Measure and print everything."""
    base = child(_COMPILE, str(LAYERS.value))
    size, repeats = MEGABYTES.value * 1e6, REPEATS.value
    path = folder / "model.hlo"
    against_xla("unrolled Llama", path, *llama_text(MODEL_LAYERS.value), repeats)
    text = cloned(base, size)
    once = against_xla("dense", path, text, _MESH, repeats)
    for dump in DUMPS.value:
        other = Path(dump).read_text(encoding="utf-8")
        _report(Path(dump).name, other, analyze_seconds(other, None, repeats))
    for factor in sorted({2.0, 4.0, LARGEST.value / MEGABYTES.value} - {0.0}):
        larger = cloned(base, factor * size)
        seconds = analyze_seconds(larger, _MESH, 1 if factor > 4 else repeats)
        per_byte = seconds / len(larger) / (once / len(text))
        _report(
            f"dense, {factor:g} times: shardlab.analyze",
            larger,
            seconds,
            f"{per_byte:.2f} of the time per byte",
        )
    groups = listed_groups(DEVICES.value)
    _report(
        f"{DEVICES.value} devices in listed groups",
        groups,
        analyze_seconds(groups, {"all": DEVICES.value}, repeats),
    )
    path.write_text(small := cloned(base, 1e6))
    _report("shardlab analyze, whole process", small, process_seconds(path, repeats))


def main(argv: Sequence[str]) -> None:
    """Run the benchmark in a temporary folder."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    with tempfile.TemporaryDirectory() as folder:
        bench(Path(folder))


if __name__ == "__main__":
    app.run(main)
