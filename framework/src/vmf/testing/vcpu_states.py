"""Random legal states of a vCPU, for the property "what restore takes, save gives back". Needs hypothesis.

    @given(vcpu_states(contract, khz))
    def test_states_round_trip(state):
        vcpu.restore(state)
        assert comparable(vcpu.save()) == comparable(state)

"Legal" is what a guest under that contract could have brought about on a processor, in five modes (64-bit code in ring
0 and ring 3, 32-bit code in ring 3 under a 64-bit kernel, 32-bit code with and without paging, 16-bit code), in the
canonical forms that the heads of the bundled backends' `convert` modules name. What not every processor can hold is an
option: a backend that lacks it must refuse such a state by name.
"""

from __future__ import annotations

import struct
from typing import Any

from attrs import evolve
from hypothesis import strategies as st

from vmf.cpu.state import (
    AR_DB,
    AR_DPL_SHIFT,
    AR_GRANULARITY,
    AR_LONG,
    AR_PRESENT,
    AR_S,
    AR_UNUSABLE,
    GENERAL_REGISTERS,
    MSR_CSTAR,
    MSR_FMASK,
    MSR_IA32_PAT,
    MSR_IA32_SYSENTER_CS,
    MSR_IA32_SYSENTER_EIP,
    MSR_IA32_SYSENTER_ESP,
    MSR_KERNEL_GS_BASE,
    MSR_LSTAR,
    MSR_STAR,
    MSR_TSC_AUX,
    REQUIRED_MSRS,
    XFEATURE_AVX,
    XSAVE_LEGACY_SIZE,
    XSAVE_MIN_SIZE,
    DescriptorTable,
    PendingEvents,
    Segment,
    VcpuState,
    msr_reset_value,
)
from vmf.cpuid.features import features_of
from vmf.cpuid.layout import AMD_VENDORS, address_widths, xsave_components
from vmf.cpuid.table import CpuidTable

MODES = ("long0", "long3", "compat3", "protected", "paged", "real")
"""64-bit code in ring 0 and 3, 32-bit code in ring 3 under a 64-bit kernel, 32-bit code without and with (two-level)
paging, 16-bit code."""
VECTORS_WITH_CODE = frozenset({8, 10, 11, 12, 13, 14, 17})
_VECTORS = (0, 1, 5, 6, 7, *sorted(VECTORS_WITH_CODE), 16, 19)
"""Not 3 and 4: like INT n these are raised by an instruction, which a processor may as well have begin again."""
_MTRR_TYPES = (0, 1, 4, 5, 6)
_PAT_TYPES = (*_MTRR_TYPES, 7)
_FIXED_MTRRS = (0x250, 0x258, 0x259, *range(0x268, 0x270))

u16, u32, u64 = (st.integers(0, (1 << width) - 1) for width in (16, 32, 64))
canonical = st.integers(0, (1 << 47) - 1) | st.integers((1 << 64) - (1 << 47), (1 << 64) - 1)
"""Linear addresses of 48 bits, sign-extended."""


def _subset(*bits: int) -> st.SearchStrategy[int]:
    """Any of these bits, together."""
    return st.integers(0, (1 << len(bits)) - 1).map(
        lambda chosen: sum(1 << bit for number, bit in enumerate(bits) if chosen >> number & 1)
    )


def _types(kinds: tuple[int, ...]) -> st.SearchStrategy[int]:
    """Eight memory types, a byte each."""
    return st.lists(st.sampled_from(kinds), min_size=8, max_size=8).map(
        lambda row: int.from_bytes(bytes(row), "little")
    )


def comparable(state: VcpuState) -> VcpuState:
    """The state without what may differ between a `restore` and the next `save`: the TSC goes on, and an MSR at its
    reset value may be left out."""
    kept = {i: value for i, value in state.msrs.items() if i in REQUIRED_MSRS or value != msr_reset_value(i)}
    return evolve(state, tsc=0, msrs=kept)


_UNUSED = Segment(0, 0, 0, AR_UNUSABLE)


@st.composite
def _limits(draw: st.DrawFn) -> tuple[int, int]:
    """(limit, granularity bit): a limit beyond 1 MiB counts in pages."""
    if draw(st.booleans()):
        return draw(st.integers(0, 0xFFFFF)), 0
    return draw(st.integers(0x100, 0xFFFFF)) << 12 | 0xFFF, AR_GRANULARITY


@st.composite
def _data_segment(draw: st.DrawFn, dpl: int, base: st.SearchStrategy[int], *, may_be_null: bool = True) -> Segment:
    if may_be_null and draw(st.booleans()):
        return evolve(_UNUSED, base=draw(base))
    limit, granularity = draw(_limits())
    access = AR_PRESENT | AR_S | 3 | dpl << AR_DPL_SHIFT | granularity | AR_DB
    return Segment(draw(u16) & ~3 | dpl, draw(base), limit, access)


