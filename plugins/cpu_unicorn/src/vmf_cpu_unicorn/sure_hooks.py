"""Hooks that are called whatever happens at the same instant.

The engine calls the hooks for SYSENTER and CPUID from a loop over all instruction hooks, and leaves that loop early
while a stop is requested. A stop that another thread requests at that moment then hides the instruction: SYSENTER does
nothing (and the guest continues at a wrong address), CPUID shows the engine's own processor. To take the request back
first is not enough, as the other thread may repeat it in the middle of the loop. The hook for SYSCALL is the first of
the loop; those for IN and OUT have a loop that does not look at stops.

So some instructions stand in for the two helpers in vmf's own engines. They find the hook in the engine's list, and
call it as the helper does. They neither read nor change the request, so that no stop is lost either.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Mapping

from vmf_cpu_unicorn import layout as at

INSN_CPUID = 113
INSN_SYSENTER = 700
"""x86.h"""

HELPERS = {"helper_sysenter": INSN_SYSENTER, "helper_cpuid": INSN_CPUID}
INTERNALS = (*HELPERS, "cpu_restore_state")
"""What is used here, all with the suffix _x86_64."""

_ROOM = 128
"""Bytes for one helper."""

_kept: list[mmap.mmap] = []
"""The machine code, which the engine refers to until the process ends."""


def assemble(name: str, address: Mapping[str, int]) -> bytes:
    """What stands in for a helper (System V AMD64: env in RDI, the instruction's length in ESI)."""
    call = _sysenter(address["cpu_restore_state"]) if name == "helper_sysenter" else _cpuid()
    find = b"".join(
        (
            b"\x48\x8b\x51\x08",  # mov rdx,[rcx+8]: the hook
            b"\x48\x8b\x09",  # mov rcx,[rcx]: the next item
            b"\x81\x7a" + struct.pack("<bI", at.HOOK_INSN, HELPERS[name]),  # cmp dword [rdx+insn],name's
        )
    )
    search = b"\x48\x85\xc9"  # test rcx,rcx
    search += b"\x74" + struct.pack("<b", len(find) + 2 + len(call))  # jz original: there is no hook
    search += find + b"\x75" + struct.pack("<b", -len(search) - len(find) - 2)  # jne search
    return b"".join(
        (
            b"\x48\x8b\x87" + struct.pack("<i", at.ENV_UC),  # mov rax,[rdi+uc]
            b"\x80\xb8" + struct.pack("<i", at.UC_NO_EXIT_REQUEST) + b"\x00",  # cmp byte [rax+no_exit_request],0
            b"\x74" + struct.pack("<b", 7 + len(search) + len(call)),  # jz original: another's engine
            b"\x48\x8b\x88" + struct.pack("<i", at.UC_INSN_HOOKS),  # mov rcx,[rax+hooks]
            search,
            call,
            b"\x48\xb8" + struct.pack("<Q", address[name]),  # original: mov rax,helper
            b"\xff\xe0",  # jmp rax: it looks at its return address
        )
    )


def _cpuid() -> bytes:
    """With uc in RAX and the hook in RDX. The translated code has brought RIP and the flags up to date."""
    return b"".join(
        (
            b"\x48\x8b\x72" + struct.pack("<b", at.HOOK_USER),  # mov rsi,[rdx+user]
            b"\x48\x89\xc7",  # mov rdi,rax
            b"\xff\x62" + struct.pack("<b", at.HOOK_CALLBACK),  # jmp [rdx+callback]
        )
    )


def _sysenter(restore: int) -> bytes:
    """The same; RIP is found by the return address, which lies in translated code. The hook may leave by longjmp."""
    return b"".join(
        (
            b"\x53\x55\x41\x54",  # push rbx; push rbp; push r12
            b"\x48\x89\xfb\x89\xf5\x49\x89\xd4",  # mov rbx,rdi; mov ebp,esi; mov r12,rdx
            b"\x48\x8b\xb8" + struct.pack("<i", at.UC_CPU),  # mov rdi,[rax+cpu]
            b"\x48\x8b\x74\x24\x18\x31\xd2",  # mov rsi,[rsp+24]; xor edx,edx
            b"\x48\xb8" + struct.pack("<Q", restore) + b"\xff\xd0",  # mov rax,restore; call rax
            b"\x48\x8b\xbb" + struct.pack("<i", at.ENV_UC),  # mov rdi,[rbx+uc]
            b"\x49\x8b\x74\x24" + struct.pack("<b", at.HOOK_USER),  # mov rsi,[r12+user]
            b"\x41\xff\x54\x24" + struct.pack("<b", at.HOOK_CALLBACK),  # call [r12+callback]
            b"\x48\x01\xab" + struct.pack("<i", at.EIP),  # add [rbx+eip],rbp
            b"\x41\x5c\x5d\x5b\xc3",  # pop r12; pop rbp; pop rbx; ret
        )
    )


def _expected(base: int, address: Mapping[str, int]) -> bool:
    """The places hold the helpers, and SYSENTER's has the fields where layout.py says."""
    code = ctypes.string_at(address["helper_sysenter"], 256)
    used = (
        struct.pack("<i", at.ENV_UC),
        b"\x48\x8b\xaf" + struct.pack("<i", at.UC_INSN_HOOKS),  # mov rbp,[rdi+hooks]
        b"\x48\x8b\x5d\x08",  # mov rbx,[rbp+8]
        b"\x48\x8b\x6d\x00",  # mov rbp,[rbp]
        b"\x81\x7b" + struct.pack("<bI", at.HOOK_INSN, INSN_SYSENTER),  # cmp dword [rbx+insn],SYSENTER
        b"\x48\x8b\x73" + struct.pack("<b", at.HOOK_USER),  # mov rsi,[rbx+user]
        b"\xff\x53" + struct.pack("<b", at.HOOK_CALLBACK),  # call [rbx+callback]
        b"\x49\x8b\xbe" + struct.pack("<i", at.UC_CPU),  # mov rdi,[r14+cpu]
    )
    return all(piece in code for piece in used) and all(
        at.read_pointer(base + place) == address[name] for name in HELPERS for place in at.HELPER_PLACES[name]
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
        entry = _ROOM * number
        piece = assemble(name, address)
        assert len(piece) <= _ROOM
        code[entry : entry + len(piece)] = piece
        for place in at.HELPER_PLACES[name]:
            front = ctypes.addressof(ctypes.c_char.from_buffer(code)) + entry
            ctypes.c_uint64.from_address(base + place).value = front
    return True
