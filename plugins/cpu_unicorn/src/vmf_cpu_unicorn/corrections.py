"""Corrections of what the engine accepts or computes wrong, where the C extension is there; theory: _corrections.c.

Without the extension, or when the engine's image is not as expected, or with VMF_UNICORN_CORRECTIONS=engine, the engine
does as it does: docs/explanation/engine-deviations.md says what differs then.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Mapping

from vmf.cpuid.features import feature, features_of
from vmf.cpuid.layout import ADDRESS_LEAF, AMD_VENDORS
from vmf.cpuid.table import CpuidTable
from vmf_cpu_unicorn import layout as at

CORRECTIONS_VARIABLE = "VMF_UNICORN_CORRECTIONS"

INTERNALS = (
    "gen_intermediate_code", "cpu_ldub_code", "raise_exception_err_ra", "x86_cpu_do_interrupt", "tcg_func_start",
    "tcg_op_insert_before", "tcg_emit_op", "tcg_gen_ext32u_i64",
)  # fmt: skip
"""The engine's functions that are called or replaced, or looked into."""

_OP_EXT32U = 109
_CR4_ALWAYS = 1 << 8 | 1 << 9 | 1 << 10
"""PCE, OSFXSR, OSXMMEXCPT: of every processor with SSE and RDPMC."""
_CR4_OF = {
    "vme": 1 << 0 | 1 << 1, "tsc": 1 << 2, "de": 1 << 3, "pse": 1 << 4, "pae": 1 << 5, "mce": 1 << 6, "pge": 1 << 7,
    "fsgsbase": 1 << 16, "smep": 1 << 20, "smap": 1 << 21,
}  # fmt: skip
"""Those that the engine acts on, by the feature that a contract must have (SDM vol. 3A 2.5)."""
_EFER_OF = {"syscall": 1 << 0, "lm": 1 << 8 | 1 << 10, "nx": 1 << 11}


def _operations_are_known(address: Mapping[str, int]) -> bool:
    """Where the list of operations ends, and one operation's number, as these functions' machine code has them."""
    tail = struct.pack("<I", at.TCG_OPERATIONS + 8)
    return (
        b"\x48\x8b\x97" + tail in ctypes.string_at(address["tcg_emit_op"], 64)  # mov rdx,[rdi+tail]
        and b"\xbe" + struct.pack("<I", _OP_EXT32U) in ctypes.string_at(address["tcg_gen_ext32u_i64"], 24)  # mov esi,
    )


def _bits(cpuid: CpuidTable, of: Mapping[str, int]) -> int:
    present = features_of(cpuid)
    return sum(bits for name, bits in of.items() if feature(name) in present)


def install(handle: int, address: Mapping[str, int]) -> bool:
    """Take places of the library that dlopen gave `handle` for, before its first engine is opened."""
    if os.environ.get(CORRECTIONS_VARIABLE) == "engine":
        return False
    try:
        from vmf_cpu_unicorn import _corrections
    except ImportError:
        return False
    if not _operations_are_known(address):
        return False
    places = (
        at.CPU_ENV_PTR, at.CPU_CLASS, at.CPU_UC, at.UC_TCG_CONTEXT, at.TCG_OPERATIONS,
        at.REGS, at.SEGS, at.HFLAGS, at.CR, at.EFER, at.SYSENTER_CS, at.SYSENTER_ESP, at.SYSENTER_EIP, at.TSC_OFFSET,
        address["raise_exception_err_ra"], address["x86_cpu_do_interrupt"], address["tcg_func_start"],
        address["tcg_op_insert_before"],
    )  # fmt: skip
    packed = struct.pack(f"={len(places)}Q", *places)
    return _corrections.install(handle, packed, address["gen_intermediate_code"], address["cpu_ldub_code"])


def attach(cpu: int, cpuid: CpuidTable) -> bool:
    """Correct this engine from now on, for a machine with this contract; it must not have run yet."""
    try:
        from vmf_cpu_unicorn import _corrections
    except ImportError:
        return False
    cr4, efer = _CR4_ALWAYS | _bits(cpuid, _CR4_OF), _bits(cpuid, _EFER_OF)
    address_bits = cpuid.lookup(ADDRESS_LEAF, 0).eax & 0xFF
    return _corrections.attach(cpu, cr4, efer, address_bits, cpuid.vendor in AMD_VENDORS)


def detach(cpu: int) -> None:
    """The engine is about to be closed."""
    try:
        from vmf_cpu_unicorn import _corrections
    except ImportError:
        return
    _corrections.detach(cpu + at.CPU_ENV)
