"""The neutral vCPU state to and from KVM's structures. No system calls in here.

Canonical form: `save` after `restore` gives the same state bit for bit, except that

- a segment is unusable exactly when its present bit is clear;
- MSRs at their reset value are left out (see `vmf_cpu_kvm.msrs`);
- in the XSAVE area, MXCSR_MASK is 0xffff, reserved bytes are zero, a component is written out (initial values, its
  XSTATE_BV bit set) when XCR0 enables it or it holds anything, and the area ends with the last such component;
- AMD's hardware has one interrupt shadow where Intel's has two: KVM says both, and it is called STI's when IF is set.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, Final

from attrs import frozen

from vmf.cpu.state import (
    AR_AVL,
    AR_DB,
    AR_DPL_SHIFT,
    AR_GRANULARITY,
    AR_LONG,
    AR_PRESENT,
    AR_S,
    AR_UNUSABLE,
    GENERAL_REGISTERS,
    SEGMENT_NAMES,
    XFEATURE_SSE,
    XFEATURE_X87,
    XSAVE_LEGACY_SIZE,
    XSAVE_MIN_SIZE,
    DescriptorTable,
    PendingEvents,
    Segment,
    VcpuState,
)
from vmf.errors import StateError
from vmf_cpu_kvm import abi

RFLAGS_IF: Final = 1 << 9
RFLAGS_RF: Final = 1 << 16

# struct kvm_vcpu_events: which fields count, and the interrupt shadow.
_VALID_NMI_PENDING: Final = 1 << 0
_VALID_SHADOW: Final = 1 << 2
_VALID_SMM: Final = 1 << 3
_VALID_PAYLOAD: Final = 1 << 4
_VALID_TRIPLE_FAULT: Final = 1 << 5
_SHADOW_MOV_SS: Final = 1
_SHADOW_STI: Final = 2

_FAULTS: Final = frozenset({0, 5, 6, 7, 10, 11, 12, 13, 14, 16, 17, 19, 20, 21, 29, 30})
"""Exceptions that push RF set: faults, not traps or aborts. SDM vol. 3A 6.5 and 17.3.1.1 (#DB is handled by KVM)."""

_XSTATE_BV: Final = struct.Struct("<QQ")
_MXCSR_AT: Final = 24
_MXCSR_MASK_AT: Final = 28
_MXCSR_MASK: Final = 0xFFFF
_XMM_AT: Final = 160
_RESERVED_AT: Final = 416
_INITIAL_X87: Final = struct.pack("<HHBBHQQ", 0x37F, 0, 0, 0, 0, 0, 0)


@frozen
class XsaveLayout:
    """Where this host's KVM has each component of the XSAVE area (standard format): index to (offset, size)."""

    components: Mapping[int, tuple[int, int]]

    def end(self, bits: int) -> int:
        """Bytes up to the end of the last of these components."""
        return max(
            (offset + size for index, (offset, size) in self.components.items() if bits >> index & 1),
            default=XSAVE_MIN_SIZE,
        )


# -- general registers

_FROM_KVM: Final = tuple(abi.REGS_ORDER.index(name) for name in GENERAL_REGISTERS)


def pack_regs(buffer: abi.Buffer, state: VcpuState) -> None:
    registers = state.registers
    abi.REGS.pack_into(buffer, 0, *(registers[name] for name in abi.REGS_ORDER), state.rip, state.rflags | 2)


def unpack_regs(buffer: abi.Buffer) -> tuple[dict[str, int], int, int]:
    """Registers, RIP, RFLAGS."""
    values = abi.REGS.unpack_from(buffer)
    return {name: values[at] for name, at in zip(GENERAL_REGISTERS, _FROM_KVM, strict=True)}, values[16], values[17]


# -- segments and control registers


def _pack_segment(buffer: abi.Buffer, at: int, segment: Segment) -> None:
    access = segment.access
    unusable = access & AR_UNUSABLE or not access & AR_PRESENT
    abi.SEGMENT.pack_into(
        buffer, at, segment.base, segment.limit, segment.selector,
        access & 0xF, 0 if unusable else 1, access >> AR_DPL_SHIFT & 3, bool(access & AR_DB), bool(access & AR_S),
        bool(access & AR_LONG), bool(access & AR_GRANULARITY), bool(access & AR_AVL), 1 if unusable else 0,
    )  # fmt: skip


def _unpack_segment(buffer: abi.Buffer, at: int) -> Segment:
    base, limit, selector, kind, present, dpl, db, s, long, granularity, avl, unusable = abi.SEGMENT.unpack_from(
        buffer, at
    )
    access = kind | dpl << AR_DPL_SHIFT
    if s:
        access |= AR_S
    if db:
        access |= AR_DB
    if long:
        access |= AR_LONG
    if granularity:
        access |= AR_GRANULARITY
    if avl:
        access |= AR_AVL
    access |= AR_PRESENT if present and not unusable else AR_UNUSABLE
    return Segment(selector, base, limit, access)


def pack_sregs(buffer: abi.Buffer, state: VcpuState, apic_base: int) -> None:
    """Into struct kvm_sregs2 or kvm_sregs: they share all that is written here; the rest is zero."""
    for i, name in enumerate(abi.SREGS_SEGMENTS):
        segment = state.tr if name == "tr" else state.ldtr if name == "ldtr" else state.segments[name]
        _pack_segment(buffer, i * abi.SEGMENT.size, segment)
    gdtr, idtr = state.gdtr, state.idtr
    abi.SREGS_TABLES.pack_into(buffer, abi.SREGS_TABLES_AT, gdtr.base, gdtr.limit, idtr.base, idtr.limit)
    abi.SREGS_CONTROL.pack_into(
        buffer, abi.SREGS_CONTROL_AT,
        state.cr0, state.cr2, state.cr3, state.cr4, state.cr8, state.efer, apic_base,
    )  # fmt: skip
    for at in range(abi.SREGS_CONTROL_AT + abi.SREGS_CONTROL.size, len(buffer)):
        buffer[at] = b"\0"


def unpack_sregs(buffer: abi.Buffer) -> tuple[dict[str, Any], int]:
    """Fields of a VcpuState, and apic_base."""
    segments = {name: _unpack_segment(buffer, i * abi.SEGMENT.size) for i, name in enumerate(abi.SREGS_SEGMENTS)}
    gdt_base, gdt_limit, idt_base, idt_limit = abi.SREGS_TABLES.unpack_from(buffer, abi.SREGS_TABLES_AT)
    cr0, cr2, cr3, cr4, cr8, efer, apic_base = abi.SREGS_CONTROL.unpack_from(buffer, abi.SREGS_CONTROL_AT)
    return {
        "segments": {name: segments[name] for name in SEGMENT_NAMES},
        "tr": segments["tr"],
        "ldtr": segments["ldtr"],
        "gdtr": DescriptorTable(gdt_base, gdt_limit),
        "idtr": DescriptorTable(idt_base, idt_limit),
        "cr0": cr0,
        "cr2": cr2,
        "cr3": cr3,
        "cr4": cr4,
        "cr8": cr8,
        "efer": efer,
    }, apic_base


# -- events


def pack_events(buffer: abi.Buffer, state: VcpuState, *, payloads: bool, triple_faults: bool) -> None:
    """Into struct kvm_vcpu_events. An exception with a payload is pending (delivery will set CR2 or DR6), one without
    is being delivered."""
    events = state.events
    flags = _VALID_NMI_PENDING | _VALID_SHADOW
    vector, payload = events.exception, events.exception_payload
    if payload is not None and vector not in (1, 14):
        raise StateError(f"vCPU state: exception {vector} has a payload; only 1 (#DB) and 14 (#PF) can.")
    if payload is not None and not payloads:
        raise StateError(
            "vCPU state: an exception with a payload is pending, and this kernel's KVM lacks"
            " KVM_CAP_EXCEPTION_PAYLOAD.",
            "Use Linux 4.20 or later.",
        )
    if payloads:
        flags |= _VALID_PAYLOAD
    if triple_faults:
        flags |= _VALID_TRIPLE_FAULT
    if events.exception_error_code is not None and vector is None:
        raise StateError("vCPU state: an error code without an exception.")
    if vector is not None and vector > 31:
        raise StateError(f"vCPU state: exception {vector} does not exist.")
    if events.interrupt_soft:
        # KVM does not tell of an INT n in delivery: RIP stands on the instruction, which is executed again.
        raise StateError(f"vCPU state: INT {events.interrupt} is in delivery, which KVM cannot hold.")
    if vector is not None and events.interrupt is not None:
        raise StateError("vCPU state: an exception and an interrupt are in delivery at once.")
    shadow = (0, _SHADOW_STI, _SHADOW_MOV_SS)[events.interrupt_shadow]
    abi.EVENTS.pack_into(
        buffer, 0,
        vector is not None and payload is None, vector or 0, events.exception_error_code is not None,
        payload is not None, events.exception_error_code or 0,
        events.interrupt is not None, events.interrupt or 0, 0, shadow,
        0, events.nmi_pending, events.nmi_masked, 0,
        0, flags, 0, 0, 0, 0, 0,
        payload is not None, payload or 0,
    )  # fmt: skip


def unpack_events(buffer: abi.Buffer, rflags: int) -> tuple[PendingEvents, int]:
    """The events, and RFLAGS with what KVM would do to them when it delivers a pending fault."""
    (
        injected, vector, has_code, pending, code,
        interrupt_injected, interrupt, _soft, shadow,
        nmi_injected, nmi_pending, nmi_masked, _pad,
        _sipi, _flags, smm, smi_pending, _smm_nmi, _init, triple_fault,
        has_payload, payload,
    ) = abi.EVENTS.unpack_from(buffer)  # fmt: skip
    if smm or smi_pending:
        raise StateError("the vCPU is in system management mode, which no state can hold.", "Try again.")
    if triple_fault:
        raise StateError("the guest is shutting down by a triple fault.", "Reset the machine.")
    if nmi_injected and nmi_pending:
        raise StateError("the vCPU has two NMIs in flight, of which a state can hold one.", "Try again.")
    raised = bool(injected or pending)
    if pending and not has_payload and vector in _FAULTS:
        rflags |= RFLAGS_RF
    if shadow == _SHADOW_STI | _SHADOW_MOV_SS:
        shadow = _SHADOW_STI if rflags & RFLAGS_IF else _SHADOW_MOV_SS
    events = PendingEvents(
        exception=vector if raised else None,
        exception_error_code=code if raised and has_code else None,
        exception_payload=payload if pending and has_payload else None,
        interrupt=interrupt if interrupt_injected else None,
        nmi_pending=bool(nmi_pending or nmi_injected),
        nmi_masked=bool(nmi_masked and not nmi_injected),
        interrupt_shadow={0: 0, _SHADOW_STI: 1, _SHADOW_MOV_SS: 2}[shadow & 3],
    )
    return events, rflags


# -- XSAVE


def neutral_xsave(raw: bytes, xcr0: int, layout: XsaveLayout) -> bytes:
    """What KVM_GET_XSAVE gave, in canonical form."""
    held, compacted = _XSTATE_BV.unpack_from(raw, XSAVE_LEGACY_SIZE)
    if compacted:
        raise StateError("KVM gave the XSAVE area in the compacted format.")
    shown = (xcr0 | XFEATURE_X87 | XFEATURE_SSE) & _known(layout)
    for index, (offset, size) in layout.components.items():
        # The kernel's own use may mark a component that the guest never had: it counts when there is anything in it.
        if held >> index & 1 and not shown >> index & 1 and any(raw[offset : offset + size]):
            shown |= 1 << index
    area = bytearray(layout.end(shown))
    area[:XSAVE_LEGACY_SIZE] = raw[:XSAVE_LEGACY_SIZE]
    area[_RESERVED_AT:XSAVE_LEGACY_SIZE] = bytes(XSAVE_LEGACY_SIZE - _RESERVED_AT)
    area[_MXCSR_MASK_AT : _MXCSR_MASK_AT + 4] = _MXCSR_MASK.to_bytes(4, "little")
    if not held & XFEATURE_X87:
        area[:_MXCSR_AT] = _INITIAL_X87
        area[32:_XMM_AT] = bytes(_XMM_AT - 32)
    if not held & XFEATURE_SSE:
        area[_XMM_AT:_RESERVED_AT] = bytes(_RESERVED_AT - _XMM_AT)
    for index, (offset, size) in layout.components.items():
        if held >> index & 1 and shown >> index & 1:
            area[offset : offset + size] = raw[offset : offset + size]
    _XSTATE_BV.pack_into(area, XSAVE_LEGACY_SIZE, shown, 0)
    return bytes(area)


def _known(layout: XsaveLayout) -> int:
    bits = XFEATURE_X87 | XFEATURE_SSE
    for index in layout.components:
        bits |= 1 << index
    return bits


def kvm_xsave(area: bytes, allowed: int, layout: XsaveLayout, size: int) -> bytes:
    """A state's area as KVM_SET_XSAVE takes it, `size` bytes.

    Args:
        allowed: components that this vCPU's CPUID has; others must be at rest.
    """
    held, compacted = _XSTATE_BV.unpack_from(area, XSAVE_LEGACY_SIZE)
    if compacted or any(area[XSAVE_LEGACY_SIZE + 16 : XSAVE_MIN_SIZE]):
        raise StateError("vCPU state: the xsave header is not that of the standard format.")
    if len(area) > size:
        raise StateError(f"vCPU state: the XSAVE area has {len(area)} bytes, and KVM here takes {size}.")
    allowed |= XFEATURE_X87 | XFEATURE_SSE
    raw = bytearray(size)
    raw[: len(area)] = area
    for index in range(2, 64):
        if not held >> index & 1:
            continue
        place = layout.components.get(index)
        if place is None:
            raise StateError(f"vCPU state: XSAVE component {index} is not known to this host's KVM.")
        offset, length = place
        if offset + length > len(area):
            raise StateError(f"vCPU state: XSAVE component {index} lies outside its area of {len(area)} bytes.")
        if not allowed >> index & 1:
            if any(area[offset : offset + length]):
                raise StateError(
                    f"vCPU state: XSAVE component {index} holds something, and the machine's CPUID does not have it."
                )
            held &= ~(1 << index)
    mxcsr = int.from_bytes(area[_MXCSR_AT : _MXCSR_AT + 4], "little")
    if mxcsr & ~0x2FFFF:
        raise StateError(f"vCPU state: MXCSR {mxcsr:#x} has reserved bits set.")
    _XSTATE_BV.pack_into(raw, XSAVE_LEGACY_SIZE, held, 0)
    if not held & XFEATURE_SSE:
        # MXCSR counts whenever SSE or AVX is in use; write SSE out, so that it does.
        raw[_XMM_AT:_RESERVED_AT] = bytes(_RESERVED_AT - _XMM_AT)
        _XSTATE_BV.pack_into(raw, XSAVE_LEGACY_SIZE, held | XFEATURE_SSE, 0)
    return bytes(raw)
