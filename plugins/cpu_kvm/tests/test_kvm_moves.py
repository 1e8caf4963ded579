"""The self-checking guest (workload.S) moves between vCPUs at random instants and never notices."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from vmf.cpu.backend import CpuBackend, ExitReason
from vmf.cpu.state import VcpuState
from vmf.cpuid.contract import make_contract
from vmf.cpuid.features import features_of


def run_for(rig: Any, seconds: float) -> None:
    """Run with a timer tick every millisecond or so."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        exit_ = rig.run(min(left, 0.001))
        assert exit_.reason is ExitReason.KICKED, exit_
        if not rig.pic.requests:
            rig.pic.raise_()


def run_until(rig: Any, enough: Callable[[], object], what: str) -> None:
    """Whatever the host's speed: an emulated host in an emulator takes its time."""
    end = time.monotonic() + 120
    while not enough():
        assert time.monotonic() < end, f"{what} does not come"
        run_for(rig, 0.01)


def ticks(rig: Any, kit: Any) -> int:
    return int.from_bytes(rig.memory.read(kit.TICKS_AT, 8), "little")


def start(rig: Any, kit: Any, *, avx: bool = False) -> Any:
    rig.load(kit.WORKLOAD_AVX if avx else kit.WORKLOAD)
    if avx:
        rig.vcpu.restore(kit.changed(kit.entry_state(rig.tsc_khz), xcr0=7, cr4=0x40620))
    return kit.Workload(rig)


def move(here: Any, there: Any) -> VcpuState:
    """The state of `here` goes on in `there`, and so does an interrupt that nobody has taken yet."""
    state: VcpuState = here.vcpu.save()
    there.vcpu.restore(state)
    there.vcpu.invalidate_code(0, there.memory.size)
    there.pic.requests, here.pic.requests = here.pic.requests, 0
    return state


def go_round(route: list[Any], rounds: int, kit: Any, *, avx: bool = False) -> None:
    """Run the workload on one vCPU after the other, leaving each at a random instant after at least one output."""
    workload = start(route[0], kit, avx=avx)
    for leg in range(rounds * len(route)):
        rig, following = route[leg % len(route)], route[(leg + 1) % len(route)]
        workload.attach(rig)
        before = workload.outputs
        run_for(rig, random.random() * 0.02)
        run_until(rig, partial(workload.has_more_than, before), "an output")
        run_for(rig, random.random() * 0.002)
        workload.check()
        move(rig, following)
    assert workload.outputs >= rounds * len(route)
    run_until(route[0], lambda: ticks(route[0], kit), "a tick")
    in_flight = sum(rig.pic.acknowledged for rig in set(route)) - ticks(route[0], kit)
    assert in_flight <= 1, "an interrupt was lost on the way"


def test_workload_runs_and_ticks(rig: Any, kit: Any) -> None:
    workload = start(rig, kit)
    run_until(rig, lambda: workload.problem or (workload.outputs > 10 and rig.pic.acknowledged > 20), "enough of it")
    workload.check()
    assert ticks(rig, kit) + rig.pic.requests >= rig.pic.acknowledged >= ticks(rig, kit)


def test_save_changes_nothing(rig: Any, kit: Any) -> None:
    workload = start(rig, kit)
    for _ in range(200):
        rig.run(random.random() * 0.001)
        first, second = rig.vcpu.save(), rig.vcpu.save()
        assert kit.changed(first, tsc=0) == kit.changed(second, tsc=0)
        assert second.tsc >= first.tsc
    run_until(rig, partial(workload.has_more_than, 10), "output")
    workload.check()


def test_moves_between_vms_at_random_instants(make_rig: Any, kit: Any) -> None:
    """Not a bit is lost at any instant; `go_round` has the same with something done in between."""
    rigs = [make_rig()]
    rigs.append(make_rig(memory=rigs[0].memory))
    workload = start(rigs[0], kit)
    for count in range(60):
        here, there = rigs[count % 2], rigs[1 - count % 2]
        workload.attach(here)
        run_for(here, random.random() * 0.01)
        state = move(here, there)
        again = there.vcpu.save()
        assert kit.changed(again, tsc=0) == kit.changed(state, tsc=0)
        if here.tsc_can_be_set:
            assert state.tsc <= again.tsc < state.tsc + here.tsc_khz * 1000
    workload.attach(rigs[0])
    run_until(rigs[0], partial(workload.has_more_than, 10), "output")
    workload.check()


def test_ten_rounds_from_kvm_to_kvm(make_rig: Any, kit: Any) -> None:
    one = make_rig()
    go_round([one, make_rig(memory=one.memory)], 10, kit)


def test_ten_rounds_with_avx(make_rig: Any, kit: Any, kvm: CpuBackend) -> None:
    """The upper halves of the YMM registers are in it."""
    contract = make_contract(kvm.cpuid_capability())
    if "avx" not in {item.name for item in features_of(contract)}:
        pytest.skip("this host's KVM does not present AVX")
    one = make_rig(contract=contract)
    go_round([one, make_rig(contract=contract, memory=one.memory)], 10, kit, avx=True)


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


def _at(rig: Any, kit: Any, tsc: int) -> Any:
    return kit.changed(kit.entry_state(rig.tsc_khz), tsc=tsc)


@pytest.fixture
def unicorn() -> CpuBackend:
    backend_module = pytest.importorskip("vmf_cpu_unicorn.backend", reason="the Unicorn backend is not installed")
    backend: CpuBackend = backend_module.UnicornBackend()
    here = backend.availability()
    if not here.usable:
        pytest.skip(f"the Unicorn backend cannot be used here: {here.reason}")
    return backend


def test_ten_rounds_between_kvm_and_unicorn(make_rig: Any, kit: Any, kvm: CpuBackend, unicorn: CpuBackend) -> None:
    """KVM to KVM, to Unicorn, and back to the first. The guest executes no CPUID, so Unicorn's contract suits all."""
    rate = kvm.tsc_khz()
    if not unicorn.tsc_khz_supported(rate):
        pytest.skip("the two backends have no common TSC rate")
    options = {"contract": unicorn.cpuid_capability(), "tsc_khz": rate}
    one = make_rig(**options)
    options["memory"] = one.memory
    go_round([one, make_rig(**options), make_rig(unicorn, **options)], 10, kit)
