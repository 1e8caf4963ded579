"""The vCPU.

Theory of operation. Unicorn calls `_before` in front of every instruction, with the vCPU between two instructions. That
is where everything is decided: whether somebody wants the slice to end, and whether an interrupt can be taken. A stop
from within this callback takes effect before the instruction; nothing is ever half done. So `kick` only sets a flag.

The engine delivers no interrupts; `_interrupt` does what the processor would (SDM vol. 3A 6.14). It holds no more than
a 64-bit guest in ring 0 with flat segments needs. Whatever else a state contains is refused by `_refuse`, naming it:
a backend that drops what it does not know corrupts a guest some seconds after a teleport, and nobody will know why.
"""

from __future__ import annotations

import struct
import time
from typing import Any

import attrs
import unicorn
from unicorn import (
    UC_ARCH_X86,
    UC_CTL_IO_WRITE,
    UC_CTL_TLB_FLUSH,
    UC_HOOK_CODE,
    UC_HOOK_INSN,
    UC_HOOK_INTR,
    UC_MODE_64,
    UC_PROT_ALL,
)
from unicorn import x86_const as x86

from vmf.cpu.backend import ExitReason, Vcpu, VcpuEnvironment, VmExit
from vmf.cpu.state import (
    GENERAL_REGISTERS,
    REQUIRED_MSRS,
    RFLAGS_IF,
    DescriptorTable,
    PendingEvents,
    Segment,
    VcpuState,
    msr_reset_value,
)
from vmf.cpuid.table import CpuidRegisters, CpuidTable
from vmf.errors import StateError
from vmf_cpu_stepper.backend import ADDRESS_BITS

LOOK_EVERY = 256
"""Instructions between two looks at the clock."""
RFLAGS_SHOWN = 0x3F_7FD7
_EVERYTHING = (1 << 64) - 1
_BINDING: Any = unicorn  # it has no types
_GENERAL = {name: getattr(x86, f"UC_X86_REG_{name.upper()}") for name in GENERAL_REGISTERS}
_SELECTORS = {name: getattr(x86, f"UC_X86_REG_{name.upper()}") for name in ("es", "cs", "ss", "ds", "fs", "gs")}
_FP = [getattr(x86, f"UC_X86_REG_FP{i}") for i in range(8)]
_XMM = [getattr(x86, f"UC_X86_REG_XMM{i}") for i in range(16)]
_FS_BASE, _GS_BASE, _EFER = 0xC0000100, 0xC0000101, 0xC0000080
_LSTAR, _FMASK = 0xC0000082, 0xC0000084
_CODE64 = 0xA09B


