"""The vCPU: one engine instance, its memory map and its gate."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numpy as np

from vmf.cpu.backend import ExitReason, Vcpu, VcpuEnvironment, VmExit
from vmf.cpu.state import (
    AR_PRESENT,
    AR_S,
    AR_UNUSABLE,
    GENERAL_REGISTERS,
    MSR_IA32_MISC_ENABLE,
    REQUIRED_MSRS,
    DescriptorTable,
    PendingEvents,
    Segment,
    VcpuState,
    msr_reset_value,
)
from vmf.cpuid.layout import AMD_VENDORS
from vmf.cpuid.table import CpuidRegisters, CpuidTable
from vmf.errors import StateError
from vmf.memory.guest import LOW_RAM_LIMIT
from vmf.memory.scattered import Ranges
from vmf_cpu_unicorn import convert, corrections, fast_stores, gates
from vmf_cpu_unicorn import layout as at
from vmf_cpu_unicorn.engine import (
    HOOK_INSN,
    HOOK_INSN_INVALID,
    HOOK_INTR,
    INSN_IN,
    INSN_OUT,
    INSN_SYSCALL,
    Engine,
    Library,
    require_room,
)
from vmf_cpu_unicorn.sure_hooks import INSN_CPUID, INSN_SYSENTER
from vmf_cpu_unicorn.tsc import host_tsc

CODE_CACHE_BYTES = 64 << 20
"""Room for translated code; the engine starts afresh when it is full. A Linux boot fills some 20 MiB of it."""

SPARE_BYTES = 16 << 20
"""What the engine takes besides, to begin with."""

ADDRESS_BITS = 39
"""Guest-physical address width presented. Everything in it that is not RAM is MMIO."""
VECTOR_PAGE = 1 << ADDRESS_BITS
"""The page of the INTA cycle (see _gate.c), out of the guest's reach."""
_PAGE = 4096
_U64 = (1 << 64) - 1
_FLUSH_ALL_ABOVE = 16 << 20
"""Bytes from which dropping all translated code is cheaper than looking page by page."""

_EXIT_REASONS = {
    gates.EXIT_KICKED: VmExit(ExitReason.KICKED),
    gates.EXIT_HALTED: VmExit(ExitReason.HALTED),
}
_VECTOR_HAS_CODE = frozenset({8, 10, 11, 12, 13, 14, 17})
_VECTOR_DB = 1
_VECTOR_PF = 14
_DR6_TRAPS = 0xE00F
_DR6_STEP = 1 << 14
_DR6_ACTIVE_LOW = 1 << 16 | 1 << 11
_CPUID_CALLBACK = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


def reset_state(tsc_khz: int, signature: int) -> VcpuState:
    """SDM vol. 3A table 9-1. `signature` is CPUID.1:EAX, which EDX holds after reset."""
    data = Segment(0, 0, 0xFFFF, AR_PRESENT | AR_S | 3)
    segments = dict.fromkeys(("es", "ss", "ds", "fs", "gs"), data)
    segments["cs"] = Segment(0xF000, 0xFFFF0000, 0xFFFF, AR_PRESENT | AR_S | 11)
    return VcpuState(
        registers={**dict.fromkeys(GENERAL_REGISTERS, 0), "rdx": signature},
        rip=0xFFF0,
        segments=segments,
        ldtr=Segment(0, 0, 0xFFFF, AR_PRESENT | 2),
        tr=Segment(0, 0, 0xFFFF, AR_PRESENT | 11),
        gdtr=DescriptorTable(0, 0xFFFF),
        idtr=DescriptorTable(0, 0xFFFF),
        msrs={index: msr_reset_value(index) for index in sorted({*REQUIRED_MSRS, MSR_IA32_MISC_ENABLE})},
        tsc_khz=tsc_khz,
    )


