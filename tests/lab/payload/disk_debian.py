"""Stock Debian's kernel on cpu_kvm checks a virtio disk without pause, is switched to Unicorn and back, and paused.

    python3 disk_debian.py [--rounds N] [--timeout S] [--backend kvm|unicorn]

Four processes in the guest write, read, zero and discard past the page cache, and compare. Runs in the lab, and on
other hosts with hardware KVM.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import tempfile
import time
from pathlib import Path

from boot_debian import LEVEL, SPARING

import vmf
from vmf.machine.config import CpuidConfig, DriveConfig
from vmf.machine.machine import wait_until
from vmf.testing.disks import diskcheck_guest

DISK_MIB = 32
_ROUNDS = re.compile(rb"diskcheck: ok rounds=(\d+) ")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=180, help="for the boot, and for a report; seconds")
    parser.add_argument("--backend", default="kvm")
    options = parser.parse_args()
    guest = diskcheck_guest(f"check /dev/vda -m {DISK_MIB} -z")
    registry = vmf.PluginRegistry()
    khz = registry.cpu_backend(options.backend).tsc_khz()
    with tempfile.TemporaryDirectory() as folder:
        disk = Path(folder, "disk.img")
        with disk.open("wb") as file:
            file.truncate(DISK_MIB << 20)
        config = vmf.MachineConfig(
            name="debian",
            memory_mib=192,
            kernel=guest.kernel,
            initrd=guest.initrd,
            cmdline=f"{guest.cmdline} tsc_early_khz={khz} {SPARING} loglevel=4",
            cpu_backend=options.backend,
            cpuid=CpuidConfig(portability_level=LEVEL),
            devices=("pc", "virtio"),
            drives=(DriveConfig(port=0, medium=str(disk)),),
        )
        with vmf.Machine(config, registry) as machine:
            output = bytearray()
            machine.console.add_listener(output.extend)
            good = check(machine, output, options.rounds, options.timeout)
            print(output[-1500:].decode(errors="replace"))
            print(f"--- {machine.state.value} {machine.failure}")
            if not good:
                for payload in machine.hardware.save():
                    print(f"--- {payload}")
    return 0 if good else 1


def check(machine: vmf.Machine, output: bytearray, rounds: int, timeout: float) -> bool:
    def reports(more: int) -> bool:
        wanted = len(_ROUNDS.findall(output)) + more
        wait_until(lambda: len(_ROUNDS.findall(output)) >= wanted or bool(machine.failure), timeout)
        return len(_ROUNDS.findall(output)) >= wanted

    machine.start()
    began = time.monotonic()
    alive = reports(2)
    print(f"--- first reports after {time.monotonic() - began:.1f} s on {machine.config.cpu_backend}", flush=True)
    for _ in range(rounds):
        for backend in ("unicorn", machine.config.cpu_backend):
            if alive:
                print(f"--- {machine.switch_backend(backend)}", flush=True)
                time.sleep(random.random())
                machine.pause()
                machine.resume()
                alive = reports(1)
    alive = alive and reports(2)
    counts = [int(count) for count in _ROUNDS.findall(output)]
    return alive and counts[-1] > counts[0] and b"MISMATCH" not in output and b"FAILED" not in output


if __name__ == "__main__":
    sys.exit(main())
