"""Bare-metal guests: a flat binary or an ELF64 image that runs on the naked machine.

The entry contract:

- 64-bit mode, ring 0, the first 4 GiB identity-mapped in 2-MiB pages, writable and executable, MMIO hole included
  (page tables at 0x9000; RAM above 4 GiB is there but not mapped);
- interrupts off, IDT empty (an exception is a triple fault: the machine resets), GDT with 0x10 code and 0x18 data;
  the 8259 pair, 8254 and 16550 are as after power-on, so all interrupt lines are unprogrammed;
- SSE on (CR4.OSFXSR, OSXMMEXCPT), x87 as after FNINIT;
- flat binary: loaded and entered at 1 MiB. ELF64: every PT_LOAD at its physical address, at 1 MiB or above, entered
  at e_entry (a physical address);
- RDI = RAM size in bytes, RSI = end of the RAM that begins at 0, RDX = TSC rate in kHz; RSP = 0x9FFF8, a stack of
  64 KiB, aligned as after a call; the other general registers 0; there is nothing to return to;
- RAM that was not loaded is zero, except for the loader's tables below 64 KiB.
"""

from __future__ import annotations

from pathlib import Path

from vmf.cpu.state import VcpuState
from vmf.errors import ImageError
from vmf.machine.boot.image import ImageKind, kind_of, open_image
from vmf.machine.boot.linux import load_elf_file
from vmf.machine.boot.longmode import (
    CR4_OSFXSR,
    CR4_OSXMMEXCPT,
    CR4_PAE,
    LOADER_END,
    initial_state,
    low_ram_end,
    write_environment,
)
from vmf.machine.boot.multiboot import load_multiboot
from vmf.memory.guest import MIB, GuestMemory

FLAT_BASE = LOADER_END


def load_image(memory: GuestMemory, image: Path, tsc_khz: int) -> VcpuState:
    """Load a bare-metal guest into zeroed RAM; the module says what it finds. Raises ImageError."""
    write_environment(memory)
    with open_image("image", image) as file:
        kind = kind_of(file)
        if kind is ImageKind.FLAT:
            if FLAT_BASE + file.size > low_ram_end(memory):
                mib = -(-(FLAT_BASE + file.size) // MIB)
                raise ImageError(
                    f"{file.what} ({file.size} bytes, loaded at 1 MiB) does not fit into {memory.size // MIB} MiB "
                    "of RAM.",
                    f"Give the machine at least {mib} MiB with `vmf modifyvm NAME --memory {mib}`.",
                )
            with memory.view(FLAT_BASE, file.size) as view:
                file.read_into(0, view)
            entry = FLAT_BASE
        elif kind is ImageKind.ELF:
            entry = load_elf_file(memory, file).entry
        elif kind is ImageKind.MULTIBOOT:
            return load_multiboot(memory, image, None, None, tsc_khz, "image")
        else:
            raise file.wrong(f"is a {kind.value}, not a bare-metal image", "Boot it as a Linux kernel.")
    registers = {"rdi": memory.size, "rsi": low_ram_end(memory), "rdx": tsc_khz}
    return initial_state(entry, registers, CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT, tsc_khz)
