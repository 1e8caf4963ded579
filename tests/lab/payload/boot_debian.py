"""Boots a stock Debian cloud kernel with a busybox initrd to a shell, types at it, and says how long it took.

    python3 boot_debian.py [--backend kvm|unicorn] [--memory MIB] [--timeout S]

Runs in the lab, and elsewhere.
"""

from __future__ import annotations

import argparse
import sys
import time

import vmf
from vmf.machine.config import CpuidConfig
from vmf.machine.machine import wait_until
from vmf.testing.guests import linux_guest

LEVEL = "3"
"""x86-64-v2: no XSAVE, which QEMU breaks for guests in the lab (see README.md)."""

SPARING = "quiet highres=off nohz=off"
"""Few exits: no log on the console, and a tick that the 8254 repeats by itself."""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="kvm")
    parser.add_argument("--memory", type=int, default=256)
    parser.add_argument("--timeout", type=float, default=120)
    parser.add_argument("--cmdline", default=SPARING, help="more for the kernel")
    options = parser.parse_args()
    guest = linux_guest()
    registry = vmf.PluginRegistry()
    khz = registry.cpu_backend(options.backend).tsc_khz()
    config = vmf.MachineConfig(
        name="debian",
        memory_mib=options.memory,
        kernel=guest.kernel,
        initrd=guest.initrd,
        cmdline=f"{guest.cmdline} tsc_early_khz={khz} {options.cmdline}",
        cpu_backend=options.backend,
        cpuid=CpuidConfig(portability_level=LEVEL),
    )
    with vmf.Machine(config, registry) as machine:
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
