"""Teleports beside QEMU's migration (TCG): same guest, same load, loopback TCP, in turns in the same run.

    python benchmarks/bench_teleport.py [--cases abcd] [--runs 3]

    a  256 MiB, Linux idle                      b  256 MiB, Linux dirtying 64 MiB/s
    c  4 GiB holding 2 GiB incompressible       d  16 GiB, almost untouched

Printed besides: the raw speed of a plain Python socket pair over loopback in the same run (the ceiling), and the most
private memory that each side's process held on top of guest RAM.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from attrs import frozen

from common import MemoryWatch, loopback_ceiling, machine_line, median, table, warm_host_memory
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


CASES = {
    "a": Case("256 MiB, idle", 256, None, b"vmf: init is running", 3, 256),
    "b": Case("256 MiB, dirtying 64 MiB/s", 256, "dirty 64", b"dirtying", 3, 512),
    "c": Case("4 GiB, 2 GiB incompressible", 4096, "fill 2048", b"filled", 3, 6144),
    "d": Case("16 GiB, almost untouched", 16384, None, b"vmf: init is running", 3, 1024),
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
            watches = [MemoryWatch(host.pid("bench") or 0, case.memory_mib) for host in (source, target)]
            with source.client("bench") as client:
                started = time.monotonic()
                summary = client.teleport("127.0.0.1", port, max_downtime_ms=MAX_DOWNTIME_MS)
                total_ms = (time.monotonic() - started) * 1000
            peaks = [watch.stop() for watch in watches]
            results.append(
                Result(
                    total_ms,
                    summary["downtime_ns"] / 1e6,
                    summary["rounds"],
                    summary["bytes"] / 2**20,
                    peaks[0],
                    peaks[1],
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
                results.append(source.migrate(target.listen(), MAX_DOWNTIME_MS))
            except BaseException:
                target.close()
                raise
            source.close()
            source = target
    finally:
        source.close()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default="abcd")
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
    rows, memory_rows = [], []
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
            row += [f"{peer_total:.0f}", f"{peer_down:.0f}", f"{total / peer_total:.2f}", f"{down / peer_down:.2f}"]
        rows.append(row)
        memory_rows.append(
            [f"({key})", f"{max(r.source_mib for r in ours):.0f}", f"{max(r.target_mib for r in ours):.0f}"]
        )
        print(f"({key}) vmf total ms {[round(r.total_ms) for r in ours]}, downtime {[r.downtime_ms for r in ours]}")
        if theirs:
            totals, downtimes = [r["total-time"] for r in theirs], [r["downtime"] for r in theirs]
            print(f"    QEMU total ms {totals}, downtime {downtimes}", flush=True)
    print()
    header = ["case", "vmf total ms", "vmf downtime ms", "moved MiB", "GiB/s"]
    if PROGRAM:
        header += ["QEMU total ms", "QEMU downtime ms", "total ratio", "downtime ratio"]
    table(header, rows)
    table(["private memory, MiB (peak)", "source", "target"], memory_rows)


if __name__ == "__main__":
    main()
