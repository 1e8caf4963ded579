"""The neutral state: every legal state comes back bit for bit; what cannot be held is refused by name."""

from __future__ import annotations

import functools
import random
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmf.cpu.backend import ExitReason
from vmf.cpu.state import (
    GENERAL_REGISTERS,
    SEGMENT_NAMES,
    XSAVE_LEGACY_SIZE,
    XSAVE_MIN_SIZE,
    PendingEvents,
    Segment,
    VcpuState,
)
from vmf.cpuid.compare import diff
from vmf.cpuid.layout import with_vendor
from vmf.errors import StateError
from vmf.testing.vcpu_states import comparable, vcpu_states
from vmf_cpu_unicorn import engine
from vmf_cpu_unicorn.selftest_guest import CODE, DATA, Bench


@functools.lru_cache(maxsize=1)
def shared_bench() -> Bench:
    return Bench(engine.load())


def states() -> st.SearchStrategy[VcpuState]:
    environment = shared_bench().environment
    contract = st.sampled_from([with_vendor(environment.cpuid, vendor) for vendor in ("GenuineIntel", "AuthenticAMD")])
    return contract.flatmap(lambda table: vcpu_states(table, environment.tsc_khz))


unhurried = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


@unhurried
@given(st.data())
def test_every_legal_state_round_trips(data: st.DataObject) -> None:
    bench = shared_bench()
    state = data.draw(states())
    bench.vcpu.restore(state)
    found = bench.vcpu.save()
    assert state.tsc <= found.tsc < state.tsc + (1 << 36)
    for attribute in attrs.fields(VcpuState):
        wanted, got = (getattr(comparable(each), attribute.name) for each in (state, found))
        assert got == wanted, attribute.name


@settings(unhurried, max_examples=25)
@given(st.data())
def test_nothing_of_an_earlier_state_is_left(data: st.DataObject) -> None:
    bench = shared_bench()
    first, second = data.draw(states()), data.draw(states())
    bench.vcpu.restore(second)
    fresh = attrs.evolve(bench.vcpu.save(), tsc=0)
    bench.vcpu.restore(first)
    bench.vcpu.restore(second)
    assert attrs.evolve(bench.vcpu.save(), tsc=0) == fresh


def test_initial_components_are_written_out() -> None:
    bench = shared_bench()
    area = bytearray(b"\xa5" * XSAVE_MIN_SIZE)
    area[24:28] = (0x1F80).to_bytes(4, "little")
    area[XSAVE_LEGACY_SIZE:] = bytes(64)
    bench.vcpu.restore(attrs.evolve(bench.state(), xsave=bytes(area)))
    found = bench.vcpu.save().xsave
    assert found == VcpuState(registers=dict.fromkeys(GENERAL_REGISTERS, 0)).xsave


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"cr4": 1 << 17}, "cr4"),  # PCIDE
        ({"cr4": 1 << 18}, "cr4"),  # OSXSAVE
        ({"cr0": 1 << 20}, "cr0"),
        ({"xcr0": 7}, "xcr0"),
        ({"efer": 1 << 12}, "efer"),  # SVME
        ({"rflags": 1 << 40}, "rflags"),
        ({"xsave": bytes(512) + b"\x07" + bytes(63)}, "xsave"),
        ({"tsc_khz": 1000}, "tsc_khz"),
        ({"events": PendingEvents(exception=14)}, "exception 14"),
        ({"events": PendingEvents(exception=6, exception_payload=1)}, "exception 6 has a payload"),
        ({"events": PendingEvents(exception_error_code=1)}, "error code"),
        ({"events": PendingEvents(interrupt=0x80, interrupt_soft=True)}, "software interrupt"),
        ({"dr": (0x1234, 0, 0, 0, 0xFFFF0FF0, 0x402 | 1 << 16)}, "writes of data at 0x1234"),
        ({"dr": (0, 0x2345, 0, 0, 0xFFFF0FF0, 0x408 | 3 << 20)}, "accesses to data at 0x2345"),
        ({"dr": (0, 0, 0x60, 0, 0xFFFF0FF0, 0x420 | 2 << 24)}, "ports at 0x60"),
        ({"dr": (0, 0, 0, 0, 0xFFFF0FF0, 0x2400)}, "GD"),
        ({"dr": (0, 0, 0, 0, 0xFFFF0FF0, 1 << 40)}, "dr7"),
    ],
)
def test_what_cannot_be_held_is_named(changes: dict[str, Any], named: str) -> None:
    bench = shared_bench()
    before = attrs.evolve(bench.vcpu.save(), tsc=0)
    with pytest.raises(StateError, match=named):
        bench.vcpu.restore(attrs.evolve(bench.state(), **changes))
    assert attrs.evolve(bench.vcpu.save(), tsc=0) == before, "a refused state changes nothing"


