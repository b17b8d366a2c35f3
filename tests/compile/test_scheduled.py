"""TPU programs without their code: the schedule as libtpu writes it down, and what waits for it."""

from dataclasses import replace
from pathlib import Path

import pytest
from compile.cases import tiny_case

from shardlab.analysis import analyze
from shardlab.compile import compile_case
from shardlab.compile.request import TEMPLATE_FILE
from shardlab.compile.scheduled import DUMP, is_scheduled, scheduled_program
from shardlab.program import Program, save

BEGUN = Program(name="step", backend="tpu", hlo_text="", num_devices=8, mesh={"data": 8}, notes=("n",))
FILES = {  # of two modules, the first of which is whole
    "1-TLP-hlo.txt": "HloModule small",
    "1-TLP-00-deduplication-map.txt": "",
    "2-TLP-hlo.txt": "HloModule step, is_scheduled=true",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / DUMP).mkdir()
    for name, text in FILES.items():
        (tmp_path / DUMP / name).write_text(text)
    save(BEGUN, tmp_path / TEMPLATE_FILE)
    return tmp_path


def test_a_module_is_taken_when_it_is_whole(folder: Path) -> None:
    first = scheduled_program(folder, 1.0)
    assert first is not None and first.hlo_text == FILES["1-TLP-hlo.txt"]
    (folder / DUMP / "2-TLP-00-deduplication-map.txt").touch()
    found = scheduled_program(folder, 3.0)
    assert found is not None and found.notes[:1] == ("n",) and "no memory analysis" in found.notes[1]
    assert replace(found, notes=("n",)) == replace(BEGUN, hlo_text=FILES["2-TLP-hlo.txt"], compile_s=3.0)


def test_what_did_not_come_so_far_is_no_program(tmp_path: Path, folder: Path) -> None:
    (folder / TEMPLATE_FILE).unlink()
    assert is_scheduled(folder) and scheduled_program(folder, 1.0) is None
    assert not is_scheduled(tmp_path / "elsewhere")


@pytest.mark.full
@pytest.mark.tpu
def test_the_schedule_is_that_of_the_whole_compile() -> None:
    case = tiny_case("v5e:2x4", workload="train", batch=8)
    scheduled, whole = (compile_case(case, scheduled_only=only) for only in (True, False))
    assert (scheduled.memory, scheduled.compile_s or (whole.compile_s or 0) > 0) == (None, True)
    assert scheduled.device_coords == whole.device_coords
    one, other = (analyze(program) for program in (scheduled, whole))
    assert one.collectives == other.collectives and one.ledger == other.ledger
