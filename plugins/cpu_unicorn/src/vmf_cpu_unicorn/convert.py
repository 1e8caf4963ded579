"""The neutral vCPU state to and from the engine's CPU structure.

Reading takes one copy of the structure and unpacks it; writing packs a whole new structure over the old one, so that
nothing of an earlier state can survive: what is not written is zero. The engine's derived data (hidden flags, FPU and
SSE rounding state, TLB) is rebuilt by the caller with the engine's own functions.

Canonical form. `save` after `restore` gives the same state bit for bit, except that `restore`
  - marks a segment unusable exactly when its present bit is clear, and drops reserved access-rights bits (8-11);
  - shows MXCSR_MASK, reserved parts of the legacy FP area and a component whose XSTATE_BV bit is clear in the form
    that XSAVE would have stored (initial values, bit set), in an area of 576 bytes;
  - marks a task register's TSS busy, as it always is;
  - keeps the upper 6 bytes of the x87 registers' 16-byte slots (reserved) as zero;
  - sets bit 1 of RFLAGS and bit 10 of DR7, which are always set;
  - leaves MSRs at rest (`_MSRS_WHEN_USED`, MTRRs) out;
  - keeps 32 bits of SYSENTER_ESP and SYSENTER_EIP when the machine is an AMD one, as AMD's processors do.

What the engine cannot do is refused, not carried in silence: MSRs that it has no place for, bits of control registers
that it would not act on, breakpoints on data and ports, which it does not raise.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from attrs import evolve, frozen

from vmf.cpu.state import (
    AR_PRESENT,
    AR_UNUSABLE,
    GENERAL_REGISTERS,
    MSR_CSTAR,
    MSR_FMASK,
    MSR_IA32_MISC_ENABLE,
    MSR_IA32_PAT,
    MSR_IA32_SYSENTER_CS,
    MSR_IA32_SYSENTER_EIP,
    MSR_IA32_SYSENTER_ESP,
    MSR_KERNEL_GS_BASE,
    MSR_LSTAR,
    MSR_STAR,
    MSR_TSC_AUX,
    SEGMENT_NAMES,
    XFEATURE_SSE,
    XFEATURE_X87,
    XSAVE_LEGACY_SIZE,
    XSAVE_MIN_SIZE,
    DescriptorTable,
    Segment,
    VcpuState,
    msr_reset_value,
)
from vmf.errors import StateError
from vmf_cpu_unicorn import layout as at

_GENERAL = struct.Struct("<16Q")
_SEGMENT = struct.Struct("<I4xQII")
_SEGMENT_FLAGS_SHIFT = 8  # the engine keeps the descriptor's second doubleword: access rights from bit 8
_ACCESS_MASK = 0xF0FF
_XSAVE_BV = struct.Struct("<Q")
_XMM_OFFSET = 160
_ST_OFFSET = 32
_MXCSR_MASK = 0xFFFF

FLAGS_ARITHMETIC = 0x8D5
FLAG_FIXED = 1 << 1
FLAG_TF = 1 << 8
FLAG_IF = 1 << 9
FLAG_DF = 1 << 10

_MSRS_U64 = {
    MSR_IA32_SYSENTER_ESP: at.SYSENTER_ESP,
    MSR_IA32_SYSENTER_EIP: at.SYSENTER_EIP,
    MSR_IA32_PAT: at.PAT,
    MSR_STAR: at.STAR,
    MSR_LSTAR: at.LSTAR,
    MSR_CSTAR: at.CSTAR,
    MSR_FMASK: at.FMASK,
    MSR_KERNEL_GS_BASE: at.KERNEL_GS_BASE,
    MSR_TSC_AUX: at.TSC_AUX,
    MSR_IA32_MISC_ENABLE: at.MISC_ENABLE,
}
_MSRS_WHEN_USED = {0x17A: at.MCG_STATUS, 0xC0010117: at.VM_HSAVE_PA, 0xD90: at.BNDCFGS}
"""MCG_STATUS, VM_HSAVE_PA, IA32_BNDCFGS. No contract has the feature, but the engine lets a guest write them all the
same: a guest that did finds its value again anywhere, or is refused there by name."""
_HELD_MSRS = frozenset({*_MSRS_U64, MSR_IA32_SYSENTER_CS, *_MSRS_WHEN_USED, *at.MTRR_INDICES})
_CARRIED_MSRS = frozenset({0x3B})
"""TSC_ADJUST: on KVM it follows a guest's writes to its TSC, whether or not the guest's CPUID has it. No contract that
comes here has, so the guest does not look at it; KVM finds its value again."""
_MTRRS = struct.Struct(f"<{len(at.MTRR_INDICES)}Q")

CR0_LEGAL = 0xE005003F
CR4_LEGAL = 0x00310FFF & ~(1 << 11)
"""VME PVI TSD DE PSE PAE MCE PGE PCE OSFXSR OSXMMEXCPT, FSGSBASE (16), SMEP (20), SMAP (21)."""
EFER_LEGAL = 0xD01
"""SCE LME LMA NXE."""
XCR0_LEGAL = XFEATURE_X87 | XFEATURE_SSE
RFLAGS_LEGAL = 0x3F7FD7
DR7_FIXED = 1 << 10
DR7_DETECT = 1 << 13
"""GD: MOV to or from a debug register raises #DB."""