def test_msrs_that_cannot_be_held_are_named() -> None:
    bench = shared_bench()
    state = bench.state()
    for index in (0x48, 0xDA0, 0x1D9, 0x1B):  # SPEC_CTRL XSS DEBUGCTL APIC_BASE
        with pytest.raises(StateError, match=f"MSR {index:#x}"):
            bench.vcpu.restore(attrs.evolve(state, msrs={**state.msrs, index: 1}))
    bench.vcpu.restore(attrs.evolve(state, msrs={**state.msrs, 0x48: 0, 0x3B: 77}))  # at rest; TSC_ADJUST
    assert bench.vcpu.save().msrs[0x3B] == 77


_MSRS_WITH_PLACE = (
    *(0x174, 0x175, 0x176, 0x17A, 0x1A0, 0x200, 0x20F, 0x250, 0x258, 0x26F, 0x277, 0x2FF, 0xD90),
    *(0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084, 0xC0000100, 0xC0000101, 0xC0000102, 0xC0000103, 0xC0010117),
)
_MSRS_WITHOUT_PLACE = {0x10: 77, 0x1B: 0xFEE00900, 0x3A: 5, 0x3B: 7, 0x48: 1, 0x17B: 3, 0x1D9: 1, 0x400: 5, 0x6E0: 55,
                       0xDA0: 1, 0xC0010015: 1}  # fmt: skip


_LEGAL_VALUES = {
    0x200: 0x1006,
    0x20F: 0x1800,
    0x2FF: 0xC06,
    0x277: 0x406,
    **dict.fromkeys((0x250, 0x258, 0x26F), 0x406),
}
"""Of MSRs that hold types of memory."""


@pytest.mark.parametrize("index", [*_MSRS_WITH_PLACE, *_MSRS_WITHOUT_PLACE], ids=hex)
def test_what_a_guest_writes_into_an_msr_is_in_the_state_or_was_not_taken(bench: Bench, index: int) -> None:
    value = _MSRS_WITHOUT_PLACE.get(index, _LEGAL_VALUES.get(index, 0x1234))
    # wrmsr; hlt, and rdmsr; hlt: each may be #GP, which goes to the hlt
    for raw, eax in ((b"\x0f\x30\xf4", value), (b"\x0f\x32\xf4", 0)):
        state = bench.vcpu.save() if not eax else bench.state()
        registers = {**bench.state().registers, "rax": eax, "rcx": index, "r15": CODE + 2}
        state = attrs.evolve(state, rip=CODE, registers=registers, halted=False)
        assert bench.execute(raw, state).reason is ExitReason.HALTED
    state = bench.vcpu.save()
    seen = state.registers["rax"] & 0xFFFFFFFF | state.registers["rdx"] << 32
    if index in _MSRS_WITHOUT_PLACE:
        assert seen != value, "the engine has it: the state must carry it"
        return
    assert seen == value
    bases = {0xC0000100: "fs", 0xC0000101: "gs"}
    carried = state.segments[bases[index]].base if index in bases else state.msrs[index]
    assert carried == value
    registers = {**state.registers, "rax": 0, "rdx": 0, "rcx": index}
    other = attrs.evolve(state, rip=CODE + 0x100, registers=registers, halted=False)
    bench.memory.write(CODE + 0x100, b"\x0f\x32\xf4")  # rdmsr; hlt
    bench.vcpu.restore(bench.state())
    bench.vcpu.restore(other)
    bench.go()
    assert bench.vcpu.save().registers["rax"] == value


def test_sysenter_has_32_bits_on_an_amd_processor(make_bench: Callable[..., Bench]) -> None:
    """As AMD's do: a 64-bit Linux writes 64 bits there all the same, and KVM on AMD could not take them."""
    for vendor, kept in (("AuthenticAMD", 0x8765_4321), ("GenuineIntel", 0xFFFF_FFFF_8765_4321)):
        bench = make_bench(vendor=vendor)
        state = bench.state()
        bench.vcpu.restore(attrs.evolve(state, msrs={**state.msrs, 0x175: 0xFFFF_FFFF_8765_4321}))
        assert bench.vcpu.save().msrs[0x175] == kept


def test_cr8_is_the_guests(bench: Bench) -> None:
    code = bytes.fromhex("440f20c3 b805000000 440f22c0 440f20c1 f4")  # mov rbx,cr8; mov eax,5; mov cr8,rax; mov rcx,cr8
    assert bench.execute(code, attrs.evolve(bench.state(), cr8=9)).reason is ExitReason.HALTED
    state = bench.vcpu.save()
    assert (state.registers["rbx"], state.registers["rcx"], state.cr8) == (9, 5, 5)


