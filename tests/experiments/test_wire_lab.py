"""The wire lab: what it says without privileges, and (marked `wire`) real processes over real links."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import pytest
import sites
import wire_control
from sites import HEADER_BYTES, Sites, check_privileges, remove_leftovers
from wire_control import QUIET_SHARE, STEADY, Beside, CoreControl, first_quiet
from wire_cores import StepRates, rates_of, work_of
from wire_lab import Predicted, machine_file, middle, row_of
from wire_measure import Measured, payload, read_measured
from wire_plans import PLANS
from wire_plot import Point, write_plot
from wire_stream import stream
from wire_table import Row, read_csv, write_csv

from shardlab.errors import UserError
from shardlab.hardware.catalog import load_machine
from shardlab.spec.case import make_case
from shardlab.spec.plan import load_plan, plan_from_text

ROOT = Path(__file__).parents[2]
LAB = ROOT / "experiments" / "lab.toml"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "experiments")))}


def test_says_everything_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool in ("ip", "tc") else f"/usr/bin/{tool}")
    with pytest.raises(UserError) as caught:
        check_privileges()
    assert str(caught.value).splitlines() == [
        "wire lab: not root; run it with sudo, or as root in a container",
        "wire lab: no 'ip' here; apt-get install iproute2",
        "wire lab: no 'tc' here; apt-get install iproute2",
    ]


def test_says_when_namespaces_do_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda tool: f"/usr/bin/{tool}")

    def refuse(*command: str, check: bool = True) -> None:
        raise UserError(sites.Problem(" ".join(command), "Operation not permitted", ""))

    monkeypatch.setattr(sites, "_run", refuse)
    with pytest.raises(UserError, match=r"namespaces do not work: Operation not permitted; .*CAP_SYS_ADMIN"):
        check_privileges()


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_can_be_put_on_every_network(plan: str, devices: int, tmp_path: Path) -> None:
    path, made = tmp_path / "plan.toml", PLANS[plan]
    path.write_text(made.text(devices))
    case = make_case(load_plan(path), made.model, f"{LAB}:2x{devices // 2}", made.batch, made.seq)
    assert case.load_machine().num_devices == devices


def test_counters_become_bytes_per_step() -> None:
    """Two steps that count, of 1,000 and 3,000 bytes in frames with 66 bytes of headers."""

    def reading(step: int, sent: int, packets: int, loss: float | None = 1.0) -> dict[str, object]:
        eth0 = [0, 0, sent + HEADER_BYTES * packets, packets]
        return {
            "step": step,
            "time_s": float(step),
            "cpu_s": 0.5 * step,
            "loss": loss,
            "eth0": eth0,
            "lo": [0, 0, 0, 0],
        }

    rows = [
        reading(0, 300, 5, None),
        reading(1, 700, 9),
        reading(2, 1700, 10),
        reading(3, 4700, 20),
    ]
    rows.append(reading(-2, 4800, 21, None) | {"time_s": 8.0})
    found = read_measured([rows], 1, 300)
    assert found.out_bytes == (2000,)
    assert (found.step_s, found.cpu_s) == (1.0, 0.5)
    assert found.startup_bytes == 300
    assert found.idle_bytes_per_s == 20
    assert payload(rows[1], rows[2], "eth0") == 1000


def test_a_profile_becomes_rates() -> None:
    """Two steps of 2 s. In their profile a bare product of 2 · 64³ FLOPs takes 1 and 3 s, a fused one of as
    many twice 1 s, a copy of 2 · 8,192 bytes 5 s each: 16 s for 4, so that each is taken as a quarter."""
    text = (
        "HloModule m, is_scheduled=true\n\nf {\n  p = bf16[64,64]{1,0} parameter(0)\n"
        "  ROOT d.2 = bf16[64,64]{1,0} dot(p, p), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n}\n\n"
        "ENTRY e {\n  x = bf16[64,64]{1,0} parameter(0)\n"
        "  d.1 = bf16[64,64]{1,0} dot(x, x), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n"
        "  f.1 = bf16[64,64]{1,0} fusion(d.1), kind=kOutput, calls=f\n"
        "  ROOT c.2 = bf16[64,64]{1,0} copy(f.1)\n}\n"
    )
    spent_s = {"d.1": [1.0, 3.0], "f.1": [1.0, 1.0], "c.2": [5.0, 5.0], "while.7": [9.0]}
    assert rates_of(work_of(text), spent_s, 2, 2.0) == StepRates(
        step_s=2.0,
        bf16_flops_per_s=2 * 64**3 / 0.25,
        dot_bf16_flops_per_s=2 * 64**3 / 0.5,
        memory_bytes_per_s=2 * 8_192 / 1.25,
    )


CORES = StepRates(step_s=0.1, bf16_flops_per_s=2e11, dot_bf16_flops_per_s=3e10, memory_bytes_per_s=4e10)


def test_a_machine_has_the_links_and_cores_of_a_row(tmp_path: Path) -> None:
    """Two sites share the cores; what is not given is as in `lab.toml`."""
    machine, known = (load_machine(f"{path}:2x1") for path in (machine_file(tmp_path, 50, CORES), LAB))
    assert (machine.chip.bf16_flops_per_s, machine.chip.dot_bf16_flops_per_s) == (1e11, 1.5e10)
    assert machine.chip.memory_bytes_per_s == 2e10
    assert machine.domains[-1].bytes_per_s == 6.25e6
    only_links = load_machine(f"{machine_file(tmp_path, 50)}:2x1")
    assert only_links.chip.memory_bytes_per_s == known.chip.memory_bytes_per_s


ROW = Row(
    plan="data", sites=2, devices_per_site=1, link_mbit_per_s=20.0, predicted_wire_bytes=10,
    measured_wire_bytes=11, predicted_step_s=None, measured_step_s=1.5, predicted_communication_s=None,
    predicted_turns_s=None, gloo_header_bytes=1, site_error=0.01, predicted_loopback_bytes=0,
    measured_loopback_bytes=0, frame_bytes=12, startup_bytes=3, idle_bytes_per_s=0, measured_cpu_s=0.25,
    least_step_s=1.25, most_step_s=1.75,
)  # fmt: skip


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    """A step that is not known stays so; a file of something else is one sentence."""
    rows = [
        ROW,
        replace(
            ROW,
            plan="ring",
            predicted_step_s=0.5,
            link_share=0.75,
            cores_change=1.5,
            cores_step_s=0.1,
            cores_bf16_flops_per_s=2e11,
            cores_dot_bf16_flops_per_s=3e10,
            cores_memory_bytes_per_s=4e10,
        ),
    ]
    write_csv(tmp_path / "wire.csv", rows)
    assert read_csv(tmp_path / "wire.csv") == rows
    assert [row.cores for row in rows] == [None, CORES]
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"other\.csv: is no table of the wire lab"):
        read_csv(tmp_path / "other.csv")


def test_the_plot_has_a_point_for_each_measured_step(tmp_path: Path) -> None:
    points = [Point("data", "2 x 1", rate, None, 1 / rate) for rate in (10.0, 20.0, 50.0)]
    write_plot(tmp_path / "wire.svg", [*points, Point("ring", "2 x 1", 10.0, 0.2, 0.1)])
    drawing = (tmp_path / "wire.svg").read_text()
    assert drawing.count('aria-roledescription="point"') == 4
    assert drawing.count('aria-roledescription="line mark"') == 1  # what is predicted of the ring


def beside(share: float, before_s: float, after_s: float) -> Beside:
    before, after = (replace(CORES, step_s=step_s) for step_s in (before_s, after_s))
    return Beside(link_share=share, before=before, after=after, run_step_s=0.5)


QUIET = beside(QUIET_SHARE, 0.1, 0.1)


@pytest.mark.parametrize(
    ("near", "taken", "runs"),
    [
        pytest.param([QUIET], 0, 1, id="quiet at once"),
        pytest.param([beside(0.5, 0.1, 0.1), QUIET], 1, 2, id="links slow at first"),
        pytest.param([beside(1.0, 0.1, 0.2), beside(1.0, 0.2, 0.1), QUIET], 2, 3, id="cores change twice"),
        pytest.param([beside(1.0, 0.1, 0.1 + 0.499 * STEADY)], 0, 1, id="cores change a little"),
        pytest.param([beside(s, 0.1, 0.1) for s in (0.5, 0.8, 0.7)], 1, 3, id="links never"),
        pytest.param(
            [beside(0.9, 0.1, 0.2), beside(0.9, 0.1, 0.15), beside(0.2, 0.1, 0.1)], 1, 3, id="worst"
        ),
        pytest.param([None], 0, 1, id="does not matter"),
    ],
)
def test_a_run_beside_other_work_is_done_again(near: list[Beside | None], taken: int, runs: int) -> None:
    left = iter(enumerate([*near, *[QUIET] * (3 - len(near))]))
    assert first_quiet(left, 3) == (taken, near[taken])
    assert len(list(left)) == 3 - runs


def test_says_when_a_control_of_the_cores_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, as without jax, and later; nothing of it goes on."""
    monkeypatch.setattr(wire_control, "on_core", lambda index, command: ["sh", "-c", f"exit {index}"])
    with pytest.raises(UserError, match="core 0: its control ended"), CoreControl():
        pass
    told = json.dumps(asdict(CORES))
    monkeypatch.setattr(wire_control, "on_core", lambda index, command: ["echo", told])
    with CoreControl() as control, pytest.raises(UserError, match="core 0: its control ended"):
        control.rates("data")
    assert all(process.poll() is not None for process in control._running)