@frozen
class EngineState:
    """What `unpack` finds in the structure; the rest of a VcpuState lies outside the engine."""

    fields: Mapping[str, object]
    nmi_masked: bool
    interrupt_shadow: bool


def _unpack_segment(blob: bytes, offset: int) -> Segment:
    selector, base, limit, flags = _SEGMENT.unpack_from(blob, offset)
    access = (flags >> _SEGMENT_FLAGS_SHIFT) & _ACCESS_MASK
    if not access & AR_PRESENT:
        access |= AR_UNUSABLE
    return Segment(selector & 0xFFFF, base, limit, access)


def _pack_segment(blob: bytearray, offset: int, segment: Segment) -> None:
    access = segment.access & _ACCESS_MASK
    if segment.access & AR_UNUSABLE:
        access &= ~AR_PRESENT
    _SEGMENT.pack_into(blob, offset, segment.selector, segment.base, segment.limit, access << _SEGMENT_FLAGS_SHIFT)


def canonical(segment: Segment) -> Segment:
    """A segment as `save` shows it: unusable exactly when not present."""
    access = segment.access & _ACCESS_MASK
    if segment.access & AR_UNUSABLE or not access & AR_PRESENT:
        access = access & ~AR_PRESENT | AR_UNUSABLE
    return evolve(segment, access=access)


_TSS_BUSY = 1 << 1
"""Of the type of a TSS. The engine keeps the type as it was when LTR read it, not busy, and compares with that."""


def _pack_task_register(blob: bytearray, segment: Segment) -> None:
    """The engine aborts the process when it looks for a stack in a task register that is not present; one with
    limit 0 makes that a #TS of the guest's instead."""
    if segment.access & AR_UNUSABLE or not segment.access & AR_PRESENT:
        _pack_segment(blob, at.TR, Segment(segment.selector, 0, 0, AR_PRESENT | 9))
    else:
        _pack_segment(blob, at.TR, evolve(segment, access=segment.access & ~_TSS_BUSY))


def task_register_bytes(blob: bytes | bytearray) -> bytes:
    """To tell whether the guest has loaded another one since."""
    return bytes(blob[at.TR : at.TR + at.SEGMENT_SIZE])


def _u16(blob: bytes, offset: int) -> int:
    return int.from_bytes(blob[offset : offset + 2], "little")


def _u32(blob: bytes, offset: int) -> int:
    return int.from_bytes(blob[offset : offset + 4], "little")


def _u64(blob: bytes, offset: int) -> int:
    return int.from_bytes(blob[offset : offset + 8], "little")


