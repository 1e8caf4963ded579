"""Which MSRs a vCPU carries besides those with a field of their own in the neutral state.

An MSR is saved when it is one of `REQUIRED_MSRS` or when its value differs from its reset value; one that a state
does not list is put at its reset value. So a state says nothing about what the guest never touched, and another
backend need not know an MSR that is at rest.

Candidates are KVM's own list plus `UNLISTED` (KVM carries these too but does not list them), minus `NOT_STATE`; of
those, the ones that this vCPU, with its CPUID, really has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from vmf.cpu.state import (
    MSR_CSTAR,
    MSR_EFER,
    MSR_FMASK,
    MSR_IA32_MISC_ENABLE,
    MSR_IA32_PAT,
    MSR_IA32_SYSENTER_CS,
    MSR_IA32_SYSENTER_EIP,
    MSR_IA32_SYSENTER_ESP,
    MSR_IA32_TSC,
    MSR_KERNEL_GS_BASE,
    MSR_LSTAR,
    MSR_STAR,
    MSR_TSC_AUX,
    REQUIRED_MSRS,
    msr_reset_value,
)

MSR_APIC_BASE: Final = 0x1B
MSR_TSC_ADJUST: Final = 0x3B
MSR_SPEC_CTRL: Final = 0x48
MSR_DEBUGCTL: Final = 0x1D9
MSR_XSS: Final = 0xDA0
MSR_FS_BASE: Final = 0xC0000100
MSR_GS_BASE: Final = 0xC0000101

_MTRRS: Final = (*range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270), 0x2FF)

UNLISTED: Final = (
    *REQUIRED_MSRS, MSR_TSC_AUX, MSR_SPEC_CTRL, MSR_XSS, MSR_TSC_ADJUST, MSR_IA32_MISC_ENABLE, MSR_DEBUGCTL, *_MTRRS,
)  # fmt: skip

_OWN_FIELD: Final = {MSR_IA32_TSC, MSR_EFER, MSR_FS_BASE, MSR_GS_BASE, MSR_APIC_BASE}
_PARAVIRTUAL: Final = {0x11, 0x12, *range(0x4B564D00, 0x4B564E00), *range(0x40000000, 0x40000200)}
"""KVM's and Hyper-V's own: no machine shows their CPUID leaves."""
_CONSTANTS: Final = {0x8B, 0xCE, 0xFE, 0x10A, 0x179, 0x345, *range(0x480, 0x4A0), 0xC001001F, 0xC0011029, 0xC0000104}
"""What an engine is, not what the guest did: microcode revision, platform info, capabilities. The guest is not shown
the CPUID features that send it there."""
_COUNTERS: Final = {
    0xE7, 0xE8, 0x34, *range(0xC1, 0xC9), *range(0x186, 0x18E), *range(0x309, 0x310), *range(0x38D, 0x391), 0x3F1,
    *range(0x4C1, 0x4C9), 0x600, *range(0xC0010000, 0xC0010008), *range(0xC0010200, 0xC0010210),
    *range(0xC0000300, 0xC0000304),
}  # fmt: skip
"""Performance counters: the vCPU has none (KVM_CAP_PMU_CAPABILITY), as no two hosts count alike."""
_SMM: Final = {0x9E}

NOT_STATE: Final = _OWN_FIELD | _PARAVIRTUAL | _CONSTANTS | _COUNTERS | _SMM

NAMES: Final[Mapping[int, str]] = {
    MSR_TSC_ADJUST: "IA32_TSC_ADJUST", MSR_SPEC_CTRL: "IA32_SPEC_CTRL", 0xC001011F: "VIRT_SPEC_CTRL",
    MSR_IA32_SYSENTER_CS: "IA32_SYSENTER_CS", MSR_IA32_SYSENTER_ESP: "IA32_SYSENTER_ESP",
    MSR_IA32_SYSENTER_EIP: "IA32_SYSENTER_EIP", MSR_IA32_MISC_ENABLE: "IA32_MISC_ENABLE", MSR_DEBUGCTL: "IA32_DEBUGCTL",
    MSR_IA32_PAT: "IA32_PAT", MSR_XSS: "IA32_XSS", 0x122: "IA32_TSX_CTRL", 0xE1: "IA32_UMWAIT_CONTROL",
    0x140: "MISC_FEATURES_ENABLES", 0x17A: "IA32_MCG_STATUS", 0x17B: "IA32_MCG_CTL", 0x6E0: "IA32_TSC_DEADLINE",
    0xC0010015: "HWCR", 0xD90: "IA32_BNDCFGS", 0x2FF: "IA32_MTRR_DEF_TYPE", MSR_STAR: "STAR", MSR_LSTAR: "LSTAR",
    MSR_CSTAR: "CSTAR", MSR_FMASK: "FMASK", MSR_KERNEL_GS_BASE: "KERNEL_GS_BASE", MSR_TSC_AUX: "IA32_TSC_AUX",
    0xC0010117: "VM_HSAVE_PA", 0x3A: "IA32_FEATURE_CONTROL", 0x6A0: "IA32_U_CET", 0x6A2: "IA32_S_CET",
    **{msr: f"MTRR {msr:#x}" for msr in _MTRRS[:-1]},
}  # fmt: skip


def amd_value(index: int, value: int) -> int:
    """What an AMD processor keeps of a value: its SYSENTER_ESP and SYSENTER_EIP have 32 bits, since it has no SYSENTER
    in long mode (AMD APM vol. 3, SYSENTER). A 64-bit Linux writes addresses of 64 bits there all the same."""
    return value & 0xFFFF_FFFF if index in (MSR_IA32_SYSENTER_ESP, MSR_IA32_SYSENTER_EIP) else value


def describe(index: int) -> str:
    """`MSR 0x48 (IA32_SPEC_CTRL)`."""
    name = NAMES.get(index)
    return f"MSR {index:#x} ({name})" if name else f"MSR {index:#x}"


def reset_value(index: int, fresh: int = 0) -> int:
    """What an MSR holds that no state lists: for those known here the same on every host, otherwise what KVM gave it
    in a new vCPU (`fresh`), which is a constant of the engine more often than not."""
    return msr_reset_value(index) if index in UNLISTED else fresh


def candidates(listed: Iterable[int]) -> list[int]:
    """MSRs to try on a vCPU, ascending."""
    return sorted({*listed, *UNLISTED} - NOT_STATE)
