"""Teleports beside QEMU's migration (TCG): same guest, same load, loopback TCP, in turns in the same run.

    python benchmarks/bench_teleport.py [--cases abcdef] [--runs 3]

    a  256 MiB, Linux idle                      b  256 MiB, Linux dirtying 64 MiB/s
    c  4 GiB holding 2 GiB incompressible       d  16 GiB, almost untouched
    e, f  as a and b, with a byte on the serial port every millisecond

"vmf downtime" and "QEMU downtime" are each program's own account, and not of the same thing: QEMU's ends when the
source has sent everything, vmf's when the guest runs at the target. In e and f the guest is watched from outside, both
programs' the same way: "still" is the time between its last byte at the source and its first at the target.

Printed besides: the raw speed of a plain Python socket pair over loopback in the same run (the ceiling), and the most
private memory that each side's process held on top of guest RAM.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from attrs import frozen

from common import MemoryWatch, StillWatch, loopback_ceiling, machine_line, median, table, warm_host_memory
from peer import PROGRAM, Qemu, version
from vmf.machine.config import MachineConfig
from vmf.testing.guests import LinuxGuest, linux_guest, selfcheck_guest
from vmf.testing.hosts import Host

MAX_DOWNTIME_MS = 250
SETTLE_SECONDS = 1.0


@frozen
class Case:
    """One load: the guest's program (None: a shell), and the text that says that the load is there."""

    title: str
    memory_mib: int
    program: str | None
    ready: bytes
    runs: int
    warm_mib: int
    """As much as the target will touch; see `warm_host_memory`."""
    watched: bool = False
    """The guest writes a byte every millisecond."""


CASES = {
    "a": Case("256 MiB, idle", 256, None, b"vmf: init is running", 3, 256),
    "b": Case("256 MiB, dirtying 64 MiB/s", 256, "dirty 64", b"dirtying", 3, 512),
    "c": Case("4 GiB, 2 GiB incompressible", 4096, "fill 2048", b"filled", 3, 6144),
    "d": Case("16 GiB, almost untouched", 16384, None, b"vmf: init is running", 3, 1024),
    "e": Case("256 MiB, a byte every ms", 256, "beat 1000", b"beating", 3, 256, True),
    "f": Case("64 MiB/s, a byte every ms", 256, "beat 1000 & /bin/selfcheck dirty 64", b"dirtying", 3, 512, True),
}


@frozen
class Result:
    """Milliseconds, MiB."""

    total_ms: float
    downtime_ms: float
    rounds: int
    moved_mib: float
    source_mib: float
    target_mib: float
    still_ms: float = math.nan


def guest_of(case: Case) -> LinuxGuest:
    return linux_guest() if case.program is None else selfcheck_guest(case.program)


def teleport_vmf(case: Case, runs: int) -> list[Result]:
    """Boot once, then teleport back and forth."""
    guest = guest_of(case)
    config = MachineConfig(
        name="bench",
        memory_mib=case.memory_mib,
        kernel=guest.kernel,
        initrd=guest.initrd,
        cmdline=guest.cmdline,
        cpu_backend="unicorn",
    )
    results = []
    with (
        tempfile.TemporaryDirectory() as directory,
        Host(Path(directory, "a")) as here,
        Host(Path(directory, "b")) as there,
    ):
        for host in (here, there):
            host.define(config)
        here.start("bench")
        here.wait_for_output("bench", case.ready, timeout=300)
        source, target = here, there
        for _ in range(runs):
            time.sleep(SETTLE_SECONDS)
            port = target.wait("bench")
            warm_host_memory(case.warm_mib)
            watched_memory = [] if case.watched else [source, target]  # it takes processor time from the guest
            watches = [MemoryWatch(host.pid("bench") or 0, case.memory_mib) for host in watched_memory]
            logs = [host.home.paths("bench").console_log for host in (source, target)]
            still = StillWatch(logs[0], logs[1]) if case.watched else None
            with source.client("bench") as client:
                started = time.monotonic()
                summary = client.teleport("127.0.0.1", port, max_downtime_ms=MAX_DOWNTIME_MS)
                total_ms = (time.monotonic() - started) * 1000
            still_ms = still.wait() * 1000 if still is not None else math.nan
            peaks = [watch.stop() for watch in watches] or [math.nan, math.nan]
            results.append(
                Result(
                    total_ms,
                    summary["downtime_ns"] / 1e6,
                    summary["rounds"],
                    summary["bytes"] / 2**20,
                    peaks[0],
                    peaks[1],
                    still_ms,
                )
            )
            source.wait_gone("bench")
            source, target = target, source
    return results


