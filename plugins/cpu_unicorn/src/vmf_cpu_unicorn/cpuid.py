"""What this backend can present: an x86-64-v2 processor of any vendor.

An emulator is no vendor's, so the capability names none: machines come here from hosts of all. A machine that is born
here without peers is GenuineIntel (`vmf.cpuid.contract`) with the model of a Goldmont (family 6, model 0x5c), a real
processor of exactly this level. Linux draws from it that the TSC's rate is in leaf 0x15 (it believes that of Intel
only), that this TSC needs no watchdog, and that the page tables need no Meltdown isolation, which an emulator does not
need either. As an AMD CPU it must be told the rate on its command line (vmf's default one does).

Not presented, because the engine or vmf does not have it: APIC, XSAVE and AVX, MTRR, MCE/MCA, PCID, MONITOR, hypervisor
leaves; SMAP, because each STAC/CLAC would cost a translated block; ERMS, because `rep movsb` is slower here than
`rep movsq`. Every bit that is presented is executed by tests/test_unicorn_instructions.py.
"""

from __future__ import annotations

from vmf.cpuid.contract import tsc_leaf
from vmf.cpuid.table import CpuidRegisters, CpuidTable

BRAND = "vmf virtual CPU (Unicorn)"
FAMILY_MODEL_STEPPING = 0x000506C9
LINEAR_ADDRESS_BITS = 48

FEATURES_1_EDX = {
    "fpu": 0, "vme": 1, "de": 2, "pse": 3, "tsc": 4, "msr": 5, "pae": 6, "cx8": 8, "sep": 11, "pge": 13, "cmov": 15,
    "pat": 16, "pse36": 17, "clflush": 19, "mmx": 23, "fxsr": 24, "sse": 25, "sse2": 26,
}  # fmt: skip
FEATURES_1_ECX = {
    "sse3": 0, "pclmulqdq": 1, "ssse3": 9, "cx16": 13, "sse4_1": 19, "sse4_2": 20, "movbe": 22, "popcnt": 23,
    "aes": 25,
}  # fmt: skip
FEATURES_7_EBX = {"fsgsbase": 0, "smep": 7}
FEATURES_80000001_EDX = {"syscall": 11, "nx": 20, "rdtscp": 27, "lm": 29}
FEATURES_80000001_ECX = {"lahf_lm": 0}
INVARIANT_TSC = 1 << 8


def _word(features: dict[str, int]) -> int:
    return sum(1 << bit for bit in features.values())


def _text(text: str, size: int) -> list[int]:
    raw = text.encode("ascii").ljust(size, b"\0")
    return [int.from_bytes(raw[i : i + 4], "little") for i in range(0, size, 4)]


def capability(tsc_khz: int, address_bits: int) -> CpuidTable:
    """The widest contract; `tsc_khz` is told in leaf 0x15."""
    clflush_line = 8  # in units of 8 bytes
    entries: dict[tuple[int, int], CpuidRegisters] = {
        (0, 0): CpuidRegisters(0x15),
        (1, 0): CpuidRegisters(
            FAMILY_MODEL_STEPPING, clflush_line << 8 | 1 << 16, _word(FEATURES_1_ECX), _word(FEATURES_1_EDX)
        ),
        # Two levels of data and instruction caches and a unified one: sizes are for programs that tune themselves.
        (4, 0): CpuidRegisters(0x0000_0121, 0x01C0_003F, 0x3F, 1),  # L1D 32 KiB, 8 ways, 64 sets
        (4, 1): CpuidRegisters(0x0000_0122, 0x01C0_003F, 0x3F, 1),  # L1I 32 KiB
        (4, 2): CpuidRegisters(0x0000_0143, 0x03C0_003F, 0x3FF, 1),  # L2 1 MiB, 16 ways, 1024 sets
        (7, 0): CpuidRegisters(0, _word(FEATURES_7_EBX), 0, 0),
        (0x15, 0): tsc_leaf(tsc_khz),
        (0x8000_0000, 0): CpuidRegisters(0x8000_0008, 0, 0, 0),
        (0x8000_0001, 0): CpuidRegisters(0, 0, _word(FEATURES_80000001_ECX), _word(FEATURES_80000001_EDX)),
        (0x8000_0007, 0): CpuidRegisters(0, 0, 0, INVARIANT_TSC),
        (0x8000_0008, 0): CpuidRegisters(LINEAR_ADDRESS_BITS << 8 | address_bits, 0, 0, 0),
    }
    brand = _text(BRAND, 48)
    for i in range(3):
        entries[0x8000_0002 + i, 0] = CpuidRegisters(*brand[4 * i : 4 * i + 4])
    return CpuidTable(entries)