def _unpack_xsave(blob: bytes) -> bytes:
    """SDM vol. 1 table 13-1 (64-bit form). The engine keeps x87 registers by their physical number."""
    area = bytearray(XSAVE_MIN_SIZE)
    top = _u32(blob, at.FPSTT) & 7
    status = (_u16(blob, at.FPUS) & ~0x3800) | top << 11
    valid = sum(1 << i for i in range(8) if not blob[at.FPTAGS + i])
    struct.pack_into(
        "<HHBxHQQII", area, 0, _u16(blob, at.FPUC), status, valid, _u16(blob, at.FPOP),
        _u64(blob, at.FPIP), _u64(blob, at.FPDP), _u32(blob, at.MXCSR), _MXCSR_MASK,
    )  # fmt: skip
    for i in range(8):
        source = at.FPREGS + 16 * ((top + i) & 7)
        area[_ST_OFFSET + 16 * i : _ST_OFFSET + 16 * i + 10] = blob[source : source + 10]
    for i in range(16):
        source = at.XMM + at.XMM_STRIDE * i
        area[_XMM_OFFSET + 16 * i : _XMM_OFFSET + 16 * i + 16] = blob[source : source + 16]
    _XSAVE_BV.pack_into(area, XSAVE_LEGACY_SIZE, XFEATURE_X87 | XFEATURE_SSE)
    return bytes(area)


def _pack_xsave(blob: bytearray, area: bytes) -> None:
    components, compacted = struct.unpack_from("<QQ", area, XSAVE_LEGACY_SIZE)
    if compacted:
        raise StateError("vCPU state: xsave is in the compacted format; the standard one is expected.")
    if components & ~(XFEATURE_X87 | XFEATURE_SSE):
        raise StateError(
            f"vCPU state: xsave holds components {components:#x}; the Unicorn backend has x87 and SSE only.",
            "Start the machine with a CPUID portability level of at least x86-64-v2.",
        )
    if components & XFEATURE_X87:
        control, status, valid, opcode, fpip, fpdp = struct.unpack_from("<HHBxHQQ", area, 0)
    else:
        control, status, valid, opcode, fpip, fpdp = 0x37F, 0, 0, 0, 0, 0
    top = (status >> 11) & 7
    struct.pack_into("<IHH", blob, at.FPSTT, top, status & ~0x3800, control)
    struct.pack_into("<H", blob, at.FPOP, opcode)
    struct.pack_into("<QQ", blob, at.FPIP, fpip, fpdp)
    for i in range(8):
        blob[at.FPTAGS + i] = 0 if valid >> i & 1 else 1
        if components & XFEATURE_X87:
            target = at.FPREGS + 16 * ((top + i) & 7)
            blob[target : target + 10] = area[_ST_OFFSET + 16 * i : _ST_OFFSET + 16 * i + 10]
    mxcsr = _u32(area, 24)
    if mxcsr & ~_MXCSR_MASK:
        raise StateError(f"vCPU state: MXCSR {mxcsr:#x} has reserved bits set.")
    struct.pack_into("<I", blob, at.MXCSR, mxcsr)
    if components & XFEATURE_SSE:
        for i in range(16):
            target = at.XMM + at.XMM_STRIDE * i
            blob[target : target + 16] = area[_XMM_OFFSET + 16 * i : _XMM_OFFSET + 16 * i + 16]


