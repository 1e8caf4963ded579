"""The kernel's KVM interface, as far as this backend uses it: Linux Documentation/virt/kvm/api.rst, <linux/kvm.h>.

Structures are packed and unpacked with `struct` over buffers that are made once per vCPU; the ioctls go through
ctypes, because `fcntl.ioctl` refuses arguments over 1,024 bytes. `ctypes.CDLL` releases the GIL during the call,
which is what lets the other threads work while the guest runs.
"""

from __future__ import annotations

import ctypes
import errno
import os
from struct import Struct
from typing import Any, Final

_IOC_WRITE, _IOC_READ = 1, 2


def _io(number: int, size: int = 0, direction: int = 0) -> int:
    return direction << 30 | size << 16 | 0xAE << 8 | number


def _iow(number: int, size: int) -> int:
    return _io(number, size, _IOC_WRITE)


def _ior(number: int, size: int) -> int:
    return _io(number, size, _IOC_READ)


def _iowr(number: int, size: int) -> int:
    return _io(number, size, _IOC_READ | _IOC_WRITE)


# -- structures

REGS: Final = Struct("<18Q")
"""rax rbx rcx rdx rsi rdi rsp rbp r8..r15 rip rflags."""
REGS_ORDER: Final = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
SEGMENT: Final = Struct("<QIHBBBBBBBBBx")
"""base limit selector type present dpl db s l g avl unusable."""
SREGS_SEGMENTS: Final = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldtr")
SREGS_TABLES: Final = Struct("<QH6xQH6x")
"""gdt, idt: base and limit."""
SREGS_TABLES_AT: Final = 192
SREGS_CONTROL: Final = Struct("<7Q")
"""cr0 cr2 cr3 cr4 cr8 efer apic_base."""
SREGS_CONTROL_AT: Final = 224
SREGS_SIZE: Final = 312
"""... and a bitmap of 256 interrupts."""
SREGS2_SIZE: Final = 320
"""... and flags and four PDPTRs."""
EVENTS: Final = Struct("<4BI4B4BII4BB26xBQ")
"""struct kvm_vcpu_events; see `vmf_cpu_kvm.convert` for the fields."""
DEBUGREGS: Final = Struct("<7Q72x")
"""db0 db1 db2 db3 dr6 dr7 flags."""
XCRS: Final = Struct("<IIIIQ")
"""nr_xcrs flags (xcr reserved value)."""
XCRS_SIZE: Final = 392
XSAVE_SIZE: Final = 4096
MSRS_HEADER: Final = 8
MSR_ENTRY: Final = Struct("<IIQ")
CPUID_HEADER: Final = 8
CPUID_ENTRY: Final = Struct("<7I12x")
"""function index flags eax ebx ecx edx."""
CPUID_SIGNIFICANT_INDEX: Final = 1
MEMORY_REGION: Final = Struct("<IIQQQ")
"""slot flags gpa size userspace_addr."""
ENABLE_CAP: Final = Struct("<II4Q64x")
"""cap flags args."""
DEVICE_ATTR: Final = Struct("<IIQQ")
"""flags group attr addr."""
DIRTY_LOG: Final = Struct("<IIQ")
"""slot padding bitmap."""
CLEAR_DIRTY_LOG: Final = Struct("<IIQQ")
"""slot pages first bitmap."""

MEM_LOG_DIRTY_PAGES: Final = 1
VCPU_TSC_CTRL: Final = 0
VCPU_TSC_OFFSET: Final = 0

# -- requests: system

GET_API_VERSION: Final = _io(0x00)
CREATE_VM: Final = _io(0x01)
GET_MSR_INDEX_LIST: Final = _iowr(0x02, 4)
CHECK_EXTENSION: Final = _io(0x03)
GET_VCPU_MMAP_SIZE: Final = _io(0x04)
GET_SUPPORTED_CPUID: Final = _iowr(0x05, CPUID_HEADER)

# -- requests: VM

