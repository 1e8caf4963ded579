"""The neutral state: what restore takes, save gives back, bit for bit."""

from __future__ import annotations

import os
import random
import struct
from typing import Any

import pytest

from vmf.cpu.state import GENERAL_REGISTERS, PendingEvents, Segment, VcpuState, fresh_xsave
from vmf.errors import PluginError, StateError

try:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st
except ImportError:  # in the KVM lab; the property tests are left out where it is None
    given = None  # type: ignore[assignment]

U64 = 1 << 64
IN_LAB = bool(os.environ.get("VMF_LAB"))
"""In the KVM lab everything takes twenty times as long."""


def random_state(rng: random.Random, rig: Any, kit: Any, pvm: bool) -> VcpuState:
    """A legal state of a 64-bit guest, anywhere in it."""
    base = kit.entry_state(rig.tsc_khz)
    canonical = lambda: rng.choice([rng.randrange(1 << 47), U64 - 1 - rng.randrange(1 << 47)])  # noqa: E731
    ring3 = rng.random() < 0.5
    rflags = 2 | rng.getrandbits(12) & 0xCD5 | (rng.getrandbits(1) << 9) | rng.getrandbits(22) & 0x240000
    rflags &= ~0x100  # TF
    segments = dict(base.segments)
    if ring3:
        segments = dict.fromkeys(("es", "ds"), Segment(0x23, 0, 0xFFFFFFFF, 0xC0F3))
        segments |= {"cs": Segment(0x2B, 0, 0xFFFFFFFF, 0xA0FB), "ss": Segment(0x23, 0, 0xFFFFFFFF, 0xC0F3)}
    segments["fs"] = Segment(rng.choice([0, 0x10]), canonical(), 0xFFFFFFFF, 0xC093)
    segments["gs"] = Segment(0, canonical(), 0, 0x10000)
    xsave = bytearray(fresh_xsave())
    xsave[0:2] = struct.pack("<H", rng.choice([0x37F, 0x27F, 0xC7F]))
    xsave[2:4] = struct.pack("<H", rng.randrange(8) << 11)
    xsave[4] = rng.getrandbits(8)
    for i in range(8):
        xsave[32 + 16 * i : 42 + 16 * i] = rng.randbytes(10)
    xsave[24:28] = struct.pack("<I", rng.choice([0x1F80, 0x7F80, 0x1FBF, 0x9FC0]))
    xsave[160:416] = rng.randbytes(256)
    msrs = {index: canonical() for index in base.msrs}
    msrs |= {0x174: rng.randrange(1 << 16), 0x277: 0x0007_0406_0007_0406, 0xC0000084: rng.randrange(1 << 22)}
    msrs[0xC0000081] = rng.getrandbits(64)
    if rig.contract.vendor == "AuthenticAMD":
        msrs |= {index: msrs[index] & 0xFFFFFFFF for index in (0x175, 0x176)}  # AMD has 32 bits there
    if rng.random() < 0.5:
        msrs[0x2FF] = 0xC06
        msrs[0x250] = 0x0606060606060606
    return kit.changed(
        base,
        registers={name: rng.getrandbits(64) for name in GENERAL_REGISTERS},
        rip=rng.choice([canonical(), kit.CODE_AT]),
        rflags=rflags,
        segments=segments,
        gdtr=kit.DescriptorTable(canonical(), rng.getrandbits(16)),
        idtr=kit.DescriptorTable(canonical(), rng.getrandbits(16)),
        tr=Segment(0x30, canonical(), 0x67, 0x8B),
        ldtr=rng.choice([Segment(0, 0, 0, 0x10000), Segment(0x28, canonical(), 0xFFF, 0x82)]),
        cr2=rng.getrandbits(64),
        cr3=rng.randrange(1, 256) << 12,
        cr8=rng.randrange(16),
        cr4=0x620 | rng.choice([0, 0x80, 0x8]),
        dr=(*(canonical() for _ in range(4)), 0xFFFF0FF0 | rng.randrange(16), 0x400 | rng.choice([0, 0x55])),
        msrs=msrs,
        xsave=bytes(xsave),
        events=random_events(rng, bool(rflags & 0x200), pvm),
        halted=rng.random() < 0.1,
    )


