"""Exits: ports, MMIO, strings, HLT, interrupts, shadow, shutdown, errors."""

from __future__ import annotations

import struct
import time
from typing import Any

import pytest

from vmf.cpu.backend import ExitReason
from vmf.cpu.state import PendingEvents

HLT = b"\xf4"


def test_port_accesses_of_every_size(rig: Any) -> None:
    code = (
        b"\x66\xba\x10\x05"  # mov dx, 0x510
        b"\xb0\x5a\xee"  # mov al, 0x5a; out dx, al
        b"\x66\xb8\x34\x12\x66\xef"  # mov ax, 0x1234; out dx, ax
        b"\xb8\x78\x56\x34\x92\xef"  # mov eax, 0x92345678; out dx, eax
        b"\xec\x88\xc1"  # in al, dx; mov cl, al
        b"\x66\xed\x66\x89\xc3"  # in ax, dx; mov bx, ax
        b"\xed\x89\xc6" + HLT  # in eax, dx; mov esi, eax
    )
    answers = {1: 0xA7, 2: 0xBEEF, 4: 0xFEEDF00D}
    rig.ports.answer = lambda offset, size: answers[size]
    rig.load(code)
    rig.run_to_halt()
    assert rig.ports.writes == [(0x510, 1, 0x5A), (0x510, 2, 0x1234), (0x510, 4, 0x92345678)]
    assert rig.ports.reads == [(0x510, 1), (0x510, 2), (0x510, 4)]
    registers = rig.registers()
    assert (registers["rcx"], registers["rbx"], registers["rsi"]) == (0xA7, 0xBEEF, 0xFEEDF00D)


def test_unclaimed_port_reads_ones(rig: Any) -> None:
    rig.load(b"\x66\xba\x00\x09\xed\x89\xc3\xec" + HLT)  # mov dx, 0x900; in eax, dx; mov ebx, eax; in al, dx
    rig.run_to_halt()
    assert rig.registers()["rbx"] == 0xFFFFFFFF


@pytest.mark.parametrize(("size", "opcode_out", "opcode_in"), [(1, b"\xf3\x6e", b"\xf3\x6c"),
                                                              (2, b"\x66\xf3\x6f", b"\x66\xf3\x6d"),
                                                              (4, b"\xf3\x6f", b"\xf3\x6d")])  # fmt: skip
def test_string_io(rig: Any, size: int, opcode_out: bytes, opcode_in: bytes) -> None:
    count = 700
    code = (
        b"\xfc\x66\xba\x20\x05"  # cld; mov dx, 0x520
        b"\xbe\x00\x00\x02\x00\xb9" + struct.pack("<I", count) + opcode_out +  # mov esi, 0x20000; mov ecx; rep outs
        b"\xbf\x00\x00\x03\x00\xb9" + struct.pack("<I", count) + opcode_in + HLT  # mov edi, 0x30000; rep ins
    )  # fmt: skip
    values = [(i * 2654435761) & ((1 << 8 * size) - 1) for i in range(count)]
    packed = b"".join(value.to_bytes(size, "little") for value in values)
    served = iter(values)
    rig.ports.answer = lambda offset, width: next(served)
    rig.load(code)
    rig.memory.write(0x20000, packed)
    rig.run_to_halt()
    assert rig.ports.writes == [(0x520, size, value) for value in values]
    assert len(rig.ports.reads) == count
    assert rig.memory.read(0x30000, len(packed)) == packed
    registers = rig.registers()
    assert (registers["rcx"], registers["rdi"]) == (0, 0x30000 + len(packed))


def test_mmio(rig: Any) -> None:
    rig.mmio.answer = lambda offset, size: 0x8877665544332211 & (1 << 8 * size) - 1
    code = (
        b"\xbf\x10\x00\x00\xe0"  # mov edi, 0xe0000010
        b"\x8a\x07\x8b\x1f\x48\x8b\x37"  # mov al, [rdi]; mov ebx, [rdi]; mov rsi, [rdi]
        b"\x67\x88\x07"  # mov [edi], al
        b"\xc7\x47\x04\xef\xbe\xad\xde"  # mov dword [rdi+4], 0xdeadbeef
        b"\x48\x89\x77\x08"  # mov [rdi+8], rsi
        b"\xbf\x00\x20\x00\xe0\x48\x8b\x0f" + HLT  # mov edi, 0xe0002000; mov rcx, [rdi]: nobody's
    )
    rig.load(code)
    rig.run_to_halt()
    base = 0xE0000010
    assert rig.mmio.reads == [(base, 1), (base, 4), (base, 8)]
    assert rig.mmio.writes == [(base, 1, 0x11), (base + 4, 4, 0xDEADBEEF), (base + 8, 8, 0x8877665544332211)]
    registers = rig.registers()
    assert (registers["rbx"], registers["rsi"]) == (0x44332211, 0x8877665544332211)
    assert registers["rcx"] == 0xFFFF_FFFF_FFFF_FFFF


