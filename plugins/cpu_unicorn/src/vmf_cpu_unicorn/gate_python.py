"""The gate without a compiler: thunks.py where native code is indispensable, ctypes callbacks for the rest.

The theory of operation is that of _gate.c, which see; this is the same design with the pacer as a Python thread and
SYSCALL and SYSENTER in Python. The engine runs without the GIL (ctypes releases it), so that the pacer can end a slice.

A callback must let no exception out: ctypes would print and forget it. The first one is kept, the slice is stopped,
and `run` reports it.
"""

# ruff: noqa: BLE001 - see above: callbacks catch everything and hand it on

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Mapping
from ctypes import c_int, c_int32, c_uint, c_uint16, c_uint32, c_uint64, c_void_p
from typing import Any

from vmf.cpuid.layout import AMD_VENDORS
from vmf.cpuid.table import CpuidTable
from vmf_cpu_unicorn import gates, thunks
from vmf_cpu_unicorn import layout as at
from vmf_cpu_unicorn.convert import FLAG_DF, FLAG_FIXED, FLAG_IF, FLAGS_ARITHMETIC
from vmf_cpu_unicorn.engine import Engine
from vmf_cpu_unicorn.gates import Handlers

_IN = ctypes.CFUNCTYPE(c_uint32, c_void_p, c_uint32, c_int, c_void_p)
_OUT = ctypes.CFUNCTYPE(None, c_void_p, c_uint32, c_int, c_uint32, c_void_p)
_SYSCALL = ctypes.CFUNCTYPE(None, c_void_p, c_void_p)
_CPUID = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p)
_MMIO_READ = ctypes.CFUNCTYPE(c_uint64, c_void_p, c_uint64, c_uint, c_void_p)
_MMIO_WRITE = ctypes.CFUNCTYPE(None, c_void_p, c_uint64, c_uint, c_uint64, c_void_p)

_U64 = (1 << 64) - 1
_FLAG_RF = 1 << 16
_FLAG_VM = 1 << 17
_HF_LMA = 1 << 14
_HF_CS64 = 1 << 15
_CR4_OSXSAVE = 1 << 18
_CPUID_1_ECX_OSXSAVE = 1 << 27
_CPUID_1_ECX_XSAVE = 1 << 26
_RETRY_S = 0.0005
_VECTOR_DF = 8
# Second doubleword of flat segment descriptors, SDM vol. 3A 3.4.5.
_CODE64_FLAGS = 1 << 23 | 1 << 21 | 1 << 15 | 1 << 12 | 1 << 11 | 1 << 9 | 1 << 8
_CODE32_FLAGS = 1 << 23 | 1 << 22 | 1 << 15 | 1 << 12 | 1 << 11 | 1 << 9 | 1 << 8
_DATA_FLAGS = 1 << 23 | 1 << 22 | 1 << 15 | 1 << 12 | 1 << 9 | 1 << 8


def _address(callback: Any) -> int:
    value = ctypes.cast(callback, c_void_p).value
    assert value is not None
    return value


class _Field:
    """Typed views of the engine's structure, made once: attribute access is then one C call."""

    def __init__(self, env: int) -> None:
        self.regs = (c_uint64 * 16).from_address(env + at.REGS)
        self.eip = c_uint64.from_address(env + at.EIP)
        self.eflags = c_uint64.from_address(env + at.EFLAGS)
        self.cc_src = c_uint64.from_address(env + at.CC_SRC)
        self.cc_op = c_uint32.from_address(env + at.CC_OP)
        self.df = c_int32.from_address(env + at.DF)
        self.hflags = c_uint32.from_address(env + at.HFLAGS)
        self.hflags2 = c_uint32.from_address(env + at.HFLAGS2)
        self.efer = c_uint64.from_address(env + at.EFER)
        self.star = c_uint64.from_address(env + at.STAR)
        self.lstar = c_uint64.from_address(env + at.LSTAR)
        self.cstar = c_uint64.from_address(env + at.CSTAR)
        self.sysenter_cs = c_uint32.from_address(env + at.SYSENTER_CS)
        self.sysenter_esp = c_uint64.from_address(env + at.SYSENTER_ESP)
        self.sysenter_eip = c_uint64.from_address(env + at.SYSENTER_EIP)
        self.fmask = c_uint64.from_address(env + at.FMASK)
        self.cr4 = c_uint64.from_address(env + at.CR + 32)
        self.old_exception = c_int32.from_address(env + at.OLD_EXCEPTION)
        self.vm_vmcb = c_uint64.from_address(env + at.VM_VMCB)