def unpack(blob: bytes, mtrrs: bytes, *, amd: bool) -> EngineState:
    """Read a structure. Between two slices the engine keeps all of RFLAGS in its eflags field.

    Args:
        mtrrs: the `MTRRS_SIZE` bytes at `MTRRS`.
        amd: the machine's CPUID is that of an AMD processor.
    """
    msrs = {index: _u64(blob, offset) for index, offset in _MSRS_U64.items()}
    msrs |= {index: value for index, offset in _MSRS_WHEN_USED.items() if (value := _u64(blob, offset))}
    if any(mtrrs):
        msrs |= {index: value for index, value in zip(at.MTRR_INDICES, _MTRRS.unpack(mtrrs), strict=True) if value}
    msrs[MSR_IA32_SYSENTER_CS] = _u32(blob, at.SYSENTER_CS)
    if amd:
        for index in (MSR_IA32_SYSENTER_ESP, MSR_IA32_SYSENTER_EIP):
            msrs[index] &= 0xFFFF_FFFF
    cr = struct.unpack_from("<9Q", blob, at.CR)
    dr = struct.unpack_from("<8Q", blob, at.DR)
    tr = _unpack_segment(blob, at.TR)
    fields: dict[str, object] = {
        "registers": dict(zip(GENERAL_REGISTERS, _GENERAL.unpack_from(blob, at.REGS), strict=True)),
        "rip": _u64(blob, at.EIP),
        "rflags": _u64(blob, at.EFLAGS) | FLAG_FIXED,
        "segments": {
            name: _unpack_segment(blob, at.SEGS + at.SEGMENT_SIZE * i) for i, name in enumerate(SEGMENT_NAMES)
        },
        "ldtr": _unpack_segment(blob, at.LDT),
        "tr": evolve(tr, access=tr.access | _TSS_BUSY),
        "gdtr": DescriptorTable(_u64(blob, at.GDT + 8), _u32(blob, at.GDT + 16) & 0xFFFF),
        "idtr": DescriptorTable(_u64(blob, at.IDT + 8), _u32(blob, at.IDT + 16) & 0xFFFF),
        "cr0": cr[0],
        "cr2": cr[2],
        "cr3": cr[3],
        "cr4": cr[4],
        "cr8": blob[at.V_TPR] & 0xF,
        "xcr0": _u64(blob, at.XCR0),
        "efer": _u64(blob, at.EFER),
        "dr": (*dr[0:4], dr[6], dr[7]),
        "msrs": msrs,
        "xsave": _unpack_xsave(blob),
    }
    return EngineState(
        fields,
        nmi_masked=bool(_u32(blob, at.HFLAGS2) & at.HF2_NMI_MASKED),
        interrupt_shadow=bool(_u32(blob, at.HFLAGS) & at.HF_INHIBIT_IRQ),
    )


def _refuse_bits(name: str, value: int, legal: int, remedy: str = "") -> None:
    if value & ~legal:
        raise StateError(
            f"vCPU state: {name} is {value:#x}; the Unicorn backend cannot hold the bits {value & ~legal:#x}.", remedy
        )


def _refuse_breakpoints(dr: tuple[int, int, int, int, int, int]) -> None:
    """The engine raises #DB for instruction breakpoints only."""
    dr7 = dr[5]
    _refuse_bits("dr6", dr[4], 0xFFFF_FFFF)
    _refuse_bits("dr7", dr7, 0xFFFF_FFFF)
    kinds = {1: "writes of data", 2: "ports", 3: "accesses to data"}
    for number in range(4):
        kind = dr7 >> (16 + 4 * number) & 3
        if dr7 >> (2 * number) & 3 and kind:
            raise StateError(
                f"vCPU state: dr7 has a hardware breakpoint on {kinds[kind]} at {dr[number]:#x}, which the Unicorn"
                " backend does not raise.",
                "Remove it in the guest's debugger (in gdb: `delete` the watchpoint), or choose another CPU backend.",
            )
    if dr7 & DR7_DETECT:
        raise StateError(
            "vCPU state: dr7 guards the debug registers (GD), which the Unicorn backend does not do.",
            "Choose another CPU backend.",
        )


def pack_mtrrs(state: VcpuState) -> bytes:
    """What belongs at `MTRRS`."""
    return _MTRRS.pack(*(state.msrs.get(index, 0) for index in at.MTRR_INDICES))