def test_halt_and_wake_by_interrupt(rig: Any, kit: Any) -> None:
    """HLT with IF set halts; an interrupt wakes the guest behind the HLT; with IF clear nothing does."""
    code = bytearray(
        b"\x0f\x01\x1c\x25\x00\x10\x01\x00"  # lidt [0x11000]
        b"\xfb\xf4"  # sti; hlt
        b"\x41\xff\xc7"  # inc r15d
        b"\xfa\xf4"  # cli; hlt
    )
    _with_idt(rig, kit, bytes(code), handler=b"\x41\xff\xc6\x48\xcf")  # inc r14d; iretq
    rig.run_to_halt()
    assert rig.registers()["r15"] == 0
    assert rig.run(0.05).reason is ExitReason.HALTED  # nothing pending: still halted, at once
    rig.pic.raise_()
    rig.run_to_halt()
    registers = rig.registers()
    assert (registers["r14"], registers["r15"], rig.pic.acknowledged) == (1, 1, 1)
    rig.pic.raise_()
    assert rig.run(0.05).reason is ExitReason.HALTED  # IF is clear
    assert (rig.pic.acknowledged, rig.vcpu.save().halted) == (1, True)


@pytest.mark.parametrize(
    ("vector", "events"),
    [
        (1, PendingEvents(exception=1, exception_payload=1 << 14)),
        (6, PendingEvents(exception=6)),
        (0x51, PendingEvents(interrupt=0x51)),
        (2, PendingEvents(nmi_pending=True)),
    ],
    ids=["pending #DB", "injected #UD", "interrupt", "NMI"],
)
def test_what_is_in_flight_wakes_a_halted_guest(rig: Any, kit: Any, vector: int, events: PendingEvents) -> None:
    """A state may come from another backend, halted, and with something that is to be delivered first."""
    code = b"\xf4\x41\xff\xc7\xfa\xf4"  # hlt; inc r15d; cli; hlt
    _with_idt(rig, kit, code, handler=b"\x41\xff\xc6\x48\xcf", vector=vector)  # inc r14d; iretq
    state = kit.entry_state(rig.tsc_khz, rflags=0x202)
    idtr = kit.DescriptorTable(0x12000, 0xFFF)
    rig.vcpu.restore(kit.changed(state, rip=kit.CODE_AT + 1, idtr=idtr, halted=True, events=events))
    rig.run_to_halt()
    found = rig.vcpu.save()
    assert (found.registers["r14"], found.registers["r15"]) == (1, 1)
    if vector == 1:
        assert found.dr[4] >> 14 & 1


def test_a_masked_nmi_does_not_wake_a_halted_guest(rig: Any, kit: Any) -> None:
    rig.load(b"\xf4\xf4")
    events = PendingEvents(nmi_pending=True, nmi_masked=True)
    rig.vcpu.restore(kit.changed(kit.entry_state(rig.tsc_khz), rip=kit.CODE_AT + 1, halted=True, events=events))
    assert rig.run(0.05).reason is ExitReason.HALTED
    assert (rig.vcpu.save().rip, rig.vcpu.save().events) == (kit.CODE_AT + 1, events)


def test_a_single_stepped_hlt_traps_at_once(rig: Any, kit: Any) -> None:
    code = b"\x0f\x01\x1c\x25\x00\x10\x01\x00\x9c\x81\x0c\x24\x00\x01\x00\x00\x9d\xf4\x41\xff\xc7\xfa\xf4"
    # lidt [0x11000]; pushfq; or dword [rsp], TF; popfq; hlt; inc r15d; cli; hlt
    # The handler counts, and ends the stepping: inc r14d; and dword [rsp+16], ~TF; iretq
    _with_idt(rig, kit, code, handler=b"\x41\xff\xc6\x81\x64\x24\x10\xff\xfe\xff\xff\x48\xcf", vector=1)
    rig.run_to_halt()
    registers = rig.registers()
    assert (registers["r14"], registers["r15"]) == (1, 1)


def _with_idt(rig: Any, kit: Any, code: bytes, handler: bytes, vector: int = 0, **options: Any) -> None:
    rig.load(code, **options)
    at = 0x11800
    rig.memory.write(at, handler)
    gate = struct.pack("<HHBBHII", at & 0xFFFF, 8, 0, 0x8E, at >> 16, 0, 0)
    rig.memory.write(0x12000, bytes(0x1000))
    rig.memory.write(0x12000 + 16 * (vector or kit.VECTOR), gate)
    rig.memory.write(0x11000, struct.pack("<HQ", 0xFFF, 0x12000))