class StepperVcpu(Vcpu):
    """One vCPU. All methods on its thread, but `kick`."""

    def __init__(self, environment: VcpuEnvironment) -> None:
        self._environment = environment
        self._memory, self._bus = environment.memory, environment.bus
        self._kicked = self._halted = False
        self._deadline_ns: int | None = None
        self._countdown = LOOK_EVERY
        self._last = 0
        """Address of the instruction that was executed last."""
        self._fresh = False
        """The slice's first instruction is still to come: it is always executed, so that the guest gets on."""
        self._problem = ""
        self._restored: VcpuState | None = None
        self._tsc_base = 0
        self._uc = uc = _BINDING.Uc(UC_ARCH_X86, UC_MODE_64)
        position = 0
        for region in self._memory.regions:
            self._map_mmio(position, region.gpa)
            uc.mem_map_ptr(region.gpa, region.size, UC_PROT_ALL, self._memory.address + region.offset)
            position = region.gpa + region.size
        self._map_mmio(position, 1 << ADDRESS_BITS)
        uc.hook_add(UC_HOOK_CODE, self._before)
        uc.hook_add(UC_HOOK_INTR, self._exception)
        uc.hook_add(
            UC_HOOK_INSN, lambda _uc, port, size, _user: self._bus.port_read(port, size), aux1=x86.UC_X86_INS_IN
        )
        uc.hook_add(UC_HOOK_INSN, self._out, aux1=x86.UC_X86_INS_OUT)
        uc.hook_add(UC_HOOK_INSN, self._cpuid, aux1=x86.UC_X86_INS_CPUID)
        uc.hook_add(UC_HOOK_INSN, self._syscall, aux1=x86.UC_X86_INS_SYSCALL)

    def _map_mmio(self, first: int, end: int) -> None:
        """All that is no RAM goes to the bus."""
        if first < end:
            self._uc.mmio_map(
                first,
                end - first,
                lambda _uc, offset, size, _user: self._bus.mmio_read(first + offset, size),
                None,
                lambda _uc, offset, size, value, _user: self._bus.mmio_write(first + offset, size, value),
                None,
            )

    # -- running

    def run(self, deadline_ns: int | None) -> VmExit:
        self._deadline_ns, self._countdown = deadline_ns, LOOK_EVERY
        while True:
            if self._problem:
                return VmExit(ExitReason.ERROR, self._problem)
            if self._interruptible():
                self._halted = False
                self._interrupt(self._environment.interrupts.acknowledge())
            if self._halted:
                return VmExit(ExitReason.HALTED)
            if self._kicked:
                self._kicked = False  # seen, and not lost: whoever kicks from here on ends the next slice
                return VmExit(ExitReason.KICKED)
            if self._late():
                return VmExit(ExitReason.KICKED)
            self._fresh = True
            rip = self._uc.reg_read(x86.UC_X86_REG_RIP)
            try:
                self._uc.emu_start(rip, _EVERYTHING)
            except _BINDING.UcError as error:
                at = self._uc.reg_read(x86.UC_X86_REG_RIP)
                return VmExit(ExitReason.ERROR, f"the engine stopped at RIP {at:#x}: {error}")
            # The engine stops by itself after HLT only, with RIP behind it.
            rip = self._uc.reg_read(x86.UC_X86_REG_RIP)
            self._halted = rip == self._last + 1 and self._memory.read(self._physical(self._last), 1) == b"\xf4"

    def _before(self, uc: Any, address: int, _size: int, _user: object) -> None:
        """In front of every instruction."""
        if not self._fresh:
            self._countdown -= 1
            late = self._countdown <= 0 and self._late()
            if self._kicked or late or self._interruptible():
                uc.emu_stop()
                return
            self._countdown = self._countdown or LOOK_EVERY
        self._fresh = False
        self._last = address

    def _late(self) -> bool:
        return self._deadline_ns is not None and time.monotonic_ns() >= self._deadline_ns

    def _interruptible(self) -> bool:
        """An interrupt waits, IF is set, and the instruction before was not STI."""
        return (
            self._environment.interrupts.pending()
            and bool(self._uc.reg_read(x86.UC_X86_REG_EFLAGS) & RFLAGS_IF)
            and self._memory.read(self._physical(self._last), 1) != b"\xfb"
        )

    def _physical(self, linear: int) -> int:
        """Of an address in identity-mapped low memory, where such guests have their code."""
        return linear if linear < self._memory.size else 0

    def _interrupt(self, vector: int) -> None:
        """Through the guest's IDT, in ring 0 without a stack switch: SS, RSP, RFLAGS, CS, RIP."""
        uc = self._uc
        _, base, _, _ = uc.reg_read(x86.UC_X86_REG_IDTR)
        low, selector, _, _, middle, high = struct.unpack("<HHBBHI", uc.mem_read(base + 16 * vector, 12))
        rsp, rflags = uc.reg_read(x86.UC_X86_REG_RSP), uc.reg_read(x86.UC_X86_REG_EFLAGS)
        frame = (
            uc.reg_read(x86.UC_X86_REG_RIP), uc.reg_read(x86.UC_X86_REG_CS), rflags, rsp,
            uc.reg_read(x86.UC_X86_REG_SS),
        )  # fmt: skip
        top = (rsp & ~15) - 40
        uc.mem_write(top, struct.pack("<5Q", *frame))
        uc.reg_write(x86.UC_X86_REG_RSP, top)
        uc.reg_write(x86.UC_X86_REG_EFLAGS, rflags & ~(RFLAGS_IF | 0x1_4100))  # RF NT TF
        uc.reg_write(x86.UC_X86_REG_RIP, high << 32 | middle << 16 | low)
        self._last = 0
        assert selector == uc.reg_read(x86.UC_X86_REG_CS), "the guest has one code segment"

    def _exception(self, uc: Any, vector: int, _user: object) -> None:
        self._problem = f"the guest raised exception {vector} at {self._last:#x}, which this backend does not deliver"
        uc.emu_stop()

    def _out(self, _uc: Any, port: int, size: int, value: int, _user: object) -> None:
        self._bus.port_write(port, size, value)

    def _cpuid(self, uc: Any, _user: object) -> int:
        leaf, subleaf = uc.reg_read(x86.UC_X86_REG_EAX), uc.reg_read(x86.UC_X86_REG_ECX)
        eax, ebx, ecx, edx = self._environment.cpuid.lookup(leaf, subleaf)
        for name, value in (("rax", eax), ("rbx", ebx), ("rcx", ecx), ("rdx", edx)):
            uc.reg_write(_GENERAL[name], value)
        return 1  # the engine's own answer is not wanted

    def _syscall(self, uc: Any, _user: object) -> None:
        """From ring 0 to ring 0; the engine adds the instruction's two bytes to RIP afterwards."""
        rflags = uc.reg_read(x86.UC_X86_REG_EFLAGS)
        uc.reg_write(x86.UC_X86_REG_RCX, self._last + 2)
        uc.reg_write(x86.UC_X86_REG_R11, rflags)
        uc.reg_write(x86.UC_X86_REG_EFLAGS, rflags & ~self._msr(_FMASK))
        uc.reg_write(x86.UC_X86_REG_RIP, self._msr(_LSTAR) - 2)

    def kick(self) -> None:
        self._kicked = True

    # -- state

    def _msr(self, index: int) -> int:
        value: int = self._uc.reg_read(x86.UC_X86_REG_MSR, index)
        return value

    def save(self) -> VcpuState:
        """What the guest can have changed since `restore`, over what was restored."""
        uc, before = self._uc, self._restored
        if before is None:
            raise StateError("the vCPU has no state yet.")
        gdt, idt = uc.reg_read(x86.UC_X86_REG_GDTR), uc.reg_read(x86.UC_X86_REG_IDTR)
        return attrs.evolve(
            before,
            registers={name: uc.reg_read(register) for name, register in _GENERAL.items()},
            rip=uc.reg_read(x86.UC_X86_REG_RIP),
            rflags=uc.reg_read(x86.UC_X86_REG_EFLAGS) | 2,
            segments={name: self._segment(name, gdt[1], before.segments[name]) for name in _SELECTORS},
            gdtr=DescriptorTable(gdt[1], gdt[2]),
            idtr=DescriptorTable(idt[1], idt[2]),
            cr0=uc.reg_read(x86.UC_X86_REG_CR0),
            cr2=uc.reg_read(x86.UC_X86_REG_CR2),
            cr3=uc.reg_read(x86.UC_X86_REG_CR3),
            cr4=uc.reg_read(x86.UC_X86_REG_CR4),
            efer=self._msr(_EFER),
            msrs={index: self._msr(index) for index in sorted(REQUIRED_MSRS)},
            xsave=self._saved_fpu(),
            halted=self._halted,
            tsc=self.read_tsc(),
        )

    def _segment(self, name: str, gdt: int, before: Segment) -> Segment:
        """As it was restored, or as the descriptor says that the guest has loaded since."""
        selector = self._uc.reg_read(_SELECTORS[name])
        base = self._msr({"fs": _FS_BASE, "gs": _GS_BASE}[name]) if name in ("fs", "gs") else 0
        if selector == before.selector:
            return attrs.evolve(before, base=base)
        raw = int.from_bytes(self._uc.mem_read(gdt + (selector & ~7), 8), "little")
        access = raw >> 40 & 0xF0FF
        return Segment(selector, base, 0xFFFF_FFFF, access)

    def _saved_fpu(self) -> bytes:
        """The legacy part of the XSAVE area, SDM vol. 1 table 13-1, and a header that says x87 and SSE."""
        uc, area = self._uc, bytearray(576)
        status, tags = uc.reg_read(x86.UC_X86_REG_FPSW), uc.reg_read(x86.UC_X86_REG_FPTAG)
        top = status >> 11 & 7
        used = sum(1 << i for i in range(8) if tags >> 2 * i & 3 != 3)
        struct.pack_into("<HHB", area, 0, uc.reg_read(x86.UC_X86_REG_FPCW), status, used)
        struct.pack_into("<II", area, 24, uc.reg_read(x86.UC_X86_REG_MXCSR), 0xFFFF)
        for i in range(8):
            mantissa, exponent = uc.reg_read(_FP[(top + i) & 7])
            struct.pack_into("<QH", area, 32 + 16 * i, mantissa, exponent)
        for i, register in enumerate(_XMM):
            area[160 + 16 * i : 176 + 16 * i] = uc.reg_read(register).to_bytes(16, "little")
        area[512] = 3
        return bytes(area)

    def restore(self, state: VcpuState) -> None:
        self._refuse(state)
        uc = self._uc
        # Paging needs CR4, CR3 and EFER before CR0.
        for register, value in (
            (x86.UC_X86_REG_CR4, state.cr4), (x86.UC_X86_REG_CR3, state.cr3), (x86.UC_X86_REG_CR2, state.cr2)
        ):  # fmt: skip
            uc.reg_write(register, value)
        for index, value in {**state.msrs, _EFER: state.efer}.items():
            uc.reg_write(x86.UC_X86_REG_MSR, (index, value))
        uc.reg_write(x86.UC_X86_REG_CR0, state.cr0)
        for table, register in ((state.gdtr, x86.UC_X86_REG_GDTR), (state.idtr, x86.UC_X86_REG_IDTR)):
            uc.reg_write(register, (0, table.base, table.limit, 0))
        tr = state.tr
        uc.reg_write(x86.UC_X86_REG_TR, (tr.selector, tr.base, tr.limit, tr.access << 8))
        for name, register in _SELECTORS.items():
            uc.reg_write(register, state.segments[name].selector)
        uc.reg_write(x86.UC_X86_REG_MSR, (_FS_BASE, state.segments["fs"].base))
        uc.reg_write(x86.UC_X86_REG_MSR, (_GS_BASE, state.segments["gs"].base))
        self._restore_fpu(state.xsave)
        for name, register in _GENERAL.items():
            uc.reg_write(register, state.registers[name])
        uc.reg_write(x86.UC_X86_REG_EFLAGS, state.rflags)
        uc.reg_write(x86.UC_X86_REG_RIP, state.rip)
        uc.ctl(UC_CTL_TLB_FLUSH, UC_CTL_IO_WRITE)
        self._halted, self._last, self._problem = state.halted, 0, ""
        self._restored = attrs.evolve(state, events=PendingEvents())
        self.write_tsc(state.tsc)

    def _restore_fpu(self, area: bytes) -> None:
        uc = self._uc
        control, status, used = struct.unpack_from("<HHB", area, 0)
        (mxcsr,) = struct.unpack_from("<I", area, 24)
        uc.reg_write(x86.UC_X86_REG_FPCW, control)
        uc.reg_write(x86.UC_X86_REG_FPSW, status)
        uc.reg_write(x86.UC_X86_REG_FPTAG, sum(0 if used >> i & 1 else 3 << 2 * i for i in range(8)))
        uc.reg_write(x86.UC_X86_REG_MXCSR, mxcsr)
        for i in range(8):
            mantissa, exponent = struct.unpack_from("<QH", area, 32 + 16 * i)
            uc.reg_write(_FP[((status >> 11 & 7) + i) & 7], (mantissa, exponent))
        for i, register in enumerate(_XMM):
            uc.reg_write(register, int.from_bytes(area[160 + 16 * i : 176 + 16 * i], "little"))

    def _refuse(self, state: VcpuState) -> None:
        """Name what this engine cannot hold."""
        unset = {
            index: value
            for index, value in state.msrs.items()
            if index not in REQUIRED_MSRS and value != msr_reset_value(index)
        }
        segments = state.segments
        checks: list[tuple[str, bool]] = [
            ("efer: 64-bit mode only", state.efer & 0x500 == 0x500),
            ("cs: 64-bit code in ring 0 only", segments["cs"].access & ~1 == _CODE64 & ~1),
            ("es, ss or ds: flat segments only", not any(segments[name].base for name in ("es", "ss", "ds"))),
            ("rflags: reserved bits", not state.rflags & ~RFLAGS_SHOWN),
            ("cr8", state.cr8 == 0),
            ("xcr0: x87 only", state.xcr0 == 1),
            ("dr7: no breakpoints", state.dr[5] == 0x400),
            ("xsave: components beyond SSE", not int.from_bytes(state.xsave[512:520], "little") & ~3),
            ("events: nothing may be in flight", state.events == PendingEvents()),
            ("ldtr: must be null or unused", not state.ldtr.selector),
            (f"MSR {min(unset, default=0):#x}", not unset),
        ]
        for what, fine in checks:
            if not fine:
                raise StateError(
                    f"vCPU state: {what}, which the stepper backend cannot hold.", "Choose another CPU backend."
                )

    def read_cpuid(self) -> CpuidTable:
        """By the callback that answers the guest, with its registers put back."""
        kept = {name: self._uc.reg_read(_GENERAL[name]) for name in ("rax", "rbx", "rcx", "rdx")}
        entries = {}
        for leaf, subleaf in self._environment.cpuid.entries:
            self._uc.reg_write(x86.UC_X86_REG_RAX, leaf)
            self._uc.reg_write(x86.UC_X86_REG_RCX, subleaf)
            self._cpuid(self._uc, None)
            values = (self._uc.reg_read(_GENERAL[name]) for name in kept)
            entries[leaf, subleaf] = CpuidRegisters(*values)
        for name, value in kept.items():
            self._uc.reg_write(_GENERAL[name], value)
        return CpuidTable(entries)

    # -- the rest

    def read_tsc(self) -> int:
        return (self._tsc_base + time.monotonic_ns() * self._environment.tsc_khz // 1_000_000) & (1 << 64) - 1

    def write_tsc(self, value: int) -> None:
        self._tsc_base = value - time.monotonic_ns() * self._environment.tsc_khz // 1_000_000

    def invalidate_code(self, gpa: int, size: int) -> None:
        self._uc.ctl_flush_tb()

    def close(self) -> None:
        uc: Any = self.__dict__.pop("_uc", None)
        del uc  # the engine ends with its last reference