def test_a_restored_breakpoint_is_raised(bench: Bench) -> None:
    """On the second NOP, and only while its bit is set."""
    armed = attrs.evolve(bench.state(r15=CODE + 2), dr=(CODE + 1, 0, 0, 0, 0xFFFF0FF0, 0x402))
    assert bench.execute(b"\x90\x90\x90\xf4", armed).reason is ExitReason.HALTED
    assert [(r.vector, r.rip) for r in bench.records()] == [(1, CODE + 1)]
    assert bench.vcpu.save().dr[4] & 15 == 1
    again = attrs.evolve(bench.state(), dr=(CODE + 1, 0, 0, 0, 0xFFFF0FF0, 0x400))
    assert bench.execute(b"\x90\x90\x90\xf4", again).reason is ExitReason.HALTED
    assert bench.records() == []


def test_a_restored_exception_sets_what_its_delivery_sets(bench: Bench) -> None:
    """CR2 and DR6 are the guest's old ones until then."""
    fault = PendingEvents(exception=14, exception_error_code=2, exception_payload=0x1234_5678_9000)
    state = attrs.evolve(bench.state(r15=CODE), cr2=0x77, events=fault)
    bench.load(b"\xf4", state)
    assert (bench.vcpu.save().cr2, bench.vcpu.save().events) == (0x77, fault)
    assert bench.go().reason is ExitReason.HALTED
    assert [(r.vector, r.error, r.cr2, r.rip) for r in bench.records()] == [(14, 2, 0x1234_5678_9000, CODE)]
    trap = PendingEvents(exception=1, exception_payload=1 << 14)
    state = attrs.evolve(bench.state(r15=CODE), dr=(0, 0, 0, 0, 0xFFFF0FF1, 0x400), events=trap)
    bench.load(b"\xf4", state)
    assert bench.vcpu.save().dr[4] == 0xFFFF0FF1
    assert bench.go().reason is ExitReason.HALTED
    assert bench.records()[0].vector == 1
    assert bench.vcpu.save().dr[4] == 0xFFFF4FF0


def test_cpuid_is_read_back_as_the_guest_sees_it(bench: Bench) -> None:
    """Every leaf of the contract by the CPUID instruction, and what is read back of it; registers stay as they are."""
    contract = bench.environment.cpuid
    before = bench.vcpu.save().registers
    seen = bench.vcpu.read_cpuid()
    assert bench.vcpu.save().registers == before
    assert diff(contract, seen) == []
    for (leaf, subleaf), expected in contract.entries.items():
        bench.execute(b"\x0f\xa2\xf4", bench.state(rax=leaf, rcx=subleaf))
        found = bench.vcpu.save().registers
        assert (
            tuple(found[name] for name in ("rax", "rbx", "rcx", "rdx"))
            == tuple(expected)
            == tuple(seen.lookup(leaf, subleaf))
        )


def test_reset_state() -> None:
    bench = Bench(engine.load())
    try:
        state = bench.vcpu.save()
        assert (state.rip, state.segments["cs"].base, state.cr0, state.efer) == (0xFFF0, 0xFFFF0000, 0x60000010, 0)
    finally:
        bench.close()


@pytest.mark.parametrize("bits", [16, 32])
def test_segment_caches_rule_in_16_and_32_bit_modes(bench: Bench, bits: int) -> None:
    """Code at base 0x20000 with RIP 0: mov word [si], 0x1234 with DS base 0x30000; hlt. Selectors are nonsense."""
    access = 0x9B if bits == 16 else 0x409B
    data = 0x93 if bits == 16 else 0x4093
    state = bench.state(rsi=8)
    names = {name: Segment(0x7777, DATA, 0xFFFF, data) for name in SEGMENT_NAMES}
    state = attrs.evolve(
        state, cr0=0x11, efer=0, cr4=0, rip=0, segments={**names, "cs": Segment(0x6666, CODE, 0xFFFF, access)}
    )
    bench.memory.write(CODE, bytes.fromhex("c7043412 f4" if bits == 16 else "66c7063412f4"))
    bench.vcpu.invalidate_code(CODE, 16)
    bench.vcpu.restore(state)
    assert bench.go().reason is ExitReason.HALTED
    assert bench.memory.read(DATA + 8, 2) == b"\x34\x12"
    assert bench.vcpu.save().segments["ds"].selector == 0x7777


