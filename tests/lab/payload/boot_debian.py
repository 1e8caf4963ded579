"""Boots a stock Debian cloud kernel with a busybox initrd to a shell, types at it, and says how long it took.

    python3 boot_debian.py [--backend kvm|unicorn] [--memory MIB] [--timeout S]

Runs in the lab, and elsewhere.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

import vmf
from vmf.cpu.backend import CpuBackend
from vmf.cpuid.contract import without
from vmf.cpuid.table import CpuidTable
from vmf.machine.machine import wait_until
from vmf.testing.guests import linux_guest


class LabMachine(vmf.Machine):
    """A machine whose guest sees no XSAVE: see README.md about QEMU and XSETBV."""

    def _contract(self, backend: CpuBackend) -> CpuidTable:
        contract = super()._contract(backend)
        return without(contract, "xsave") if os.environ.get("VMF_LAB") else contract


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="kvm")
    parser.add_argument("--memory", type=int, default=256)
    parser.add_argument("--timeout", type=float, default=120)
    parser.add_argument("--cmdline", default="")
    options = parser.parse_args()
    guest = linux_guest()
    config = vmf.MachineConfig(
        name="debian",
        memory_mib=options.memory,
        kernel=guest.kernel,
        initrd=guest.initrd,
        cmdline=f"{guest.cmdline} {options.cmdline}",
        cpu_backend=options.backend,
    )
    with LabMachine(config) as machine:
        return boot(machine, options.timeout)


def boot(machine: vmf.Machine, timeout: float) -> int:
    def seen(words: bytes, seconds: float) -> bool:
        wait_until(lambda: words in machine.console.scrollback() or bool(machine.failure), seconds)
        return words in machine.console.scrollback()

    began = time.monotonic()
    machine.start()
    started = time.monotonic()
    up = seen(b"init is running", timeout)
    ready = time.monotonic()
    answered = False
    if up:
        seen(b"# ", 30)
        machine.type(b"echo answer $((6*7)); grep -c processor /proc/cpuinfo; grep model.name /proc/cpuinfo\n")
        answered = seen(b"answer 42", 30) and seen(b"model name", 30)
    print(machine.console.scrollback().decode(errors="replace"))
    print(f"\n--- {machine.info()}")
    print(f"--- start {started - began:.2f} s, to init {ready - began:.2f} s on {machine.config.cpu_backend}")
    if not answered:
        print(f"--- FAILED: {'no answer' if up else 'no init'}; {machine.failure}")
    return 0 if answered else 1


if __name__ == "__main__":
    sys.exit(main())
