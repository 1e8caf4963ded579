"""One KVM VM with one vCPU.

Theory of operation
    The vCPU thread owns every ioctl on the vCPU. `run` enters KVM_RUN again and again; each return is an exit that
    is handled right there with the machine's bus, until something ends the slice (`vmf_cpu_kvm.kick` says how kicks
    and deadlines get in). An IN or an MMIO read is completed by the *next* KVM_RUN: until then RIP stands on the
    instruction and the value is in the shared area. So the slice never ends between the two, and `save` enters once
    more with immediate_exit set, which completes and executes nothing.

    Interrupts. The VM has no in-kernel irqchip; the chipset is Python, shared by all backends. Before every entry the
    controller is asked. When it has a request and KVM said at the last exit that the guest can take one (IF set, no
    shadow, nothing in delivery), it is acknowledged and handed over with KVM_INTERRUPT, which injects without asking
    anything. Otherwise an interrupt window is requested: KVM_RUN then returns as soon as the guest can take it.

    HLT. Without irqchip KVM knows no halted state: it exits and RIP is behind the HLT. `halted` is ours, and so is
    knowing what ends it: an interrupt that the guest can take, or what is in flight already (an NMI or an exception of
    a restored state, the trap of a HLT that was single-stepped).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import threading
import time
from collections.abc import Mapping
from typing import Any, Final, Literal

from vmf.cpu.backend import ExitReason, Vcpu, VcpuEnvironment, VmExit
from vmf.cpu.state import (
    REQUIRED_MSRS,
    DescriptorTable,
    PendingEvents,
    Segment,
    VcpuState,
)
from vmf.cpuid.compare import Difference
from vmf.cpuid.table import CpuidTable
from vmf.errors import BackendUnavailable, MachineError, StateError
from vmf.memory.scattered import Ranges
from vmf_cpu_kvm import abi, convert, cpuid, errors, msrs
from vmf_cpu_kvm.dirtylog import KvmDirtyLog
from vmf_cpu_kvm.host import HostKvm, get_cpuid, pack_cpuid
from vmf_cpu_kvm.kick import Kicker
from vmf_cpu_kvm.vcpu_msrs import VcpuMsrs
from vmf_cpu_kvm.vm import can_log, enable, make_vm

_KICKED = VmExit(ExitReason.KICKED)
_HALTED = VmExit(ExitReason.HALTED)

MIN_SLICE_NS = 100_000
"""A slice lasts at least that long even when its deadline has passed, so that the guest always gets
on (entering a nested guest alone can take 50 µs)."""
_APIC_BASE = 0xFEE00100
"""IA32_APIC_BASE of a boot processor whose APIC is off: KVM shows the APIC bit in CPUID when it is on."""
_EFER_KNOWN = 0x20_ED01
"""SCE LME LMA NXE LMSLE FFXSR TCE AIBRSE; the ones that the guest's CPUID lacks KVM refuses itself."""
_RFLAGS_KNOWN = 0x3F_7FD7
"""KVM would take the others, and the CPU then refuse to enter."""
_KEPT_EVENTS = (
    "exception", "exception_error_code", "exception_payload", "interrupt", "nmi_pending", "nmi_masked",
)  # fmt: skip
_PIO_FORMAT: Final[Mapping[int, Literal["B", "H", "I"]]] = {1: "B", 2: "H", 4: "I"}


