"""The vCPU: one engine instance, its memory map and its gate."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

from vmf.cpu.backend import ExitReason, Vcpu, VcpuEnvironment, VmExit
from vmf.cpu.state import (
    AR_PRESENT,
    AR_S,
    AR_UNUSABLE,
    GENERAL_REGISTERS,
    MSR_IA32_PAT,
    REQUIRED_MSRS,
    DescriptorTable,
    PendingEvents,
    Segment,
    VcpuState,
)
from vmf.errors import StateError
from vmf.machine.memory import LOW_RAM_LIMIT
from vmf_cpu_unicorn import convert, fast_stores, gates
from vmf_cpu_unicorn import layout as at
from vmf_cpu_unicorn.engine import (
    HOOK_INSN,
    HOOK_INSN_INVALID,
    HOOK_INTR,
    INSN_CPUID,
    INSN_IN,
    INSN_OUT,
    INSN_SYSCALL,
    Engine,
    Library,
)
from vmf_cpu_unicorn.tsc import host_tsc

CODE_CACHE_BYTES = 64 << 20
"""Room for translated code; the engine starts afresh when it is full. A Linux boot fills some 20 MiB of it."""

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
        msrs={
            **dict.fromkeys(REQUIRED_MSRS, 0),
            MSR_IA32_PAT: 0x0007040600070406,
            convert.MSR_IA32_MISC_ENABLE: convert.MISC_ENABLE_FAST_STRING,
        },
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
        self._exception_payload: int | None = None
        self._unusable_tr: tuple[bytes, Segment] | None = None
        memory, bus = environment.memory, environment.bus
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
        self._written = fast_stores.written_function() if self.fast_stores else None
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
        engine.hook(HOOK_INSN, hooks["syscall"], user, INSN_SYSCALL)
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
        if not isinstance(error, Exception):
            raise error  # KeyboardInterrupt and its like are not the guest's business
        return VmExit(ExitReason.ERROR, f"a device failed: {type(error).__name__}: {error}")

    def halted_for_good(self) -> bool:
        return not at.read_pointer(self._env + at.EFLAGS) & convert.FLAG_IF

    def kick(self) -> None:
        self._gate.kick()

    def _rip(self) -> int:
        return at.read_pointer(self._env + at.EIP)

    def save(self) -> VcpuState:
        blob = ctypes.string_at(self._env, at.ENV_SIZE)
        found = convert.unpack(blob)
        halted, inflight, exception, code, nmi_pending = self._gate.get_events()
        fields: dict[str, Any] = dict(found.fields)
        fields["msrs"] = {**self._carried_msrs, **fields["msrs"]}
        if self._unusable_tr is not None and self._unusable_tr[0] == convert.task_register_bytes(blob):
            fields["tr"] = self._unusable_tr[1]
        raised = exception >= 0
        events = PendingEvents(
            exception=exception if raised else None,
            exception_error_code=code if raised and exception in _VECTOR_HAS_CODE else None,
            exception_payload=self._exception_payload if raised else None,
            interrupt=inflight if inflight >= 0 else None,
            nmi_pending=nmi_pending,
            nmi_masked=found.nmi_masked,
            interrupt_shadow=self._shadow_kind if found.interrupt_shadow else 0,
        )
        return VcpuState(
            **fields, events=events, halted=halted, tsc=self.read_tsc(), tsc_khz=self._environment.tsc_khz
        )

    def restore(self, state: VcpuState) -> None:
        events = state.events
        if events.interrupt_soft and events.interrupt is not None:
            raise StateError(
                "vCPU state: a software interrupt is half delivered; the Unicorn backend cannot finish it.",
                "Save the state at another instant.",
            )
        if events.exception is not None:
            if events.exception >= 32 or events.exception == 2:
                raise StateError(f"vCPU state: {events.exception} is not the vector of an exception.")
            if (events.exception in _VECTOR_HAS_CODE) != (events.exception_error_code is not None):
                raise StateError(
                    f"vCPU state: the error code of exception {events.exception} is missing or too much."
                )
        if state.tsc_khz and abs(state.tsc_khz - self._tsc_khz) * 4000 > self._tsc_khz:
            raise StateError(
                f"vCPU state: tsc_khz is {state.tsc_khz}; the Unicorn backend counts {self._tsc_khz} kHz here "
                "and cannot scale it."
            )
        blob = convert.pack(state)
        carried = convert.carried_msrs(state)

        library = self._engine.library.quick
        # Breakpoints of an earlier state are pointers in the structure: have the engine free them first.
        library.cpu_x86_update_dr7_x86_64(self._env, 0x400)
        ctypes.memmove(self._env, bytes(blob), len(blob))
        library.x86_update_hflags_x86_64(self._env)
        library.update_fp_status_x86_64(self._env)
        library.update_mxcsr_status_x86_64(self._env)
        self._engine.flush_tlb()
        self._carried_msrs = carried
        usable = state.tr.access & AR_PRESENT and not state.tr.access & AR_UNUSABLE
        self._unusable_tr = None if usable else (convert.task_register_bytes(blob), convert.canonical(state.tr))
        self._shadow_kind = events.interrupt_shadow or 1
        self._exception_payload = events.exception_payload
        if events.exception == _VECTOR_PF and events.exception_payload is not None:
            ctypes.c_uint64.from_address(self._env + at.CR + 16).value = events.exception_payload
        elif events.exception == _VECTOR_DB and events.exception_payload is not None:
            ctypes.c_uint64.from_address(self._env + at.DR + 48).value |= events.exception_payload
        self._gate.set_events(
            state.halted,
            -1 if events.interrupt is None else events.interrupt,
            -1 if events.exception is None else events.exception,
            events.exception_error_code or 0,
            events.nmi_pending,
        )
        self.write_tsc(state.tsc)

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

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._gate.close()
        fast_stores.detach(self._cpu)
        self._engine.close()