def random_events(rng: random.Random, interrupts_on: bool, pvm: bool) -> PendingEvents:
    kind = rng.randrange(6)
    if kind == 0:
        return PendingEvents(exception=13, exception_error_code=rng.randrange(1 << 16) & ~1)
    if kind == 1:
        address = rng.getrandbits(64)
        return PendingEvents(exception=14, exception_error_code=rng.randrange(8), exception_payload=address)
    if kind == 2:
        return PendingEvents(interrupt=rng.randrange(32, 256))
    if kind == 3:
        return PendingEvents(nmi_masked=rng.random() < 0.7, nmi_pending=rng.random() < 0.3)
    if kind == 4 and not pvm:
        return PendingEvents(interrupt_shadow=1 if interrupts_on else 2)
    return PendingEvents()


def round_trip(rig: Any, state: VcpuState, kit: Any) -> None:
    rig.vcpu.restore(kit.changed(state, tsc=1 << 50))
    saved = rig.vcpu.save()
    if rig.tsc_can_be_set:
        assert 0 <= saved.tsc - (1 << 50) < rig.tsc_khz * 1000
    for name in VcpuState.__slots__:
        if name not in ("tsc", "__weakref__"):
            assert getattr(saved, name) == getattr(state, name), name


def test_random_states_round_trip(rig: Any, kit: Any, pvm: bool) -> None:
    rng = random.Random(20240607)
    kinds = set()
    for _ in range(60 if IN_LAB else 300):
        state = random_state(rng, rig, kit, pvm)
        round_trip(rig, state, kit)
        kinds.add((state.events.exception, state.events.interrupt is None, state.events.nmi_masked, state.halted))
    assert len(kinds) > 6


@pytest.mark.skipif(given is None, reason="no hypothesis here; test_random_states_round_trip covers the same")
def test_states_round_trip_property(rig: Any, kit: Any, pvm: bool) -> None:
    @settings(max_examples=30 if IN_LAB else 150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, U64 - 1))
    def check(seed: int) -> None:
        round_trip(rig, random_state(random.Random(seed), rig, kit, pvm), kit)

    check()


def test_reset_state_round_trips(rig: Any, kit: Any) -> None:
    from vmf_cpu_kvm.vcpu import reset_state

    round_trip(rig, reset_state(rig.tsc_khz), kit)


def test_nothing_of_an_earlier_state_survives(rig: Any, kit: Any, pvm: bool) -> None:
    clean = kit.entry_state(rig.tsc_khz)
    rng = random.Random(5)
    for _ in range(30):
        round_trip(rig, random_state(rng, rig, kit, pvm), kit)
        round_trip(rig, clean, kit)


def test_half_done_input_is_completed_by_save(rig: Any, kit: Any, make_rig: Any) -> None:
    """A device that kicks in the middle of an IN, and one that fails there: save is behind the instruction."""
    code = b"\x66\xba\x10\x05\xed\x89\xc3\xf4"  # mov dx, 0x510; in eax, dx; mov ebx, eax; hlt
    rig.load(code)

    def answer(offset: int, size: int) -> int:
        rig.vcpu.kick()
        return 0xCAFEF00D

    rig.ports.answer = answer
    assert rig.run().reason is kit.ExitReason.KICKED
    state = rig.vcpu.save()
    assert (state.registers["rax"], state.rip) == (0xCAFEF00D, kit.CODE_AT + 5)
    other = make_rig(memory=rig.memory)
    other.vcpu.restore(state)
    other.run_to_halt()
    assert other.registers()["rbx"] == 0xCAFEF00D
    assert other.ports.reads == []

    def fail(offset: int, size: int) -> int:
        raise RuntimeError("device bug")

    rig.load(code)
    rig.ports.answer = fail
    with pytest.raises(PluginError, match="device bug"):
        rig.run()
    assert rig.vcpu.save().rip == kit.CODE_AT + 5