class KvmVcpu(Vcpu):
    """A VM of one vCPU. All methods on one thread (the vCPU thread), `kick` on any."""

    def __init__(
        self,
        device: int,
        host: HostKvm,
        environment: VcpuEnvironment,
        *,
        strict: bool = True,
        dirty_log: bool = False,
    ) -> None:
        """Make the VM.

        Args:
            strict: a KVM that gives another TSC than was set is refused, and `read_cpuid` says what it presents, so
                that the core refuses another CPUID than the contract; otherwise only `overrides` tells of that.
            dirty_log: let KVM log writes (see `vmf_cpu_kvm.dirtylog`).

        Raises BackendUnavailable when KVM refuses, StateError when it cannot honour the contract.
        """
        self.overrides: list[Difference] = []
        self._strict = strict
        self._environment = environment
        self._host = host
        self._layout = cpuid.xsave_layout(host.supported_cpuid)
        self.vm = self._fd = -1
        self._run_map: mmap.mmap | None = None
        self._kicker: Kicker | None = None
        self._kicked = False
        self._entered = False
        self._halted = False
        self._wake = False
        self._lost: str = ""
        """Why the registers are not worth saving."""
        try:
            self._make(device, dirty_log)
            self._set_cpuid()
            self._set_tsc_rate()
            self._msrs = VcpuMsrs(self._fd, host.msr_indices, environment.cpuid.vendor)
            self.restore(reset_state(environment.tsc_khz))
        except OSError as error:
            self.close()
            raise BackendUnavailable(
                f"KVM refuses to make this machine's vCPU: {error.strerror}.", "See the kernel's log (dmesg)."
            ) from error
        except BaseException:
            self.close()
            raise

    # -- making it

    def _make(self, device: int, dirty_log: bool) -> None:
        host, memory = self._host, self._environment.memory
        self.vm, extensions = make_vm(device, memory, dirty_log=dirty_log)
        self._payloads = bool(extensions[abi.CAP_EXCEPTION_PAYLOAD])
        self._triple_faults = bool(extensions[abi.CAP_TRIPLE_FAULT_EVENT])
        self._logs = can_log(extensions)
        self._fd = abi.ioctl(self.vm, abi.CREATE_VCPU, 0)
        if extensions[abi.CAP_ENFORCE_PV_FEATURE_CPUID]:
            enable(self._fd, abi.CAP_ENFORCE_PV_FEATURE_CPUID, 1)
        run_map = mmap.mmap(self._fd, host.mmap_size, flags=mmap.MAP_SHARED)
        self._run_map = run_map
        self._run = memoryview(run_map)
        self._kicker = Kicker(lambda mask: self._set(abi.SET_SIGNAL_MASK, mask))

        self._regs = abi.buffer(abi.REGS.size)
        sregs2 = bool(extensions[abi.CAP_SREGS2])
        self._sregs = abi.buffer(abi.SREGS2_SIZE if sregs2 else abi.SREGS_SIZE)
        self._get_sregs, self._set_sregs = (
            (abi.GET_SREGS2, abi.SET_SREGS2) if sregs2 else (abi.GET_SREGS, abi.SET_SREGS)
        )
        self._events = abi.buffer(abi.EVENTS.size)
        self._debug = abi.buffer(abi.DEBUGREGS.size)
        self._xcrs = abi.buffer(abi.XCRS_SIZE)
        xsave_size = extensions[abi.CAP_XSAVE2]
        self._get_xsave = abi.GET_XSAVE2 if xsave_size else abi.GET_XSAVE
        self._xsave = abi.buffer(max(xsave_size, abi.XSAVE_SIZE))
        self._vector = abi.buffer(4)

    def _set(self, request: int, argument: Any) -> None:
        abi.ioctl(self._fd, request, argument)

    def _set_cpuid(self) -> None:
        contract = self._environment.cpuid
        if misplaced := cpuid.misplaced_components(contract, self._layout):
            raise StateError(
                f"the machine's CPUID has XSAVE components at other places than this host: {'; '.join(misplaced)}.",
                "Start the machine at a portability level without them, or go to a host of the same kind.",
            )
        try:
            self._set(abi.SET_CPUID2, pack_cpuid(contract))
        except OSError as error:
            raise StateError(
                f"KVM does not take the machine's CPUID: {error.strerror}.",
                "Start the machine with a contract made for this host.",
            ) from error
        # KVM shows the APIC bit as IA32_APIC_BASE has it, so that comes first.
        abi.ioctl(self._fd, self._get_sregs, self._sregs)
        struct.pack_into("<Q", self._sregs, abi.SREGS_CONTROL_AT + 48, _APIC_BASE)
        self._set(self._set_sregs, self._sregs)
        self.overrides = cpuid.overridden(contract, get_cpuid(self._fd, abi.GET_CPUID2))

    def _set_tsc_rate(self) -> None:
        wanted, native = self._environment.tsc_khz, self._host.tsc_khz
        if wanted != native:
            try:
                abi.ioctl(self._fd, abi.SET_TSC_KHZ, wanted)
            except OSError as error:
                raise StateError(
                    f"the machine's TSC counts at {wanted} kHz; this host's KVM gives {native} kHz and cannot scale.",
                    "Choose a host whose CPU runs at the machine's rate.",
                ) from error
        self.tsc_khz = abi.ioctl(self._fd, abi.GET_TSC_KHZ)

    # -- running

    def run(self, deadline_ns: int | None) -> VmExit:
        kicker, run = self._kicker, self._run
        assert kicker is not None
        if kicker.thread != threading.get_native_id():
            kicker.bind()
        interrupts, bus, fd = self._environment.interrupts, self._environment.bus, self._fd
        pending, ioctl, unpack = interrupts.pending, abi.raw_ioctl, abi.RUN_IO.unpack_from
        self._entered = True
        try:
            if self._kicked:
                run[abi.RUN_IMMEDIATE_EXIT] = 1
            if self._halted:
                if self._wake or (pending() and run[abi.RUN_READY_FOR_INTERRUPT] and run[abi.RUN_IF_FLAG]):
                    self._halted = self._wake = False
                elif run[abi.RUN_IMMEDIATE_EXIT]:
                    return self._kick_taken()
                else:
                    return _HALTED
            if deadline_ns is not None:
                deadline_ns = max(deadline_ns, time.monotonic_ns() + MIN_SLICE_NS)
            kicker.arm(deadline_ns)
            while True:
                if pending():
                    if run[abi.RUN_READY_FOR_INTERRUPT] and run[abi.RUN_IF_FLAG]:
                        self._inject(interrupts.acknowledge())
                        run[abi.RUN_REQUEST_INTERRUPT_WINDOW] = pending()
                    else:
                        run[abi.RUN_REQUEST_INTERRUPT_WINDOW] = 1
                elif run[abi.RUN_REQUEST_INTERRUPT_WINDOW]:
                    run[abi.RUN_REQUEST_INTERRUPT_WINDOW] = 0

                if ioctl(fd, abi.RUN, None) < 0:
                    code = ctypes.get_errno()
                    if code != errno.EINTR:
                        return self._error(f"KVM_RUN: {os.strerror(code)} ({errno.errorcode.get(code, code)})")
                    if run[abi.RUN_IMMEDIATE_EXIT]:
                        return self._kick_taken()
                    kicker.drain()
                    if deadline_ns is not None and time.monotonic_ns() >= deadline_ns:
                        kicker.fired()
                        return _KICKED
                    continue

                reason, _ready, if_flag, _flags, _cr8, _apic, direction, size, port, count, at = unpack(
                    run, abi.RUN_EXIT_REASON
                )
                if reason == abi.EXIT_IO:
                    if count == 1:
                        if direction:
                            bus.port_write(port, size, int.from_bytes(run[at : at + size], "little"))
                        else:
                            value = bus.port_read(port, size)
                            run[at : at + size] = value.to_bytes(size, "little")
                    else:
                        self._string_io(direction, size, port, count, at)
                elif reason == abi.EXIT_MMIO:
                    self._mmio()
                elif reason == abi.EXIT_HLT:
                    ready = pending() and if_flag and run[abi.RUN_READY_FOR_INTERRUPT]
                    if not ready and not self._exception_waits():
                        self._halted = True
                        return _HALTED
                elif reason not in (abi.EXIT_IRQ_WINDOW_OPEN, abi.EXIT_SET_TPR, abi.EXIT_INTR):
                    return self._unusual(reason)
        finally:
            self._entered = False

    def _kick_taken(self) -> VmExit:
        # In this order: a kick that comes in between is seen at the next entry.
        self._kicked = False
        self._run[abi.RUN_IMMEDIATE_EXIT] = 0
        return _KICKED

    def kick(self) -> None:
        self._kicked = True
        run_map = self._run_map
        if run_map is None:
            return
        try:
            self._run[abi.RUN_IMMEDIATE_EXIT] = 1
        except ValueError:
            return  # closed in this very moment
        kicker = self._kicker
        # A device on the vCPU thread itself is not inside KVM_RUN: the flag is enough.
        if self._entered and kicker is not None and kicker.thread != threading.get_native_id():
            kicker.signal()

    def _exception_waits(self) -> bool:
        """After a HLT that was single-stepped: its trap (#DB) is in flight and wakes the guest at once."""
        abi.ioctl(self._fd, abi.GET_VCPU_EVENTS, self._events)
        injected, _vector, _has_code, pending = abi.EVENTS.unpack_from(self._events)[:4]
        return bool(injected or pending)

    def _inject(self, vector: int) -> None:
        struct.pack_into("<I", self._vector, 0, vector)
        abi.ioctl(self._fd, abi.INTERRUPT, self._vector)
        self._run[abi.RUN_READY_FOR_INTERRUPT] = 0

    def _string_io(self, direction: int, size: int, port: int, count: int, at: int) -> None:
        """INS and OUTS: KVM hands over up to a page of items at once."""
        bus = self._environment.bus
        with self._run[at : at + count * size].cast(_PIO_FORMAT[size]) as items:
            if direction:
                write = bus.port_write
                for value in items.tolist():
                    write(port, size, value)
            else:
                read = bus.port_read
                for i in range(count):
                    items[i] = read(port, size)

    def _mmio(self) -> None:
        gpa, data, size, is_write = abi.RUN_MMIO.unpack_from(self._run, abi.RUN_UNION_AT)
        if is_write:
            self._environment.bus.mmio_write(gpa, size, data & (1 << 8 * size) - 1)
        else:
            value = self._environment.bus.mmio_read(gpa, size)
            at = abi.RUN_UNION_AT + 8
            self._run[at : at + 8] = value.to_bytes(8, "little")

    # -- what goes wrong

    def _unusual(self, reason: int) -> VmExit:
        if reason == abi.EXIT_SHUTDOWN:
            self._lost = "the guest has shut down by a triple fault"
            return VmExit(ExitReason.SHUTDOWN, "the guest caused a triple fault")
        return self._error(errors.describe_exit(self._run, reason))

    def _error(self, what: str) -> VmExit:
        try:
            abi.ioctl(self._fd, abi.GET_REGS, self._regs)
            abi.ioctl(self._fd, self._get_sregs, self._sregs)
            _, rip, rflags = convert.unpack_regs(self._regs)
            fields, _ = convert.unpack_sregs(self._sregs)
            cpl, cr3 = fields["segments"]["ss"].dpl, fields["cr3"]
            where = f" at RIP {rip:#x} (CPL {cpl}, RFLAGS {rflags:#x}, CR3 {cr3:#x})"
        except OSError:
            where = ""
        return VmExit(ExitReason.ERROR, f"{what}{where}")

    # -- state

    def _settle(self) -> None:
        """Complete an IN or MMIO read whose exit was the last one; executes no further instruction."""
        run = self._run
        for _ in range(64):
            run[abi.RUN_IMMEDIATE_EXIT] = 1
            try:
                if abi.raw_ioctl(self._fd, abi.RUN, None) < 0:
                    code = ctypes.get_errno()
                    if code != errno.EINTR:
                        raise MachineError(f"KVM_RUN: {os.strerror(code)}.")
                    return
            finally:
                run[abi.RUN_IMMEDIATE_EXIT] = 0  # a kick in between is not lost: `_kicked` is looked at on entry
            # An access that spans several pieces exits once for each.
            reason, *_, direction, size, port, count, at = abi.RUN_IO.unpack_from(run, abi.RUN_EXIT_REASON)
            if reason == abi.EXIT_MMIO:
                self._mmio()
            elif reason == abi.EXIT_IO:
                self._string_io(direction, size, port, count, at)
            else:
                raise MachineError(f"KVM does not complete an access: {errors.describe_exit(run, reason)}.")
        raise MachineError("KVM does not complete an access: it goes on and on.")

    def save(self) -> VcpuState:
        if self._lost:
            raise StateError(f"the vCPU has no state to save: {self._lost}.", "Reset the machine.")
        self._settle()
        fd = self._fd
        abi.ioctl(fd, abi.GET_VCPU_EVENTS, self._events)
        abi.ioctl(fd, abi.GET_REGS, self._regs)
        abi.ioctl(fd, self._get_sregs, self._sregs)
        abi.ioctl(fd, self._get_xsave, self._xsave)
        abi.ioctl(fd, abi.GET_XCRS, self._xcrs)
        abi.ioctl(fd, abi.GET_DEBUGREGS, self._debug)
        carried = self._msrs.saved()
        tsc = self.read_tsc()
        registers, rip, rflags = convert.unpack_regs(self._regs)
        events, rflags = convert.unpack_events(self._events, rflags)
        fields, apic_base = convert.unpack_sregs(self._sregs)
        if apic_base != _APIC_BASE:
            raise StateError(
                f"the guest has set IA32_APIC_BASE to {apic_base:#x}, and no machine has a local APIC.",
                "Keep the guest from doing so: Linux does with `nolapic` on its command line.",
            )
        fields["cr8"] = abi.RUN_CR8.unpack_from(self._run, abi.RUN_CR8_AT)[0] & 0xF
        xcr0 = abi.XCRS.unpack_from(self._xcrs)[4]
        db0, db1, db2, db3, dr6, dr7, _ = abi.DEBUGREGS.unpack_from(self._debug)
        return VcpuState(
            registers=registers,
            rip=rip,
            rflags=rflags,
            **fields,
            xcr0=xcr0,
            dr=(db0, db1, db2, db3, dr6, dr7),
            msrs=carried,
            xsave=convert.neutral_xsave(self._xsave.raw, xcr0, self._layout),
            events=events,
            halted=self._halted,
            tsc=tsc,
            tsc_khz=self._environment.tsc_khz,
        )

    def restore(self, state: VcpuState) -> None:
        self._check(state)
        fd = self._fd
        self._settle_quietly()
        area = convert.kvm_xsave(
            state.xsave, cpuid.allowed_components(self._environment.cpuid), self._layout, len(self._xsave)
        )
        convert.pack_events(self._events, state, payloads=self._payloads, triple_faults=self._triple_faults)
        convert.pack_regs(self._regs, state)
        convert.pack_sregs(self._sregs, state, _APIC_BASE)
        abi.XCRS.pack_into(self._xcrs, 0, 1, 0, 0, 0, state.xcr0)
        abi.DEBUGREGS.pack_into(self._debug, 0, *state.dr, 0)
        self._xsave.raw = area
        # CPUID stands already. Control registers before what depends on them; events last, as the others clear some.
        self._put(self._set_sregs, self._sregs, "the segments and control registers", errors.explain_sregs(state))
        self._check_sregs(state)
        self._put(abi.SET_REGS, self._regs, "the general registers")
        self._put(abi.SET_XCRS, self._xcrs, f"XCR0 = {state.xcr0:#x}")
        self._put(abi.SET_XSAVE, self._xsave, "the XSAVE area", "MXCSR or a component has bits KVM does not know")
        self._msrs.write(state.msrs)
        self._put(abi.SET_DEBUGREGS, self._debug, f"DR6 {state.dr[4]:#x} and DR7 {state.dr[5]:#x}")
        self._put(abi.SET_VCPU_EVENTS, self._events, "the pending events")
        run = self._run
        abi.RUN_CR8.pack_into(run, abi.RUN_CR8_AT, state.cr8)
        run[abi.RUN_REQUEST_INTERRUPT_WINDOW] = 0
        self._halted = state.halted
        events = state.events
        in_flight = events.exception is not None or events.interrupt is not None
        self._wake = state.halted and (in_flight or (events.nmi_pending and not events.nmi_masked))
        self._lost = ""
        self.write_tsc(state.tsc)
        if self._strict and not 0 <= self.read_tsc() - state.tsc & (1 << 64) - 1 < 10_000 * state.tsc_khz:
            raise StateError("vCPU state: this KVM does not let a guest's TSC be set.", "Use the Unicorn backend.")
        self._settle()  # makes KVM say whether the guest can take an interrupt now
        self._check_events(fd, state)

    def _settle_quietly(self) -> None:
        """Before a restore: what is half done is thrown away, but must not complete into the new registers."""
        try:
            self._settle()
        except MachineError:
            pass  # the vCPU was broken, and is about to get a new state

    def _check(self, state: VcpuState) -> None:
        rate = self._environment.tsc_khz
        if state.tsc_khz != rate:
            raise StateError(f"vCPU state: its TSC counts at {state.tsc_khz} kHz, the machine's at {rate} kHz.")
        if state.efer & ~_EFER_KNOWN:  # KVM would take it, and the CPU then refuse to enter
            raise StateError(f"vCPU state: EFER {state.efer:#x} has bits that no guest of this backend can set.")
        if state.rflags & ~_RFLAGS_KNOWN:
            raise StateError(f"vCPU state: RFLAGS {state.rflags:#x} has reserved bits set.")
        allowed = cpuid.allowed_components(self._environment.cpuid)
        if state.xcr0 & ~allowed:
            raise StateError(
                f"vCPU state: XCR0 {state.xcr0:#x} enables components {state.xcr0 & ~allowed:#x} that the machine's"
                " CPUID does not have."
            )

    def _check_sregs(self, state: VcpuState) -> None:
        """Some engines take a mode that they cannot run in, and choose another."""
        abi.ioctl(self._fd, self._get_sregs, self._sregs)
        kept, _ = convert.unpack_sregs(self._sregs)
        for name in ("cr0", "cr2", "cr3", "cr4", "efer", "gdtr", "idtr"):
            wanted = getattr(state, name)
            if kept[name] != wanted:
                got = [f"{value:#x}" if isinstance(value, int) else str(value) for value in (kept[name], wanted)]
                raise StateError(f"vCPU state: this KVM keeps {got[0]} of {name.upper()} = {got[1]}.")

    def _check_events(self, fd: int, state: VcpuState) -> None:
        """Some engines take an event and forget it."""
        abi.ioctl(fd, abi.GET_VCPU_EVENTS, self._events)
        got, _ = convert.unpack_events(self._events, state.rflags)
        wanted = state.events
        if got == wanted:
            return
        for name in _KEPT_EVENTS:
            if getattr(got, name) != getattr(wanted, name):
                raise StateError(
                    f"vCPU state: this KVM does not keep {name.replace('_', ' ')} = {getattr(wanted, name)}"
                    f" (it says {getattr(got, name)})."
                )
        if bool(got.interrupt_shadow) != bool(wanted.interrupt_shadow):
            raise StateError("vCPU state: this KVM does not keep an interrupt shadow.")

    def _put(self, request: int, argument: abi.Buffer, what: str, why: str = "") -> None:
        try:
            abi.ioctl(self._fd, request, argument)
        except OSError as error:
            reason = f" ({why})" if why else ""
            raise StateError(f"vCPU state: KVM does not take {what}: {error.strerror}{reason}.") from error

    def read_cpuid(self) -> CpuidTable | None:
        """What KVM says it presents, read back; None for a KVM that is trusted blindly. That it does as it says, its
        self-test has seen."""
        return get_cpuid(self._fd, abi.GET_CPUID2) if self._strict else None

    # -- TSC

    def read_tsc(self) -> int:
        return self._msrs.read_tsc()

    def write_tsc(self, value: int) -> None:
        self._msrs.write_tsc(value)

    # -- the rest

    def write_log(self) -> KvmDirtyLog | None:
        return KvmDirtyLog(self.vm, self._environment.memory) if self._logs else None

    def invalidate_code(self, gpa: int, size: int) -> None:
        """Nothing is translated: the CPU snoops."""

    def ranges_written(self, ranges: Ranges) -> None:
        """As `invalidate_code`."""

    def close(self) -> None:
        kicker, self._kicker = self._kicker, None
        if kicker is not None:
            kicker.close()
        run_map, self._run_map = self._run_map, None
        if run_map is not None:
            self._run.release()
            run_map.close()
        for fd in (self._fd, self.vm):
            if fd >= 0:
                os.close(fd)
        self.vm = self._fd = -1


def reset_state(tsc_khz: int) -> VcpuState:
    """The vCPU after power-on (SDM vol. 3A table 10-1): real mode, about to execute at 0xfffffff0."""
    data = Segment(0, 0, 0xFFFF, 0x93)
    segments = dict.fromkeys(("es", "ss", "ds", "fs", "gs"), data)
    segments["cs"] = Segment(0xF000, 0xFFFF0000, 0xFFFF, 0x9B)
    return VcpuState(
        registers=dict.fromkeys(
            ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
             "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"), 0,
        ),
        rip=0xFFF0,
        segments=segments,
        ldtr=Segment(0, 0, 0xFFFF, 0x82),
        tr=Segment(0, 0, 0xFFFF, 0x8B),
        gdtr=DescriptorTable(0, 0xFFFF),
        idtr=DescriptorTable(0, 0xFFFF),
        msrs={index: msrs.reset_value(index) for index in sorted(REQUIRED_MSRS)},
        events=PendingEvents(),
        tsc_khz=tsc_khz,
    )  # fmt: skip