def test_the_slowest_core_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores: of the slower one, twice."""
    told = [json.dumps(asdict(replace(CORES, step_s=s, memory_bytes_per_s=1e9 / s))) for s in (0.1, 0.2)]
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    script = 'read plan; echo "$0"; read plan; echo "$0"'
    monkeypatch.setattr(wire_control, "on_core", lambda index, command: ["sh", "-c", script, told[index]])
    with CoreControl() as control:
        assert control.rates("data") == StepRates(
            step_s=0.2, bf16_flops_per_s=4e11, dot_bf16_flops_per_s=6e10, memory_bytes_per_s=1e10
        )


@pytest.mark.parametrize("plan", PLANS)
def test_the_cores_are_measured_by_a_step_of_the_same_model(plan: str) -> None:
    """Of a plan that one device can have."""
    alone = PLANS[PLANS[plan].alone]
    assert alone.model == PLANS[plan].model
    assert plan_from_text(alone.text(1)).num_devices == 1


def test_a_control_compiles_each_plan_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is asked for experts, then for `data`, then for experts."""
    compiled = []

    class Step:
        def __init__(self, plan: str) -> None:
            compiled.append(plan)
            self._step_s = len(plan)

        def rates(self) -> StepRates:
            return replace(CORES, step_s=self._step_s)

    monkeypatch.setattr(wire_control, "OneDeviceStep", Step)
    monkeypatch.setattr(sys, "stdin", ["expert\n", "data\n", "expert\n"])
    wire_control.main()
    assert compiled == ["expert", "data"]
    assert [json.loads(line)["step_s"] for line in capsys.readouterr().out.splitlines()] == [6, 4, 6]


