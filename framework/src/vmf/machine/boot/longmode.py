"""The environment every directly loaded guest starts in: 64-bit mode with the first 4 GiB mapped one to one.

The first MiB belongs to the loader until the guest takes it over:

    0x00500  GDT: 0x10 code, 0x18 data (the selectors of the Linux boot protocol), 0x20 TSS
    0x07000  Linux: boot_params
    0x09000  page tables: PML4, PDPT, four page directories of 2-MiB pages
    0x20000  Linux: command line
    0xA0000  initial stack, growing down

Nothing here needs to survive: a guest may overwrite it once it has its own tables.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

import numpy as np

from vmf.cpu.state import (
    GENERAL_REGISTERS,
    MSR_IA32_PAT,
    REQUIRED_MSRS,
    DescriptorTable,
    Segment,
    VcpuState,
)
from vmf.errors import ImageError
from vmf.memory.guest import HIGH_RAM_BASE, LOW_RAM_LIMIT, MIB, GuestMemory

GDT_GPA = 0x500
BOOT_PARAMS_GPA = 0x7000
PAGE_TABLES_GPA = 0x9000
CMDLINE_GPA = 0x20000
STACK_TOP = 0xA0000
LOADER_END = MIB
"""Images are loaded from here up."""

CODE_SELECTOR = 0x10
DATA_SELECTOR = 0x18
TSS_SELECTOR = 0x20

# Access rights in the form of vmf.cpu.state.Segment.
_CODE64 = 0xA09B  # G, L, present, code, readable, accessed
_DATA = 0xC093  # G, D/B, present, data, writable, accessed
_TSS64_BUSY = 0x008B
_UNUSABLE = 1 << 16

CR0_LONG_MODE = 0x8005_0033  # PG AM WP NE ET MP PE
CR4_PAE = 1 << 5
CR4_OSFXSR = 1 << 9
CR4_OSXMMEXCPT = 1 << 10
EFER_LME_LMA = 0x500
PAT_RESET = 0x0007_0406_0007_0406

_PTE_PRESENT_WRITABLE = 0x3
_PTE_HUGE = 0x80
_HUGE_PAGE = 2 * MIB


def low_ram_end(memory: GuestMemory) -> int:
    """End of the RAM that begins at 0, in bytes (at most `LOW_RAM_LIMIT`)."""
    return min(memory.size, LOW_RAM_LIMIT)


def write_environment(memory: GuestMemory) -> None:
    """Write the GDT and the identity page tables."""
    if memory.size < LOADER_END:
        raise ImageError(
            f"the machine has {memory.size} bytes of RAM, less than the 1 MiB that loading a guest needs.",
            "Give it more with `vmf modifyvm NAME --memory MIB`.",
        )
    gdt = struct.pack(
        "<6Q",
        0,
        0,
        0x00AF_9B00_0000_FFFF,  # 0x10: 64-bit code
        0x00CF_9300_0000_FFFF,  # 0x18: flat data
        0x0000_8B00_0000_0067,  # 0x20: busy 64-bit TSS at 0, low half
        0,
    )
    memory.write(GDT_GPA, gdt)
    pdpt = PAGE_TABLES_GPA + 0x1000
    directories = PAGE_TABLES_GPA + 0x2000
    memory.write(PAGE_TABLES_GPA, struct.pack("<Q", pdpt | _PTE_PRESENT_WRITABLE))
    memory.write(pdpt, struct.pack("<4Q", *(directories + 0x1000 * n | _PTE_PRESENT_WRITABLE for n in range(4))))
    entries = np.arange(0, HIGH_RAM_BASE, _HUGE_PAGE, dtype=np.uint64) | np.uint64(_PTE_PRESENT_WRITABLE | _PTE_HUGE)
    memory.write(directories, entries.tobytes())


def initial_state(rip: int, registers: Mapping[str, int], cr4: int, tsc_khz: int) -> VcpuState:
    """The vCPU about to execute its first instruction: interrupts off, `registers` set, the others zero.

    RSP is `STACK_TOP` - 8 unless given, so that the stack is aligned as if the entry had been called (SysV AMD64).
    """
    values = dict.fromkeys(GENERAL_REGISTERS, 0)
    values["rsp"] = STACK_TOP - 8
    values.update(registers)
    data = Segment(DATA_SELECTOR, 0, 0xFFFF_FFFF, _DATA)
    segments = dict.fromkeys(("es", "ss", "ds", "fs", "gs"), data)
    segments["cs"] = Segment(CODE_SELECTOR, 0, 0xFFFF_FFFF, _CODE64)
    msrs = dict.fromkeys(sorted(REQUIRED_MSRS), 0)
    msrs[MSR_IA32_PAT] = PAT_RESET
    return VcpuState(
        registers=values,
        rip=rip,
        rflags=0x2,
        segments=segments,
        ldtr=Segment(0, 0, 0, _UNUSABLE),
        tr=Segment(TSS_SELECTOR, 0, 0x67, _TSS64_BUSY),
        gdtr=DescriptorTable(GDT_GPA, 6 * 8 - 1),
        idtr=DescriptorTable(0, 0),
        cr0=CR0_LONG_MODE,
        cr3=PAGE_TABLES_GPA,
        cr4=cr4,
        efer=EFER_LME_LMA,
        msrs=msrs,
        tsc=0,
        tsc_khz=tsc_khz,
    )
