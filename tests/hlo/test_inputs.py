"""What may be handed over, and what is said about what may not."""

from __future__ import annotations

import gzip
import io
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hlo.described import GOLDEN, case_text

from shardlab import program
from shardlab.errors import ParseError, UserError
from shardlab.hlo import inputs
from shardlab.hlo.inputs import read_bytes, read_sources
from shardlab.program import Program

TEXT = case_text("c01_iota_plain").encode()
PROTO = (GOLDEN / "printed" / "permuted_mesh.hlo_module.pb").read_bytes()
DUMP_PROTO = (GOLDEN / "printed" / "module_0000.jit__lambda.cpu_after_optimizations.hlo.pb").read_bytes()


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


PACKS = {"gzip": lambda data: gzip.compress(data, mtime=0), "zstd": zstd}
FORMS = {
    "text": (TEXT, "jit_c01"),
    "text with a byte-order mark": (b"\xef\xbb\xbf" + TEXT, "jit_c01"),
    "gzip": (gzip.compress(TEXT, mtime=0), "jit_c01"),
    "two gzip members": (gzip.compress(TEXT[:99], mtime=0) + gzip.compress(TEXT[99:], mtime=0), "jit_c01"),
    "zstd": (zstd(TEXT), "jit_c01"),
    "gzip in zstd": (zstd(gzip.compress(TEXT, mtime=0)), "jit_c01"),
    "module proto": (PROTO, "jit__lambda"),
    "HloProto in gzip": (gzip.compress(DUMP_PROTO, mtime=0), "jit__lambda"),
}


@pytest.mark.parametrize("form", FORMS)
def test_formats_are_told_from_their_content(form: str, tmp_path: Path) -> None:
    data, name = FORMS[form]
    path = tmp_path / "no_telling_suffix"
    path.write_bytes(data)
    (source,) = read_sources(path)
    assert [module.name for module in source.modules] == [name]
    assert (source.name, source.program) == (str(path), None)


def test_saved_program_keeps_its_facts(tmp_path: Path) -> None:
    saved = Program(
        name="p", backend="gpu", hlo_text=TEXT.decode(), num_devices=8, mesh={"data": 2, "model": 4}
    )
    program.save(saved, tmp_path / "p.shardlab")
    (source,) = read_sources(tmp_path / "p.shardlab")
    assert source.program == saved
    assert source.modules[0].name == "jit_c01"


def test_refused_program_has_no_modules(tmp_path: Path) -> None:
    refused = Program(name="p", backend="tpu", hlo_text="", num_devices=8)
    (tmp_path / "p").write_bytes(program.to_bytes(refused))
    assert read_sources(tmp_path / "p")[0].modules == ()


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(gzip.compress(TEXT, mtime=0))))
    (source,) = read_sources("-")
    assert (source.name, source.modules[0].name) == ("<stdin>", "jit_c01")


def named(name: str) -> bytes:
    return TEXT.replace(b"jit_c01", name.encode())