class PythonGate:
    """See gates.Gate."""

    def __init__(self, engine: Engine, cpu: int, cpuid: CpuidTable, handlers: Handlers, vector_page: int) -> None:
        self._engine = engine
        self._handle = engine.handle
        self._api: Any = engine.library.api
        self._quick: Any = engine.library.quick
        self._quick.cpu_cc_compute_all_x86_64.argtypes = [c_void_p, c_int]
        self._quick.cpu_cc_compute_all_x86_64.restype = c_uint32
        self._quick.cpu_ldub_code_x86_64.argtypes = [c_void_p, c_uint64]
        self._quick.cpu_ldub_code_x86_64.restype = c_uint32
        self._env = env = cpu + at.CPU_ENV
        self._at = _Field(env)
        self._request = c_uint32.from_address(cpu + at.CPU_INTERRUPT_REQUEST)
        self._halted_by_engine = c_uint32.from_address(cpu + at.CPU_HALTED)
        self._poke = c_uint16.from_address(at.read_pointer(cpu + at.CPU_ICOUNT_DECR_PTR) + 2)
        self._cpuid = cpuid
        self._osxsave = bool(cpuid.lookup(1, 0).ecx & _CPUID_1_ECX_XSAVE)
        self._handlers = handlers
        self._vector_page = vector_page
        self._error: BaseException | None = None
        self._engine_error = 0
        self._halted = False
        self._inflight = -1
        self._nmi_pending = False

        self._callbacks: dict[str, Any] = {
            "in": _IN(self._on_in),
            "out": _OUT(self._on_out),
            "syscall": _SYSCALL(self._on_syscall),
            "sysenter": _SYSCALL(self._on_sysenter),
            "cpuid": _CPUID(self._on_cpuid),
            "mmio_read": _MMIO_READ(self._on_mmio_read),
            "mmio_write": _MMIO_WRITE(self._on_mmio_write),
            "vector_read": _MMIO_READ(self._on_vector_read),
            "vector_write": _MMIO_WRITE(lambda *_: None),
        }
        address = engine.library.address
        slots = {
            thunks.CPU: cpu,
            thunks.ENV: env,
            thunks.DO_INTERRUPT: address["x86_cpu_do_interrupt"],
            thunks.RAISE_EXCEPTION: address["raise_exception_err"],
            thunks.CHECK_B: address["helper_check_iob"],
            thunks.CHECK_W: address["helper_check_iow"],
            thunks.CHECK_L: address["helper_check_iol"],
            thunks.PY_IN: _address(self._callbacks["in"]),
            thunks.PY_OUT: _address(self._callbacks["out"]),
            thunks.PY_SYSCALL: _address(self._callbacks["syscall"]),
            thunks.PY_SYSENTER: _address(self._callbacks["sysenter"]),
            thunks.AMD: int(cpuid.vendor in AMD_VENDORS),
            thunks.PY_VECTOR: _address(self._callbacks["vector_read"]),
            thunks.REQUEST_ADDRESS: cpu + at.CPU_INTERRUPT_REQUEST,
        }
        self._block = (c_uint64 * (thunks.BLOCK_SIZE // 8))()
        for slot, value in slots.items():
            self._block[slot // 8] = value
        base = ctypes.addressof(self._block)
        self._exception = c_int32.from_address(base + thunks.EXCEPTION)
        self._exception.value = -1

        self._condition = threading.Condition()
        self._kicked = False
        self._in_slice = False
        self._closed = False
        self._deadline: int | None = None
        self._asleep_until: int | None = None
        self._pacer = threading.Thread(target=self._pace, name="vmf-unicorn-pacer", daemon=True)
        self._pacer.start()

    # What the engine calls -----------------------------------------------------------------------------------

    def hooks(self) -> Mapping[str, int]:
        native = thunks.page().address
        own = {name: _address(callback) for name, callback in self._callbacks.items()}
        for name in ("exception", "invalid", "syscall", "sysenter", "in", "out", "vector_read"):
            own[name] = native(name)
        return {**own, "user": ctypes.addressof(self._block)}

    def mmio_window(self, base: int, /) -> int:
        return base

    def _keep(self, error: BaseException) -> None:
        if self._error is None:
            self._error = error
        self._quick.uc_emu_stop(self._handle)

    def _refresh(self) -> None:
        """Mirror INTR into the engine."""
        request = self._request.value
        if self._handlers.pending() or self._inflight >= 0:
            if not request & at.REQUEST_VIRQ:
                self._request.value = request | at.REQUEST_VIRQ
                self._poke.value = 0xFFFF
        elif request & at.REQUEST_VIRQ:
            self._request.value = request & ~at.REQUEST_VIRQ

    def _on_in(self, _uc: int, port: int, size: int, _user: int) -> int:
        try:
            value = self._handlers.port_read(port & 0xFFFF, size)
            self._refresh()
            return value & 0xFFFF_FFFF
        except BaseException as error:
            self._keep(error)
            return 0xFFFF_FFFF

    def _on_out(self, _uc: int, port: int, size: int, value: int, _user: int) -> None:
        try:
            self._handlers.port_write(port & 0xFFFF, size, value)
            self._refresh()
        except BaseException as error:
            self._keep(error)

    def _on_mmio_read(self, _uc: int, offset: int, size: int, base: int | None) -> int:
        try:
            value = self._handlers.mmio_read((base or 0) + offset, size)
            self._refresh()
            return value & _U64
        except BaseException as error:
            self._keep(error)
            return _U64

    def _on_mmio_write(self, _uc: int, offset: int, size: int, value: int, base: int | None) -> None:
        try:
            self._handlers.mmio_write((base or 0) + offset, size, value)
            self._refresh()
        except BaseException as error:
            self._keep(error)

    def _on_vector_read(self, _uc: int, _offset: int, _size: int, _user: int) -> int:
        try:
            if self._inflight >= 0:
                vector, self._inflight = self._inflight, -1
                again = True
            else:
                vector = self._handlers.acknowledge()
                if not 0 <= vector <= 255:
                    raise ValueError(f"the interrupt controller gave vector {vector}")
                again = self._handlers.pending()
            if again:  # the engine clears its request after this delivery: come back to set it again
                self._quick.uc_emu_stop(self._handle)
            return vector
        except BaseException as error:
            self._keep(error)
            return 0xFF

    def _on_cpuid(self, _uc: int, _user: int) -> int:
        try:
            regs = self._at.regs
            leaf = regs[0] & 0xFFFF_FFFF
            eax, ebx, ecx, edx = self._cpuid.lookup(leaf, regs[1] & 0xFFFF_FFFF)
            if leaf == 1:
                ecx &= ~_CPUID_1_ECX_OSXSAVE
                if self._osxsave and self._at.cr4.value & _CR4_OSXSAVE:
                    ecx |= _CPUID_1_ECX_OSXSAVE
            regs[0], regs[3], regs[1], regs[2] = eax, ebx, ecx, edx
        except BaseException as error:
            self._keep(error)
        return 1

    def _load_segment(self, which: int, selector: int, flags: int) -> None:
        base = self._env + at.SEGS + at.SEGMENT_SIZE * which
        c_uint32.from_address(base).value = selector
        c_uint64.from_address(base + 8).value = 0
        c_uint32.from_address(base + 16).value = 0xFFFF_FFFF
        c_uint32.from_address(base + 20).value = flags

    def _two_byte_length(self) -> int:
        """Length of the instruction 0F .. at RIP with its prefixes."""
        wide, rip = self._at.hflags.value & _HF_CS64, self._at.eip.value
        base = 0 if wide else at.read_pointer(self._env + at.SEGS + at.SEGMENT_SIZE + 8)
        for i in range(14):
            address = base + rip + i & (_U64 if wide else 0xFFFF_FFFF)
            if self._quick.cpu_ldub_code_x86_64(self._env, address) & 0xFF == 0x0F:
                return i + 2
        return 2

    def _on_sysenter(self, _uc: int, _user: int) -> None:
        """SDM vol. 2, SYSENTER; the arithmetic flags are left as they are, see on_sysenter in _gate_hooks.c."""
        try:
            env = self._at
            wide = env.hflags.value & _HF_LMA
            mask = _U64 if wide else 0xFFFF_FFFF
            length = self._two_byte_length()
            selector = env.sysenter_cs.value & 0xFFFC
            env.eflags.value &= ~(FLAG_IF | _FLAG_RF | _FLAG_VM)
            self._load_segment(1, selector, _CODE64_FLAGS if wide else _CODE32_FLAGS)
            self._load_segment(2, selector + 8, _DATA_FLAGS)
            self._quick.x86_update_hflags_x86_64(self._env)
            env.hflags.value &= ~at.HF_COPIES
            env.regs[4] = env.sysenter_esp.value & mask
            env.eip.value = (env.sysenter_eip.value & mask) - length & _U64
        except BaseException as error:
            self._keep(error)

    def _on_syscall(self, _uc: int, _user: int) -> None:
        """AMD APM vol. 3, SYSCALL; the engine adds the instruction's length to RIP afterwards."""
        try:
            env, quick = self._at, self._quick
            hflags, rip = env.hflags.value, env.eip.value
            length = self._two_byte_length()
            flags = env.eflags.value | quick.cpu_cc_compute_all_x86_64(self._env, env.cc_op.value)
            flags |= env.df.value & FLAG_DF
            selector = env.star.value >> 32 & 0xFFFC
            if hflags & _HF_LMA:
                env.regs[1] = rip + length
                env.regs[11] = flags & ~_FLAG_RF
                flags &= ~(env.fmask.value | _FLAG_RF)
                self._load_segment(1, selector, _CODE64_FLAGS)
                target = env.lstar.value if hflags & _HF_CS64 else env.cstar.value
            else:
                env.regs[1] = rip + length & 0xFFFF_FFFF
                flags &= ~(FLAG_IF | _FLAG_RF | _FLAG_VM)
                self._load_segment(1, selector, _CODE32_FLAGS)
                target = env.star.value & 0xFFFF_FFFF
            self._load_segment(2, selector + 8, _DATA_FLAGS)
            env.eflags.value = flags & ~(FLAGS_ARITHMETIC | FLAG_DF) | FLAG_FIXED
            env.cc_src.value = flags & FLAGS_ARITHMETIC
            env.cc_op.value = at.CC_OP_EFLAGS
            env.df.value = -1 if flags & FLAG_DF else 1
            quick.x86_update_hflags_x86_64(self._env)
            env.hflags.value &= ~at.HF_COPIES
            env.eip.value = target - length & _U64
        except BaseException as error:
            self._keep(error)

    # Running ------------------------------------------------------------------------------------------------

    def run(self, deadline_ns: int | None, /) -> int:
        env, handlers = self._at, self._handlers
        self._engine_error = 0
        while True:
            if self._kicked:
                self._kicked = False
                return gates.EXIT_KICKED
            try:
                asserted = handlers.pending()
            except BaseException as error:
                self._error = error
                return gates.EXIT_ERROR
            deliver = asserted or self._inflight >= 0
            raises = self._exception.value >= 0
            if self._halted:
                nmi = self._nmi_pending and not env.hflags2.value & at.HF2_NMI_MASKED
                if not (nmi or raises or (deliver and env.eflags.value & FLAG_IF)):
                    return gates.EXIT_HALTED
                self._halted = False
            self._prepare(deliver, raises)
            with self._condition:
                if self._closed:
                    raise RuntimeError("the vCPU is closed")
                self._in_slice = True
                self._deadline = deadline_ns
                asleep = self._asleep_until
                if self._kicked or (deadline_ns is not None and (asleep is None or deadline_ns < asleep)):
                    self._condition.notify()
            code = self._api.uc_emu_start(self._handle, env.eip.value, 0, 0, 0)
            with self._condition:
                self._in_slice = False
            if self._request.value & at.REQUEST_NMI:
                self._request.value &= ~at.REQUEST_NMI
                self._nmi_pending = True
            if self._error is not None:
                return gates.EXIT_ERROR
            if code:
                self._engine_error = code
                return gates.EXIT_ERROR
            if self._halted_by_engine.value:
                self._halted = True
            elif env.old_exception.value == _VECTOR_DF:
                return gates.EXIT_SHUTDOWN
            elif deadline_ns is not None and time.monotonic_ns() >= deadline_ns:
                self._kicked = False
                return gates.EXIT_KICKED

    def _prepare(self, deliver: bool, raises: bool) -> None:
        env, block = self._at, self._block
        request = self._request.value & ~at.REQUEST_VIRQ
        if self._nmi_pending:
            request |= at.REQUEST_NMI
        self._nmi_pending = False
        if deliver:
            request |= at.REQUEST_VIRQ
        if raises:
            block[thunks.SAVED_IF // 8] = env.eflags.value & FLAG_IF
            block[thunks.SAVED_INHIBIT // 8] = env.hflags.value & at.HF_INHIBIT_IRQ
            block[thunks.REQUEST_AFTER // 8] = request
            env.eflags.value |= FLAG_IF
            env.hflags.value &= ~at.HF_INHIBIT_IRQ
            request = at.REQUEST_VIRQ
        self._request.value = request
        env.vm_vmcb.value = self._vector_page
        self._halted_by_engine.value = 0

    def _pace(self) -> None:
        condition = self._condition
        with condition:
            while not self._closed:
                self._asleep_until = None
                if not self._in_slice:
                    condition.wait()
                    continue
                now, deadline = time.monotonic_ns(), self._deadline
                if self._kicked or (deadline is not None and now >= deadline):
                    self._quick.uc_emu_stop(self._handle)
                    self._asleep_until = now
                    condition.wait(_RETRY_S)
                elif deadline is None:
                    condition.wait()
                else:
                    self._asleep_until = deadline
                    condition.wait((deadline - now) / 1e9)

    def kick(self) -> None:
        # The lock is re-entrant: a signal handler may kick on the very thread that holds it in `run`.
        self._kicked = True
        with self._condition:
            if self._in_slice:
                self._quick.uc_emu_stop(self._handle)
                self._condition.notify()

    def take_error(self) -> tuple[BaseException | None, int]:
        error, self._error = self._error, None
        return error, self._engine_error

    def get_events(self) -> tuple[bool, int, int, int, bool]:
        code = self._block[thunks.EXCEPTION_CODE // 8]
        return self._halted, self._inflight, self._exception.value, code, self._nmi_pending

    def set_events(self, halted: bool, inflight: int, exception: int, code: int, nmi_pending: bool, /) -> None:
        self._halted = halted
        self._inflight = inflight
        self._exception.value = exception
        self._block[thunks.EXCEPTION_CODE // 8] = code
        self._nmi_pending = nmi_pending
        self._request.value = 0

    def close(self) -> None:
        with self._condition:
            if self._closed:
                return
            self._closed = True
            self._condition.notify()
        self._pacer.join()
        # The callbacks refer to this object and it to them: cut the ring, the engine calls nothing any more.
        self._callbacks.clear()
