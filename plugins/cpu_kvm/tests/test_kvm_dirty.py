"""Dirty tracking of a KVM guest: the core's tracker and KVM's own log agree."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from vmf.cpu.backend import VcpuEnvironment
from vmf.machine.bus import Bus
from vmf.memory.guest import GuestMemory


def touch(pages: list[int]) -> bytes:
    """Code that increments a byte in each page, then halts."""
    code = b"".join(b"\xfe\x04\x25" + struct.pack("<I", page * 4096 + 0x123) for page in pages)
    return code + b"\xf4"


def test_a_log_that_is_started_while_the_guest_exists(kvm: Any, kit: Any) -> None:
    memory = GuestMemory(8 << 20, huge_pages=False)
    vcpu = kvm.create_vcpu(VcpuEnvironment(memory, Bus(), kit.ToyPic(), kvm.cpuid_capability(), kvm.tsc_khz()))
    try:
        log = vcpu.write_log()
        assert log is not None

        def run(pages: list[int]) -> None:
            kit.load_guest(memory, touch(pages))
            vcpu.restore(kit.entry_state(kvm.tsc_khz()))
            assert vcpu.run(None).reason is kit.ExitReason.HALTED

        def logged() -> list[int]:
            return [page for page in log.collect().tolist() if page >= 256]

        run([600, 700])
        for _ in range(2):
            log.start()
            assert logged() == [], "what was written before does not count"
            run([601, 700])
            assert logged() == [601, 700]
            run([600])
            assert logged() == [600]
            log.stop()
            run([900])
    finally:
        vcpu.close()
        memory.close()
    log.stop()


def test_core_tracker_sees_what_kvm_logs(kvm: Any, kit: Any) -> None:
    dirty_uffd = pytest.importorskip("vmf.memory.dirty_uffd")
    from vmf_cpu_kvm.dirtylog import KvmDirtyLog

    reason = dirty_uffd.uffd_unusable()
    memory = GuestMemory(8 << 20, huge_pages=False)
    pic = kit.ToyPic()
    vcpu = kvm.create_logging_vcpu(VcpuEnvironment(memory, Bus(), pic, kvm.cpuid_capability(), kvm.tsc_khz()))
    try:
        rounds = [[600, 601, 700], [600], [], [1000, 1500, 2000, 2047]]
        log = KvmDirtyLog(vcpu.vm, memory)
        tracker = None if reason else dirty_uffd.UffdTracker(memory)
        first = True
        for pages in rounds:
            kit.load_guest(memory, touch(pages))
            if first:
                log.collect()
                if tracker is not None:
                    tracker.start()
            elif tracker is not None:
                tracker.collect()
            first = False
            vcpu.restore(kit.entry_state(kvm.tsc_khz()))
            assert vcpu.run(None).reason is kit.ExitReason.HALTED
            logged = [page for page in log.collect().tolist() if page >= 256]
            assert logged == pages
            if tracker is not None:
                seen = [page for a, b in tracker.collect().tolist() for page in range(a, b) if page >= 256]
                assert seen == pages
        if tracker is not None:
            tracker.stop()
    finally:
        vcpu.close()
        memory.close()
    if reason:
        pytest.skip(f"KVM's log is right; the core's userfaultfd tracker cannot work here: {reason}")
