"""Time from starting the process to the guest's init, beside QEMU (TCG), in turns in the same run.

    python benchmarks/bench_boot.py [--runs 5]

Both boot the same unmodified Debian cloud kernel with the same initrd and command line; QEMU as `-M microvm`. The
ratio is vmf / QEMU, pair by pair: below 1 vmf is faster.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from common import machine_line, median, table
from peer import PROGRAM, Qemu, version
from vmf.machine.config import MachineConfig
from vmf.testing.guests import linux_guest
from vmf.testing.hosts import Host

READY = b"vmf: init is running"


def boot_vmf(host: Host, memory_mib: int) -> float:
    guest = linux_guest()
    host.define(
        MachineConfig(
            name="bench",
            memory_mib=memory_mib,
            kernel=guest.kernel,
            initrd=guest.initrd,
            cmdline=guest.cmdline,
            cpu_backend="unicorn",
        )
    )
    started = time.monotonic()
    host.start("bench")
    host.wait_for_output("bench", READY)
    elapsed = time.monotonic() - started
    with host.client("bench") as client:
        client.power_off()
    host.wait_gone("bench")
    return elapsed


def boot_qemu(memory_mib: int) -> float:
    """QEMU's microvm sometimes hangs before the kernel's first line; such a start is tried again and said."""
    guest = linux_guest()
    while True:
        with Qemu(guest.kernel, guest.initrd, guest.cmdline, memory_mib) as qemu:
            try:
                return qemu.wait_for_output(READY, timeout=40)
            except RuntimeError as error:
                print(f"QEMU did not reach init, trying again: {error}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--memory", type=int, default=256, help="MiB")
    options = parser.parse_args()
    print(f"Boot to init. {machine_line()}. {version() or 'QEMU is not installed: no peer'}.\n")
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as directory, Host(Path(directory)) as host:
        boot_vmf(host, options.memory)  # warm caches
        for _ in range(options.runs):
            ours.append(boot_vmf(host, options.memory))
            if PROGRAM:
                theirs.append(boot_qemu(options.memory))
    rows = [["vmf (Unicorn)", f"{median(ours):.2f}", f"{min(ours):.2f}", f"{max(ours):.2f}"]]
    if theirs:
        ratios = [own / peer for own, peer in zip(ours, theirs, strict=True)]
        rows.append([f"{version()} TCG, microvm", f"{median(theirs):.2f}", f"{min(theirs):.2f}", f"{max(theirs):.2f}"])
        rows.append(["ratio", f"{median(ratios):.2f}", f"{min(ratios):.2f}", f"{max(ratios):.2f}"])
    table(["seconds to init", "median", "min", "max"], rows)


if __name__ == "__main__":
    main()