def carried_msrs(state: VcpuState) -> dict[int, int]:
    """The MSRs of a state that the engine has no place for: at zero they may be carried along, and those that the guest
    cannot look at. Raises StateError."""
    carried: dict[int, int] = {}
    for index, value in state.msrs.items():
        if index in _HELD_MSRS:
            continue
        if value and index not in _CARRIED_MSRS:
            raise StateError(
                f"vCPU state: MSR {index:#x} is {value:#x}; the Unicorn backend does not have that MSR.",
                "Start the machine with a CPU contract that Unicorn can honour.",
            )
        carried[index] = value
    return carried


def pack(state: VcpuState) -> bytearray:
    """The whole structure for a state, its breakpoints not yet armed: the engine does that, given DR7.

    Raises StateError naming what the engine cannot hold.
    """
    level = "Start the machine with a CPUID contract that the Unicorn backend can honour."
    _refuse_bits("rflags", state.rflags, RFLAGS_LEGAL)
    _refuse_bits("cr0", state.cr0, CR0_LEGAL)
    _refuse_bits("cr4", state.cr4, CR4_LEGAL, level)
    _refuse_bits("efer", state.efer, EFER_LEGAL, level)
    _refuse_bits("xcr0", state.xcr0, XCR0_LEGAL, level)
    _refuse_breakpoints(state.dr)
    if state.msrs[MSR_IA32_SYSENTER_CS] >> 32:
        raise StateError("vCPU state: MSR 0x174 (SYSENTER_CS) has more than 32 bits; the Unicorn backend holds 32.")
    carried_msrs(state)
    blob = bytearray(at.ENV_SIZE)
    _GENERAL.pack_into(blob, at.REGS, *(state.registers[name] for name in GENERAL_REGISTERS))
    struct.pack_into("<QQ", blob, at.EIP, state.rip, state.rflags | FLAG_FIXED)
    struct.pack_into("<Q", blob, at.CC_SRC, state.rflags & FLAGS_ARITHMETIC)
    struct.pack_into("<Ii", blob, at.CC_OP, at.CC_OP_EFLAGS, -1 if state.rflags & FLAG_DF else 1)
    hflags = at.HF_INHIBIT_IRQ if state.events.interrupt_shadow else 0
    if state.cr4 & 1 << 21:
        hflags |= at.HF_SMAP
    hflags2 = at.HF2_GIF | at.HF2_VINTR | (at.HF2_NMI_MASKED if state.events.nmi_masked else 0)
    struct.pack_into("<II", blob, at.HFLAGS, hflags, hflags2)
    for i, name in enumerate(SEGMENT_NAMES):
        _pack_segment(blob, at.SEGS + at.SEGMENT_SIZE * i, state.segments[name])
    _pack_segment(blob, at.LDT, state.ldtr)
    _pack_task_register(blob, state.tr)
    _SEGMENT.pack_into(blob, at.GDT, 0, state.gdtr.base, state.gdtr.limit, 0)
    _SEGMENT.pack_into(blob, at.IDT, 0, state.idtr.base, state.idtr.limit, 0)
    struct.pack_into("<9Q", blob, at.CR, state.cr0, 0, state.cr2, state.cr3, state.cr4, 0, 0, 0, 0)
    struct.pack_into("<i", blob, at.A20_MASK, -1)
    struct.pack_into("<Q", blob, at.EFER, state.efer)
    _pack_xsave(blob, state.xsave)
    for index, offset in (*_MSRS_U64.items(), *_MSRS_WHEN_USED.items()):
        struct.pack_into("<Q", blob, offset, state.msrs.get(index, msr_reset_value(index)))
    struct.pack_into("<I", blob, at.SYSENTER_CS, state.msrs[MSR_IA32_SYSENTER_CS])
    struct.pack_into("<Q", blob, at.XCR0, state.xcr0)
    dr = state.dr
    struct.pack_into("<8Q", blob, at.DR, *dr[0:4], 0, 0, dr[4], DR7_FIXED)
    struct.pack_into("<i", blob, at.OLD_EXCEPTION, -1)
    blob[at.V_TPR] = state.cr8
    return blob
