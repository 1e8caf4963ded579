"""Does a machine's memory lie within the physical addresses that its CPU has?

The CPUID contract tells the guest their width (leaf 0x80000008). A guest leaves out what lies beyond it, or takes such
an address for another one, and an engine may not be able to map it. The hole below 4 GiB counts: 512 GiB of memory end
above 512 GiB.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmf.cpuid.layout import address_widths
from vmf.errors import StateError
from vmf.memory.guest import HIGH_RAM_BASE, LOW_RAM_LIMIT, MIB, GuestMemory

if TYPE_CHECKING:
    from vmf.cpu.backend import CpuBackend
    from vmf.cpuid.table import CpuidTable


def most_memory_mib(bits: int) -> int:
    """The most memory of a machine whose physical addresses have that many bits (32 at least), MiB."""
    return ((1 << bits) - (HIGH_RAM_BASE - LOW_RAM_LIMIT)) // MIB


def require_addressable(name: str, memory: GuestMemory, contract: CpuidTable, backend: CpuBackend) -> None:
    """Raise StateError unless all of the memory lies within the contract's physical addresses."""
    bits = address_widths(contract)[0]
    last = memory.regions[-1]
    if last.gpa + last.size <= 1 << bits:
        return
    own, most = address_widths(backend.cpuid_capability())[0], most_memory_mib(bits)
    wider = f"use portability level 0, at which {backend.name} has {own}"
    raise StateError(
        f"machine {name} has {memory.size // MIB} MiB of memory, and its CPU ({backend.name}) has {bits} bits of"
        f" physical address, enough for {most} MiB.",
        f"Give it less memory with `vmf modifyvm {name} --memory {most}`, or"
        f" {wider if own > bits else 'choose another CPU backend'}.",
    )
