"""Loopback speed of the TLS channel beside the TCP channel, Python's own SSLSocket and `openssl speed`, in one run.

Two processes each time; guest RAM is sent by `send_ranges` and received by `recv_ranges` in batches of 4 MiB, as long
runs and as scattered single pages (every other page). "of bound" is the share of the smaller of the two bounds that
nobody can beat on one connection: the TCP channel, and the cipher alone (which `openssl speed` measures, one core).

With `--teleport MIB` also whole teleports of a machine whose RAM holds so much incompressible data, between two
processes, over both transports in turns; and what a TLS could reach here that costs nothing but the cipher as `openssl
speed` measures it, where both hosts share the processors.

    python benchmarks/bench_tls.py [--mib 512] [--repeat 3] [--teleport 2048]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import ssl
import subprocess
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from common import machine_line, median, table, warm_host_memory
from vmf.machine.config import MachineConfig
from vmf.machine.machine import Machine
from vmf.memory import pages
from vmf.memory.guest import MIB, GuestMemory
from vmf.plugins import PluginRegistry
from vmf.testing.guests import builtin_guest
from vmf.testing.hosts import Host
from vmf.transport import sockets
from vmf.transport.base import Address, Channel, Listener, Transport
from vmf_transport_tcp.transport import TcpTransport
from vmf_transport_tls import files, issue
from vmf_transport_tls.channel import TlsChannel
from vmf_transport_tls.transport import TlsTransport

used_cipher: set[str] = set()
BATCH = 4 * MIB
SLICE = 1 * MIB
ROWS = (
    ("tcp", "runs", "TCP channel, long runs"),
    ("tls", "runs", "TLS channel, long runs"),
    ("tcp", "scattered", "TCP channel, scattered pages"),
    ("tls", "scattered", "TLS channel, scattered pages"),
    ("sslsocket", "runs", "Python's SSLSocket, long runs"),
)


def touched_memory(mib: int) -> GuestMemory:
    memory = GuestMemory(mib * MIB)
    np.frombuffer(memory.buffer, dtype=np.uint64)[:] = 0x5A5A_0000_1234_FFFF
    return memory


def move(function: Callable[[memoryview, pages.ByteRanges], None], what: str, memory: GuestMemory) -> None:
    """All of it; scattered pages are half of them, twice."""
    if what == "runs":
        runs, passes = pages.full(memory.pages), 1
    else:
        mask = np.zeros(memory.pages, dtype=bool)
        mask[::2] = True
        runs, passes = pages.from_mask(mask), 2
    for _ in range(passes):
        for batch in pages.batches(runs, BATCH):
            function(memory.buffer, pages.to_byte_ranges(batch))


def transport(scheme: str) -> Transport:
    return TlsTransport() if scheme == "tls" else TcpTransport()


def options(scheme: str, directory: str) -> dict[str, str]:
    return {"tls_dir": directory} if scheme == "tls" else {}


def receiver(pipe: Connection, mib: int, directory: str) -> None:
    """The other process."""
    memory = touched_memory(mib)
    listeners: dict[str, Listener] = {
        scheme: transport(scheme).listen(Address(scheme, "127.0.0.1", 0, options(scheme, directory)))
        for scheme in ("tcp", "tls")
    }
    plain = sockets.listen(Address("tcp", "127.0.0.1", 0))
    pipe.send({scheme: each.address.port for scheme, each in listeners.items()} | {"sslsocket": plain.address.port})
    while (asked := pipe.recv()) is not None:
        scheme, what = asked
        if scheme == "sslsocket":
            raw, _ = plain.accept(30)
            with files.load(Path(directory), "server").context.wrap_socket(raw, server_side=True) as one:
                began = time.process_time()
                for at in range(0, memory.size, SLICE):
                    view, done = memory.buffer[at : at + SLICE], 0
                    while done < len(view):
                        done += one.recv_into(view[done:])
                pipe.send(time.process_time() - began)
                one.sendall(b"k")
            continue
        channel: Channel = listeners[scheme].accept(30)
        began = time.process_time()
        move(channel.recv_ranges, what, memory)
        pipe.send(time.process_time() - began)
        channel.send(b"k")
        channel.close()


def sender(scheme: str, what: str, port: int, directory: str, memory: GuestMemory) -> tuple[float, float]:
    """(wall, processor) seconds until the other side has it all."""
    if scheme == "sslsocket":
        raw = sockets.connect(Address("tcp", "127.0.0.1", port), 10)
        context: ssl.SSLContext = files.load(Path(directory), "client").context
        with context.wrap_socket(raw, server_hostname="localhost") as one:
            one.settimeout(None)
            began, used = time.perf_counter(), time.process_time()
            for at in range(0, memory.size, SLICE):
                one.sendall(memory.buffer[at : at + SLICE])
            one.recv(1)
            return time.perf_counter() - began, time.process_time() - used
    channel = transport(scheme).connect(Address(scheme, "localhost", port, options(scheme, directory)), 10)
    began, used = time.perf_counter(), time.process_time()
    move(channel.send_ranges, what, memory)
    channel.recv_into(memoryview(bytearray(1)))
    taken = time.perf_counter() - began, time.process_time() - used
    if isinstance(channel, TlsChannel):
        used_cipher.add(channel.cipher)
    channel.close()
    return taken


def openssl_speed(cipher: str) -> float | None:
    """GB/s of a cipher on one core in pieces of 16 KiB; None without the program."""
    command = ["openssl", "speed", "-seconds", "1", "-bytes", "16384", "-evp", cipher]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return float(done.stdout.split()[-1].rstrip("k")) * 1000 / 1e9
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def used_by(pid: int | None) -> float:
    """Processor seconds of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


