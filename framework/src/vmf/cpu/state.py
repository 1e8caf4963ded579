"""The neutral state of one x86-64 vCPU.

Every backend converts between this and its engine's own form; no backend knows another. The layouts are the
architectural ones: Intel SDM vol. 3A ch. 2-3 (system registers, descriptor caches), SDM vol. 1 ch. 13 (XSAVE area,
standard format), SDM vol. 3C 24.4.1 (segment access rights). All integers are unsigned.

A state is *complete*: a register that a backend cannot read must be refused at the preflight check, never left out.
Values are plain and immutable so that `==` between two states is the round-trip test.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import field, frozen, validators

from vmf.errors import StateError

GENERAL_REGISTERS = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
"""In the order of their instruction encodings."""

SEGMENT_NAMES = ("es", "cs", "ss", "ds", "fs", "gs")
"""In the order of their instruction encodings."""

RFLAGS_IF = 1 << 9
"""Interrupts are taken (SDM vol. 1 figure 3-8)."""

# Access-rights bits of a segment, SDM vol. 3C table 24-2.
AR_S = 1 << 4
AR_DPL_SHIFT = 5
AR_PRESENT = 1 << 7
AR_AVL = 1 << 12
AR_LONG = 1 << 13
AR_DB = 1 << 14
AR_GRANULARITY = 1 << 15
AR_UNUSABLE = 1 << 16

# Architectural MSR indices (SDM vol. 4) that every 64-bit backend must carry.
MSR_IA32_TSC = 0x10
MSR_IA32_SYSENTER_CS = 0x174
MSR_IA32_SYSENTER_ESP = 0x175
MSR_IA32_SYSENTER_EIP = 0x176
MSR_IA32_MISC_ENABLE = 0x1A0
MSR_IA32_PAT = 0x277
MSR_EFER = 0xC0000080
MSR_STAR = 0xC0000081
MSR_LSTAR = 0xC0000082
MSR_CSTAR = 0xC0000083
MSR_FMASK = 0xC0000084
MSR_KERNEL_GS_BASE = 0xC0000102
MSR_TSC_AUX = 0xC0000103

REQUIRED_MSRS = frozenset(
    {
        MSR_IA32_SYSENTER_CS, MSR_IA32_SYSENTER_ESP, MSR_IA32_SYSENTER_EIP, MSR_IA32_PAT,
        MSR_STAR, MSR_LSTAR, MSR_CSTAR, MSR_FMASK, MSR_KERNEL_GS_BASE,
    }
)  # fmt: skip
"""Present in `VcpuState.msrs` always. EFER has its own field; the TSC is `VcpuState.tsc`."""

_MSR_RESET_VALUES = {
    MSR_IA32_PAT: 0x0007_0406_0007_0406,
    MSR_IA32_MISC_ENABLE: 1,  # fast string operations; Linux avoids REP MOVS without them
}


def msr_reset_value(index: int) -> int:
    """What an architectural MSR holds that a state does not list. A backend may leave out MSRs at that value, and need
    not know an MSR that no state lists."""
    return _MSR_RESET_VALUES.get(index, 0)


XSAVE_LEGACY_SIZE = 512
XSAVE_HEADER_SIZE = 64
XSAVE_MIN_SIZE = XSAVE_LEGACY_SIZE + XSAVE_HEADER_SIZE
XSAVE_MAX_SIZE = 16384
XFEATURE_X87 = 1 << 0
XFEATURE_SSE = 1 << 1
XFEATURE_AVX = 1 << 2


def _bits(width: int) -> Any:
    def check(_instance: object, attribute: Any, value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < (1 << width):
            raise StateError(f"vCPU state: {attribute.name} is not an unsigned {width}-bit number: {value!r:.80}.")

    return check


def u(width: int, default: int = 0) -> Any:
    """A field holding an unsigned integer of `width` bits."""
    return field(default=default, validator=_bits(width))


@frozen
class Segment:
    """One segment register with its hidden part.

    Attributes:
        selector: the visible 16 bits.
        base: linear base, 64 bits.
        limit: in bytes, granularity already applied, 32 bits.
        access: access rights as in SDM vol. 3C table 24-2 (type 0-3, S 4, DPL 5-6, P 7, AVL 12, L 13, D/B 14,
            G 15, unusable 16).
    """

    selector: int = u(16)
    base: int = u(64)
    limit: int = u(32)
    access: int = u(17)

    @property
    def dpl(self) -> int:
        return (self.access >> AR_DPL_SHIFT) & 3


@frozen
class DescriptorTable:
    """GDTR or IDTR: linear base and limit in bytes (16 bits)."""

    base: int = u(64)
    limit: int = u(16)


@frozen
class PendingEvents:
    """What is in flight between two instructions.

    Attributes:
        exception: vector of an exception raised but not yet delivered, or None.
        exception_error_code: its error code, or None where the vector has none.
        exception_payload: CR2 or DR6 value that delivery will set, or None.
        interrupt: vector of an external interrupt that was acknowledged but not yet delivered, or None.
        interrupt_soft: True when it comes from INT n.
        nmi_pending: an NMI waits.
        nmi_masked: NMIs are blocked until IRET.
        interrupt_shadow: 0 none, 1 after STI, 2 after MOV/POP SS: the next instruction is not interruptible.
    """

    exception: int | None = field(default=None, validator=validators.optional(_bits(8)))
    exception_error_code: int | None = field(default=None, validator=validators.optional(_bits(32)))
    exception_payload: int | None = field(default=None, validator=validators.optional(_bits(64)))
    interrupt: int | None = field(default=None, validator=validators.optional(_bits(8)))
    interrupt_soft: bool = field(default=False, validator=validators.instance_of(bool))
    nmi_pending: bool = field(default=False, validator=validators.instance_of(bool))
    nmi_masked: bool = field(default=False, validator=validators.instance_of(bool))
    interrupt_shadow: int = field(default=0, validator=validators.in_((0, 1, 2)))


def _check_registers(_instance: object, _attribute: Any, value: Mapping[str, int]) -> None:
    if set(value) != set(GENERAL_REGISTERS):
        raise StateError("vCPU state: the general registers are not exactly the sixteen of x86-64.")
    for name, number in value.items():
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 1 << 64:
            raise StateError(f"vCPU state: {name} is not an unsigned 64-bit number: {number!r:.80}.")


def _check_segments(_instance: object, _attribute: Any, value: Mapping[str, Segment]) -> None:
    if set(value) != set(SEGMENT_NAMES):
        raise StateError("vCPU state: the segments are not exactly es, cs, ss, ds, fs and gs.")


def _check_msrs(_instance: object, _attribute: Any, value: Mapping[int, int]) -> None:
    missing = REQUIRED_MSRS - set(value)
    if missing:
        raise StateError(f"vCPU state: MSR {min(missing):#x} is missing.")
    for index, number in value.items():
        if (
            isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < 1 << 32
            or isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 1 << 64
        ):  # fmt: skip
            raise StateError(f"vCPU state: MSR {index!r:.80} or its value {number!r:.80} is out of range.")


def _check_xsave(_instance: object, _attribute: Any, value: bytes) -> None:
    if not isinstance(value, bytes) or not XSAVE_MIN_SIZE <= len(value) <= XSAVE_MAX_SIZE:
        raise StateError(
            f"vCPU state: the XSAVE area must be {XSAVE_MIN_SIZE} to {XSAVE_MAX_SIZE} bytes in standard format."
        )


def fresh_xsave() -> bytes:
    """An XSAVE area as after reset: FCW 0x37f, MXCSR 0x1f80, XSTATE_BV = x87 | SSE (written out in full)."""
    area = bytearray(XSAVE_MIN_SIZE)
    area[0:2] = (0x37F).to_bytes(2, "little")
    area[24:28] = (0x1F80).to_bytes(4, "little")
    area[28:32] = (0xFFFF).to_bytes(4, "little")
    area[XSAVE_LEGACY_SIZE] = XFEATURE_X87 | XFEATURE_SSE
    return bytes(area)


@frozen
class VcpuState:
    """Everything one x86-64 vCPU carries.

    Attributes:
        registers: the sixteen general registers by name.
        rip, rflags: instruction pointer and flags.
        segments: es, cs, ss, ds, fs, gs with hidden parts (fs/gs bases live here, not in `msrs`).
        ldtr, tr: system segments.
        gdtr, idtr: descriptor tables.
        cr0, cr2, cr3, cr4, cr8, xcr0, efer: control registers.
        dr: dr0, dr1, dr2, dr3, dr6, dr7.
        msrs: other MSRs by index; at least `REQUIRED_MSRS`. One that is not listed is at its reset value
            (`msr_reset_value`).
        xsave: x87/SSE/AVX... state, XSAVE standard format; XSTATE_BV bits of written-out components are set.
        events: what is in flight.
        halted: waiting in HLT.
        tsc: value of the guest's time-stamp counter at the moment of saving.
        tsc_khz: its rate in kHz.
    """

    registers: Mapping[str, int] = field(validator=_check_registers)
    rip: int = u(64)
    rflags: int = u(64, 2)
    segments: Mapping[str, Segment] = field(
        factory=lambda: {name: Segment() for name in SEGMENT_NAMES}, validator=_check_segments
    )
    ldtr: Segment = field(factory=Segment)
    tr: Segment = field(factory=Segment)
    gdtr: DescriptorTable = field(factory=DescriptorTable)
    idtr: DescriptorTable = field(factory=DescriptorTable)
    cr0: int = u(64, 0x60000010)
    cr2: int = u(64)
    cr3: int = u(64)
    cr4: int = u(64)
    cr8: int = u(4)
    xcr0: int = u(64, 1)
    efer: int = u(64)
    dr: tuple[int, int, int, int, int, int] = field(default=(0, 0, 0, 0, 0xFFFF0FF0, 0x400))
    msrs: Mapping[int, int] = field(factory=lambda: dict.fromkeys(sorted(REQUIRED_MSRS), 0), validator=_check_msrs)
    xsave: bytes = field(factory=fresh_xsave, validator=_check_xsave)
    events: PendingEvents = field(factory=PendingEvents)
    halted: bool = field(default=False, validator=validators.instance_of(bool))
    tsc: int = u(64)
    tsc_khz: int = u(32)
