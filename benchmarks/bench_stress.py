"""A self-checking Linux guest through many teleports at random instants between alternating processes.

    python benchmarks/bench_stress.py [--hops 30] [--seed N]

The guest checks integer, x87, SSE, memory, fork, signals, timers and clocks without pause; every byte it prints is
checked for loss and repetition across all hosts; its kernel's complaints count as failures. Exits with 1 on any.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from common import machine_line, median, table
from vmf.machine.config import MachineConfig
from vmf.testing.guests import selfcheck_guest
from vmf.testing.hosts import Host
from vmf.testing.serial_check import check


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hops", type=int, default=30)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--memory", type=int, default=256, help="MiB")
    parser.add_argument("--backends", default="unicorn", help="of the two hosts, comma-separated")
    options = parser.parse_args()
    randomness = random.Random(options.seed)
    guest = selfcheck_guest("run -m 16 -r 64 -t 20")
    backends = options.backends.split(",")
    print(f"Self-checking stress, {options.hops} hops, seed {options.seed}. {machine_line()}.\n", flush=True)
    downtimes, totals, output = [], [], b""
    with (
        tempfile.TemporaryDirectory() as directory,
        Host(Path(directory, "a")) as here,
        Host(Path(directory, "b")) as there,
    ):
        for number, host in enumerate((here, there)):
            host.define(
                MachineConfig(
                    name="stress",
                    memory_mib=options.memory,
                    kernel=guest.kernel,
                    initrd=guest.initrd,
                    cmdline=f"{guest.cmdline} loglevel=5",  # notices would come in the middle of the guest's lines
                    cpu_backend=backends[number % len(backends)],
                )
            )
        here.start("stress")
        here.wait_for_output("stress", b"tick 5 ", timeout=120)
        source, target = here, there
        for hop in range(options.hops):
            port = target.wait("stress")
            time.sleep(randomness.random())
            with source.client("stress") as client:
                summary = client.teleport("127.0.0.1", port)
            downtimes.append(summary["downtime_ns"] / 1e6)
            totals.append(summary["total_ns"] / 1e6)
            source.wait_gone("stress")
            output += source.output("stress")
            source, target = target, source
            print(f"hop {hop + 1}: downtime {downtimes[-1]:.1f} ms, total {totals[-1]:.0f} ms", flush=True)
        time.sleep(2)
        with source.client("stress") as client:
            client.power_off()
        source.wait_gone("stress")
        output += source.output("stress")
    report = check(output)
    print()
    table(
        ["hops", "ticks", "guest rounds", "downtime median ms", "max", "total median ms", "problems"],
        [[options.hops, report.ticks, report.rounds, f"{median(downtimes):.1f}", f"{max(downtimes):.1f}",
          f"{median(totals):.0f}", len(report.problems)]],
    )  # fmt: skip
    for problem in report.problems[:20]:
        print(problem)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
