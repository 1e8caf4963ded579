"""A Debian root file system on a virtio disk boots to a login prompt, and a program of it answers.

    python3 root_debian.py [--backend kvm|unicorn] [--medium IMAGE] [--timeout S]

In the lab the disk is the one that the lab itself runs from, only read; elsewhere that of `vmf.testing.disks`. What
runs as the first process is Debian's getty, as that needs no disk to be written. Runs in the lab, and elsewhere.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from boot_debian import LEVEL, SPARING

import vmf
from vmf.machine.config import CpuidConfig, DriveConfig
from vmf.machine.machine import wait_until
from vmf.testing import disks

SHELL = "/sbin/agetty --noclear --skip-login --login-program /bin/bash ttyS0 115200 vt100"
PROMPT = "/sbin/agetty --noclear ttyS0 115200 vt100"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="kvm")
    parser.add_argument("--medium", default="/dev/vda" if os.environ.get("VMF_LAB") else "")
    parser.add_argument("--timeout", type=float, default=200)
    options = parser.parse_args()
    medium = options.medium or str(disks.debian_root().require())
    good = boots(options.backend, medium, PROMPT, b"login:", options.timeout)
    return 0 if good and boots(options.backend, medium, SHELL, b"DISTRIB=debian", options.timeout) else 1


def boots(backend: str, medium: str, program: str, expected: bytes, timeout: float) -> bool:
    guest = disks.root_guest(program, "-o ro")
    registry = vmf.PluginRegistry()
    khz = registry.cpu_backend(backend).tsc_khz()
    config = vmf.MachineConfig(
        name="debian",
        memory_mib=192,
        kernel=guest.kernel,
        initrd=guest.initrd,
        cmdline=f"{guest.cmdline} tsc_early_khz={khz} {SPARING} loglevel=4",
        cpu_backend=backend,
        cpuid=CpuidConfig(portability_level=LEVEL),
        devices=("pc", "virtio"),
        drives=(DriveConfig(port=0, medium=medium, read_only=True),),
    )
    with vmf.Machine(config, registry) as machine:
        output = bytearray()
        machine.console.add_listener(output.extend)
        began = time.monotonic()
        machine.start()
        if program is SHELL:
            wait_until(lambda: b"# " in output or bool(machine.failure), timeout)
            machine.type(b". /etc/os-release; echo DISTRIB=$ID\n")
        wait_until(lambda: expected in output or bool(machine.failure), timeout)
        print(output[-600:].decode(errors="replace"))
        print(f"--- {expected!r} {'came' if expected in output else 'did not come'} on {backend} from {medium}", end="")
        print(f" within {time.monotonic() - began:.1f} s", flush=True)
        return expected in output


if __name__ == "__main__":
    sys.exit(main())