class UnicornVcpu(Vcpu):
    """A vCPU on Unicorn."""

    def __init__(self, library: Library, environment: VcpuEnvironment, tsc_khz: int) -> None:
        self._environment = environment
        self._tsc_khz = tsc_khz
        self._lock = threading.Lock()
        self._closed = False
        self._carried_msrs: dict[int, int] = {}
        self._shadow_kind = 1
        self._payload: tuple[int, int] | None = None
        """(vector, payload) of an exception that was restored and has not been raised yet."""
        self._amd = environment.cpuid.vendor in AMD_VENDORS
        self._unusable_tr: tuple[bytes, Segment] | None = None
        memory, bus = environment.memory, environment.bus
        require_room(CODE_CACHE_BYTES + SPARE_BYTES)
        self._engine = engine = Engine(library, CODE_CACHE_BYTES)
        try:
            for region in memory.regions:
                engine.map_ram(region.gpa, region.size, memory.address + region.offset)
            # From here on the engine has its CPU.
            self._cpu = at.cpu_address(engine.handle)
            self._env = self._cpu + at.CPU_ENV
            ctypes.c_uint8.from_address(engine.handle + at.UC_NO_EXIT_REQUEST).value = 1
            handlers = gates.Handlers(
                bus.port_read, bus.port_write, bus.mmio_read, bus.mmio_write,
                environment.interrupts.pending, environment.interrupts.acknowledge,
            )  # fmt: skip
            self._gate = gates.make_gate(engine, self._cpu, environment.cpuid, handlers, VECTOR_PAGE)
        except BaseException:
            engine.close()
            raise
        self.fast_stores = fast_stores.attach(engine, self._cpu, memory)
        self.corrected = library.corrected and corrections.attach(self._cpu, environment.cpuid)
        self._written: fast_stores.Written | None = None
        self._written_all: fast_stores.WrittenAll | None = None
        if self.fast_stores:
            self._written, self._written_all = fast_stores.written_functions()
        try:
            self._install_hooks()
            self.restore(reset_state(environment.tsc_khz, environment.cpuid.lookup(1, 0).eax))
        except BaseException:
            self.close()
            raise

    def _install_hooks(self) -> None:
        engine, hooks = self._engine, self._gate.hooks()
        user = hooks["user"]
        engine.hook(HOOK_INTR, hooks["exception"], user)
        engine.hook(HOOK_INSN_INVALID, hooks["invalid"], user)
        engine.hook(HOOK_INSN, hooks["syscall"], user, INSN_SYSCALL)  # the first: see sure_hooks.py
        engine.hook(HOOK_INSN, hooks["sysenter"], user, INSN_SYSENTER)
        engine.hook(HOOK_INSN, hooks["in"], user, INSN_IN)
        engine.hook(HOOK_INSN, hooks["out"], user, INSN_OUT)
        engine.hook(HOOK_INSN, hooks["cpuid"], user, INSN_CPUID)
        engine.map_mmio(VECTOR_PAGE, _PAGE, hooks["vector_read"], hooks["vector_write"], user)
        position = 0
        for region in (*self._environment.memory.regions, None):
            start = 1 << ADDRESS_BITS if region is None else region.gpa
            if position < start:
                window = self._gate.mmio_window(position)
                engine.map_mmio(position, start - position, hooks["mmio_read"], hooks["mmio_write"], window)
            if region is not None:
                position = region.gpa + region.size

    def run(self, deadline_ns: int | None) -> VmExit:
        if self._payload is not None:
            self._deliver_payload(*self._payload)
            self._payload = None
        reason = self._gate.run(deadline_ns)
        while reason == gates.EXIT_HALTED and at.read_pointer(self._env + at.EFLAGS) & convert.FLAG_TF:
            # A HLT that was single-stepped: the engine has no trap behind it; a processor's wakes the guest at once.
            self._deliver_payload(_VECTOR_DB, _DR6_STEP)
            _, inflight, _, _, nmi_pending = self._gate.get_events()
            self._gate.set_events(True, inflight, _VECTOR_DB, 0, nmi_pending)
            reason = self._gate.run(deadline_ns)
        self._shadow_kind = 1
        known = _EXIT_REASONS.get(reason)
        if known is not None:
            return known
        if reason == gates.EXIT_SHUTDOWN:
            return VmExit(ExitReason.SHUTDOWN, f"triple fault at RIP {self._rip():#x}")
        error, code = self._gate.take_error()
        if error is None:
            text = self._engine.library.strerror(code)
            return VmExit(ExitReason.ERROR, f"the Unicorn engine stopped at RIP {self._rip():#x}: {text}")
        raise error  # of a device: the machine knows whose it is

    def _deliver_payload(self, vector: int, payload: int) -> None:
        """What the delivery of an exception does to the registers (SDM vol. 3A 6.15, 18.2.3): CR2 for a page fault; DR6
        for a debug exception, whose bits RTM (16) and bus lock (11) say by being clear that they were the cause."""
        if vector == _VECTOR_PF:
            ctypes.c_uint64.from_address(self._env + at.CR + 16).value = payload
            return
        dr6 = ctypes.c_uint64.from_address(self._env + at.DR + 48)
        dr6.value = (dr6.value & ~_DR6_TRAPS | _DR6_ACTIVE_LOW | payload) ^ (payload & _DR6_ACTIVE_LOW)

    def halted_for_good(self) -> bool:
        return not at.read_pointer(self._env + at.EFLAGS) & convert.FLAG_IF

    def kick(self) -> None:
        self._gate.kick()

    def _rip(self) -> int:
        return at.read_pointer(self._env + at.EIP)

    def save(self) -> VcpuState:
        blob = ctypes.string_at(self._env, at.ENV_SIZE)
        found = convert.unpack(blob, ctypes.string_at(self._env + at.MTRRS, at.MTRRS_SIZE), amd=self._amd)
        halted, inflight, exception, code, nmi_pending = self._gate.get_events()
        fields: dict[str, Any] = dict(found.fields)
        fields["msrs"] = {**self._carried_msrs, **fields["msrs"]}
        if self._unusable_tr is not None and self._unusable_tr[0] == convert.task_register_bytes(blob):
            fields["tr"] = self._unusable_tr[1]
        raised = exception >= 0
        events = PendingEvents(
            exception=exception if raised else None,
            exception_error_code=code if raised and exception in _VECTOR_HAS_CODE else None,
            exception_payload=self._payload[1] if raised and self._payload is not None else None,
            interrupt=inflight if inflight >= 0 else None,
            nmi_pending=nmi_pending,
            nmi_masked=found.nmi_masked,
            interrupt_shadow=self._shadow_kind if found.interrupt_shadow else 0,
        )
        return VcpuState(**fields, events=events, halted=halted, tsc=self.read_tsc(), tsc_khz=self._environment.tsc_khz)

    def restore(self, state: VcpuState) -> None:
        events = state.events
        if events.interrupt_soft:
            raise StateError(
                "vCPU state: a software interrupt is half delivered; the Unicorn backend cannot finish it.",
                "Save the state at another instant.",
            )
        if events.exception is not None:
            if events.exception >= 32 or events.exception == 2:
                raise StateError(f"vCPU state: {events.exception} is not the vector of an exception.")
            if (events.exception in _VECTOR_HAS_CODE) != (events.exception_error_code is not None):
                raise StateError(f"vCPU state: the error code of exception {events.exception} is missing or too much.")
        if events.exception_payload is not None and events.exception not in (_VECTOR_DB, _VECTOR_PF):
            raise StateError(f"vCPU state: exception {events.exception} has a payload; only 1 (#DB) and 14 (#PF) can.")
        if events.exception_error_code is not None and events.exception is None:
            raise StateError("vCPU state: an error code without an exception.")
        rate = self._environment.tsc_khz
        if state.tsc_khz not in (0, rate):
            raise StateError(f"vCPU state: its tsc_khz is {state.tsc_khz}; the machine's TSC counts {rate} kHz.")
        blob = convert.pack(state)
        carried = convert.carried_msrs(state)

        library = self._engine.library.quick
        # Breakpoints of an earlier state are pointers in the structure: have the engine free them first.
        library.cpu_x86_update_dr7_x86_64(self._env, 0x400)
        ctypes.memmove(self._env, bytes(blob), len(blob))
        ctypes.memmove(self._env + at.MTRRS, convert.pack_mtrrs(state), at.MTRRS_SIZE)
        library.x86_update_hflags_x86_64(self._env)
        ctypes.c_uint32.from_address(self._env + at.HFLAGS).value &= ~at.HF_COPIES
        library.update_fp_status_x86_64(self._env)
        library.update_mxcsr_status_x86_64(self._env)
        library.cpu_x86_update_dr7_x86_64(self._env, state.dr[5])
        self._engine.flush_tlb()
        self._carried_msrs = carried
        usable = state.tr.access & AR_PRESENT and not state.tr.access & AR_UNUSABLE
        self._unusable_tr = None if usable else (convert.task_register_bytes(blob), convert.canonical(state.tr))
        self._shadow_kind = events.interrupt_shadow or 1
        self._payload = None
        if events.exception is not None and events.exception_payload is not None:
            self._payload = (events.exception, events.exception_payload)
        self._gate.set_events(
            state.halted,
            -1 if events.interrupt is None else events.interrupt,
            -1 if events.exception is None else events.exception,
            events.exception_error_code or 0,
            events.nmi_pending,
        )
        self.write_tsc(state.tsc)

    def read_cpuid(self) -> CpuidTable:
        """What CPUID answers: the very callback that the engine calls for the instruction is asked for every leaf of
        the contract, and for those next to its ends."""
        hooks = self._gate.hooks()
        answer = _CPUID_CALLBACK(hooks["cpuid"])
        contract = self._environment.cpuid
        leaves = {*contract.entries, *((leaf + 1, 0) for leaf, _ in contract.entries), (0x4000_0000, 0)}
        registers = (ctypes.c_uint64 * 4).from_address(self._env + at.REGS)
        kept = list(registers)
        entries: dict[tuple[int, int], CpuidRegisters] = {}
        try:
            for leaf, subleaf in leaves:
                registers[0], registers[1] = leaf, subleaf
                answer(None, hooks["user"])
                eax, ecx, edx, ebx = registers
                entries[leaf, subleaf] = CpuidRegisters(eax, ebx, ecx, edx)
        finally:
            registers[:] = kept
        return CpuidTable(entries)

    def read_tsc(self) -> int:
        return (host_tsc() + at.read_pointer(self._env + at.TSC_OFFSET)) & _U64

    def write_tsc(self, value: int) -> None:
        ctypes.c_uint64.from_address(self._env + at.TSC_OFFSET).value = (value - host_tsc()) & _U64

    def invalidate_code(self, gpa: int, size: int) -> None:
        # The engine counts in offsets of its RAM list; only the first region's equal guest-physical addresses.
        first = self._environment.memory.regions[0]
        if size <= _FLUSH_ALL_ABOVE and gpa >= first.gpa and gpa + size <= first.gpa + first.size:
            self._engine.invalidate_code(gpa, gpa + size)
        else:
            self._engine.flush_code()

    def memory_written(self, gpa: int, size: int) -> None:
        if self._written is not None:
            low = gpa + size <= LOW_RAM_LIMIT  # there offset and address are the same
            self._written(self._env, gpa if low else self._environment.memory.offset_of(gpa, size), size)
        else:
            self.invalidate_code(gpa, size)

    def ranges_written(self, ranges: Ranges) -> None:
        # Up to there offsets and addresses are the same.
        every = self._written_all
        if every is None or not every(self._env, np.ascontiguousarray(ranges), LOW_RAM_LIMIT):
            super().ranges_written(ranges)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._gate.close()
        fast_stores.detach(self._cpu)
        corrections.detach(self._cpu)
        self._engine.close()