# A guest that checks itself: integer, memory read-modify-write, stack, string move, x87 and SSE in step.
# start: rax = rax*0x5851F42D + 0x14057B7E; inc [rdi]; inc r8; [rdi] == r8; push rax, pop rcx, rcx == rax;
# [rdi+8] = rax, += r8, -= r8, == rax; double(r8) == xmm1 += 1.0; st0 += 1, fistp == r8; rep movsq of 64 words;
# lock xadd [rdi+24], rax == r10 += rax; jmp start. Any difference: ud2, whose handler goes to R15, a HLT.
SELF_CHECK = bytes.fromhex(
    "4869c02df4515848057e7b051448ff0749ffc04c3907757650594839c1756f488947084c0147084c29470848394708755df2490f2ac0f20f58ca"
    "660f2ec1754ed9e8dec1d9c0df7f104c394710753f4989f9498db100010000498db900040000488906b940000000f348a54c89cf483987000400"
    "0075174889c1f0480fc14f184901c24c3957187505e972ffffff0f0bf4"
)


def self_checking_state(bench: Bench) -> VcpuState:
    area = bytearray(bench.state().xsave)
    area[4] = 0x80  # ST0 = physical register 7 is valid: 0.0
    area[2:4] = (7 << 11).to_bytes(2, "little")
    area[160 + 32 : 160 + 40] = struct.pack("<d", 1.0)  # xmm2
    return attrs.evolve(bench.state(rdi=DATA, r15=CODE + len(SELF_CHECK) - 1), xsave=bytes(area))


@pytest.mark.parametrize("calling", [False, True])
def test_kicks_are_never_lost_and_never_harm(bench: Bench, gate: str, calling: bool) -> None:
    """Of a guest that computes, and of one that comes to vmf all the time (OUT), which takes another way."""
    kicks = 10_000 if gate == "native" else 3_000
    if calling:  # out 0x80, al; inc r8; jmp back
        bench.load(bytes.fromhex("e680 49ffc0 ebf9"), bench.state())
    else:
        bench.load(SELF_CHECK, self_checking_state(bench))
    asked, returned = threading.Event(), threading.Semaphore(0)
    lost: list[int] = []
    noise = random.Random(1)

    def kicker() -> None:
        for number in range(kicks):
            pause = noise.random() * 60e-6
            begin = time.perf_counter()
            while time.perf_counter() - begin < pause:
                pass
            asked.set()
            bench.vcpu.kick()
            if not returned.acquire(timeout=60):
                lost.append(number)
                bench.vcpu.kick()
                return

    thread = threading.Thread(target=kicker)
    thread.start()
    results = []
    while thread.is_alive():
        result = bench.vcpu.run(time.monotonic_ns() + (4_000_000 if calling else 10_000_000_000))
        if result.reason is ExitReason.KICKED and not asked.is_set():
            continue  # the deadline
        asked.clear()
        results.append(result.reason)
        returned.release()
        if result.reason is not ExitReason.KICKED:
            break
        if len(results) >= kicks:
            break
    thread.join()
    assert not lost, f"kick {lost} was lost"
    assert set(results) == {ExitReason.KICKED}
    assert bench.records() == []
    assert bench.vcpu.save().registers["r8"] > 1000


def test_kick_before_run_ends_that_run(bench: Bench) -> None:
    bench.load(SELF_CHECK, self_checking_state(bench))
    bench.vcpu.kick()
    begin = time.monotonic()
    assert bench.vcpu.run(None).reason is ExitReason.KICKED
    assert time.monotonic() - begin < 1


def test_deadlines_are_kept(bench: Bench) -> None:
    bench.load(SELF_CHECK, self_checking_state(bench))
    lateness = []
    for _ in range(30):
        deadline = time.monotonic_ns() + 3_000_000
        assert bench.vcpu.run(deadline).reason is ExitReason.KICKED
        lateness.append(time.monotonic_ns() - deadline)
    assert min(lateness) >= 0


def test_moves_at_random_instants_between_two_vcpus(make_bench: Callable[..., Bench]) -> None:
    first = make_bench()
    second = make_bench(memory=first.memory)
    first.load(SELF_CHECK, self_checking_state(first))
    here, there = first, second
    noise = random.Random(2)
    for _ in range(300):
        result = here.vcpu.run(time.monotonic_ns() + noise.randrange(1, 2_000_000))
        assert result.reason is ExitReason.KICKED
        state = here.vcpu.save()
        there.vcpu.restore(state)
        moved = there.vcpu.save()
        assert moved.tsc >= state.tsc
        assert attrs.evolve(moved, tsc=0) == attrs.evolve(state, tsc=0)
        here, there = there, here
    assert first.records() == []
    assert here.vcpu.save().registers["r8"] > 1000