def test_cores_beside_a_run_are_those_before_and_after_by_their_times() -> None:
    """A loop at 4 and 2 GB/s takes as long as one at 8/3."""
    after = replace(CORES, step_s=0.2, memory_bytes_per_s=2e10)
    near = Beside(link_share=1.0, before=CORES, after=after, run_step_s=0.25)
    assert (near.cores.step_s, near.cores_change) == (pytest.approx(0.15), pytest.approx(0.4))
    assert near.cores.memory_bytes_per_s == pytest.approx(8e10 / 3)
    assert near.cores.bf16_flops_per_s == pytest.approx(CORES.bf16_flops_per_s)


def test_a_row_is_of_the_run_in_the_middle_and_of_the_worst_bytes() -> None:
    """Three runs, of 3, 1 and 2 s, one of which sent 110 bytes for 100."""

    def run(step_s: float, sent: float, near: Beside) -> tuple[Measured, Beside]:
        measured = Measured(
            out_bytes=(sent, 100.0), loopback_bytes=(0.0, 0.0), frame_bytes=(120.0, 120.0), step_s=step_s,
            startup_bytes=7, idle_bytes_per_s=0.0, cpu_s=0.5,
        )  # fmt: skip
        return measured, near

    predicted = Predicted(
        out_bytes=(Fraction(96), Fraction(96)), loopback_bytes=(Fraction(0),) * 2, gloo_bytes=(4, 4),
        step_s=2.25, communication_s=1.5, turns_s=0.0,
    )  # fmt: skip
    runs = [run(3.0, 110, beside(0.93, 0.1, 0.1)), run(1.0, 100, QUIET), run(2.0, 101, beside(1, 0.2, 0.1))]
    assert middle(runs) == runs[2]
    row = row_of("data", 2, 1, 100.0, predicted, runs)
    assert (row.measured_step_s, row.predicted_step_s, row.predicted_communication_s) == (2.0, 2.25, 1.5)
    assert (row.least_step_s, row.most_step_s, row.measured_wire_bytes) == (1.0, 3.0, 101)
    assert (row.site_error, row.link_share, row.cores_change) == (0.1, round(QUIET_SHARE, 3), 0.2)
    assert row.cores == StepRates(
        step_s=0.15, bf16_flops_per_s=2e11, dot_bf16_flops_per_s=3e10, memory_bytes_per_s=4e10
    )


