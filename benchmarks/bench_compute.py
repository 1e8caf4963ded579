"""How fast guests compute: vmf on Unicorn beside QEMU (TCG), in turns in the same run.

    python benchmarks/bench_compute.py [--runs 3]

Both boot the same unmodified Debian cloud kernel and run the same program (`vmf/testing/guest/compute.c`), loops of
fixed work. A loop's time is taken here, from the lines that the guest prints before and after it, and is the processor
time of the whole process, so that a busy host changes little; its result must be the same on both. The ratio is vmf /
QEMU, pair by pair: below 1 vmf is faster.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from common import machine_line, median, table
from peer import PROGRAM, Qemu, version
from vmf.machine.config import MachineConfig
from vmf.machine.machine import Machine
from vmf.testing.guests import LinuxGuest, compiled, linux_guest

LIMIT_S = 300.0
_LINE = re.compile(rb"^(begin|end) (\w+)(?: ([0-9a-f]{16}))?\r?$", re.MULTILINE)
MEANING = {
    "integer": "64-bit shifts and XORs in registers",
    "sort": "qsort of a million numbers: calls and branches",
    "copy": "800 MiB through a loop of loads and stores",
    "chase": "30 million dependent loads",
    "matrix": "double-precision products (SSE2)",
    "syscalls": "a million system calls",
    "faults": "40,960 page faults",
}


def processor_seconds(pid: int) -> float:
    """Of all threads of a process (proc(5), schedstat)."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


class Stopwatch:
    """Times the loops by what has been printed so far."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.begun: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self.results: dict[str, bytes] = {}

    def look(self, output: bytes) -> bool:
        """Whether the program is through."""
        now = processor_seconds(self._pid)
        for match in _LINE.finditer(output):
            name = match[2].decode()
            if match[1] == b"begin":
                self.begun.setdefault(name, now)
            elif name not in self.seconds:
                self.seconds[name] = now - self.begun[name]
                self.results[name] = match[3]
        return b"all done" in output


def watch(pid: int, output: Callable[[], bytes]) -> Stopwatch:
    stopwatch, end = Stopwatch(pid), time.monotonic() + LIMIT_S
    while not stopwatch.look(output()):
        if time.monotonic() > end:
            raise SystemExit(f"The guest is not through after {LIMIT_S:.0f} s: ...{output()[-300:]!r}")
        time.sleep(0.005)
    return stopwatch


def run_vmf(guest: LinuxGuest) -> Stopwatch:
    config = MachineConfig(
        name="bench", memory_mib=256, kernel=guest.kernel, initrd=guest.initrd, cmdline=guest.cmdline,
        cpu_backend="unicorn",
    )  # fmt: skip
    output = bytearray()
    with Machine(config) as machine:
        machine.console.add_listener(output.extend)
        machine.start()
        return watch(os.getpid(), lambda: bytes(output))


def run_qemu(guest: LinuxGuest) -> Stopwatch:
    with Qemu(guest.kernel, guest.initrd, guest.cmdline, 256) as qemu:
        return watch(qemu.process.pid, qemu.output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    print(f"Compute. {machine_line()}. {version() or 'QEMU is not installed: no peer'}.\n")
    program = compiled("compute").require().read_bytes()
    guest = linux_guest("/bin/compute", {"bin/compute": program})
    ours, theirs = [], []
    for _ in range(options.runs):
        ours.append(run_vmf(guest))
        if PROGRAM:
            theirs.append(run_qemu(guest))
            if ours[-1].results != theirs[-1].results:
                raise SystemExit(f"The results differ: {ours[-1].results} and {theirs[-1].results}.")
    rows = []
    for name, meaning in MEANING.items():
        row = [name, meaning, f"{median([run.seconds[name] for run in ours]):.2f}"]
        if theirs:
            pairs = zip(ours, theirs, strict=True)
            ratios = [own.seconds[name] / peer.seconds[name] for own, peer in pairs]
            row += [
                f"{median([run.seconds[name] for run in theirs]):.2f}",
                f"{median(ratios):.2f}",
                f"{min(ratios):.2f}-{max(ratios):.2f}",
            ]
        rows.append(row)
    peer = ["QEMU TCG, s", "ratio", "range"] if theirs else []
    table(["loop", "what it does", "vmf (Unicorn), s", *peer], rows)


if __name__ == "__main__":
    main()
