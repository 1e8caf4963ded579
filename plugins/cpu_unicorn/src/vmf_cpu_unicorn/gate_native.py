"""Making a gate of the C extension; its theory of operation stands at the top of _gate.c."""

from __future__ import annotations

import struct
from typing import cast

from vmf.cpuid.layout import AMD_VENDORS
from vmf.cpuid.table import CpuidTable
from vmf_cpu_unicorn import _gate
from vmf_cpu_unicorn import layout as at
from vmf_cpu_unicorn.engine import Engine
from vmf_cpu_unicorn.gates import Gate, Handlers

_ANY_SUBLEAF = 0xFFFF_FFFF
CPUID_1_ECX_XSAVE = 1 << 26
CPUID_1_ECX_OSXSAVE = 1 << 27


def cpuid_rows(cpuid: CpuidTable) -> list[tuple[int, int, int, int, int, int]]:
    """(leaf, subleaf or _ANY_SUBLEAF, eax, ebx, ecx, edx), the dynamic bits cleared."""
    rows = []
    for (leaf, subleaf), registers in cpuid.entries.items():
        if leaf not in CpuidTable.SUBLEAF_LEAVES:
            if subleaf:
                continue  # `lookup` never shows it
            subleaf = _ANY_SUBLEAF
        eax, ebx, ecx, edx = registers
        if leaf == 1:
            ecx &= ~CPUID_1_ECX_OSXSAVE
        rows.append((leaf, subleaf, eax, ebx, ecx, edx))
    return rows


def make_native_gate(engine: Engine, cpu: int, cpuid: CpuidTable, handlers: Handlers, vector_page: int) -> Gate:
    address = engine.library.address
    env = cpu + at.CPU_ENV
    config = (
        engine.handle, cpu, env,
        address["uc_emu_start"], address["uc_emu_stop"], address["x86_cpu_do_interrupt"],
        address["x86_update_hflags"], address["cpu_cc_compute_all"], address["cpu_ldub_code"],
        address["helper_check_iob"], address["helper_check_iow"], address["helper_check_iol"],
        address["raise_exception_err"], address["cpu_loop_exit"],
        cpu + at.CPU_INTERRUPT_REQUEST, at.read_pointer(cpu + at.CPU_ICOUNT_DECR_PTR), cpu + at.CPU_HALTED,
        cpu + at.CPU_EXCEPTION_INDEX,
        at.EIP, at.EFLAGS, at.CC_SRC, at.CC_OP, at.DF, at.HFLAGS, at.HFLAGS2, at.SEGS, at.CR, at.EFER,
        at.STAR, at.LSTAR, at.CSTAR, at.FMASK, at.SYSENTER_CS, at.SYSENTER_ESP, at.SYSENTER_EIP,
        at.EXCEPTION_IS_INT, at.EXCEPTION_NEXT_EIP, at.OLD_EXCEPTION, at.VM_VMCB, vector_page,
        cpuid.vendor in AMD_VENDORS,
    )  # fmt: skip
    packed = struct.pack(f"<{len(config)}Q", *config)
    assert len(packed) == _gate.CONFIG_SIZE, "gate_native.py and _gate.c disagree about Config"
    rows = b"".join(struct.pack("<6I", *row) for row in cpuid_rows(cpuid))
    return cast(
        Gate,
        _gate.Gate(
            packed, rows, bool(cpuid.lookup(1, 0).ecx & CPUID_1_ECX_XSAVE),
            handlers.port_read, handlers.port_write, handlers.mmio_read, handlers.mmio_write,
            handlers.pending, handlers.acknowledge,
        ),
    )  # fmt: skip