def migrate_qemu(case: Case, runs: int) -> list[dict[str, Any]]:
    guest = guest_of(case)
    results: list[dict[str, Any]] = []
    source = Qemu(guest.kernel, guest.initrd, guest.cmdline, case.memory_mib)
    try:
        source.wait_for_output(case.ready, timeout=600)
        for _ in range(runs):
            time.sleep(SETTLE_SECONDS)
            target = Qemu(guest.kernel, guest.initrd, guest.cmdline, case.memory_mib, incoming=True)
            try:
                warm_host_memory(case.warm_mib)
                still = StillWatch(source.log, target.log) if case.watched else None
                results.append(source.migrate(target.listen(), MAX_DOWNTIME_MS))
                if still is not None:
                    results[-1]["still"] = still.wait() * 1000
            except BaseException:
                target.close()
                raise
            source.close()
            source = target
    finally:
        source.close()
    return results


def rounded(values: list[float]) -> list[float]:
    return [round(value, 1) for value in values]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default="abcdef")
    parser.add_argument("--runs", type=int, default=0, help="teleports per case (default: 3)")
    options = parser.parse_args()
    print(f"Teleports over loopback. {machine_line()}. {version() or 'QEMU is not installed: no peer'}.")
    one, two = (loopback_ceiling(pairs=pairs) / 2**30 for pairs in (1, 2))
    fresh = median([loopback_ceiling(pairs=2, fresh=True) / 2**30 for _ in range(3)])
    print(
        f"Ceiling: plain Python sockets over loopback, one pair {one:.2f} GiB/s, two {two:.2f} GiB/s, "
        f"two into memory that was never touched {fresh:.2f} GiB/s.\n",
        flush=True,
    )
    rows, memory_rows, still_rows = [], [], []
    for key in options.cases:
        case = CASES[key]
        runs = options.runs or case.runs
        ours = teleport_vmf(case, runs)
        theirs = migrate_qemu(case, runs) if PROGRAM else []
        total, down = median([r.total_ms for r in ours]), median([r.downtime_ms for r in ours])
        speed = median([r.moved_mib / 1024 / (r.total_ms / 1000) for r in ours])
        row = [f"({key}) {case.title}", f"{total:.0f}", f"{down:.1f}", f"{median([r.moved_mib for r in ours]):.0f}",
               f"{speed:.2f}"]  # fmt: skip
        if theirs:
            peer_total = median([float(r["total-time"]) for r in theirs])
            peer_down = median([float(r["downtime"]) for r in theirs])
            row += [f"{peer_total:.0f}", f"{peer_down:.0f}", f"{total / peer_total:.2f}"]
            row += [f"{down / peer_down:.2f}" if peer_down else "-"]
        rows.append(row)
        if not case.watched:
            peaks = [f"{max(r.source_mib for r in ours):.0f}", f"{max(r.target_mib for r in ours):.0f}"]
            memory_rows.append([f"({key})", *peaks])
        print(f"({key}) vmf total ms {[round(r.total_ms) for r in ours]}, downtime {[r.downtime_ms for r in ours]}")
        if theirs:
            totals, downtimes = [r["total-time"] for r in theirs], [r["downtime"] for r in theirs]
            print(f"    QEMU total ms {totals}, downtime {downtimes}", flush=True)
        if case.watched:
            still = [[r.still_ms for r in ours], [float(r["still"]) for r in theirs]]
            print(f"    still ms: vmf {rounded(still[0])}, QEMU {rounded(still[1])}", flush=True)
            cells = [f"{median(each):.1f} ({min(each):.1f}-{max(each):.1f})" if each else "" for each in still]
            ratio = f"{median(still[0]) / median(still[1]):.2f}" if theirs else ""
            still_rows.append([f"({key}) {case.title}", *cells, ratio])
    print()
    header = ["case", "vmf total ms", "vmf downtime ms", "moved MiB", "GiB/s"]
    if PROGRAM:
        header += ["QEMU total ms", "QEMU downtime ms", "total ratio", "downtime ratio"]
    table(header, rows)
    if still_rows:
        table(["the guest still, seen from outside, ms", "vmf", "QEMU", "ratio"], still_rows)
    if memory_rows:
        table(["private memory, MiB (peak)", "source", "target"], memory_rows)


if __name__ == "__main__":
    main()