def test_sysenter_of_a_64_bit_guest_on_amd(rig: Any, kit: Any, pvm: bool) -> None:
    """Linux writes 64 bits into MSRs of which an AMD processor has 32: on another backend it may have kept them all."""
    if pvm or rig.contract.vendor != "AuthenticAMD":
        pytest.skip("only AMD's SYSENTER MSRs are narrower than what KVM takes")
    state = kit.entry_state(rig.tsc_khz)
    rig.vcpu.restore(kit.changed(state, msrs={**state.msrs, 0x175: 0xFFFF_FE00_0000_3000}))
    assert rig.vcpu.save().msrs[0x175] & 0xFFFF_FFFF == 0x3000


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"msrs": {0x12345: 7}}, "0x12345"),
        ({"msrs": {0xC0000082: 1 << 63}}, "LSTAR"),
        ({"xcr0": 1 << 40 | 3}, "XCR0"),
        ({"tsc_khz": 1000}, "1000 kHz"),
        ({"cr0": 0x80000010}, "CR0"),
        ({"cr4": 1 << 40}, "CR4"),
        ({"efer": 0x500 | 1 << 40}, "EFER"),
        ({"events": PendingEvents(exception=77)}, "77"),
        ({"events": PendingEvents(exception=13, interrupt=64)}, "at once"),
        ({"events": PendingEvents(interrupt=128, interrupt_soft=True)}, "INT 128"),
        ({"dr": (0, 0, 0, 0, 0xFFFF0FF0, 1 << 40)}, "DR7"),
    ],
)
def test_what_cannot_be_held_is_named(rig: Any, kit: Any, fields: dict[str, Any], names: str) -> None:
    state = kit.entry_state(rig.tsc_khz)
    if "msrs" in fields:
        fields = {"msrs": {**state.msrs, **fields["msrs"]}}
    with pytest.raises(StateError) as caught:
        rig.vcpu.restore(kit.changed(state, **fields))
    assert names in str(caught.value)
    round_trip(rig, state, kit)  # and the vCPU can take another


def test_a_guest_that_moved_its_apic_is_not_saved_without_it(rig: Any, kit: Any) -> None:
    """No contract has an APIC, but KVM lets a guest write IA32_APIC_BASE all the same."""
    rig.load(b"\xb9\x1b\x00\x00\x00\xb8\x00\x00\xd0\xfe\x31\xd2\x0f\x30\xf4")  # wrmsr 0x1b, 0xfed00000; hlt
    rig.run_to_halt()
    with pytest.raises(StateError, match="IA32_APIC_BASE"):
        rig.vcpu.save()
    round_trip(rig, kit.entry_state(rig.tsc_khz), kit)


def test_debugctl_is_held_or_refused_by_name(rig: Any, kit: Any) -> None:
    """An MSR that KVM carries and does not list. BTF makes a trap of branches, not of instructions."""
    state = kit.entry_state(rig.tsc_khz)
    state = kit.changed(state, msrs={**state.msrs, 0x1D9: 2})
    refusal = ""
    try:
        rig.vcpu.restore(state)
    except StateError as error:
        refusal = str(error)
    assert "IA32_DEBUGCTL" in refusal or rig.vcpu.save().msrs[0x1D9] == 2
    rig.vcpu.restore(kit.entry_state(rig.tsc_khz))
    assert 0x1D9 not in rig.vcpu.save().msrs


def test_xsave_component_without_cpuid_is_refused(rig: Any, kit: Any) -> None:
    area = bytearray(fresh_xsave()) + bytes(256)
    area[512] |= 4
    state = kit.entry_state(rig.tsc_khz)
    if rig.contract.lookup(0xD, 0).eax & 4:
        pytest.skip("this machine has AVX")
    rig.vcpu.restore(kit.changed(state, xsave=bytes(area)))  # at rest: fine
    area[600] = 1
    with pytest.raises(StateError, match="component 2"):
        rig.vcpu.restore(kit.changed(state, xsave=bytes(area)))
