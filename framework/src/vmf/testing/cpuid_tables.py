"""CPUID tables of real CPU generations, for tests of backends and of everything that compares hosts.

Made by hand from the vendors' documentation (feature lists, signatures, XSAVE offsets, address widths), not captured:
what the tests need is right in kind, cache sizes and the like are plausible.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from vmf.cpuid.features import features, with_features
from vmf.cpuid.layout import AMD_VENDORS, brand_entries, with_vendor
from vmf.cpuid.table import CpuidRegisters, CpuidTable

Component = tuple[int, int, int]
"""Size and offset in bytes, flags: EAX, EBX and ECX of its subleaf of leaf 0xD."""


def make_table(
    vendor: str,
    signature: int,
    names: str,
    *,
    brand: str = "",
    physical: int = 40,
    linear: int = 48,
    components: Mapping[int, Component] | None = None,
    extra: Mapping[tuple[int, int], CpuidRegisters] | None = None,
) -> CpuidTable:
    """A table as a host with two logical processors would show it.

    Args:
        vendor: twelve characters, or "" for a capability that can present any.
        signature: leaf 1 EAX.
        names: features, as one text.
        components: XSAVE components from 2 up; with "xsave" among the names.
        extra: further entries.
    """
    entries: dict[tuple[int, int], CpuidRegisters] = {
        (0, 0): CpuidRegisters(0xD),
        (1, 0): CpuidRegisters(signature, 0x01020800),
        (4, 0): CpuidRegisters(0x04000121, 0x01C0003F, 63),
        (4, 1): CpuidRegisters(0x04000122, 0x01C0003F, 63),
        (0xB, 0): CpuidRegisters(1, 2, 0x100, 1),
        (0xB, 1): CpuidRegisters(4, 2, 0x201, 1),
        (0x80000000, 0): CpuidRegisters(0x80000008),
        (0x80000001, 0): CpuidRegisters(signature if vendor in AMD_VENDORS else 0),
        (0x80000006, 0): CpuidRegisters(0, 0, 0x01006040),
        (0x80000008, 0): CpuidRegisters(physical | linear << 8, 0, 1),
        (0x40000000, 0): CpuidRegisters(0x40000001, 0x4B4D564B, 0x564B4D56, 0x4D),
        (0x40000001, 0): CpuidRegisters(0x01007EFB),
        **brand_entries(brand),
        **(extra or {}),
    }
    if "xsave" in names.split():
        user = 3 | sum(1 << index for index, (_, _, flags) in (components or {}).items() if not flags & 1)
        system = sum(1 << index for index, (_, _, flags) in (components or {}).items() if flags & 1)
        size = max([576, *(offset + width for width, offset, flags in (components or {}).values() if not flags & 1)])
        entries[0xD, 0] = CpuidRegisters(user, size, size, 0)
        entries[0xD, 1] = CpuidRegisters(0, size, system, 0)
        entries |= {(0xD, index): CpuidRegisters(*place) for index, place in (components or {}).items()}
    return with_features(with_vendor(CpuidTable(entries), vendor), features(names.split()))


_COMMON = """
    fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 ht
    pni cx16 syscall nx lm lahf_lm nonstop_tsc
"""
_NEHALEM = f"""{_COMMON}
    dts acpi ss tm pbe dtes64 monitor ds_cpl vmx est tm2 ssse3 xtpr pdcm sse4_1 sse4_2 popcnt rdtscp
"""
_HASWELL = f"""{_NEHALEM}
    pclmulqdq smx fma pcid dca x2apic movbe tsc_deadline_timer aes xsave osxsave avx f16c rdrand pdpe1gb abm fsgsbase
    tsc_adjust bmi1 avx2 smep bmi2 erms invpcid xsaveopt dtherm arat
"""
_SKYLAKE_SP = f"""{_HASWELL}
    3dnowprefetch hle rtm mpx avx512f avx512dq rdseed adx smap clflushopt clwb intel_pt avx512cd avx512bw
    avx512vl xsavec xgetbv1 xsaves pku ospke spec_ctrl intel_stibp spec_ctrl_ssbd arch_capabilities md_clear hwp
    pt_cr3_filter pt_topa
