"""A guest that writes without pause is teleported between two hosts that see its disk by different mounts or devices.

    shared_machines.py MEDIUM_A MEDIUM_B [--hops 2] [--backend kvm|unicorn] [--timeout S]

A medium is a directory (the disk is made in it) or a URI, as for `shared_storage.py`. The guest says which of its
writes are flushed; at the end every one of them must be there, as seen from either side, and the lease free at the
generation that so many hops leave behind. Runs in the lab, and elsewhere.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

from boot_debian import LEVEL, SPARING

import vmf
from vmf.machine.config import CpuidConfig, DriveConfig
from vmf.storage.media import lease_of
from vmf.storage.uri import scheme_of
from vmf.testing.disks import diskcheck_guest
from vmf.testing.hosts import Host

BLOCK = 4096
BLOCKS = 256
SLOWDOWN = int(os.environ.get("VMF_LAB_SLOWDOWN", "1"))
_MASK = (1 << 64) - 1


def stamp(number: int, generation: int) -> bytes:
    """What `diskcheck stamp` writes."""
    words = [number, generation]
    state = ((number << 32 ^ generation) * 0x9E3779B97F4A7C15 & _MASK) | 1
    for _ in range(BLOCK // 8 - 2):
        state ^= state << 13 & _MASK
        state ^= state >> 7
        state ^= state << 17 & _MASK
        words.append(state)
    return b"".join(word.to_bytes(8, "little") for word in words)


def lost(registry: vmf.PluginRegistry, medium: str, last: int) -> list[int]:
    """The acknowledged writes that are not there; a later one in the same place is as good."""
    image = registry.storage(scheme_of(medium)).open(medium, True)
    missing = []
    try:
        for number in range(max(0, last - BLOCKS + 1), last + 1):
            block = bytearray(BLOCK)
            image.readv(number % BLOCKS * BLOCK, [memoryview(block)])
            generation = int.from_bytes(block[8:16], "little")
            if generation <= number or block != stamp(number % BLOCKS, generation):
                missing.append(number)
    finally:
        image.close()
    return missing


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("media", nargs=2)
    parser.add_argument("--hops", type=int, default=2)
    parser.add_argument("--backend", default="kvm")
    parser.add_argument("--timeout", type=float, default=180, help="for the boot, and for a write; seconds")
    options = parser.parse_args()
    registry = vmf.PluginRegistry()
    media = [f"{Path(each).resolve()}/machine.img" if Path(each).is_dir() else each for each in options.media]
    if Path(options.media[0]).is_dir():
        registry.storage("file").create(media[0], BLOCKS * BLOCK)
    guest = diskcheck_guest(f"stamp /dev/vda {BLOCKS}")
    khz = registry.cpu_backend(options.backend).tsc_khz()
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"shared machines: {(time.monotonic() - began) * SLOWDOWN:.0f} s: {text}", flush=True)

    say(f"{media[0]}, on {registry.storage(scheme_of(media[0])).probe(media[0]).where}")
    before = lease_of(registry, media[0]).generation
    numbers: list[int] = []
    with (
        tempfile.TemporaryDirectory() as directory,
        Host(Path(directory, "a")) as source,
        Host(Path(directory, "b")) as target,
    ):
        for host, medium in ((source, media[0]), (target, media[1])):
            host.define(
                vmf.MachineConfig(
                    name="vm",
                    memory_mib=128,
                    kernel=guest.kernel,
                    initrd=guest.initrd,
                    cmdline=f"{guest.cmdline} tsc_early_khz={khz} {SPARING} loglevel=4",
                    cpu_backend=options.backend,
                    cpuid=CpuidConfig(portability_level=LEVEL),
                    devices=("pc", "virtio"),
                    drives=(DriveConfig(port=0, medium=medium),),
                )
            )
        source.start("vm")
        source.wait_for_output("vm", b"stamped 5", timeout=options.timeout)
        say("the guest writes")
        for hop in range(1, options.hops + 1):
            port = target.wait("vm")
            with source.client("vm") as client:
                summary = client.teleport("127.0.0.1", port, max_downtime_ms=2000)
            source.wait_gone("vm")
            target.wait_for_more("vm", b"stamped ", timeout=options.timeout)
            output = source.output("vm") + target.output("vm")
            numbers += [int(each) for each in re.findall(rb"stamped (\d+)\r?\n", output)]
            if b"FAILED" in output or b"I/O error" in output:
                say(f"the guest's disk failed: {output[-500:]!r}")
                return 1
            say(f"hop {hop}: downtime {summary['downtime_ns'] * SLOWDOWN / 1e6:.0f} ms, {max(numbers)} writes")
            source, target = target, source
        with source.client("vm") as client:
            client.power_off()
        source.wait_gone("vm")
        numbers += [int(each) for each in re.findall(rb"stamped (\d+)\r?\n", source.output("vm"))]
    for medium in media:
        missing = lost(registry, medium, max(numbers))
        if missing:
            say(f"lost, as seen at {medium}: {missing}")
            return 1
        lease = lease_of(registry, medium)
        if (lease.standing, lease.generation) != ("free", before + options.hops + 1):
            say(f"the lease is {lease}")
            return 1
    say(f"OK: {max(numbers) + 1} acknowledged writes, none lost")
    return 0


if __name__ == "__main__":
    sys.exit(main())
