"""Stock Debian on cpu_kvm, under the self-checking stress, is switched to Unicorn and back, and traced.

    python3 switch_debian.py [--rounds N] [--timeout S]

Each round is KVM -> Unicorn -> KVM and a trace, at random instants; the guest's serial line is judged over all of it.
Runs in the lab, and on other hosts with hardware KVM.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from boot_debian import LEVEL, SPARING

import vmf
from vmf.machine.config import CpuidConfig
from vmf.machine.machine import wait_until
from vmf.testing.guests import selfcheck_guest
from vmf.testing.serial_check import check

INSTRUCTIONS = 3000


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=180, help="for the boot, and for a tick; seconds")
    options = parser.parse_args()
    guest = selfcheck_guest("run -m 2 -r 8 -t 20")
    registry = vmf.PluginRegistry()
    khz = registry.cpu_backend("kvm").tsc_khz()
    config = vmf.MachineConfig(
        name="debian",
        memory_mib=192,
        kernel=guest.kernel,
        initrd=guest.initrd,
        # loglevel: the kernel warns of late timers while the guest is slow
        cmdline=f"{guest.cmdline} tsc_early_khz={khz} {SPARING} loglevel=4",
        cpu_backend="kvm",
        cpuid=CpuidConfig(portability_level=LEVEL),
    )
    output = bytearray()
    with vmf.Machine(config, registry) as machine, tempfile.TemporaryDirectory() as folder:
        machine.console.add_listener(output.extend)

        def wait_for_ticks(more: int) -> bool:
            wanted = output.count(b"tick ") + more
            wait_until(lambda: output.count(b"tick ") >= wanted or bool(machine.failure), options.timeout)
            return output.count(b"tick ") >= wanted

        machine.start()
        began = time.monotonic()
        alive = wait_for_ticks(2)
        print(f"--- first ticks after {time.monotonic() - began:.1f} s", flush=True)
        for number in range(options.rounds if alive else 0):
            for backend in ("unicorn", "kvm"):
                summary = machine.switch_backend(backend)
                print(f"--- {summary}", flush=True)
                time.sleep(random.random())
                if not wait_for_ticks(1):
                    print(f"--- FAILED: no tick on {backend}; {machine.failure}")
                    alive = False
                    break
            if not alive:
                break
            traced = machine.trace(INSTRUCTIONS, Path(folder) / "trace")
            print(f"--- round {number + 1}: {traced}", flush=True)
        alive = alive and wait_for_ticks(2)
        report = check(bytes(output[: output.rindex(b"\n") + 1])) if b"\n" in output else None
        print(output[-1500:].decode(errors="replace"))
        print(f"--- {machine.state.value} on {machine.info()['cpu_backend_used']} {machine.failure}")
        print(f"--- {report}")
    return 0 if alive and report is not None and report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
