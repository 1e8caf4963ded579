#!/usr/bin/env python3
"""What the KVM backend costs: exits, kicks, deadlines, save and restore, dirty tracking, teleports KVM to KVM.

    python benchmarks/bench_kvm.py

Sets VMF_KVM_TRUST=1 for itself, so that it measures any KVM; a KVM that fails the self-test is said to be one.
"""

from __future__ import annotations

import os
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

os.environ["VMF_KVM_TRUST"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "plugins/cpu_kvm/tests"))

import conftest as kit
from vmf.cpu.backend import ExitReason, VcpuEnvironment
from vmf.machine.bus import Bus
from vmf.machine.config import CpuidConfig, MachineConfig
from vmf.memory.guest import GuestMemory
from vmf.testing.guest.build import SOURCE, build
from vmf.testing.hosts import Host
from vmf_cpu_kvm import selftest
from vmf_cpu_kvm.backend import KvmBackend
from vmf_cpu_kvm.dirtylog import KvmDirtyLog


def say(what: str, value: str) -> None:
    print(f"{what:<52} {value}")


def quantiles(values: list[float], unit: str = "us") -> str:
    values.sort()
    pick = lambda share: values[min(int(len(values) * share), len(values) - 1)]  # noqa: E731
    return f"median {pick(0.5):8.1f} {unit}   99 % {pick(0.99):8.1f} {unit}   worst {values[-1]:8.1f} {unit}"


def exits(rig: kit.Rig, what: str, code: bytes) -> None:
    """`code` loops forever over exits; counts them for half a second."""
    rig.load(code)
    rig.ports.reads.clear()
    rig.mmio.reads.clear()
    rig.ports.writes.clear()
    started = time.perf_counter()
    rig.run(0.5)
    elapsed = time.perf_counter() - started
    count = len(rig.ports.reads) + len(rig.ports.writes) + len(rig.mmio.reads)
    say(what, f"{count / elapsed:12,.0f} /s   {elapsed / max(count, 1) * 1e6:6.2f} us each")


def kicks(rig: kit.Rig, count: int = 3000) -> None:
    rig.load(b"\xeb\xfe")
    latencies: list[float] = []
    kicked_at = 0.0
    go = threading.Semaphore(0)

    def loop() -> None:
        for _ in range(count):
            go.release()
            assert rig.vcpu.run(None).reason is ExitReason.KICKED
            latencies.append((time.perf_counter() - kicked_at) * 1e6)

    thread = threading.Thread(target=loop)
    thread.start()
    for _ in range(count):
        go.acquire()
        time.sleep(0.0002)
        kicked_at = time.perf_counter()
        rig.vcpu.kick()
    thread.join()
    say(f"kick to return, {count} kicks, {len(latencies)} arrived", quantiles(latencies))


def deadlines(rig: kit.Rig) -> None:
    rig.load(b"\xeb\xfe")
    late = []
    for _ in range(300):
        deadline = time.monotonic_ns() + 1_000_000
        rig.vcpu.run(deadline)
        late.append((time.monotonic_ns() - deadline) / 1e3)
    say("deadline of 1 ms: late by", quantiles(late))


def timed(what: str, count: int, function: Callable[[], object]) -> None:
    times = []
    for _ in range(count):
        started = time.perf_counter()
        function()
        times.append((time.perf_counter() - started) * 1e6)
    say(what, quantiles(times))


def dirty(backend: KvmBackend) -> None:
    """A guest that writes a byte in each of 16,384 pages; the log and the core's tracker side by side."""
    from vmf.memory.dirty_uffd import UffdTracker, uffd_unusable

    size, pages = 256 << 20, 16_384
    code = b"\xbf\x00\x00\x00\x04\xb9" + struct.pack("<I", pages) + b"\xfe\x07\x81\xc7\x00\x10\x00\x00\xe2\xf6\xf4"
    # mov edi, 64 MiB; mov ecx, pages; 1: inc byte [rdi]; add edi, 4096; loop 1b; hlt
    for name in ("none", "kvm log", "uffd"):
        memory = GuestMemory(size)
        environment = VcpuEnvironment(memory, Bus(), kit.ToyPic(), backend.cpuid_capability(), backend.tsc_khz())
        log = None
        if name == "kvm log":
            vcpu = backend.create_logging_vcpu(environment)
            log = KvmDirtyLog(vcpu.vm, memory)
        else:
            vcpu = backend.create_vcpu(environment)
        tracker = None
        if name == "uffd":
            if reason := uffd_unusable():
                say("dirty tracking by uffd", reason)
                continue
            tracker = UffdTracker(memory)
        runs, collects, found = [], [], 0
        for i in range(6):
            kit.load_guest(memory, code)
            vcpu.restore(kit.entry_state(backend.tsc_khz()))
            if i == 1 and tracker is not None:
                tracker.start()
            if i == 1 and log is not None:
                log.collect()
            started = time.perf_counter()
            while vcpu.run(None).reason is ExitReason.KICKED:
                pass
            run = time.perf_counter() - started
            started = time.perf_counter()
            if i and tracker is not None:
                found = int(sum(b - a for a, b in tracker.collect().tolist()))
            if i and log is not None:
                found = len(log.collect())
            if i > 1:
                runs.append(run * 1e3)
                collects.append((time.perf_counter() - started) * 1e3)
        if tracker is not None:
            tracker.stop()
        vcpu.close()
        memory.close()
        text = f"guest {min(runs):7.2f} ms   collect {min(collects):6.2f} ms   found {found}"
        say(f"write {pages} pages, tracker {name}", text)