def _code_segment(selector: int, dpl: int, kind: int) -> Segment:
    access = AR_PRESENT | AR_S | 11 | dpl << AR_DPL_SHIFT | AR_GRANULARITY | kind
    return Segment(selector, 0, 0xFFFF_FFFF, access)


@st.composite
def _events(draw: st.DrawFn, interrupts_on: bool, shadow: bool) -> PendingEvents:
    kind = draw(st.sampled_from(["none", "exception", "payload", "interrupt", "shadow", "nmi"]))
    masked, waits = draw(st.booleans()), draw(st.booleans())
    if kind == "exception":
        vector = draw(st.sampled_from(_VECTORS))
        code = draw(st.integers(0, 0x7FFF)) if vector in VECTORS_WITH_CODE else None
        return PendingEvents(exception=vector, exception_error_code=code, nmi_masked=masked)
    if kind == "payload":
        if draw(st.booleans()):
            return PendingEvents(
                exception=14, exception_error_code=draw(st.integers(0, 31)), exception_payload=draw(canonical)
            )
        return PendingEvents(exception=1, exception_payload=draw(_subset(0, 1, 2, 3, 14)))
    if kind == "interrupt":
        return PendingEvents(interrupt=draw(st.integers(32, 255)), nmi_masked=masked)
    if kind == "shadow" and shadow:
        return PendingEvents(interrupt_shadow=1 if interrupts_on else 2)
    if kind == "nmi":
        return PendingEvents(nmi_pending=waits, nmi_masked=masked)
    return PendingEvents()


@st.composite
def xsave_areas(draw: st.DrawFn, contract: CpuidTable, xcr0: int, *, x87_pointers: bool) -> bytes:
    """An area in which every component that XCR0 enables is written out."""
    component = xsave_components(contract).get(2) if xcr0 & XFEATURE_AVX else None
    area = bytearray(XSAVE_MIN_SIZE if component is None else component.offset + component.size)
    control = 0x40 | draw(_subset(0, 1, 2, 3, 4, 5)) | draw(st.sampled_from([0, 2, 3])) << 8 | draw(_subset(10, 11))
    struct.pack_into("<HHB", area, 0, control, draw(st.integers(0, 7)) << 11, draw(st.integers(0, 255)))
    if x87_pointers:
        struct.pack_into("<HQQ", area, 6, draw(st.integers(0, 0x7FF)), draw(u64), draw(u64))
    struct.pack_into("<II", area, 24, draw(st.integers(0, 0xFFFF)), 0xFFFF)
    for i in range(8):
        area[32 + 16 * i : 42 + 16 * i] = draw(st.binary(min_size=10, max_size=10))
    area[160:416] = draw(st.binary(min_size=256, max_size=256))
    area[XSAVE_LEGACY_SIZE] = 3
    if component is not None:
        end = component.offset + component.size
        area[component.offset : end] = draw(st.binary(min_size=component.size, max_size=component.size))
        area[XSAVE_LEGACY_SIZE] |= XFEATURE_AVX
    return bytes(area)


def _cr4_bits(names: set[str]) -> list[int]:
    bits = [7, 8, 9, 10]  # PGE PCE OSFXSR OSXMMEXCPT
    bits += [0, 1] if "vme" in names else []
    owners = {"tsc": 2, "de": 3, "pse": 4, "fsgsbase": 16, "smep": 20, "smap": 21, "umip": 11}
    return bits + [bit for name, bit in owners.items() if name in names]


@st.composite
def _msrs(draw: st.DrawFn, contract: CpuidTable, names: set[str], mtrrs: bool) -> dict[int, int]:
    amd = contract.vendor in AMD_VENDORS
    sysenter = u32 if amd else canonical
    msrs = {
        MSR_IA32_SYSENTER_CS: draw(u16),
        MSR_IA32_SYSENTER_ESP: draw(sysenter),
        MSR_IA32_SYSENTER_EIP: draw(sysenter),
        MSR_IA32_PAT: draw(_types(_PAT_TYPES)),
        MSR_STAR: draw(u64),
        MSR_LSTAR: draw(canonical),
        MSR_CSTAR: draw(canonical),
        MSR_FMASK: draw(st.integers(0, (1 << 22) - 1)),
        MSR_KERNEL_GS_BASE: draw(canonical),
    }
    if "rdtscp" in names:
        msrs[MSR_TSC_AUX] = draw(u32)
    if mtrrs and draw(st.booleans()):
        msrs[0x2FF] = draw(st.sampled_from(_MTRR_TYPES)) | draw(_subset(10, 11))
        msrs |= {index: draw(_types(_MTRR_TYPES)) for index in draw(st.sets(st.sampled_from(_FIXED_MTRRS)))}
        pages = st.integers(0, (1 << (address_widths(contract)[0] - 12)) - 1)
        for number in draw(st.sets(st.integers(0, 7))):
            msrs[0x200 + 2 * number] = draw(pages) << 12 | draw(st.sampled_from(_MTRR_TYPES))
            msrs[0x201 + 2 * number] = draw(pages) << 12 | draw(_subset(11))
    return msrs