Figures = tuple[float, float, float]
"""Of a whole teleport: GB/s, processor s/GiB at the source and at the target."""


def teleports(mib: int, directory: str, repeat: int) -> dict[str, list[Figures]]:
    """`repeat` whole teleports by transport, in turns. The source is this process, as its RAM is to be filled."""
    runs: dict[str, list[Figures]] = {"tcp": [], "tls": []}
    config = MachineConfig(name="box", memory_mib=mib + 64, image=builtin_guest(), cpu_backend="unicorn")
    for _ in range(repeat):
        for scheme in runs:
            with tempfile.TemporaryDirectory() as home, Host(Path(home)) as target:
                target.define(config)
                port = target.wait("box", transport=scheme, tls_dir=options(scheme, directory).get("tls_dir"))
                with Machine(config, PluginRegistry()) as source:
                    source.start()
                    source.pause()
                    content = np.random.default_rng(1).bytes(MIB)
                    for at in range(64, mib + 64):
                        source.hardware.memory.buffer[at * MIB : (at + 1) * MIB] = content
                    source.resume()
                    extra = options(scheme, directory)
                    warm_host_memory(2 * mib)  # what is freed is not just what is handed out next
                    before = time.process_time(), used_by(target.pid("box"))
                    summary = source.teleport("localhost", port, transport=scheme, options=extra)
                    here, there = time.process_time() - before[0], used_by(target.pid("box")) - before[1]
                gib = summary.bytes / 2**30
                runs[scheme].append((summary.bytes / summary.total_ns, here / gib, there / gib))
    return runs


def ceiling(tcp: Figures, cipher: float) -> float:
    """Share of TCP's speed that TLS had if it cost the cipher and nothing else, at both ends on these processors."""
    wall = 2**30 / 1e9 / tcp[0]
    busy = tcp[1] + tcp[2] + 2 * 2**30 / 1e9 / cipher
    return wall / max(wall, busy / (os.cpu_count() or 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--teleport", type=int, default=0, metavar="MIB")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        issue.make_ca(Path(directory))
        issue.issue(Path(directory), Path(directory), ["localhost"])
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=receiver, args=(theirs, chosen.mib, directory), daemon=True)
        process.start()
        ports = ours.recv()
        memory = touched_memory(chosen.mib)
        best: dict[tuple[str, str], tuple[float, float, float]] = {}
        ciphers = dict.fromkeys(("aes-128-gcm", "aes-256-gcm"), 0.0)
        for _ in range(chosen.repeat):
            for cipher, speed in ciphers.items():
                ciphers[cipher] = max(speed, openssl_speed(cipher) or 0.0)
            for scheme, what, _ in ROWS:
                ours.send((scheme, what))
                wall, used = sender(scheme, what, ports[scheme], directory, memory)
                result = (chosen.mib * MIB / wall / 1e9, used, ours.recv())
                best[scheme, what] = max(best.get((scheme, what), (0.0, 0.0, 0.0)), result)
        ours.send(None)
        process.join(10)
        del memory
        whole = teleports(chosen.teleport, directory, chosen.repeat) if chosen.teleport else {}
    print(f"{machine_line()}; {ssl.OPENSSL_VERSION}; load {os.getloadavg()[0]:.1f}")
    print(
        f"loopback, {chosen.mib} MiB, best of {chosen.repeat}, of teleports the median, pair by pair; "
        f"cipher: {', '.join(sorted(used_cipher))}\n"
    )
    rows = [
        [f"openssl speed {cipher}", f"{speed:.2f}" if speed else "-", "", "", ""] for cipher, speed in ciphers.items()
    ]
    per_gib = 1024 / chosen.mib
    for scheme, what, text in ROWS:
        speed, sent, received = best[scheme, what]
        cipher = ciphers["aes-128-gcm"]
        bound = min(best["tcp", what][0], cipher) if cipher else best["tcp", what][0]
        share = "" if scheme == "tcp" else f"{speed / bound:.0%}"
        rows.append([text, f"{speed:.2f}", share, f"{sent * per_gib:.2f}", f"{received * per_gib:.2f}"])
    cipher = ciphers["aes-128-gcm"] or float("inf")
    middle: dict[str, Figures] = {}
    for scheme, runs in whole.items():
        speed, sent, received = (median([run[column] for run in runs]) for column in range(3))
        middle[scheme] = (speed, sent, received)
        shares = [mine[0] / min(tcp[0], cipher) for mine, tcp in zip(runs, whole["tcp"], strict=True)]
        share = "" if scheme == "tcp" else f"{median(shares):.0%} ({min(shares):.0%}-{max(shares):.0%})"
        text = f"teleport of {chosen.teleport} MiB, {scheme}"
        rows.append([text, f"{speed:.2f}", share, f"{sent:.2f}", f"{received:.2f}"])
    if whole:
        most = ceiling(middle["tcp"], cipher)
        rows.append(
            ["the same at the speed of `openssl speed`", f"{middle['tcp'][0] * most:.2f}", f"{most:.0%}", "", ""]
        )
    table(["", "GB/s", "of bound", "sender CPU s/GiB", "receiver CPU s/GiB"], rows)


if __name__ == "__main__":
    main()
