"""The self-checking guest (workload.S) moves between vCPUs at random instants and never notices."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from vmf.cpu.backend import CpuBackend, ExitReason
from vmf.cpu.state import VcpuState
from vmf.cpuid.table import CpuidTable


def run_for(rig: Any, seconds: float) -> None:
    """Run with a timer tick every millisecond or so."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        exit_ = rig.run(min(left, 0.001))
        assert exit_.reason is ExitReason.KICKED, exit_
        if not rig.pic.requests:
            rig.pic.raise_()


def ticks(rig: Any, kit: Any) -> int:
    return int.from_bytes(rig.memory.read(kit.TICKS_AT, 8), "little")


def start(rig: Any, kit: Any) -> Any:
    rig.load(kit.WORKLOAD)
    return kit.Workload(rig)


def test_workload_runs_and_ticks(rig: Any, kit: Any) -> None:
    workload = start(rig, kit)
    run_for(rig, 0.3)
    workload.check()
    assert workload.outputs > 10
    assert ticks(rig, kit) + rig.pic.requests >= rig.pic.acknowledged >= ticks(rig, kit)
    assert rig.pic.acknowledged > 20


def test_save_changes_nothing(rig: Any, kit: Any) -> None:
    workload = start(rig, kit)
    for _ in range(200):
        rig.run(random.random() * 0.001)
        first, second = rig.vcpu.save(), rig.vcpu.save()
        assert kit.changed(first, tsc=0) == kit.changed(second, tsc=0)
        assert second.tsc >= first.tsc
    workload.check()
    assert workload.outputs > 10


def test_moves_between_vms_at_random_instants(make_rig: Any, kit: Any) -> None:
    rigs = [make_rig()]
    rigs.append(make_rig(memory=rigs[0].memory))
    workload = start(rigs[0], kit)
    acknowledged = 0
    for move in range(60):
        rig = rigs[move % 2]
        workload.attach(rig)
        run_for(rig, random.random() * 0.01)
        state = rig.vcpu.save()
        other = rigs[1 - move % 2]
        other.vcpu.restore(state)
        again = other.vcpu.save()
        assert kit.changed(again, tsc=0) == kit.changed(state, tsc=0)
        if rig.tsc_can_be_set:
            assert state.tsc <= again.tsc < state.tsc + rig.tsc_khz * 1000
        other.pic.requests, rig.pic.requests = rig.pic.requests, 0
        acknowledged = rigs[0].pic.acknowledged + rigs[1].pic.acknowledged
    workload.attach(rigs[0])
    run_for(rigs[0], 0.05)
    workload.check()
    assert workload.outputs > 10
    in_flight = acknowledged - ticks(rigs[0], kit)
    assert in_flight <= 1, "an interrupt was lost on the way"


def test_guest_tsc_goes_on(make_rig: Any, kit: Any, pvm: bool) -> None:
    """The TSC a guest reads in two VMs: never back, and the time of the move is in it."""
    code = b"\x0f\x31\x48\xc1\xe2\x20\x48\x09\xd0\x48\x89\xc3\xf4"  # rdtsc; rax |= rdx << 32; mov rbx, rax; hlt
    one, two = make_rig(), make_rig()
    if pvm and not one.tsc_can_be_set:
        pytest.skip("guests of this KVM have the host's TSC")
    one.load(code)
    two.load(code)
    for value in (0, 1, 10**12, 10**12 + 5, 1 << 62, 1 << 40):
        for rig in (one, two):
            host = time.monotonic_ns()
            rig.vcpu.restore(_at(rig, kit, value))
            rig.run_to_halt()
            elapsed = (time.monotonic_ns() - host) * rig.tsc_khz // 1_000_000
            read = rig.registers()["rbx"]
            assert value <= read <= value + elapsed + rig.tsc_khz, (value, read)
            before = rig.vcpu.read_tsc()
            rig.vcpu.write_tsc(before - 12345)
            assert 0 <= rig.vcpu.read_tsc() - (before - 12345) < rig.tsc_khz * 100


def _at(rig: Any, kit: Any, tsc: int) -> VcpuState:
    return kit.changed(kit.entry_state(rig.tsc_khz), tsc=tsc)


@pytest.fixture
def unicorn() -> CpuBackend:
    backend_module = pytest.importorskip("vmf_cpu_unicorn.backend", reason="the Unicorn backend is not installed")
    backend: CpuBackend = backend_module.UnicornBackend()
    here = backend.availability()
    if not here.usable:
        pytest.skip(f"the Unicorn backend cannot be used here: {here.reason}")
    return backend


def common_contract(unicorn: CpuBackend) -> CpuidTable:
    """Both engines take any table here (the guest executes no CPUID): Unicorn's, that none is offended."""
    return unicorn.cpuid_capability()


def test_moves_between_kvm_and_unicorn(make_rig: Any, kit: Any, kvm: CpuBackend, unicorn: CpuBackend) -> None:
    contract = common_contract(unicorn)
    if kvm.tsc_khz() != unicorn.tsc_khz() and not unicorn.tsc_khz_supported(kvm.tsc_khz()):
        pytest.skip("the two backends have no common TSC rate")
    rate = kvm.tsc_khz()
    on_kvm = make_rig(contract=contract, tsc_khz=rate)
    on_unicorn = make_rig(unicorn, contract=contract, tsc_khz=rate, memory=on_kvm.memory)
    workload = start(on_kvm, kit)
    rig, other = on_kvm, on_unicorn
    outputs = []
    for _ in range(20):
        workload.attach(rig)
        before = workload.outputs
        run_for(rig, 0.002 + random.random() * 0.02)
        outputs.append(workload.outputs - before)
        state = rig.vcpu.save()
        other.vcpu.restore(state)
        other.vcpu.invalidate_code(0, other.memory.size)
        other.pic.requests, rig.pic.requests = rig.pic.requests, 0
        rig, other = other, rig
    workload.check()
    assert sum(outputs[0::2]) > 10
    assert sum(outputs[1::2]) > 10
    acknowledged = on_kvm.pic.acknowledged + on_unicorn.pic.acknowledged
    assert acknowledged - ticks(on_kvm, kit) <= 1
