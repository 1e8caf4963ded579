"""Both gates against the manuals: exceptions, interrupts, SYSCALL, ports, halting, faults of devices."""

from __future__ import annotations

import time
from collections.abc import Callable

import attrs
import numpy as np
import pytest

from vmf.cpu.backend import ExitReason
from vmf.cpu.state import MSR_STAR, DescriptorTable, PendingEvents
from vmf.errors import PluginError, StateError
from vmf_cpu_unicorn.selftest_guest import (
    CODE,
    KERNEL_CS,
    KERNEL_STACK,
    STACK,
    SYSCALL_ENTRY,
    USER_CS,
    USER_SS,
    Bench,
    ScriptedInterrupts,
)

HLT = 0xF4
UNMAPPED = 0x0123_4567_8000


def code(text: str) -> bytes:
    return bytes.fromhex(text)


@pytest.mark.parametrize(
    ("instruction", "registers", "vector", "error"),
    [
        ("488b03", {"rbx": UNMAPPED}, 14, 0),  # mov rax,[rbx]
        ("488903", {"rbx": UNMAPPED}, 14, 2),  # mov [rbx],rax
        ("0f0b", {}, 6, 0),  # ud2
        ("48f7f3", {}, 0, 0),  # div rbx, by zero
        ("488b03", {"rbx": 1 << 63}, 13, 0),  # not canonical: #GP
        ("8ed8", {"rax": 0x58}, 13, 0x58),  # mov ds,ax beyond the GDT: #GP(selector)
        ("0f04", {}, 6, 0),  # not an instruction
    ],
)
def test_fault(bench: Bench, instruction: str, registers: dict[str, int], vector: int, error: int) -> None:
    raw = code(instruction)
    result = bench.execute(raw + bytes([HLT]), bench.state(rflags=0x8D7, r15=CODE + len(raw), **registers))
    assert result.reason is ExitReason.HALTED
    (record,) = bench.records()
    assert (record.vector, record.error, record.rip, record.cs) == (vector, error, CODE, KERNEL_CS)
    assert record.rflags & ~0x10000 == 0x8D7 or vector == 0, "arithmetic flags must survive"
    assert record.rsp == STACK
    if vector == 14:
        assert record.cr2 == UNMAPPED
    state = bench.vcpu.save()
    assert state.halted
    assert state.rip == CODE + len(raw) + 1


@pytest.mark.parametrize(
    ("instruction", "registers", "vector", "error"),
    [
        ("488903", {"rbx": UNMAPPED}, 14, 6),  # write, user
        ("f4", {}, 13, 0),  # hlt
        ("fa", {}, 13, 0),  # cli with IOPL 0
        ("e480", {}, 13, 0),  # in al,0x80
        ("e680", {}, 13, 0),  # out 0x80,al
        ("66e580", {}, 13, 0),  # in ax,0x80
        # int 0x80 through a gate of DPL 0. 0x80 * 8 + 2 it should be; the engine counts 16 bytes a gate (README.md).
        ("cd80", {}, 13, 0x80 * 16 + 2),
        ("0f22d8", {}, 13, 0),  # mov cr3,rax
    ],
)
def test_fault_at_cpl_3(bench: Bench, instruction: str, registers: dict[str, int], vector: int, error: int) -> None:
    raw = code(instruction)
    state = bench.state(user=True, rflags=0x202, r15=CODE + len(raw), **registers)
    assert bench.execute(raw + code("0f05"), state).reason is ExitReason.HALTED
    (record,) = bench.records()
    assert (record.vector, record.error, record.rip) == (vector, error, CODE)
    assert (record.cs, record.ss, record.rsp, record.rflags & ~0x10000) == (USER_CS, USER_SS, STACK, 0x202)
    assert bench.vcpu.save().registers["rcx"] == CODE + len(raw) + 2


def test_ports_are_allowed_by_iopl(bench: Bench) -> None:
    seen: list[tuple[int, int]] = []
    bench.port.write = lambda size, value: seen.append((size, value))
    state = bench.state(user=True, rflags=0x3202, rax=0x1234_5678)
    # out 0x80,al; out 0x80,ax; out 0x80,eax; in al,0x80; syscall
    bench.execute(code("e680 66e780 e780 e480 0f05"), state)
    assert seen == [(1, 0x78), (2, 0x5678), (4, 0x1234_5678)]
    assert bench.records() == []
    assert bench.vcpu.save().registers["rax"] == 0x1234_565A


