"""Hooks that are called whatever happens at the same instant.

The engine calls the hooks for SYSENTER and CPUID from a loop over all instruction hooks, and leaves that loop early
once a stop has been requested. A stop that another thread requested a moment before then hides the instruction:
SYSENTER does nothing (and goes on at a wrong address), CPUID shows the engine's own processor. The hook for SYSCALL is
the first of the loop; those for IN and OUT have a loop that does not look at stops.

So a few instructions stand in front of the two helpers: they take back the request for the loop's sake, in vmf's own
engines only. Nothing is lost: the gates ask for the stop again from the hook if it was for an error, and the pacer
repeats its own until the slice has ended.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Mapping

from vmf_cpu_unicorn import layout as at

HELPERS = ("helper_sysenter", "helper_cpuid")

_kept: list[mmap.mmap] = []
"""The machine code, which the engine refers to until the process ends."""


def assemble(original: int) -> bytes:
    """What stands in front of a helper (System V AMD64: env in RDI, the rest is handed on)."""
    return b"".join(
        (
            b"\x48\x8b\x87" + struct.pack("<i", at.ENV_UC),  # mov rax,[rdi+uc]
            b"\x80\xb8" + struct.pack("<i", at.UC_NO_EXIT_REQUEST) + b"\x00",  # cmp byte [rax+no_exit_request],0
            b"\x74\x07",  # jz: another's engine
            b"\xc6\x80" + struct.pack("<i", at.UC_STOP_REQUEST) + b"\x00",  # mov byte [rax+stop_request],0
            b"\x48\xb8" + struct.pack("<Q", original),  # mov rax,original
            b"\xff\xe0",  # jmp rax: it looks at its return address
        )
    )


def _expected(base: int, address: Mapping[str, int]) -> bool:
    stop = b"\xc6\x87" + struct.pack("<I", at.UC_STOP_REQUEST) + b"\x01"  # mov byte [rdi+stop_request],1
    uc = struct.pack("<I", at.ENV_UC)
    return (
        stop in ctypes.string_at(address["uc_emu_stop"], 64)
        and uc in ctypes.string_at(address["helper_sysenter"], 32)
        and all(at.read_pointer(base + place) == address[name] for name in HELPERS for place in at.HELPER_PLACES[name])
    )


def install(address: Mapping[str, int]) -> bool:
    """Put them there, before the first engine is opened. False, with nothing changed, when the image is another."""
    base = address["helper_sysenter"] - at.HELPER_SYSENTER
    if base % mmap.PAGESIZE or not _expected(base, address):
        return False
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    places = [base + place for name in HELPERS for place in at.HELPER_PLACES[name]]
    for place in places:
        page = place & -mmap.PAGESIZE
        if mprotect(page, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE):
            return False
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    _kept.append(code)
    for number, name in enumerate(HELPERS):
        entry = 64 * number
        piece = assemble(address[name])
        code[entry : entry + len(piece)] = piece
        for place in at.HELPER_PLACES[name]:
            front = ctypes.addressof(ctypes.c_char.from_buffer(code)) + entry
            ctypes.c_uint64.from_address(base + place).value = front
    return True
