"""The command line as tests run it: small inputs, exit codes, and the lines that a mistake prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardlab.cli import main

PLAN = """\
description = "FSDP over two emulated devices"
on = "cpu:2"
[axes]
fsdp = 2
[params]
embed = ["fsdp"]
[activations]
batch = ["fsdp"]
"""
# One all-reduce of 4 f32 over both devices: 2 · (2-1)/2 · 16 bytes = 16 on the wire.
HLO = """\
HloModule m, num_partitions=2

add {
  a = f32[] parameter(0)
  b = f32[] parameter(1)
  ROOT c = f32[] add(a, b)
}

ENTRY main {
  p = f32[4]{0} parameter(0)
  ROOT r = f32[4]{0} all-reduce(p), channel_id=1,
    replica_groups={{0,1}}, use_global_device_ids=true, to_apply=add
}
"""
OPAQUE = HLO.replace(
    "ROOT r", 'k = f32[4]{0} custom-call(p), custom_call_target="nvshmem_put"\n  ROOT r'
).replace("all-reduce(p)", "all-reduce(k)")


def written(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def run(*argv: str) -> int:
    try:
        return main(argv)
    except SystemExit as error:  # argparse
        assert isinstance(error.code, int)
        return error.code


def mistakes(capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    """The lines on standard error of a command that must exit 2 and print nothing else."""
    assert run(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err.splitlines()