@pytest.mark.wire
def test_headers_are_66_bytes_a_frame_and_the_link_has_no_more_than_its_rate() -> None:
    """How much less than its rate hangs on what else the cores do, and so does what TCP sends again."""
    size = 5_000_000
    with Sites(2, 50) as network:
        found = stream(network, size)
        chosen = "/proc/sys/net/ipv4/tcp_congestion_control"
        tcp = [
            network.start(site, ["cat", chosen], stdout=subprocess.PIPE).communicate()[0] for site in (0, 1)
        ]
    assert found.sent_bytes - HEADER_BYTES * found.frames - found.again_bytes == size
    assert found.received_bytes < 0.05 * size
    assert size * 8 / found.time_s < 50e6
    assert tcp == ["reno\n"] * 2


@pytest.mark.wire
def test_what_a_killed_run_leaves_is_removed() -> None:
    code = "from sites import Sites\nwith Sites(1, 10):\n    print('up', flush=True)\n    input()"
    run = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "up\n"
    run.send_signal(signal.SIGKILL)
    run.communicate()
    ours = {name for name in remove_leftovers() if f"-{run.pid}-" in name}
    assert len(ours) == 2  # a site and the hub
    assert not [name for name in sites._namespaces() if f"-{run.pid}-" in name]
    assert not [path for path in sites.HOSTS.glob("*") if f"-{run.pid}-" in path.name]


@pytest.mark.wire
def test_measured_bytes_are_the_predicted_ones(tmp_path: Path) -> None:
    """FSDP and Ulysses over two sites: within 2 % of the interface counters, gloo's headers added."""
    table = tmp_path / "wire.csv"
    command = [
        sys.executable,
        str(ROOT / "experiments" / "wire_lab.py"),
        "--plans=fsdp,ulysses",
        "--rates=1000",
        "--quick",
    ]
    started_s = time.monotonic()
    done = subprocess.run(
        [*command, f"--csv={table}", "--warm_steps=1", "--count_steps=2", "--count_seconds=0"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with table.open(newline="") as file:
        rows = {row["plan"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"fsdp", "ulysses"}
    for row in rows.values():
        assert float(row["site_error"]) < 0.02, row
        assert int(row["measured_wire_bytes"]) > 1_000_000
    assert time.monotonic() - started_s < 300


@pytest.mark.wire
def test_three_kills_lose_nothing(tmp_path: Path) -> None:
    plan, text = tmp_path / "plan.toml", tmp_path / "text.txt"
    plan.write_text('on = "cpu:2"\n' + PLANS["fsdp"].text(2, quick=True))
    text.write_text("the quick brown fox jumps over the lazy dog. " * 50)
    run = ["--kills=3", "-n", "2", "--", f"--mesh={plan}", f"--text={text}", "--batch=4", "--seq=16"]
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "experiments" / "kill_lab.py"),
            *run,
            "--steps=60",
            "--checkpoint_every=4",
        ],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the loss curve is identical" in done.stdout


@pytest.mark.wire
def test_a_soak_of_300_steps_holds_no_more_at_its_end(tmp_path: Path) -> None:
    plan, text = tmp_path / "plan.toml", tmp_path / "text.txt"
    plan.write_text('on = "cpu:2"\n' + PLANS["fsdp"].text(2, quick=True))
    text.write_text("the quick brown fox jumps over the lazy dog. " * 50)
    run = ["-n", "2", "--program=soak.py", "--", f"--mesh={plan}", f"--text={text}", "--batch=4", "--seq=16"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "experiments" / "launch_local.py"), *run, "--steps=300"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("after step 300: ") == 2
    assert done.stderr.count("since then at most ") == 2
