"""Stock Debian under the self-checking stress is teleported between processes on cpu_kvm and cpu_unicorn.

    python3 teleport_debian.py [--route kvm,kvm,unicorn,kvm,...] [--within S] [--switch] [--timeout S]

The route names the backend on which the machine boots and that of the target of every move. Between moves the guest
must print ticks; at the end all that it printed is judged, on all hosts together: lost and repeated bytes, what it
found wrong in its own arithmetic, memory, processes, signals and clocks, and what its kernel complained about.
With --within the route ends early when that time is over (by the clock outside), though not before a move of each kind.
With --switch the last process is also switched to the other backend and back, by the `vmf` command.

While the guest prints its ticks, the process that it goes to next is started already: in the lab that takes as long.

Runs in the lab, and on other hosts with hardware KVM.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from attrs import evolve
from boot_debian import LEVEL, SPARING

import vmf
from vmf.machine.config import CpuidConfig
from vmf.testing.guests import selfcheck_guest
from vmf.testing.hosts import Host
from vmf.testing.serial_check import check

ROUTE = "kvm,kvm,unicorn,kvm,kvm,unicorn,kvm,kvm,unicorn,kvm,kvm"
SLOWDOWN = int(os.environ.get("VMF_LAB_SLOWDOWN", "1"))
NAME = "debian"
STRESS = "run -m 2 -r 8 -t 250 -p 10"
"""With pauses, and not too many lines: a byte on the serial port is two exits, and exits are dear in the lab."""
DOWNTIME_MS = 2000
"""In the lab's time. A small goal costs many rounds in which all of RAM is compared, and shows nothing more."""


def watch(progress: Mapping[str, Any]) -> None:
    print(f"    {time.monotonic() * SLOWDOWN:.1f} {progress}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--route", default=ROUTE)
    parser.add_argument("--within", type=float, default=float("inf"), help="no further move after so many seconds")
    parser.add_argument("--switch", action="store_true")
    parser.add_argument("--verbose", action="store_true", help="tell of each teleport's progress")
    parser.add_argument("--memory", type=int, default=128, help="MiB")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--timeout", type=float, default=180, help="for the boot, and for a tick; seconds")
    options = parser.parse_args()
    randomness = random.Random(options.seed)
    route = options.route.split(",")
    guest = selfcheck_guest(STRESS)
    khz = vmf.PluginRegistry().cpu_backend("kvm").tsc_khz()
    print(f"--- route {' > '.join(route)}; seed {options.seed}", flush=True)
    config = vmf.MachineConfig(
        name=NAME,
        memory_mib=options.memory,
        kernel=guest.kernel,
        initrd=guest.initrd,
        # loglevel: the kernel's warnings of late timers would come in the middle of the guest's lines
        cmdline=f"{guest.cmdline} tsc_early_khz={khz} {SPARING} loglevel=4",
        cpu_backend=route[0],
        cpuid=CpuidConfig(portability_level=LEVEL),
    )
    moves: Counter[str] = Counter()
    kinds = {f"{before} > {after}" for before, after in itertools.pairwise(route)}
    output = b""
    began = time.monotonic()

    def elapsed() -> float:
        return (time.monotonic() - began) * SLOWDOWN

    def wait_for_the_machine(host: Host, backend: str) -> int:
        host.define(evolve(config, cpu_backend=backend))
        return host.wait(NAME)

    with (
        tempfile.TemporaryDirectory() as directory,
        Host(Path(directory, "a")) as source,
        Host(Path(directory, "b")) as target,
        ThreadPoolExecutor(1) as beside,
    ):
        source.define(config)
        source.start(NAME)
        waiting = beside.submit(wait_for_the_machine, target, route[1])
        source.wait_for_output(NAME, b"tick 3 ", timeout=options.timeout)
        print(f"--- first ticks after {elapsed():.1f} s", flush=True)
        for number, (before, after) in enumerate(itertools.pairwise(route), 1):
            port = waiting.result()
            time.sleep(randomness.random())
            begun = elapsed()
            with source.client(NAME) as client:
                summary = client.teleport(
                    "127.0.0.1", port, max_downtime_ms=DOWNTIME_MS, progress=watch if options.verbose else None
                )
            took = elapsed() - begun
            source.wait_gone(NAME)
            output += source.output(NAME)
            source, target = target, source
            moves[f"{before} > {after}"] += 1
            last = number == len(route) - 1 or (elapsed() > options.within and set(moves) == kinds)
            if not last:
                waiting = beside.submit(wait_for_the_machine, target, route[number + 1])
            source.wait_for_more(NAME, timeout=options.timeout)
            with source.client(NAME) as client:
                used = client.info()["cpu_backend_used"]
            if used != after:
                print(f"--- FAILED: arrived on {used} instead of {after}")
                return 1
            times = {key[:-3]: round(value * SLOWDOWN / 1e6) for key, value in summary.items() if key.endswith("_ns")}
            moved = f"{summary['rounds']} rounds, {summary['bytes'] >> 20} MiB, tracker {summary['tracker']}"
            print(f"--- {elapsed():.0f} s: {number}. {before} > {after}: {took:.1f} s, {times} ms, {moved}; ", end="")
            print("ticks go on", flush=True)
            if last:
                break
        if options.switch:
            here = after
            there = "unicorn" if here == "kvm" else "kvm"
            for backend in (there, here):
                done = source.vmf("controlvm", NAME, "switch-backend", backend, timeout=options.timeout)
                print(f"--- switch-backend {backend}: {done.stdout.strip()} {done.stderr.strip()}", flush=True)
                if done.returncode:
                    return 1
                source.wait_for_more(NAME, timeout=options.timeout)
        with source.client(NAME) as client:
            client.power_off()
        source.wait_gone(NAME)
        output += source.output(NAME)
    report = check(output)
    print(output[-600:].decode(errors="replace"))
    print(f"--- {report}")
    for problem in report.problems[:20]:
        print(f"--- PROBLEM: {problem}")
    print(f"--- {moves.total()} moves: {json.dumps(moves)}; {report.ticks} ticks, {report.rounds} rounds,", end=" ")
    print(f"{len(report.problems)} problems")
    if place := os.environ.get("VMF_LAB_RESULTS"):
        Path(place, "serial.log").write_bytes(output)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
