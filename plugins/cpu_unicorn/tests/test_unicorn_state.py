"""The neutral state: every legal state comes back bit for bit; what cannot be held is refused by name."""

from __future__ import annotations

import functools
import random
import struct
import threading
import time
from collections.abc import Callable

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmf.cpu.backend import ExitReason
from vmf.cpu.state import (
    AR_PRESENT,
    AR_UNUSABLE,
    GENERAL_REGISTERS,
    REQUIRED_MSRS,
    SEGMENT_NAMES,
    XSAVE_LEGACY_SIZE,
    XSAVE_MIN_SIZE,
    DescriptorTable,
    PendingEvents,
    Segment,
    VcpuState,
)
from vmf.errors import StateError
from vmf_cpu_unicorn import convert, engine
from vmf_cpu_unicorn.selftest_guest import CODE, DATA, Bench

u16, u32, u64 = (st.integers(0, (1 << width) - 1) for width in (16, 32, 64))


def masked(mask: int, always: int = 0) -> st.SearchStrategy[int]:
    return u64.map(lambda value: value & mask | always)


def accesses() -> st.SearchStrategy[int]:
    return u16.map(lambda raw: raw & 0xF0FF).map(lambda raw: raw if raw & AR_PRESENT else raw | AR_UNUSABLE)


segments = st.builds(Segment, u16, u64, u32, accesses())
tables = st.builds(DescriptorTable, u64, u16)


@st.composite
def xsave_areas(draw: st.DrawFn) -> bytes:
    area = bytearray(XSAVE_MIN_SIZE)
    mxcsr = draw(masked(0xFFFF))
    struct.pack_into(
        "<HHBxHQQII", area, 0, draw(u16), draw(u16), draw(st.integers(0, 255)), draw(u16), draw(u64), draw(u64),
        mxcsr, 0xFFFF,
    )  # fmt: skip
    for i in range(8):
        area[32 + 16 * i : 42 + 16 * i] = draw(st.binary(min_size=10, max_size=10))
    area[160:416] = draw(st.binary(min_size=256, max_size=256))
    area[XSAVE_LEGACY_SIZE] = 3
    return bytes(area)


@st.composite
def pending_events(draw: st.DrawFn) -> PendingEvents:
    exception = draw(st.none() | st.sampled_from([0, 1, 6, 7, 8, 10, 11, 12, 13, 14, 16, 17, 19]))
    has_code = exception in (8, 10, 11, 12, 13, 14, 17)
    return PendingEvents(
        exception=exception,
        exception_error_code=draw(u32) if has_code else None,
        interrupt=draw(st.none() | st.integers(0, 255)),
        nmi_pending=draw(st.booleans()),
        nmi_masked=draw(st.booleans()),
        interrupt_shadow=draw(st.sampled_from([0, 1, 2])),
    )


@st.composite
def states(draw: st.DrawFn) -> VcpuState:
    tr = draw(segments)
    return VcpuState(
        registers={name: draw(u64) for name in GENERAL_REGISTERS},
        rip=draw(u64),
        rflags=draw(masked(convert.RFLAGS_LEGAL, 2)),
        segments={name: draw(segments) for name in SEGMENT_NAMES},
        ldtr=draw(segments),
        tr=attrs.evolve(tr, access=tr.access | 2) if tr.access & AR_PRESENT else tr,
        gdtr=draw(tables),
        idtr=draw(tables),
        cr0=draw(masked(convert.CR0_LEGAL)),
        cr2=draw(u64),
        cr3=draw(u64),
        cr4=draw(masked(convert.CR4_LEGAL)),
        cr8=draw(st.integers(0, 15)),
        xcr0=draw(st.sampled_from([1, 3])),
        efer=draw(masked(convert.EFER_LEGAL)),
        dr=tuple(draw(u64) for _ in range(6)),
        msrs={
            **{index: draw(u32 if index == 0x174 else u64) for index in sorted(REQUIRED_MSRS)},
            0xC0000103: draw(u64),
            0x1A0: draw(u64),
            **draw(st.sampled_from([{}, {0x2FF: 0xC06, 0x200: 7}, {0x48: 0}])),
        },
        xsave=draw(xsave_areas()),
        events=draw(pending_events()),
        halted=draw(st.booleans()),
        tsc=draw(st.integers(0, 1 << 62)),
    )


@functools.lru_cache(maxsize=1)
def shared_bench() -> Bench:
    return Bench(engine.load())


@settings(max_examples=150, deadline=None)
@given(states())
def test_every_legal_state_round_trips(state: VcpuState) -> None:
    bench = shared_bench()
    bench.vcpu.restore(state)
    found = bench.vcpu.save()
    assert state.tsc <= found.tsc < state.tsc + (1 << 36)
    expected = attrs.evolve(state, tsc=found.tsc, tsc_khz=found.tsc_khz)
    for attribute in attrs.fields(VcpuState):
        assert getattr(found, attribute.name) == getattr(expected, attribute.name), attribute.name
    assert found == expected


@settings(max_examples=30, deadline=None)
@given(states(), states())
def test_nothing_of_an_earlier_state_is_left(first: VcpuState, second: VcpuState) -> None:
    bench = shared_bench()
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
    ],
)
def test_what_cannot_be_held_is_named(changes: dict[str, object], named: str) -> None:
    bench = shared_bench()
    before = attrs.evolve(bench.vcpu.save(), tsc=0)
    with pytest.raises(StateError, match=named):
        bench.vcpu.restore(attrs.evolve(bench.state(), **changes))
    assert attrs.evolve(bench.vcpu.save(), tsc=0) == before, "a refused state changes nothing"


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


def test_kicks_are_never_lost_and_never_harm(bench: Bench, gate: str) -> None:
    kicks = 10_000 if gate == "native" else 3_000
    bench.load(SELF_CHECK, self_checking_state(bench))
    returned = threading.Semaphore(0)
    lost: list[int] = []
    noise = random.Random(1)

    def kicker() -> None:
        for number in range(kicks):
            pause = noise.random() * 60e-6
            begin = time.perf_counter()
            while time.perf_counter() - begin < pause:
                pass
            bench.vcpu.kick()
            if not returned.acquire(timeout=5):
                lost.append(number)
                bench.vcpu.kick()
                return

    thread = threading.Thread(target=kicker)
    thread.start()
    results = []
    while thread.is_alive():
        result = bench.vcpu.run(time.monotonic_ns() + 10_000_000_000)
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
    assert sorted(lateness)[len(lateness) // 2] < 20_000_000


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