@st.composite
def vcpu_states(
    draw: st.DrawFn,
    contract: CpuidTable,
    tsc_khz: int,
    *,
    shadow: bool = True,
    modes: tuple[str, ...] = MODES,
    x87_pointers: bool = True,
    mtrrs: bool = True,
    breakpoints: bool = True,
) -> VcpuState:
    """A state under that contract.

    Args:
        shadow: interrupt shadows; an AMD processor has one kind, and not every KVM keeps them.
        modes: those of `MODES` to choose from.
        x87_pointers: FOP, FIP and FDP; an AMD processor keeps them only while an exception is unmasked.
        mtrrs: MTRRs.
        breakpoints: DR7 with breakpoints on instructions.
    """
    names = {item.name for item in features_of(contract)}
    mode = draw(st.sampled_from(modes))
    long = mode in ("long0", "long3", "compat3")
    ring = 3 if mode in ("long3", "compat3") else 0
    address = canonical if long else u32
    width = address_widths(contract)[0]
    cr0 = (
        0x10
        | draw(_subset(1, 2, 3, 5, 16, 18, 30))
        | (mode != "real")
        | (0x8000_0000 if long or mode == "paged" else 0)
    )
    cr4 = draw(_subset(*_cr4_bits(names))) | (0x20 if long else 0)
    efer = draw(_subset(0, 11)) | (0x500 if long else 0)
    rflags = 2 | draw(_subset(0, 2, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16, 18, 19, 20, 21))
    kind = AR_LONG if mode in ("long0", "long3") else AR_DB
    data = {name: draw(_data_segment(ring, u32)) for name in ("es", "ds")}
    data |= {name: draw(_data_segment(ring, address)) for name in ("fs", "gs")}
    data["ss"] = draw(_data_segment(ring, u32, may_be_null=False))
    data["cs"] = _code_segment(draw(u16) & ~3 | ring, ring, kind)
    if mode == "real":
        selectors = {name: draw(u16) for name in data}
        data = {name: Segment(value, value << 4, 0xFFFF, AR_PRESENT | AR_S | 3) for name, value in selectors.items()}
        data["cs"] = evolve(data["cs"], access=AR_PRESENT | AR_S | 11)
    xcr0 = 1
    if "xsave" in names:
        xcr0 = draw(st.sampled_from([1, 3, 7] if "avx" in names else [1, 3]))
    dr7 = 0x400 | (draw(_subset(0, 1, 2, 3, 4, 5, 6, 7)) if breakpoints else 0)
    dr6 = 0xFFFF0FF0 | draw(_subset(0, 1, 2, 3, 14))
    events = draw(_events(bool(rflags >> 9 & 1), shadow))
    fields: dict[str, Any] = {}
    if not events.interrupt_shadow:  # whoever waits in HLT has executed that instruction: no shadow is left
        fields["halted"] = draw(st.booleans()) and ring == 0
    return VcpuState(
        registers={name: draw(u64) for name in GENERAL_REGISTERS},
        rip=draw(canonical if mode in ("long0", "long3") else u16 if mode == "real" else u32),
        rflags=rflags,
        segments={name: data[name] for name in ("es", "cs", "ss", "ds", "fs", "gs")},
        ldtr=draw(st.just(_UNUSED) | st.builds(Segment, u16, address, u16, st.just(AR_PRESENT | 2))),
        tr=Segment(draw(u16), draw(address), draw(u16), AR_PRESENT | 11),
        gdtr=DescriptorTable(draw(address), draw(u16)),
        idtr=DescriptorTable(draw(address), draw(u16)),
        cr0=cr0,
        cr2=draw(u64 if long else u32),
        cr3=draw(st.integers(0, (1 << (min(width, 48 if long else 32) - 12)) - 1)) << 12,
        cr4=cr4,
        cr8=draw(st.integers(0, 15)),
        xcr0=xcr0,
        efer=efer,
        dr=(draw(canonical), draw(canonical), draw(canonical), draw(canonical), dr6, dr7),
        msrs=draw(_msrs(contract, names, mtrrs)),
        xsave=draw(xsave_areas(contract, xcr0, x87_pointers=x87_pointers)),
        events=events,
        tsc=draw(st.integers(0, 1 << 62)),
        tsc_khz=tsc_khz,
        **fields,
    )


__all__ = ["MODES", "comparable", "vcpu_states", "xsave_areas"]
