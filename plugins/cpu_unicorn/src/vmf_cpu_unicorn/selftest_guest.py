"""A bare 64-bit guest for experiments: page tables, descriptor tables, and handlers that write down what arrived.

`Bench` is used by the self-test at start-up and by this plugin's tests. Every one of the 256 vectors leads to a
handler that appends one record (what the processor pushed, and CR2) to a log in guest memory and returns, to R15 when
that is not zero (so that a fault can be left behind), else to where it came from.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable

from attrs import evolve, frozen

from vmf.cpu.backend import ExitReason, VcpuEnvironment, VmExit
from vmf.cpu.state import (
    AR_DB,
    AR_GRANULARITY,
    AR_LONG,
    AR_PRESENT,
    AR_S,
    GENERAL_REGISTERS,
    MSR_FMASK,
    MSR_IA32_SYSENTER_CS,
    MSR_IA32_SYSENTER_EIP,
    MSR_IA32_SYSENTER_ESP,
    MSR_LSTAR,
    MSR_STAR,
    DescriptorTable,
    Segment,
    VcpuState,
)
from vmf.cpuid.layout import with_vendor
from vmf.machine.bus import Bus
from vmf.memory.guest import GuestMemory
from vmf_cpu_unicorn import cpuid, tsc
from vmf_cpu_unicorn.engine import Library
from vmf_cpu_unicorn.vcpu import ADDRESS_BITS, UnicornVcpu

RAM_SIZE = 4 << 20
_PML4, _PDPT, _PD = 0x1000, 0x2000, 0x3000
_GDT, _TSS, IDT = 0x5000, 0x6000, 0x7000
_STUBS, _COMMON = 0x8000, 0x9000
_LOG_POINTER, _LOG = 0x9800, 0xA000
KERNEL_STACK = 0xF000
"""RSP0 of the TSS."""
STACK = 0x1F000
CODE = 0x20000
SYSCALL_ENTRY = 0x21000
"""LSTAR: a HLT."""
DATA = 0x30000

KERNEL_CS, KERNEL_SS, USER_CS, USER_SS, _TSS_SELECTOR = 0x08, 0x10, 0x2B, 0x23, 0x30
USER_VECTORS = frozenset({3, 4, 0x42})
"""Gates that CPL 3 may call with INT."""
_VECTORS_WITH_CODE = frozenset({8, 10, 11, 12, 13, 14, 17})

# push rax; push rbx; rbx = [LOG_POINTER]; copy [rsp+16..64] (vector, error code, rip, cs, rflags, rsp, ss) and CR2 to
# [rbx]; LOG_POINTER += 64; if r15: [rsp+32] = r15, r15 = 0; pop rbx; pop rax; rsp += 16; iretq
_COMMON_CODE = bytes.fromhex(
    "5053bb00980000488b1b488b442410488903488b44241848894308488b44242048894310488b44242848894318488b442430"
    "48894320488b4424384889432848" "8b442440488943300f20d0488943384883c340b8009800004889184d85ff74084c89"
    "7c24204531ff5b584883c41048cf"
)  # fmt: skip

_KERNEL_CODE = Segment(KERNEL_CS, 0, 0xFFFFFFFF, AR_PRESENT | AR_S | 11 | AR_LONG | AR_GRANULARITY)
_KERNEL_DATA = Segment(KERNEL_SS, 0, 0xFFFFFFFF, AR_PRESENT | AR_S | 3 | AR_DB | AR_GRANULARITY)
_USER_CODE = evolve(_KERNEL_CODE, selector=USER_CS, access=_KERNEL_CODE.access | 3 << 5)
_USER_DATA = evolve(_KERNEL_DATA, selector=USER_SS, access=_KERNEL_DATA.access | 3 << 5)


@frozen
class Record:
    """One arrival at a handler."""

    vector: int
    error: int
    rip: int
    cs: int
    rflags: int
    rsp: int
    ss: int
    cr2: int


class ScriptedInterrupts:
    """An interrupt controller with a queue of vectors; `acknowledged` tells which were taken."""

    def __init__(self) -> None:
        self.queue: list[int] = []
        self.acknowledged: list[int] = []

    def pending(self) -> bool:
        return bool(self.queue)

    def acknowledge(self) -> int:
        vector = self.queue.pop(0) if self.queue else 0xFF
        self.acknowledged.append(vector)
        return vector


class Port:
    """One port whose two directions are callables."""

    def __init__(self) -> None:
        self.read: Callable[[int], int] = lambda size: 0x5A
        self.write: Callable[[int, int], None] = lambda size, value: None

    def io_read(self, offset: int, size: int) -> int:
        return self.read(size)

    def io_write(self, offset: int, size: int, value: int) -> None:
        self.write(size, value)


def _tables() -> list[tuple[int, bytes]]:
    def entry(flags: int, access: int) -> bytes:
        return struct.pack("<HHBBBB", 0xFFFF, 0, 0, access, flags << 4 | 0xF, 0)

    gdt = b"".join((bytes(8), entry(0xA, 0x9B), entry(0xC, 0x93), entry(0xC, 0xFB), entry(0xC, 0xF3), entry(0xA, 0xFB)))
    gdt += struct.pack("<HHBBBBII", 0x67, _TSS, 0, 0x8B, 0, 0, 0, 0)
    idt, stubs = bytearray(), bytearray()
    for vector in range(256):
        stub = _STUBS + 16 * vector
        access = 0xEE if vector in USER_VECTORS else 0x8E
        idt += struct.pack("<HHBBHII", stub & 0xFFFF, KERNEL_CS, 0, access, stub >> 16, 0, 0)
        code = b"" if vector in _VECTORS_WITH_CODE else b"\x6a\x00"  # push 0
        code += b"\x68" + struct.pack("<I", vector)
        code += b"\xe9" + struct.pack("<i", _COMMON - (stub + len(code) + 5))
        stubs += code.ljust(16, b"\x90")
    return [
        (_PML4, struct.pack("<Q", _PDPT | 7)),
        (_PDPT, struct.pack("<Q", _PD | 7)),
        (_PD, struct.pack("<QQ", 0x87, 0x200087)),
        (_GDT, gdt),
        (_TSS, struct.pack("<IQ", 0, KERNEL_STACK).ljust(0x66, b"\0") + struct.pack("<H", 0x68)),
        (IDT, bytes(idt)),
        (_STUBS, bytes(stubs)),
        (_COMMON, _COMMON_CODE),
        (SYSCALL_ENTRY, b"\xf4"),
    ]


class Bench:
    """A machine of 4 MiB with one port (0x80), one MMIO page (0xE0000000) and scripted interrupts."""

    def __init__(
        self, library: Library, memory: GuestMemory | None = None, tsc_khz: int = 0, vendor: str = "GenuineIntel"
    ) -> None:
        self.memory = memory or GuestMemory(RAM_SIZE)
        self._own_memory = memory is None
        self.interrupts = ScriptedInterrupts()
        self.port = Port()
        self.bus = Bus()
        self.bus.claim_ports("bench", 0x80, 1, self.port)
        khz = tsc_khz or tsc.host_tsc_khz()
        contract = with_vendor(cpuid.capability(khz, ADDRESS_BITS), vendor)
        self.environment = VcpuEnvironment(self.memory, self.bus, self.interrupts, contract, khz)
        self.vcpu = UnicornVcpu(library, self.environment, khz)
        if self._own_memory:
            for gpa, data in _tables():
                self.memory.write(gpa, data)

    def state(self, user: bool = False, rip: int = CODE, rflags: int = 2, **registers: int) -> VcpuState:
        """64-bit mode at CPL 0 or 3, interrupts off unless `rflags` says so."""
        base = self.vcpu.save()
        data = _USER_DATA if user else _KERNEL_DATA
        return evolve(
            base,
            registers={**dict.fromkeys(GENERAL_REGISTERS, 0), "rsp": STACK, **registers},
            rip=rip,
            rflags=rflags,
            segments={
                **dict.fromkeys(("es", "ss", "ds", "fs", "gs"), data),
                "cs": _USER_CODE if user else _KERNEL_CODE,
            },
            tr=Segment(_TSS_SELECTOR, _TSS, 0x67, AR_PRESENT | 11),
            gdtr=DescriptorTable(_GDT, 63),
            idtr=DescriptorTable(IDT, 0xFFF),
            cr0=0x8001_0033,
            cr3=_PML4,
            cr4=0x620,
            efer=0xD01,
            msrs={**base.msrs, MSR_LSTAR: SYSCALL_ENTRY, MSR_STAR: 0x1B << 48 | KERNEL_CS << 32, MSR_FMASK: 0x700},
            halted=False,
        )

    def load(self, code: bytes, state: VcpuState) -> None:
        """Put `code` at the state's RIP, forget the log, and make the state the vCPU's."""
        self.memory.write(_LOG_POINTER, struct.pack("<Q", _LOG))
        self.memory.write(state.rip, code)
        self.vcpu.invalidate_code(state.rip, len(code))
        self.vcpu.restore(state)

    def execute(self, code: bytes, state: VcpuState | None = None, seconds: float = 2.0) -> VmExit:
        """Run `code` until it halts, or says anything else than that it was kicked."""
        self.load(code, state or self.state())
        return self.go(seconds)

    def go(self, seconds: float = 2.0) -> VmExit:
        deadline = time.monotonic_ns() + int(seconds * 1e9)
        while True:
            result = self.vcpu.run(deadline)
            if result.reason is not ExitReason.KICKED or time.monotonic_ns() >= deadline:
                return result

    def records(self) -> list[Record]:
        """The log."""
        end = struct.unpack("<Q", self.memory.read(_LOG_POINTER, 8))[0]
        raw = self.memory.read(_LOG, end - _LOG) if end > _LOG else b""
        return [Record(*values) for values in struct.iter_unpack("<8Q", raw)]

    def close(self) -> None:
        self.vcpu.close()
        if self._own_memory:
            self.memory.close()


class Trial:
    """The self-test's guest: what must work before a real one is trusted to the engine."""

    def __init__(self, library: Library) -> None:
        # The TSC's rate does not matter here, and measuring it takes longer than everything else.
        self._bench = Bench(library, tsc_khz=1_000_000)
        self._abandoned = False

    def abandon(self) -> None:
        """From another thread: give up."""
        self._abandoned = True
        self._bench.vcpu.kick()

    def close(self) -> None:
        self._bench.close()

    def run(self) -> str:
        """What went wrong, or ""."""
        checks = (
            ("exceptions are not delivered", self._exceptions),
            ("a software interrupt is not delivered", self._software_interrupt),
            ("SYSCALL and SYSRET do not work", self._syscall),
            ("SYSENTER does not work", self._sysenter),
            ("interrupts are not delivered", self._interrupt),
            ("execution cannot be stopped from outside", self._stop),
            ("a stop hides an instruction", self._stop_before),
            ("corrections of the engine do not work", self._corrections),
        )
        for complaint, check in checks:
            if not check() or self._abandoned:
                return complaint
        return ""

    def _exceptions(self) -> bool:
        bench = self._bench
        # mov rax,[rbx]; hlt with RBX in an unmapped page: #PF, read, CPL 0
        result = bench.execute(bytes.fromhex("488b03f4"), bench.state(rbx=0x0123_4567_8000, r15=CODE + 3))
        first = bench.records()
        # ud2; hlt
        bench.execute(bytes.fromhex("0f0bf4"), bench.state(r15=CODE + 2))
        second = bench.records()
        # in al,0x80 at CPL 3: #GP(0); then syscall, whose entry halts
        bench.execute(bytes.fromhex("e4800f05"), bench.state(user=True, r15=CODE + 2))
        third = bench.records()
        return (
            result.reason is ExitReason.HALTED
            and [(r.vector, r.error, r.cr2, r.rip) for r in first] == [(14, 0, 0x0123_4567_8000, CODE)]
            and [(r.vector, r.rip) for r in second] == [(6, CODE)]
            and [(r.vector, r.error, r.rip, r.cs, r.ss, r.rsp) for r in third]
            == [(13, 0, CODE, USER_CS, USER_SS, STACK)]
        )

    def _software_interrupt(self) -> bool:
        bench = self._bench
        bench.execute(bytes.fromhex("cd42f4"))  # int 0x42; hlt
        return [(r.vector, r.rip) for r in bench.records()] == [(0x42, CODE + 2)]

    def _syscall(self) -> bool:
        bench = self._bench
        # syscall at CPL 3 with carry and IF set; at LSTAR: hlt
        result = bench.execute(bytes.fromhex("0f05"), bench.state(user=True, rflags=0x203))
        state = bench.vcpu.save()
        return (
            result.reason is ExitReason.HALTED
            and state.rip == SYSCALL_ENTRY + 1
            and state.registers["rcx"] == CODE + 2
            and state.registers["r11"] == 0x203
            and state.rflags == 0x003
            and state.segments["cs"].selector == KERNEL_CS
            and state.segments["ss"].selector == KERNEL_SS
        )

    def _sysenter(self) -> bool:
        bench = self._bench
        state = bench.state(user=True, rflags=0x202)
        msrs = {MSR_IA32_SYSENTER_CS: KERNEL_CS, MSR_IA32_SYSENTER_ESP: STACK, MSR_IA32_SYSENTER_EIP: SYSCALL_ENTRY}
        result = bench.execute(bytes.fromhex("0f34"), evolve(state, msrs={**state.msrs, **msrs}))
        found = bench.vcpu.save()
        return (
            result.reason is ExitReason.HALTED
            and (found.rip, found.rflags, found.registers["rsp"]) == (SYSCALL_ENTRY + 1, 2, STACK)
            and (found.segments["cs"].selector, found.segments["ss"].selector) == (KERNEL_CS, KERNEL_SS)
        )

    def _interrupt(self) -> bool:
        bench = self._bench
        # nop; sti; nop; hlt: the interrupt may come only after the instruction that follows STI
        bench.interrupts.queue = [0x55]
        bench.execute(bytes.fromhex("90fb90f4"))
        taken = bench.interrupts.acknowledged == [0x55]
        return taken and [(r.vector, r.rip) for r in bench.records()] == [(0x55, CODE + 3)]

    def _stop_before(self) -> bool:
        bench, kicks = self._bench, 0

        def read(size: int) -> int:
            nonlocal kicks
            kicks += 1
            bench.vcpu.kick()
            return size

        before, bench.port.read = bench.port.read, read
        bench.execute(bytes.fromhex("e480 31c0 0fa2 f4"), bench.state())  # in al,0x80; xor eax,eax; cpuid; hlt
        bench.port.read = before
        ebx = bench.vcpu.save().registers["rbx"]
        return kicks == 1 and ebx == bench.environment.cpuid.lookup(0, 0).ebx

    def _corrections(self) -> bool:
        """One of each kind that _corrections.c has, where it is installed."""
        bench = self._bench
        if not bench.vcpu.corrected:
            return True
        # Each is left behind by its handler: lock mov [rdi],ebx; movaps xmm0,[rdi+1]; rdmsr; mov cr4,rax
        found = []
        for text, rax in (("f0891f", 0), ("0f284701", 0), ("0f32", 0), ("0f22e0", 1 << 12)):
            raw = bytes.fromhex(text)
            bench.execute(raw + b"\xf4", bench.state(rdi=DATA, rcx=0x1234_5678, rax=rax, r15=CODE + len(raw)))
            found += [(r.vector, r.rip) for r in bench.records()]
        # lock cmpxchg [rdi],ebx: equal, so RAX stays as it is
        bench.memory.write(DATA, bytes(8))
        bench.execute(bytes.fromhex("f00fb11f f4"), bench.state(rdi=DATA, rax=1 << 40, rbx=5))
        kept = bench.vcpu.save().registers["rax"] == 1 << 40 and bench.memory.read(DATA, 4) == b"\5\0\0\0"
        return kept and found == [(6, CODE), (13, CODE), (13, CODE), (13, CODE)]

    def _stop(self) -> bool:
        bench = self._bench
        bench.load(bytes.fromhex("48ffc0ebfb"), bench.state())  # inc rax; jmp back
        # On a very slow host (an emulated one) a millisecond may be over before the first instruction.
        for milliseconds in (1, 10, 100, 1000):
            result = bench.vcpu.run(time.monotonic_ns() + milliseconds * 1_000_000)
            if result.reason is not ExitReason.KICKED:
                return False
            if bench.vcpu.save().registers["rax"] > 0:
                return True
        return False