def test_folder_gives_the_last_final_module_of_each_name(tmp_path: Path) -> None:
    files = {
        "module_0001.jit_a.before_optimizations.txt": b"broken",
        "module_0001.jit_a.cpu_after_optimizations.txt": named("first_a"),
        "module_0003.jit_a.cpu_after_optimizations.txt": named("last_a"),
        "module_0003.jit_a.cpu_after_optimizations.hlo.pb": b"not read: text is there",
        "module_0003.jit_a.cpu_after_optimizations-buffer-assignment.txt": b"broken",
        "module_0002.jit_b.sm_9.0a_gpu_after_optimizations.txt": named("b"),
        "module_0004.jit_c.d.cl_736.after_optimizations.txt": named("c"),
        "module_0010.jit_e.gpu_after_optimizations.hlo.pb.gz": gzip.compress(PROTO, mtime=0),
        "module_0011.after_optimizations.txt": named("long_1"),
        "module_0012.after_optimizations.txt": named("long_2"),
        "module_0003.jit_a.after_spmd_partitioner.txt": b"broken",
        "module_0009.jit_a.cpu_after_optimizations.txt.tmp": b"broken",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    names = [source.modules[0].name for source in read_sources(tmp_path)]
    assert names == ["b", "last_a", "c", "jit__lambda", "long_1", "long_2"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (gzip.compress(b"", mtime=0), "it is empty"),
        (bytes(range(256)) * 4, "binary, but no HLO proto"),
        (DUMP_PROTO[:500], "binary, but no HLO proto"),
        (gzip.compress(TEXT, mtime=0)[:-20], "gzip data is cut off"),
        (
            gzip.compress(TEXT, mtime=0)[:20] + b"xxxx" + gzip.compress(TEXT, mtime=0)[24:],
            "gzip data is damaged",
        ),
        (zstd(TEXT)[:20] + b"xxxx" + zstd(TEXT)[24:], "zstd data is damaged"),
        (b'{"schema": "shardlab.report/1"}', "not a saved program"),
        (b"{" * 100_000, "not a saved program"),
    ],
)
def test_what_cannot_be_read(data: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_bytes(data)
    with pytest.raises(UserError, match=words) as caught:
        read_sources(path)
    assert caught.value.problems[0].where == str(path)
    assert caught.value.problems[0].fix


def test_broken_text_points_into_the_file(tmp_path: Path) -> None:
    (tmp_path / "cut.hlo").write_bytes(TEXT[:-20])
    with pytest.raises(ParseError) as caught:
        read_sources(tmp_path / "cut.hlo")
    assert str(caught.value).startswith(f"{tmp_path / 'cut.hlo'}:11:")


@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
def test_compressed_data_is_refused_wherever_it_is_cut(pack: Callable[[bytes], bytes]) -> None:
    """Even where the text that was cut off is only the line end after the last brace."""
    packed = pack(TEXT[:-9]) + pack(TEXT[-9:])
    assert read_bytes(packed).modules
    joint = len(pack(TEXT[:-9]))  # the first part alone is whole as compressed data, and its text is cut
    for cut in range(4, len(packed)):
        with pytest.raises(ParseError if cut == joint else UserError):
            read_bytes(packed[:cut])


@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
def test_many_small_members_take_time_in_proportion(pack: Callable[[bytes], bytes]) -> None:
    """Eight times as many; copying the rest for each of them would take sixty-four times as long."""
    empty, text = pack(b""), pack(TEXT)

    def seconds(count: int) -> float:
        data = empty * count + text
        start = time.process_time()
        assert read_bytes(data).modules
        return time.process_time() - start

    few = min(seconds(8_000) for _ in range(3))
    assert min(seconds(64_000) for _ in range(3)) < 24 * few


def test_frames_that_zstd_readers_skip_are_skipped() -> None:
    skippable = b"\x50\x2a\x4d\x18\x05\x00\x00\x00hello"
    data = zstd(TEXT[:99]) + skippable + zstd(TEXT[99:]) + skippable
    assert read_bytes(data).modules == read_bytes(TEXT).modules


def test_missing_file_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_sources(tmp_path / "nothing")
    with pytest.raises(UserError, match="no file in this folder"):
        read_sources(tmp_path)


@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
def test_bombs_are_refused(pack: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MAX_INPUT_BYTES", 1 << 20)
    assert read_bytes(pack(TEXT)).modules
    with pytest.raises(UserError, match="holds more than"):
        read_bytes(pack(TEXT + b"\n" * (8 << 20)))
    with pytest.raises(UserError, match="holds more than"):
        read_bytes(TEXT + b"\n" * (2 << 20))


@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
def test_a_bomb_of_bombs_takes_little_memory(
    pack: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """256 MiB of line ends in two layers: what is refused is never held whole."""
    monkeypatch.setattr(inputs, "MAX_INPUT_BYTES", 1 << 20)
    bomb = pack(pack(b"\n" * (256 << 20)))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="holds more than"):
            read_bytes(bomb)
        assert tracemalloc.get_traced_memory()[1] < 80 << 20
    finally:
        tracemalloc.stop()
