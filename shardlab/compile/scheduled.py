"""A TPU program without its code: libtpu writes the scheduled module before it generates code, which is most
of a compile and changes nothing that is analysed. What does not fit has been refused by then; the compiler's
memory analysis is left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shardlab import program as programs
from shardlab.compile.request import TEMPLATE_FILE
from shardlab.program import Program

DUMP = "dump"
NOTE = "compiled as far as the schedule: without code there is no memory analysis"
# The second is begun when the first is whole.
_MODULE, _NEXT = "-TLP-hlo.txt", "-TLP-00-deduplication-map.txt"


def dump_flags(folder: Path) -> tuple[str, ...]:
    """What makes libtpu write its modules into the request's folder."""
    return (f"--xla_jf_dump_to={folder / DUMP}", "--xla_jf_dump_hlo_text=true")


def is_scheduled(folder: Path) -> bool:
    """Whether the module has been written."""
    return _module(folder) is not None


def scheduled_program(folder: Path, compile_s: float) -> Program | None:
    """The program of a request that was stopped; None where it did not come so far."""
    module, template = _module(folder), folder / TEMPLATE_FILE
    if module is None or not template.exists():
        return None
    begun = programs.load(template)
    text = module.read_text(encoding="utf-8")
    return replace(begun, hlo_text=text, compile_s=compile_s, notes=(*begun.notes, NOTE))


def _module(folder: Path) -> Path | None:
    """The largest module: small ones may be compiled on the way."""
    found = [
        path
        for path in (folder / DUMP).glob("*" + _MODULE)
        if path.with_name(path.name.removesuffix(_MODULE) + _NEXT).exists()
    ]
    return max(found, key=lambda path: path.stat().st_size, default=None)