def test_ports_are_allowed_by_the_bitmap_of_the_tss(bench: Bench) -> None:
    # The TSS stands at 0x6000, limit 0x67: give it a bitmap of 0x20 bytes with port 0x80 clear.
    bench.memory.write(0x6066, (0x68).to_bytes(2, "little"))
    bench.memory.write(0x6068, b"\xff" * 16 + b"\xfe" + b"\xff" * 16)
    state = bench.state(user=True, rflags=0x202, r15=CODE + 4)
    state = attrs.evolve(state, tr=attrs.evolve(state.tr, limit=0x68 + 0x20))
    bench.execute(code("e480 e481 0f05"), state)
    assert [(r.vector, r.rip) for r in bench.records()] == [(13, CODE + 2)]


@pytest.mark.parametrize(("raw", "vector"), [("cd42", 0x42), ("cc", 3)])
@pytest.mark.parametrize("user", [False, True])
def test_software_interrupt(bench: Bench, raw: str, vector: int, user: bool) -> None:
    tail = "0f05" if user else "f4"
    bench.execute(code(raw + tail), bench.state(user=user, rflags=0x203))
    (record,) = bench.records()
    assert (record.vector, record.rip, record.rflags & ~0x10000) == (vector, CODE + len(raw) // 2, 0x203)
    # The log does not hold the handler's own stack; IRETQ has put everything back, though.
    registers = bench.vcpu.save().registers
    assert registers["rsp"] == STACK
    assert registers["r11" if user else "rbx"] == (0x203 if user else 0)


def test_page_fault_while_delivering_is_a_double_fault(bench: Bench) -> None:
    """ud2 with a stack that is not there: pushing #UD's frame gives #PF, whose frame gives #DF, on the IST stack."""
    bench.load(b"", bench.state())
    # Give vector 8 IST 1, and IST 1 a stack.
    entry = bytearray(bench.memory.read(0x7000 + 16 * 8, 16))
    entry[4] = 1
    bench.memory.write(0x7000 + 16 * 8, entry)
    bench.memory.write(0x6024, (0xE000).to_bytes(8, "little"))
    result = bench.execute(code("0f0bf4"), bench.state(rsp=UNMAPPED, r15=CODE + 2))
    assert result.reason is ExitReason.HALTED
    assert [(r.vector, r.error, r.rsp) for r in bench.records()] == [(8, 0, UNMAPPED)]


def test_triple_fault_is_a_shutdown(bench: Bench) -> None:
    state = attrs.evolve(bench.state(), idtr=DescriptorTable(0, 0))
    result = bench.execute(code("0f0bf4"), state)
    assert result.reason is ExitReason.SHUTDOWN
    assert "triple fault" in result.detail


def test_work_goes_on_after_a_shutdown(bench: Bench) -> None:
    bench.execute(code("0f0bf4"), attrs.evolve(bench.state(), idtr=DescriptorTable(0, 0)))
    assert bench.execute(code("f4")).reason is ExitReason.HALTED


def test_syscall_and_sysret(bench: Bench) -> None:
    # At LSTAR: inc rbx; sysretq. In ring 3: syscall; inc rbx; syscall with a prefix; cli (#GP, go on at jmp $).
    bench.memory.write(SYSCALL_ENTRY, code("48ffc3480f07"))
    bench.vcpu.invalidate_code(SYSCALL_ENTRY, 16)
    state = bench.state(user=True, rflags=0xAD7 | 0x400, r15=SYSCALL_ENTRY + 16)
    bench.memory.write(SYSCALL_ENTRY + 16, code("ebfe"))
    bench.load(code("0f05 48ffc3 480f05 fa"), state)
    bench.vcpu.run(time.monotonic_ns() + 20_000_000)
    (first,) = bench.records()
    assert (first.vector, first.rip, first.cs, first.ss) == (13, CODE + 8, USER_CS, USER_SS)
    assert bench.vcpu.save().registers["rbx"] == 3


def test_syscall_flags(bench: Bench) -> None:
    """R11 gets RFLAGS, RFLAGS loses FMASK's bits (TF, IF, DF here), arithmetic flags stay."""
    bench.execute(code("0f05"), bench.state(user=True, rflags=0xED7))
    state = bench.vcpu.save()
    assert state.registers["r11"] == 0xED7
    assert state.rflags == 0xED7 & ~0x700
    assert state.segments["cs"].selector == KERNEL_CS
    assert state.segments["cs"].dpl == 0
    assert state.segments["ss"].dpl == 0


def test_syscall_without_sce_is_undefined(bench: Bench) -> None:
    state = attrs.evolve(bench.state(r15=CODE + 2), efer=0xD00)
    bench.execute(code("0f05f4"), state)
    assert [(r.vector, r.rip) for r in bench.records()] == [(6, CODE)]


def test_iretq_to_ring_3_and_back(bench: Bench) -> None:
    # push ss; push rsp; push rflags; push cs; push rip; iretq -> at CODE+0x40 in ring 3: syscall
    program = code("6a23 6800f00100 6802020000 6a2b 6840000200 48cf").ljust(0x40, b"\x90") + code("0f05")
    assert bench.execute(program).reason is ExitReason.HALTED
    state = bench.vcpu.save()
    assert state.registers["rcx"] == CODE + 0x42
    assert state.registers["r11"] == 0x202


def test_sti_shadow(bench: Bench) -> None:
    bench.interrupts.queue = [0x55]
    bench.execute(code("90 fb 90 90 f4"))  # nop; sti; nop; nop; hlt
    assert bench.interrupts.acknowledged == [0x55]
    assert [(r.vector, r.rip) for r in bench.records()] == [(0x55, CODE + 3)]


def test_sti_cli_leaves_no_window(bench: Bench) -> None:
    bench.interrupts.queue = [0x55]
    bench.execute(code("fb fa 90 f4"))  # sti; cli; nop; hlt
    assert bench.interrupts.acknowledged == []
    assert bench.records() == []


def test_popf_opens_the_window(bench: Bench) -> None:
    bench.interrupts.queue = [0x56]
    bench.execute(code("6802020000 9d 90 fa f4"))  # push 0x202; popfq; nop; cli; hlt
    assert [r.vector for r in bench.records()] == [0x56]
    assert bench.records()[0].rip in (CODE + 6, CODE + 7)


def test_interrupt_at_cpl_3_uses_the_stack_of_the_tss(bench: Bench) -> None:
    bench.interrupts.queue = [0x57]
    bench.execute(code("90 0f05"), bench.state(user=True, rflags=0x202))
    (record,) = bench.records()
    assert (record.vector, record.cs, record.rsp, record.rip) == (0x57, USER_CS, STACK, CODE)
    assert bench.memory.read(KERNEL_STACK - 8, 1) != b"\0", "the frame lies on RSP0's stack"


def test_several_interrupts_are_taken_one_after_the_other(bench: Bench) -> None:
    bench.interrupts.queue = [0x60, 0x61, 0x62]
    bench.execute(code("fb 90 90 90 90 90 f4"))
    assert bench.interrupts.acknowledged == [0x60, 0x61, 0x62]
    assert [r.vector for r in bench.records()] == [0x60, 0x61, 0x62]


def test_device_raises_an_interrupt_in_out(bench: Bench) -> None:
    bench.port.write = lambda size, value: bench.interrupts.queue.append(value)
    # sti; mov al,0x70; out 0x80,al; jmp +0; nop; cli; hlt
    bench.execute(code("fb b070 e680 eb00 90 fa f4"))
    (record,) = bench.records()
    assert record.vector == 0x70
    assert CODE + 5 <= record.rip <= CODE + 8, "delivered at the next block, before the CLI"


def test_device_takes_an_interrupt_back_in_in(bench: Bench) -> None:
    bench.interrupts.queue = [0x71]

    def lower(size: int) -> int:
        bench.interrupts.queue.clear()
        return 0

    bench.port.read = lower
    bench.execute(code("e480 fb 90 90 f4"))  # with IF clear: in al,0x80; sti; nop; nop; hlt
    assert bench.interrupts.acknowledged == []


def test_hlt(bench: Bench) -> None:
    assert bench.execute(code("fb f4 90 f4"), bench.state()).reason is ExitReason.HALTED
    assert bench.vcpu.save().halted
    assert bench.vcpu.run(None).reason is ExitReason.HALTED, "nothing pending: still halted"
    assert not bench.vcpu.halted_for_good()
    bench.interrupts.queue = [0x44]
    assert bench.vcpu.run(None).reason is ExitReason.HALTED
    assert [r.vector for r in bench.records()] == [0x44]
    assert bench.records()[0].rip == CODE + 2
    assert bench.vcpu.save().rip == CODE + 4


def test_hlt_with_interrupt_pending_goes_on(bench: Bench) -> None:
    bench.interrupts.queue = [0x44]
    bench.port.write = lambda size, value: bench.interrupts.queue.append(0x45)
    assert bench.execute(code("e680 fb f4 fa f4")).reason is ExitReason.HALTED
    assert [r.vector for r in bench.records()] == [0x44, 0x45]


def test_hlt_with_interrupts_off_sleeps_on(bench: Bench) -> None:
    bench.interrupts.queue = [0x44]
    assert bench.execute(code("f4 90 f4")).reason is ExitReason.HALTED
    assert bench.interrupts.acknowledged == []
    assert bench.vcpu.save().rip == CODE + 1
    assert bench.vcpu.halted_for_good()


def test_mmio(bench: Bench) -> None:
    accesses: list[tuple[str, int, int, int]] = []

    class Device:
        def io_read(self, offset: int, size: int) -> int:
            accesses.append(("r", offset, size, 0))
            return 0x1122334455667788 & ((1 << 8 * size) - 1)

        def io_write(self, offset: int, size: int, value: int) -> None:
            accesses.append(("w", offset, size, value))

    bench.bus.claim_mmio("test", 0x50_0000, 0x1000, Device())
    # Map virtual 4 MiB (PD entry 2) to guest-physical 4 MiB, beyond RAM.
    bench.load(b"", bench.state())
    bench.memory.write(0x3010, (0x400083).to_bytes(8, "little"))
    # mov eax,[rbx]; mov [rbx+8],cx; mov rdx,[rbx+0x10]; mov r8,[rbx+0x2000]; hlt
    state = bench.state(rbx=0x50_0000, rcx=0xBEEF)
    assert bench.execute(code("8b03 66894b08 488b5310 4c8b8300200000 f4"), state).reason is ExitReason.HALTED
    registers = bench.vcpu.save().registers
    assert registers["rax"] == 0x55667788
    assert registers["r8"] == (1 << 64) - 1, "nobody there: all ones"
    assert ("r", 0, 4, 0) in accesses
    assert ("w", 8, 2, 0xBEEF) in accesses


@pytest.mark.parametrize("where", ["read", "write"])
def test_exception_of_a_device_is_raised(bench: Bench, where: str) -> None:
    def fail(*_: object) -> int:
        raise RuntimeError("broken device")

    setattr(bench.port, where, fail)
    bench.load(code("90 e480 e680 ebf9"), bench.state())
    with pytest.raises(PluginError, match="RuntimeError: broken device"):
        bench.vcpu.run(time.monotonic_ns() + 1_000_000_000)


@pytest.mark.parametrize("where", ["pending", "acknowledge"])
def test_exception_of_the_interrupt_controller(
    make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fail(_: object) -> int:
        raise RuntimeError("broken controller")

    monkeypatch.setattr(ScriptedInterrupts, where, fail)
    bench = make_bench()
    bench.interrupts.queue = [0x50]
    bench.load(code("90 fb 90 ebfe"), bench.state())
    with pytest.raises(RuntimeError, match="broken controller"):
        bench.vcpu.run(time.monotonic_ns() + 1_000_000_000)


def test_keyboard_interrupt_in_a_device_is_raised(bench: Bench) -> None:
    def interrupt(size: int) -> int:
        raise KeyboardInterrupt

    bench.port.read = interrupt
    bench.load(code("e480 ebfc"), bench.state())
    with pytest.raises(KeyboardInterrupt):
        bench.vcpu.run(time.monotonic_ns() + 1_000_000_000)


def test_execution_outside_of_memory_is_an_error(bench: Bench) -> None:
    bench.load(b"", bench.state())
    bench.memory.write(0x3010, (0x400083).to_bytes(8, "little"))
    result = bench.execute(code("ffe3"), bench.state(rbx=0x40_0000))  # jmp rbx, into MMIO
    assert result.reason is ExitReason.ERROR
    assert "0x400000" in result.detail


def test_cpuid_comes_from_the_contract(bench: Bench) -> None:
    for leaf, subleaf in ((0, 0), (1, 0), (1, 9), (4, 1), (7, 0), (0x15, 0), (0x40000000, 0), (0x80000002, 0)):
        bench.execute(code("0fa2f4"), bench.state(rax=leaf, rcx=subleaf, rbx=-1 & (1 << 64) - 1))
        registers = bench.vcpu.save().registers
        found = tuple(registers[name] for name in ("rax", "rbx", "rcx", "rdx"))
        assert found == tuple(bench.environment.cpuid.lookup(leaf, subleaf)), hex(leaf)


def test_tsc(bench: Bench) -> None:
    bench.vcpu.write_tsc(1_000_000)
    before = bench.vcpu.read_tsc()
    bench.load(code("0f31f4"), attrs.evolve(bench.state(), tsc=5_000_000_000))
    bench.go()
    registers = bench.vcpu.save().registers
    value = registers["rdx"] << 32 | registers["rax"]
    assert 1_000_000 <= before < 100_000_000
    assert 5_000_000_000 <= value <= bench.vcpu.read_tsc() < 15_000_000_000


@pytest.mark.parametrize("how", ["invalidate_code", "memory_written", "ranges_written"])
def test_code_written_from_outside(bench: Bench, how: str) -> None:
    bench.execute(code("48c7c001000000f4"))  # mov rax,1; hlt
    assert bench.vcpu.save().registers["rax"] == 1
    bench.memory.write(CODE + 3, b"\x02")
    if how == "ranges_written":
        bench.vcpu.ranges_written(np.array([(0, 16), (CODE + 3, 1), (64, 4096)], dtype=np.uint64))
    else:
        getattr(bench.vcpu, how)(CODE + 3, 1)
    bench.vcpu.restore(bench.state())
    bench.go()
    assert bench.vcpu.save().registers["rax"] == 2


# What a restored state may bring along -------------------------------------------------------------------------


@pytest.mark.parametrize("rflags", [0x002, 0x202])
def test_pending_exception_is_raised_first(bench: Bench, rflags: int) -> None:
    bench.interrupts.queue = [0x40]
    events = PendingEvents(exception=14, exception_error_code=7, exception_payload=UNMAPPED, interrupt_shadow=1)
    state = attrs.evolve(bench.state(rflags=rflags), events=events)
    bench.load(code("90 90 fa f4"), state)
    assert bench.vcpu.save().events == events
    assert bench.go().reason is ExitReason.HALTED
    records = bench.records()
    assert (records[0].vector, records[0].error, records[0].cr2, records[0].rip) == (14, 7, UNMAPPED, CODE)
    assert records[0].rflags & ~0x10000 == rflags
    assert [r.vector for r in records[1:]] == ([0x40] if rflags & 0x200 else [])
    assert bench.vcpu.save().events == PendingEvents()


def test_interrupt_in_flight_is_delivered_when_it_can_be(bench: Bench) -> None:
    state = attrs.evolve(bench.state(), events=PendingEvents(interrupt=0x33))
    bench.load(code("90 fb 90 90 f4"), state)
    assert bench.vcpu.save().events.interrupt == 0x33
    bench.go()
    assert [(r.vector, r.rip) for r in bench.records()] == [(0x33, CODE + 3)]
    assert bench.interrupts.acknowledged == []
    assert bench.vcpu.save().events.interrupt is None


def test_interrupt_in_flight_survives_a_save_before_it_could_be_delivered(bench: Bench) -> None:
    state = attrs.evolve(bench.state(), events=PendingEvents(interrupt=0x33))
    bench.execute(code("90 f4 fb 90 f4"), state)
    assert bench.vcpu.save().events.interrupt == 0x33


def test_nmi(bench: Bench) -> None:
    state = attrs.evolve(bench.state(), events=PendingEvents(nmi_pending=True))
    bench.execute(code("90 f4"), state)
    assert [r.vector for r in bench.records()] == [2]
    assert not bench.vcpu.save().events.nmi_masked, "IRET has unmasked it"
    masked = attrs.evolve(bench.state(), events=PendingEvents(nmi_pending=True, nmi_masked=True))
    assert bench.execute(code("90 f4 90 f4"), masked).reason is ExitReason.HALTED
    assert bench.vcpu.run(None).reason is ExitReason.HALTED
    assert bench.records() == []
    assert bench.vcpu.save().rip == CODE + 2, "a masked NMI does not end HLT"
    assert bench.vcpu.save().events == masked.events


def test_half_delivered_software_interrupt_is_refused(bench: Bench) -> None:
    events = PendingEvents(interrupt=0x80, interrupt_soft=True)
    with pytest.raises(StateError, match="software interrupt"):
        bench.vcpu.restore(attrs.evolve(bench.state(), events=events))


def test_unknown_msr_is_refused_by_number(bench: Bench) -> None:
    state = bench.state()
    with pytest.raises(StateError, match="0xda0"):
        bench.vcpu.restore(attrs.evolve(state, msrs={**state.msrs, 0xDA0: 1}))
    assert MSR_STAR in bench.vcpu.save().msrs


def test_a_single_stepped_hlt_traps_at_once(bench: Bench) -> None:
    """As on a processor (and KVM): the trap ends the halt, with nobody asserting an interrupt."""
    raw = code("f4 9c 812424fffeffff 9d f4")  # hlt; pushfq; and dword [rsp], ~TF; popfq; hlt
    assert bench.execute(raw, bench.state(rflags=0x302)).reason is ExitReason.HALTED
    assert [(record.vector, record.rip - CODE) for record in bench.records()] == [(1, 1), (1, 2), (1, 9), (1, 10)]
    state = bench.vcpu.save()
    assert state.halted
    assert state.dr[4] >> 14 & 1


def test_single_stepping_goes_on_after_a_restore_and_ends(bench: Bench) -> None:
    """A guest's debugger is stopped between two steps: the handler itself is not stepped, nor what comes after."""
    raw = code("90 9c 812424fffeffff 9d 90 f4")  # nop; pushfq; and dword [rsp], ~TF; popfq; nop; hlt
    assert bench.execute(raw, bench.state(rflags=0x102)).reason is ExitReason.HALTED
    assert [(record.vector, record.rip - CODE) for record in bench.records()] == [(1, 1), (1, 2), (1, 9), (1, 10)]


@pytest.mark.parametrize("entry", ["restore", "syscall"])
def test_rights_to_ports_end_with_iopl(bench: Bench, entry: str) -> None:
    """IOPL 3 of a restored state, or of the user whom SYSCALL interrupts, is nothing that the next process has."""
    # push ss; push rsp; push 0x202; push cs; push r14; iretq: to ring 3, with IOPL 0
    leave = code(f"6a{USER_SS:02x} 54 6802020000 6a{USER_CS:02x} 4156 48cf")
    target = CODE + 0x80
    bench.memory.write(target, code("fa ebfe"))  # cli; and then stay here
    if entry == "restore":
        state = bench.state(rflags=0x3002, r14=target, r15=target + 1)
        bench.load(leave, state)
    else:
        bench.memory.write(SYSCALL_ENTRY, leave)
        state = bench.state(user=True, rflags=0x3202, r14=target, r15=target + 1)
        bench.load(code("0f05"), attrs.evolve(state, msrs={**state.msrs, 0xC0000084: 0}))
    end = time.monotonic() + 30
    while bench.vcpu.save().rip != target + 1 and time.monotonic() < end:
        bench.go(0.01)
    assert [(record.vector, record.rip) for record in bench.records()] == [(13, target)]
