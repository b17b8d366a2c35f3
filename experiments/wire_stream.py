"""A plain TCP stream between two sites: what their links carry while nothing else does.

The lab holds one beside each run (`wire_control.py`).
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass

from sites import Sites

_TIMEOUT_S = 300
_CONTROL_S = 0.5  # a stream of half of that has between 0.83 and 0.95 of a link's rate


_STREAM = """
import socket, struct, sys, threading, time
first, both, peer, size = sys.argv[1] == "0", sys.argv[2] == "both", sys.argv[3], int(sys.argv[4])
def count():
    line = next(line for line in open("/proc/net/dev") if "eth0" in line)
    return [int(value) for value in line.split(":")[1].split()]
def again():
    info = stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 216)
    return struct.unpack_from("Q", info, 208)[0]  # tcpi_bytes_retrans
if first:
    for _ in range(200):
        try:
            stream = socket.create_connection((peer, 5556))
            break
        except OSError:
            time.sleep(0.05)
else:
    stream = socket.create_server(("", 5556)).accept()[0]
def take():
    left = size
    while left:
        left -= len(stream.recv(min(left, 1 << 20)))
def send():
    stream.sendall(bytes(size))
stream.send(b"r"), stream.recv(1)
time.sleep(0.3)
before, again_before, started = count(), again(), time.monotonic()
threads = [threading.Thread(target=one) for one in ([send, take] if both else [send if first else take])]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
if not both:
    stream.recv(1) if first else stream.send(b"x")
took = time.monotonic() - started
time.sleep(0.2)
after = count()
print(after[8] - before[8], after[9] - before[9], again() - again_before, after[0] - before[0], took)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """A TCP stream of site 0: bytes in frames and frames that left it, payload that it sent again (TCP does
    when an answer is late), bytes in frames that came, seconds."""

    sent_bytes: int
    frames: int
    again_bytes: int
    received_bytes: int
    time_s: float


def stream(sites: Sites, size: int, *, both: bool = False, local: bool = False) -> Stream:
    """`size` bytes from site 0 to site 1. both: the other way too, over one connection; local: in site 0."""
    running = []
    for index in (1, 0):
        peer = "127.0.0.1" if local else sites.address(1)
        command = [sys.executable, "-c", _STREAM, str(index), "both" if both else "one", peer, str(size)]
        running.append(sites.start(0 if local else index, command, stdout=subprocess.PIPE))
    _, told = [process.communicate(timeout=_TIMEOUT_S)[0].split() for process in running]
    return Stream(
        sent_bytes=int(told[0]),
        frames=int(told[1]),
        again_bytes=int(told[2]),
        received_bytes=int(told[3]),
        time_s=float(told[4]),
    )


_AROUND = """
import socket, sys, threading, time
own, peer, size, start = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
server = socket.create_server((own, 5557))
def take():
    stream, left = server.accept()[0], size
    while left:
        left -= len(stream.recv(min(left, 1 << 20)))
    stream.send(b"x")
taking = threading.Thread(target=take)
taking.start()
time.sleep(max(0, start - 1 - time.time()))
stream = socket.create_connection((peer, 5557))
time.sleep(max(0, start - time.time()))
started = time.monotonic()
stream.sendall(bytes(size)), stream.recv(1)
print(time.monotonic() - started, flush=True)
taking.join()
"""


def ring_shares(sites: Sites, size: int) -> list[float]:
    """How much of its rate a stream of `size` bytes has, of each site to the next, all at once: what comes in
    is acknowledged over another connection than what goes out."""
    count, start = len(sites.names), str(time.time() + 3)
    running = []
    for index in range(count):
        ends = (sites.address(index), sites.address((index + 1) % count))
        command = [sys.executable, "-c", _AROUND, *ends, str(size), start]
        running.append(sites.start(index, command, stdout=subprocess.PIPE))
    took_s = [float(process.communicate(timeout=_TIMEOUT_S)[0]) for process in running]
    return [size * 8e-6 / rate / each for rate, each in zip(sites.rates, took_s, strict=True) if rate]


_WORD = """
import socket, sys, threading, time
first, peer, size = sys.argv[1] == "0", sys.argv[2], int(sys.argv[3])
def read(one, left):
    while left:
        left -= len(one.recv(min(left, 1 << 16)))
if first:
    time.sleep(0.5)
    data, words = pair = [socket.create_connection((peer, 5558)) for _ in range(2)]
else:
    server = socket.create_server(("", 5558))
    data, words = pair = [server.accept()[0] for _ in range(2)]
for one in pair:
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
waited = []
for _ in range(12):
    if first:
        words.recv(1)
        sending = threading.Thread(target=data.sendall, args=(bytes(size),))
        sending.start()
        time.sleep(0.0003)
        words.sendall(bytes(48))
        sending.join()
    else:
        time.sleep(0.05)
        def take():
            read(data, 1)
            begun.append(time.monotonic())
            read(data, size - 1)
        begun = []
        taking = threading.Thread(target=take)
        taking.start()
        words.sendall(b"g")
        read(words, 48)
        came = time.monotonic()
        taking.join()
        waited.append(came - begun[0])
if not first:
    print(sorted(waited[2:])[5], flush=True)
"""


def word_waits_s(sites: Sites, size: int) -> float:
    """How long after the first byte of a burst of `size` bytes a word arrives that left site 0 just after it,
    over another connection: what the kernel lets the burst's connection queue. The median of ten."""
    running = [
        sites.start(
            index,
            [sys.executable, "-c", _WORD, str(index), sites.address(1), str(size)],
            stdout=subprocess.PIPE,
        )
        for index in (1, 0)
    ]
    return float(next(process.communicate(timeout=_TIMEOUT_S)[0] for process in running))


def reached_share(sites: Sites) -> float:
    """How much of the first site's rate a short stream has as payload, one way or both ways at once, the
    less of these."""
    rate_mbit_per_s = sites.rates[0]
    assert rate_mbit_per_s is not None
    size = int(rate_mbit_per_s * 125_000 * _CONTROL_S)
    return min(_CONTROL_S / stream(sites, size, both=both).time_s for both in (False, True))
