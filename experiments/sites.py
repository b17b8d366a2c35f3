"""Sites: network namespaces joined by veth pairs through a bridge, each link shaped with `tc tbf`.

    with Sites(2, rate_mbit_per_s=100) as sites:
        process = sites.start(0, ["python", "train.py"])

Linux, root and iproute2 only. Each site has one interface, `eth0`; its names resolve through a hosts file of
its own, since gloo binds to what the host name resolves to. Up to 100 Mbit/s segmentation offload is off, so
that what the interface counts are Ethernet frames; on faster links, which cores would hold up, some leave as
one and are counted with one header, while `tbf` counts each. TCP payload is exactly bytes - 66 · packets (14
Ethernet, 20 IP, 32 TCP with timestamps; `wire_calibrate.py` shows it). Everything is removed at the end,
whatever happens, and what a killed run left is removed by the next.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from shardlab.errors import Problem, UserError

PREFIX = "shardlab-wire-"
HEADER_BYTES = 66
EFFICIENCY = 1448 / 1514  # payload of a full frame
HOSTS = Path("/etc/netns")
BURST_SECONDS = 0.00025  # what a link that was idle sends at once is no more than this of its rate
QUEUE_BYTES = 64 << 20  # what a shaped link holds: nothing is dropped, TCP waits
TCP = "reno"  # any namespace may have it; a site would have what the computer has, BBR for one


def check_privileges() -> None:
    """Raises UserError with everything that is missing."""
    problems = []
    if os.geteuid() != 0:
        problems.append(Problem("wire lab", "not root", "run it with sudo, or as root in a container"))
    tools = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "taskset": "util-linux"}
    for tool, package in tools.items():
        if shutil.which(tool) is None:
            problems.append(Problem("wire lab", f"no {tool!r} here", f"apt-get install {package}"))
    if problems:
        raise UserError(*problems)
    probe = f"{PREFIX}{os.getpid()}-probe"
    try:
        _run("ip", "netns", "add", probe)
    except UserError as error:
        what = f"network namespaces do not work: {error.problems[0].what}"
        raise UserError(Problem("wire lab", what, "give the container CAP_SYS_ADMIN")) from None
    _run("ip", "netns", "delete", probe)


def remove_leftovers() -> list[str]:
    """Remove the namespaces of runs whose process is gone; returns their names."""
    removed = []
    for name in _namespaces():
        owner = name.removeprefix(PREFIX).partition("-")[0]
        if name.startswith(PREFIX) and not Path(f"/proc/{owner}").exists():
            _remove(name)
            removed.append(name)
    return removed


def on_core(index: int, command: Sequence[str]) -> list[str]:
    """The command, run on one core: what comes after the last starts again with the first."""
    cores = sorted(os.sched_getaffinity(0))
    return ["taskset", "--cpu-list", str(cores[index % len(cores)]), *command]


class Sites:
    """`count` namespaces whose links carry `rate_mbit_per_s` each way; None: as fast as they go."""

    def __init__(self, count: int, rate_mbit_per_s: float | None) -> None:
        run = f"{PREFIX}{os.getpid()}-"
        self.names = tuple(f"{run}{index}" for index in range(count))
        self.rates: list[float | None] = [rate_mbit_per_s] * count
        self._hub = f"{run}hub"
        self._running: list[subprocess.Popen[str]] = []

    def address(self, site: int) -> str:
        """IPv4 address of a site."""
        return f"10.213.0.{site + 1}"

    def __enter__(self) -> Sites:
        check_privileges()
        remove_leftovers()
        try:
            _run("ip", "netns", "add", self._hub)
            _in(self._hub, "ip", "link", "add", "br0", "type", "bridge")
            _in(self._hub, "ip", "link", "set", "br0", "up")
            for site in range(len(self.names)):
                self._add(site)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _add(self, site: int) -> None:
        name, port = self.names[site], f"port{site}"
        hosts = [f"{self.address(i)} {other}" for i, other in enumerate(self.names)]
        (HOSTS / name).mkdir(parents=True)
        (HOSTS / name / "hosts").write_text("127.0.0.1 localhost\n" + "\n".join(hosts) + "\n")
        _run("ip", "netns", "add", name)
        chosen = ["net.ipv6.conf.all.disable_ipv6=1", f"net.ipv4.tcp_congestion_control={TCP}"]
        _in(name, "sysctl", "-qw", *chosen)
        _in(name, "ip", "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", self._hub)
        _in(name, "ip", "addr", "add", f"{self.address(site)}/24", "dev", "eth0")
        _in(self._hub, "ip", "link", "set", port, "master", "br0", "up")
        _in(name, "ip", "link", "set", "lo", "up")
        _in(name, "ip", "link", "set", "eth0", "up")
        self.shape(site, self.rates[site])

    def shape(self, site: int, rate_mbit_per_s: float | None) -> None:
        """Let a site's link carry this much from now on, each way."""
        self.rates[site] = rate_mbit_per_s
        # Frames that leave as one: an eighth of a millisecond of the link.
        segments = 44 if rate_mbit_per_s is None else max(1, min(44, int(rate_mbit_per_s / 100)))
        for where, interface in ((self.names[site], "eth0"), (self._hub, f"port{site}")):
            _in(where, "ip", "link", "set", interface, "gso_max_segs", str(segments))
            _in(where, "tc", "qdisc", "del", "dev", interface, "root", check=False)
            if rate_mbit_per_s is not None:
                burst = max(3_200, int(rate_mbit_per_s * 125_000 * BURST_SECONDS))
                shaped = ("rate", f"{rate_mbit_per_s}mbit", "burst", str(burst), "limit", str(QUEUE_BYTES))
                _in(where, "tc", "qdisc", "add", "dev", interface, "root", "tbf", *shaped)

    def cut(self, site: int) -> None:
        """Take a site's link down."""
        _in(self._hub, "ip", "link", "set", f"port{site}", "down")

    def mend(self, site: int) -> None:
        """Bring it up again."""
        _in(self._hub, "ip", "link", "set", f"port{site}", "up")

    def start(self, site: int, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Run a command in a site, under the site's host name, on the site's core; it is ended when the sites
        are removed."""
        name = self.names[site]
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', name, *on_core(site, command)]
        process = subprocess.Popen(
            ["ip", "netns", "exec", name, *named], text=True, start_new_session=True, **options
        )
        self._running.append(process)
        return process

    def kill(self, site: int) -> None:
        """Kill every process in a site, without a word."""
        _kill_in(self.names[site])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for name in (*self.names, self._hub):
            _remove(name)


def _namespaces() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    return [line.split()[0] for line in listed.splitlines() if line.strip()]


def _remove(name: str) -> None:
    """A namespace, the processes in it (its veth goes with it) and its hosts file, as far as they exist."""
    _kill_in(name)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    shutil.rmtree(HOSTS / name, ignore_errors=True)


def _kill_in(namespace: str) -> None:
    found = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    for pid in found.stdout.split() if found.returncode == 0 else ():
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            continue


def _in(namespace: str, *command: str, check: bool = True) -> None:
    _run("ip", "netns", "exec", namespace, *command, check=check)


def _run(*command: str, check: bool = True) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode:
        said = done.stderr.strip() or f"exit code {done.returncode}"
        raise UserError(Problem(" ".join(command), said, "the wire lab needs root and iproute2"))