"""
_ZEN = f"""{_COMMON}
    amd_fpu amd_vme amd_de amd_pse amd_tsc amd_msr amd_pae amd_mce amd_cx8 amd_apic amd_mtrr amd_pge amd_mca amd_cmov
    amd_pat amd_pse36 amd_mmx amd_fxsr
    monitor ssse3 sse4_1 sse4_2 popcnt pclmulqdq fma movbe aes xsave osxsave avx f16c rdrand rdtscp pdpe1gb mmxext
    fxsr_opt cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw topoext fsgsbase bmi1 avx2
    smep bmi2 rdseed adx smap clflushopt sha_ni xsaveopt xsavec xgetbv1 xsaves clzero xsaveerptr amd_ibpb arat npt
    nrip_save
"""
_MILAN = f"""{_ZEN}
    pcid x2apic tsc_deadline_timer erms invpcid clwb umip pku ospke shstk vaes vpclmulqdq rdpid fsrm wbnoinvd amd_ibrs
    amd_stibp amd_ssbd lfence_rdtsc null_sel_clr_base rdpru
"""
_QEMU64 = f"""{_COMMON}
    amd_fpu amd_de amd_pse amd_tsc amd_msr amd_pae amd_mce amd_cx8 amd_apic amd_mtrr amd_pge amd_mca amd_cmov amd_pat
    amd_pse36 amd_mmx amd_fxsr hypervisor svm npt
"""

NEHALEM: Final = make_table(
    "GenuineIntel", 0x106A5, _NEHALEM, brand="Intel(R) Xeon(R) CPU X5570 @ 2.93GHz",
    extra={(5, 0): CpuidRegisters(64, 64, 3, 0x1120), (0xA, 0): CpuidRegisters(0x07300403, 4, 0, 0x603)},
)  # fmt: skip
HASWELL: Final = make_table(
    "GenuineIntel", 0x306F2, _HASWELL, brand="Intel(R) Xeon(R) CPU E5-2680 v3 @ 2.50GHz", physical=46,
    components={2: (256, 576, 0)},
    extra={(5, 0): CpuidRegisters(64, 64, 3, 0x2120), (0xA, 0): CpuidRegisters(0x07300403, 0, 0, 0x603)},
)  # fmt: skip
SKYLAKE_SP: Final = make_table(
    "GenuineIntel", 0x50654, _SKYLAKE_SP, brand="Intel(R) Xeon(R) Gold 6130 CPU @ 2.10GHz", physical=46,
    components={
        2: (256, 576, 0), 3: (64, 960, 0), 4: (64, 1024, 0), 5: (64, 1088, 0), 6: (512, 1152, 0),
        7: (1024, 1664, 0), 8: (128, 0, 1), 9: (8, 2688, 0),
    },
    extra={
        (5, 0): CpuidRegisters(64, 64, 3, 0x2020), (0xA, 0): CpuidRegisters(0x07300404, 0, 0, 0x603),
        (0x14, 0): CpuidRegisters(1), (0x15, 0): CpuidRegisters(2, 168, 0, 0),
        (0x16, 0): CpuidRegisters(2100, 3700, 100),
    },
)  # fmt: skip
NAPLES: Final = make_table(
    "AuthenticAMD", 0x800F12, _ZEN, brand="AMD EPYC 7451 24-Core Processor", physical=48,
    components={2: (256, 576, 0)}, extra={(0x8000000A, 0): CpuidRegisters(1, 0x8000)},
)  # fmt: skip
MILAN: Final = make_table(
    "AuthenticAMD", 0xA00F11, _MILAN, brand="AMD EPYC 7763 64-Core Processor", physical=48,
    components={2: (256, 576, 0), 9: (8, 832, 0), 11: (16, 0, 1), 12: (24, 0, 1)},
    extra={(0x8000000A, 0): CpuidRegisters(1, 0x8000), (0x8000001D, 0): CpuidRegisters(0x4121, 0x1C0003F, 63)},
)  # fmt: skip
QEMU64: Final = make_table("AuthenticAMD", 0x60FB1, _QEMU64, brand="QEMU Virtual CPU version 2.5+")
EMULATOR: Final = make_table(
    "", 0x106A5,
    "fpu de pse tsc msr pae mce cx8 pge mca cmov pat pse36 clflush mmx fxsr sse sse2 pni cx16 syscall nx lm lahf_lm"
    " ssse3 sse4_1 sse4_2 popcnt hypervisor",
)  # fmt: skip
"""An emulator that executes x86-64-v2 and can present any vendor."""

HOSTS: Final[Mapping[str, CpuidTable]] = {
    "nehalem": NEHALEM, "haswell": HASWELL, "skylake-sp": SKYLAKE_SP, "naples": NAPLES, "milan": MILAN,
    "qemu64": QEMU64, "emulator": EMULATOR,
}  # fmt: skip