CREATE_VCPU: Final = _io(0x41)
GET_DIRTY_LOG: Final = _iow(0x42, DIRTY_LOG.size)
SET_USER_MEMORY_REGION: Final = _iow(0x46, MEMORY_REGION.size)
SET_TSS_ADDR: Final = _io(0x47)
SET_IDENTITY_MAP_ADDR: Final = _iow(0x48, 8)
ENABLE_CAPABILITY: Final = _iow(0xA3, ENABLE_CAP.size)
CLEAR_DIRTY: Final = _iowr(0xC0, CLEAR_DIRTY_LOG.size)

# -- requests: vCPU

RUN: Final = _io(0x80)
GET_REGS: Final = _ior(0x81, REGS.size)
SET_REGS: Final = _iow(0x82, REGS.size)
GET_SREGS: Final = _ior(0x83, SREGS_SIZE)
SET_SREGS: Final = _iow(0x84, SREGS_SIZE)
INTERRUPT: Final = _iow(0x86, 4)
GET_MSRS: Final = _iowr(0x88, MSRS_HEADER)
SET_MSRS: Final = _iow(0x89, MSRS_HEADER)
SET_SIGNAL_MASK: Final = _iow(0x8B, 4)
SET_CPUID2: Final = _iow(0x90, CPUID_HEADER)
GET_CPUID2: Final = _iowr(0x91, CPUID_HEADER)
GET_VCPU_EVENTS: Final = _ior(0x9F, EVENTS.size)
SET_VCPU_EVENTS: Final = _iow(0xA0, EVENTS.size)
GET_DEBUGREGS: Final = _ior(0xA1, DEBUGREGS.size)
SET_DEBUGREGS: Final = _iow(0xA2, DEBUGREGS.size)
SET_TSC_KHZ: Final = _io(0xA2)
GET_TSC_KHZ: Final = _io(0xA3)
GET_XSAVE: Final = _ior(0xA4, XSAVE_SIZE)
SET_XSAVE: Final = _iow(0xA5, XSAVE_SIZE)
GET_XCRS: Final = _ior(0xA6, XCRS_SIZE)
SET_XCRS: Final = _iow(0xA7, XCRS_SIZE)
GET_SREGS2: Final = _ior(0xCC, SREGS2_SIZE)
SET_SREGS2: Final = _iow(0xCD, SREGS2_SIZE)
GET_XSAVE2: Final = _ior(0xCF, XSAVE_SIZE)
SET_DEVICE_ATTR: Final = _iow(0xE1, DEVICE_ATTR.size)
GET_DEVICE_ATTR: Final = _iow(0xE2, DEVICE_ATTR.size)
HAS_DEVICE_ATTR: Final = _iow(0xE3, DEVICE_ATTR.size)

# -- capabilities

CAP_HLT: Final = 1
CAP_USER_MEMORY: Final = 3
CAP_SET_TSS_ADDR: Final = 4
CAP_EXT_CPUID: Final = 7
CAP_SYNC_MMU: Final = 16
CAP_SET_IDENTITY_MAP_ADDR: Final = 37
CAP_VCPU_EVENTS: Final = 41
CAP_INTR_SHADOW: Final = 49
CAP_DEBUGREGS: Final = 50
CAP_XSAVE: Final = 55
CAP_XCRS: Final = 56
CAP_TSC_CONTROL: Final = 60
CAP_GET_TSC_KHZ: Final = 61
CAP_IMMEDIATE_EXIT: Final = 136
CAP_EXCEPTION_PAYLOAD: Final = 164
CAP_MANUAL_DIRTY_LOG_PROTECT2: Final = 168
CAP_ENFORCE_PV_FEATURE_CPUID: Final = 190
CAP_SREGS2: Final = 200
CAP_EXIT_ON_EMULATION_FAILURE: Final = 204
CAP_XSAVE2: Final = 208
CAP_PMU_CAPABILITY: Final = 212
CAP_DISABLE_QUIRKS2: Final = 213
CAP_TRIPLE_FAULT_EVENT: Final = 218

PMU_CAP_DISABLE: Final = 1
QUIRK_OUT_7E_INC_RIP: Final = 1 << 3
QUIRK_FIX_HYPERCALL_INSN: Final = 1 << 5
QUIRK_MWAIT_NEVER_UD_FAULTS: Final = 1 << 6