def teleports(count: int = 10) -> None:
    """The built-in guest (without SSE, for a KVM that emulates ring 0) between two processes on KVM, back and forth.

    It writes memory without pause and prints a tick ten times a second, so there is pre-copy to do.
    """
    downtimes, totals, rounds = [], [], []
    with tempfile.TemporaryDirectory() as directory:
        image = Path(directory, "integer.bin")
        try:
            image.write_bytes(build(SOURCE, "INTEGER_ONLY"))
        except FileNotFoundError as error:
            say("teleports KVM to KVM", f"not measured: {error}")
            return
        config = MachineConfig(
            name="bench", memory_mib=64, image=image, cpu_backend="kvm", cpuid=CpuidConfig(portability_level="3")
        )
        with Host(Path(directory, "a")) as source, Host(Path(directory, "b")) as target:
            for host in (source, target):
                host.define(config)
            source.start("bench")
            source.wait_for_output("bench", b"tick 1 ")
            for _ in range(count):
                port = target.wait("bench")
                with source.client("bench") as client:
                    summary = client.teleport("127.0.0.1", port, max_downtime_ms=250)
                downtimes.append(summary["downtime_ns"] / 1e3)
                totals.append(summary["total_ns"] / 1e3)
                rounds.append(summary["rounds"])
                source.wait_gone("bench")
                source, target = target, source
            source.wait_for_more("bench")
    say(f"teleport KVM to KVM, {count} times: downtime", quantiles(downtimes))
    say("                         the whole of it", quantiles(totals))
    say("                         rounds of pre-copy", ", ".join(map(str, rounds)))


def main() -> int:
    backend = KvmBackend()
    here = backend.availability()
    if not here.usable:
        print(f"no KVM: {here.reason} {here.remedy}")
        return 1
    started = time.perf_counter()
    problems = selftest.run_selftest(backend._device, backend._open())
    say("self-test", f"{(time.perf_counter() - started) * 1e3:.1f} ms: {'; '.join(problems) or 'passed'}")
    timed("make and close a VM with its vCPU", 20, lambda: kit.Rig(backend).close())
    rig = kit.Rig(backend)
    setup = b"\x66\xba\x10\x05\xbf\x10\x00\x00\xe0"  # mov dx, 0x510; mov edi, 0xe0000010
    exits(rig, "IN, to a Python device", setup + b"\xec\xeb\xfd")
    exits(rig, "OUT, to a Python device", setup + b"\xee\xeb\xfd")
    code = setup + b"\x66\xba\x00\x09\xec\x66\xba\x10\x05\xee\xeb\xf4"  # IN from 0x900, OUT to 0x510
    exits(rig, "nobody's IN and an OUT", code)
    exits(rig, "MMIO read, to a Python device", setup + b"\x8b\x07\xeb\xfc")
    exits(rig, "REP OUTSB of 1 KiB (items)", setup + b"\xbe\x00\x00\x02\x00\xb9\x00\x04\x00\x00\xf3\x6e\xeb\xf2")
    kicks(rig)
    deadlines(rig)
    rig.load(kit.WORKLOAD)
    rig.run(0.01)
    state = rig.vcpu.save()
    timed("save", 500, rig.vcpu.save)
    timed("restore", 500, lambda: rig.vcpu.restore(state))
    rig.close()
    dirty(backend)
    teleports()
    return 0


if __name__ == "__main__":
    sys.exit(main())
