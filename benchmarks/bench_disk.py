"""Disk throughput inside the guest beside QEMU (TCG), in turns in the same run.

    python benchmarks/bench_disk.py [--runs 3] [--seconds 3] [--mib 256] [--directory DIR]

Both run the same Debian cloud kernel with the same initrd and the same measuring program (`diskcheck bench`, see
vmf/testing/guest/diskcheck.c) on a virtio-blk-pci disk whose image is a copy of the same raw file; QEMU as `-M pc` with
its default write-back cache and thread pool. All transfers bypass the guest's page cache except the "stream" rows; the
host's page cache is warm for both. The ratio is vmf / QEMU, pair by pair: above 1 vmf is faster.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path

from common import machine_line, median, table
from peer import PROGRAM, Qemu, version
from vmf.machine.config import DriveConfig, MachineConfig
from vmf.testing.disks import diskcheck_guest
from vmf.testing.guests import LinuxGuest
from vmf.testing.hosts import Host

DONE = b"bench done"
_LINE = re.compile(rb"bench (\S+) ([0-9.]+) (\S+)\r?\n")


def results(output: bytes) -> dict[str, float]:
    """By "name, unit"."""
    return {f"{name.decode()}, {unit.decode()}": float(value) for name, value, unit in _LINE.findall(output)}


def image(directory: Path, mib: int) -> Path:
    """A new image full of data, so that no hole is read."""
    path = directory / "disk.img"
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        for _ in range(mib):
            file.write(b"\xa5" * (1 << 20))
    return path


def run_vmf(host: Host, guest: LinuxGuest, disk: Path, timeout: float) -> dict[str, float]:
    host.define(
        MachineConfig(
            name="bench",
            memory_mib=256,
            kernel=guest.kernel,
            initrd=guest.initrd,
            cmdline=guest.cmdline,
            cpu_backend="unicorn",
            devices=("pc", "virtio"),
            drives=(DriveConfig(port=0, medium=str(disk)),),
        )
    )
    host.start("bench")
    output = host.wait_for_output("bench", DONE, timeout)
    with host.client("bench") as client:
        client.power_off()
    host.wait_gone("bench")
    return results(output)


def run_qemu(guest: LinuxGuest, disk: Path, timeout: float) -> dict[str, float]:
    extra = ["-drive", f"file={disk},format=raw,if=none,id=disk", "-device", "virtio-blk-pci,drive=disk"]
    with Qemu(guest.kernel, guest.initrd, guest.cmdline, 256, machine="pc", extra=extra) as qemu:
        qemu.wait_for_output(DONE, timeout)
        return results(qemu.output())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3, help="for each row")
    parser.add_argument("--mib", type=int, default=256, help="size of the disk")
    parser.add_argument("--directory", type=Path, help="where the image is made; a temporary one by default")
    options = parser.parse_args()
    guest = diskcheck_guest(f"bench /dev/vda {options.mib} {options.seconds:g}")
    timeout = 120 + 20 * options.seconds
    print(f"Disk I/O in the guest. {machine_line()}. {version() or 'QEMU is not installed: no peer'}.\n", flush=True)
    ours: list[dict[str, float]] = []
    theirs: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(dir=options.directory) as directory, Host(Path(directory, "host")) as host:
        for _ in range(options.runs):
            ours.append(run_vmf(host, guest, image(Path(directory), options.mib), timeout))
            if PROGRAM:
                theirs.append(run_qemu(guest, image(Path(directory), options.mib), timeout))
    rows = []
    for name in ours[0]:
        row = [name, f"{median([run[name] for run in ours]):.0f}"]
        if theirs:
            row.append(f"{median([run[name] for run in theirs]):.0f}")
            ratios = [own[name] / peer[name] for own, peer in zip(ours, theirs, strict=True)]
            row.append(f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
        rows.append(row)
    table(["", "vmf (Unicorn)", *([f"{version()} TCG, pc", "ratio"] if theirs else [])], rows)


if __name__ == "__main__":
    main()