# -- struct kvm_run

RUN_REQUEST_INTERRUPT_WINDOW: Final = 0
RUN_IMMEDIATE_EXIT: Final = 1
RUN_EXIT_REASON: Final = 8
RUN_READY_FOR_INTERRUPT: Final = 12
RUN_IF_FLAG: Final = 13
RUN_CR8: Final = Struct("<Q")
RUN_CR8_AT: Final = 16
RUN_IO: Final = Struct("<IBBHQQBBHIQ")
"""From RUN_EXIT_REASON: exit_reason ready if_flag flags cr8 apic_base, direction size port count data_offset."""
RUN_MMIO: Final = Struct("<QQIB")
"""From RUN_UNION_AT: address data length is_write."""
RUN_INTERNAL: Final = Struct("<II16Q")
"""From RUN_UNION_AT: suberror ndata data."""
RUN_UNION_AT: Final = 32

EXIT_UNKNOWN: Final = 0
EXIT_EXCEPTION: Final = 1
EXIT_IO: Final = 2
EXIT_HYPERCALL: Final = 3
EXIT_DEBUG: Final = 4
EXIT_HLT: Final = 5
EXIT_MMIO: Final = 6
EXIT_IRQ_WINDOW_OPEN: Final = 7
EXIT_SHUTDOWN: Final = 8
EXIT_FAIL_ENTRY: Final = 9
EXIT_INTR: Final = 10
EXIT_SET_TPR: Final = 11
EXIT_INTERNAL_ERROR: Final = 17
EXIT_SYSTEM_EVENT: Final = 24

EXIT_NAMES: Final = {
    EXIT_UNKNOWN: "unknown", EXIT_EXCEPTION: "exception", EXIT_HYPERCALL: "hypercall", EXIT_DEBUG: "debug",
    EXIT_FAIL_ENTRY: "fail entry", 12: "TPR access", 16: "NMI", EXIT_INTERNAL_ERROR: "internal error",
    EXIT_SYSTEM_EVENT: "system event", 29: "RDMSR", 30: "WRMSR", 31: "dirty ring full", 33: "bus lock",
    37: "notify", 39: "memory fault",
}  # fmt: skip

INTERNAL_EMULATION: Final = 1
INTERNAL_ERRORS: Final = {
    INTERNAL_EMULATION: "KVM cannot emulate the instruction",
    2: "several exceptions at once",
    3: "an exit while an event was being delivered",
    4: "an exit reason that KVM does not know",
}

# -- calling

_libc = ctypes.CDLL(None, use_errno=True)
raw_ioctl = _libc.ioctl
"""ioctl(fd, request, address or None): -1 and `ctypes.get_errno()` on failure. For the hot path."""
raw_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
raw_ioctl.restype = ctypes.c_int

syscall = _libc.syscall
"""syscall(number, four arguments)."""
syscall.argtypes = (ctypes.c_long,) * 5
syscall.restype = ctypes.c_long

sigaction = _libc.sigaction
sigaction.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
sigaction.restype = ctypes.c_int
NO_OP_HANDLER: Final = ctypes.cast(_libc.abs, ctypes.c_void_p).value or 0
"""Address of a function that does nothing with its int argument: the C library's abs()."""

Buffer = ctypes.Array[ctypes.c_char]


def buffer(size: int) -> Buffer:
    """A zeroed buffer for an ioctl."""
    return ctypes.create_string_buffer(size)


def ioctl(fd: int, request: int, argument: Any = None) -> int:
    """One ioctl, retried when a signal interrupted it. Raises OSError."""
    while True:
        result: int = raw_ioctl(fd, request, argument)
        if result >= 0:
            return result
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def check_extension(fd: int, capability: int) -> int:
    """What KVM says to a capability: 0 when it lacks it."""
    return ioctl(fd, CHECK_EXTENSION, capability)


def buffer_of(layout: Struct | str, *values: Any) -> Buffer:
    """A buffer holding one structure."""
    layout = Struct(layout) if isinstance(layout, str) else layout
    result = buffer(layout.size)
    layout.pack_into(result, 0, *values)
    return result
