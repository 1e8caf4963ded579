"""Where the engine keeps what its public interface does not show.

Offsets are those of Unicorn 2.1.4 built for Linux x86-64 (`uc_struct`, `CPUState`, `CPUX86State`). None is trusted:
`selftest.verify` compares every one with what the public interface, the exported functions' own machine code or a
small guest's behaviour say, and the backend refuses to work on the first difference.
"""

from __future__ import annotations

import ctypes

# struct uc_struct
UC_CPU = 440
UC_TCG_CONTEXT = 0x300
UC_INSN_HOOKS = 856
"""First item (next, hook) of the list of instruction hooks."""
UC_NO_EXIT_REQUEST = 2034

# struct hook
HOOK_INSN = 4
HOOK_CALLBACK = 40
HOOK_USER = 48

# struct CPUState
CPU_CFLAGS_NEXT_TB = 24
CPU_INTERRUPT_REQUEST = 28
CPU_ENV_PTR = 296
CPU_ICOUNT_DECR_PTR = 304
CPU_HALTED = 33176
CPU_EXCEPTION_INDEX = 33184
CPU_UC = 33192
CPU_CLASS = 33200
CPU_ENV = 35408

# struct TCGContext
TCG_OPERATIONS = 0x7388

# struct CPUX86State
REGS = 0
EIP = 128
EFLAGS = 136
CC_SRC = 152
CC_OP = 168
DF = 172
HFLAGS = 176
HFLAGS2 = 180
SEGS = 184
LDT = 328
TR = 352
GDT = 376
IDT = 400
CR = 424
A20_MASK = 496
EFER = 592
BNDCFGS = 584
FPSTT = 604
FPUS = 608
FPUC = 610
FPTAGS = 612
FPREGS = 624
FPOP = 752
FPCS = 754
FPDS = 756
FPIP = 760
FPDP = 768
FT0 = 784
MXCSR = 816
XMM = 824
XMM_STRIDE = 64
SYSENTER_CS = 4800
SYSENTER_ESP = 4808
SYSENTER_EIP = 4816
STAR = 4824
VM_HSAVE_PA = 4832
LSTAR = 4840
CSTAR = 4848
FMASK = 4856
KERNEL_GS_BASE = 4864
TSC_AUX = 4896
XCR0 = 4904
MCG_STATUS = 4912
MISC_ENABLE = 4920
PAT = 5280
ERROR_CODE = 5384
EXCEPTION_IS_INT = 5388
EXCEPTION_NEXT_EIP = 5392
DR = 5400
OLD_EXCEPTION = 5496
VM_VMCB = 5504
TSC_OFFSET = 5512
V_TPR = 5556
ENV_UC = 7000
ENV_SIZE = 5568
"""Up to `end_reset_fields`: everything that is guest state, except"""
MTRRS = 6320
"""the MTRRs, 28 MSRs of 8 bytes in the order of `MTRR_INDICES`."""
MTRR_INDICES = (0x250, 0x258, 0x259, *range(0x268, 0x270), 0x2FF, *range(0x200, 0x210))
MTRRS_SIZE = 8 * len(MTRR_INDICES)

SEGMENT_SIZE = 24
"""selector u32 (0), base u64 (8), limit u32 (16), flags u32 (20)."""

# Hidden flags, "HF_" and "HF2_" in the engine's source.
HF_INHIBIT_IRQ = 1 << 3
HF_SMAP = 1 << 23
HF_COPIES = 1 << 8 | 3 << 12 | 1 << 17
"""TF, IOPL and VM. The engine's translator takes them from RFLAGS; `x86_update_hflags` copies them here as well, where
nothing ever clears them again: they have to be taken out after every call of it."""
HF2_GIF = 1 << 0
HF2_NMI_MASKED = 1 << 2
HF2_VINTR = 1 << 3
"""CR8 is kept in v_tpr. Without it the engine asks a local APIC, which it does not have."""

# CPUState.interrupt_request
REQUEST_VIRQ = 0x100
REQUEST_NMI = 0x200

# Places in the library's image, from where it is loaded; _stores.c looks at what stands there before it relies on it.
STORE_HELPERS = 0x14336C0
"""The table of helpers for stores of 1, 2, 4 and 8 bytes, from which translated code is made."""
SLOT_RESET_DIRTY = 0x14C67F8
SLOT_SET_DIRTY = 0x14BFCE8
"""Slots of the global offset table for tlb_reset_dirty_by_vaddr and tlb_set_dirty."""
HELPER_SYSENTER = 0x44F3B0
"""The function itself."""
HELPER_PLACES = {"helper_sysenter": (0x142EDE8, 0x14A38A0), "helper_cpuid": (0x142F058, 0x14ACD40)}
"""In the table of helpers, and the slot of the global offset table from which the translator takes the address."""
MMU_MODES_SIZE = 48
"""The three descriptors (mask, table) of the TLBs, which end where the instruction counter begins."""

CC_OP_EFLAGS = 1
VMCB_INT_VECTOR = 0x64
"""Where in the page at vm_vmcb the engine reads a virtual interrupt's vector."""


def read_pointer(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


def cpu_address(handle: int) -> int:
    """CPUState of an engine that has been initialised by some call."""
    return read_pointer(handle + UC_CPU)