def test_sti_shadow(rig: Any, kit: Any, pvm: bool) -> None:
    """An interrupt that waits is taken after the instruction behind STI, not before it."""
    code = (
        b"\x0f\x01\x1c\x25\x00\x10\x01\x00"  # lidt [0x11000]
        b"\x66\xba\x10\x05\xec"  # mov dx, 0x510; in al, dx: the test raises the interrupt here
        b"\xfb"  # sti
        b"\x41\xff\xc7"  # inc r15d: in the shadow
        b"\x41\xff\xc7"  # inc r15d
        b"\xfa\xf4"  # cli; hlt
    )
    rig.ports.answer = lambda offset, size: rig.pic.raise_() or 0
    _with_idt(rig, kit, code, handler=b"\x45\x89\xfe\x48\xcf")  # mov r14d, r15d; iretq
    rig.run_to_halt()
    registers = rig.registers()
    assert registers["r15"] == 2
    if pvm and (rig.pic.acknowledged, registers["r14"]) != (1, 1):
        pytest.skip("this KVM emulates ring 0 in batches and looks for interrupt windows only between them")
    assert (rig.pic.acknowledged, registers["r14"]) == (1, 1)


def test_many_interrupts_with_io_between(rig: Any, kit: Any) -> None:
    """Every request is delivered exactly once, whatever exits lie between."""
    code = (
        b"\x0f\x01\x1c\x25\x00\x10\x01\x00\xfb"  # lidt [0x11000]; sti
        b"\x66\xba\x10\x05"  # mov dx, 0x510
        b"\xec\x84\xc0\x75\xfb\xfa\xf4"  # 1: in al, dx; test al, al; jnz 1b; cli; hlt
    )
    rounds = 0

    def answer(offset: int, size: int) -> int:
        nonlocal rounds
        rounds += 1
        if rounds % 3 == 0:
            rig.pic.raise_()
        return int(rounds < 900)

    rig.ports.answer = answer
    _with_idt(rig, kit, code, handler=b"\x41\xff\xc6\x48\xcf")
    rig.run_to_halt()
    registers = rig.registers()
    assert registers["r14"] + rig.pic.requests == 300
    assert rig.pic.requests <= 1  # the last one may find IF clear


def test_triple_fault_is_shutdown(rig: Any) -> None:
    rig.load(b"\x0f\x0b")  # ud2 with an empty IDT
    exit_ = rig.run()
    assert exit_.reason is ExitReason.SHUTDOWN
    assert "triple fault" in exit_.detail
    with pytest.raises(Exception, match="triple fault"):
        rig.vcpu.save()
    rig.load(HLT)  # a reset brings it back
    rig.run_to_halt()


def test_error_names_instruction_and_place(rig: Any, pvm: bool) -> None:
    """An instruction with an MMIO operand that KVM's emulator does not know: the bytes and RIP are in the text."""
    code = b"\xbf\x10\x00\x00\xe0\x0f\xae\x07" + HLT  # mov edi, 0xe0000010; fxsave [rdi]
    rig.load(b"\xbf\x10\x00\x00\xe0\x66\x0f\x38\x00\x07" + HLT)  # pshufb xmm0, [rdi]
    exit_ = rig.run()
    if exit_.reason is not ExitReason.ERROR:
        rig.load(code)
        exit_ = rig.run()
    if exit_.reason is not ExitReason.ERROR:
        pytest.skip(f"this KVM emulates even that: {exit_}")
    assert "cannot emulate" in exit_.detail
    assert "0f" in exit_.detail
    assert "RIP 0x1000" in exit_.detail


def test_bad_entry_state_is_an_error_in_words(rig: Any, kit: Any) -> None:
    rig.load(HLT)
    state = rig.vcpu.save()
    with pytest.raises(kit.BackendUnavailable.__mro__[2], match="CR0"):
        rig.vcpu.restore(kit.changed(state, cr0=0x8000_0010))


def test_deadline_is_kept_without_exits(rig: Any) -> None:
    rig.load(b"\xeb\xfe")  # jmp $
    late: list[float] = []
    for _ in range(50):
        deadline = time.monotonic_ns() + 2_000_000
        assert rig.vcpu.run(deadline).reason is ExitReason.KICKED
        late.append((time.monotonic_ns() - deadline) / 1e3)
    late.sort()
    print(f"deadline: median {late[25]:.0f} us late, worst {late[-1]:.0f} us")
    assert late[0] >= 0
    assert late[25] < 2000


def test_past_deadlines_do_not_starve_the_guest(rig: Any) -> None:
    rig.load(b"\xff\xc0\xeb\xfc")  # 1: inc eax; jmp 1b
    for _ in range(200):
        assert rig.vcpu.run(0).reason is ExitReason.KICKED
    assert rig.registers()["rax"] > 200
