"""What the registers mean that hold no feature bits: numbers, sizes, layouts, and who must agree about them.

Every register of a table is of one of these kinds; the whole package follows this one classification:

- *feature bits* (`vmf.cpuid.bits`): what is promised must be executable;
- *address widths* (leaf 0x80000008 EAX): what is promised must not exceed what the engine has;
- *XSAVE layout* (leaf 0xD): components sit at fixed offsets, which differ between vendors and generations (PKRU: byte
  2688 on Intel, 832 on AMD). The guest reads the offsets once; the engine uses its own ever after. So each promised
  component must be at exactly the same place on every engine. The *sums* in that leaf follow from the components;
- *free* registers describe (brand, caches, topology, highest leaf, signature): any engine can present any value;
- *exact*: everything else, and everything unknown. Promised values must be equal to the engine's, or zero.

`assemble` turns any collection of entries and features into a table that is consistent in itself. It only ever takes
away; the sums and highest leaves are computed, never copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Final

from attrs import evolve, field, frozen

from vmf.cpuid.bits import FEATURE_MASKS, MIRRORS
from vmf.cpuid.features import (
    BY_NAME,
    MIRROR_FEATURES,
    REGISTERS,
    RUNTIME_FEATURES,
    Feature,
    Features,
    with_dependencies_removed,
    with_features,
)
from vmf.cpuid.table import EXTENDED_BASE, ZERO, CpuidRegisters, CpuidTable

XSAVE_LEAF: Final = 0xD
XSAVE_LEGACY: Final = 576
"""Bytes of legacy region and header, SDM vol. 1, 13.4."""
ADDRESS_LEAF: Final = 0x80000008
BASIC_END: Final = 0x4000_0000
"""Basic leaves are below; hypervisors' own leaves begin here."""
EXTENDED_END: Final = 0x8001_0000

AMD_VENDORS: Final = frozenset({"AuthenticAMD", "HygonGenuine"})
NO_VENDOR: Final = "\0" * 12
"""Vendor of a capability that can present any vendor (leaf 0 names none)."""

COMPONENT_OWNERS: Final[Mapping[int, tuple[str, ...]]] = {
    2: ("avx",), 3: ("mpx",), 4: ("mpx",), 5: ("avx512f",), 6: ("avx512f",), 7: ("avx512f",), 8: ("intel_pt",),
    9: ("pku",), 10: ("enqcmd",), 11: ("shstk", "ibt"), 12: ("shstk", "ibt"), 13: ("hdc",), 14: ("uintr",),
    15: ("arch_lbr",), 16: ("hwp",), 17: ("amx_tile",), 18: ("amx_tile",), 19: ("apx_f",), 62: ("lwp",),
}  # fmt: skip
"""XSAVE component to the features that use it (any of them). SDM vol. 1, 13.1; APM vol. 2, 11.5.2."""

COMPONENT_NAMES: Final[Mapping[int, str]] = {
    0: "x87", 1: "sse", 2: "avx", 3: "bndregs", 4: "bndcsr", 5: "opmask", 6: "zmm_hi256", 7: "hi16_zmm", 8: "pt",
    9: "pkru", 10: "pasid", 11: "cet_u", 12: "cet_s", 13: "hdc", 14: "uintr", 15: "lbr", 16: "hwp", 17: "tilecfg",
    18: "tiledata", 19: "apx", 62: "lwp",
}  # fmt: skip

_COMPONENTS_NEEDED: Final[Mapping[Feature, frozenset[int]]] = {
    BY_NAME[name]: frozenset(components)
    for name, components in {
        "xsave": {0, 1}, "avx": {2}, "mpx": {3, 4}, "avx512f": {5, 6, 7}, "pku": {9}, "amx_tile": {17, 18},
        "apx_f": {19}, "lwp": {62},
    }.items()
}  # fmt: skip
"""User-state features that cannot work without their place in the XSAVE area."""

LEAF_GUARDS: Final[Mapping[int, str]] = {
    0x5: "monitor", 0x9: "dca", 0xA: "pdcm", 0xF: "cqm", 0x10: "rdt_a", 0x12: "sgx", 0x14: "intel_pt",
    0x19: "key_locker", 0x1A: "hybrid_cpu", 0x1B: "pconfig", 0x1C: "arch_lbr", 0x1D: "amx_tile", 0x1E: "amx_tile",
    0x20: "hreset", 0x23: "arch_perfmon_ext", 0x24: "avx10", XSAVE_LEAF: "xsave", 0x8000000A: "svm",
    0x8000001B: "ibs", 0x8000001C: "lwp", 0x8000001D: "topoext", 0x8000001E: "topoext",
}  # fmt: skip
"""Leaves that describe a feature and make sense only beside it."""

_FREE_LEAVES: Final = frozenset(
    {0x0, 0x2, 0x3, 0x4, 0xB, 0x15, 0x16, 0x18, 0x1A, 0x1F, XSAVE_LEAF, EXTENDED_BASE, 0x80000002, 0x80000003,
     0x80000004, 0x80000005, 0x80000006, 0x80000019, 0x8000001A, 0x8000001D, 0x8000001E}
)  # fmt: skip
"""Described, or judged by a rule of their own (vendor, XSAVE). Feature bits within them are judged as such."""

_FREE_REGISTERS: Final[Mapping[tuple[int, int, str], int]] = {
    (0x1, 0, "eax"): 0xFFFF_FFFF,  # signature
    (0x1, 0, "ebx"): 0xFFFF_00FF,  # APIC id, logical processors, brand index; [15:8] is the CLFLUSH line size
    (0x7, 0, "eax"): 0xFFFF_FFFF,  # highest subleaf
    (0x80000001, 0, "eax"): 0xFFFF_FFFF,  # signature again
    (0x80000001, 0, "ebx"): 0xFFFF_FFFF,  # brand and package
    (ADDRESS_LEAF, 0, "eax"): 0xFFFF_FFFF,
    (ADDRESS_LEAF, 0, "ecx"): 0xFFFF_FFFF,  # cores
}
_ALL: Final = 0xFFFF_FFFF


@frozen
class XsaveComponent:
    """One part of the XSAVE area.

    Attributes:
        index: bit in XCR0 or IA32_XSS.
        size, offset: bytes, in the standard format; supervisor components have no offset.
        flags: ECX of its subleaf (bit 0 supervisor, bit 1 aligned to 64 in the compacted format, bit 2 XFD).
    """

    index: int
    size: int
    offset: int
    flags: int = 0

    @property
    def supervisor(self) -> bool:
        return bool(self.flags & 1)

    @property
    def name(self) -> str:
        return COMPONENT_NAMES.get(self.index, f"component {self.index}")

    def __str__(self) -> str:
        return f"{self.size} bytes" if self.supervisor else f"{self.size} bytes at {self.offset}"


def xsave_components(table: CpuidTable) -> dict[int, XsaveComponent]:
    """The components that leaf 0xD lists, with their places; those without a size are not there."""
    main, extended = table.lookup(XSAVE_LEAF, 0), table.lookup(XSAVE_LEAF, 1)
    mask = (main.eax | main.edx << 32) | (extended.ecx | extended.edx << 32)
    found: dict[int, XsaveComponent] = {}
    for index in range(63):
        if not mask >> index & 1:
            continue
        if index < 2:
            found[index] = XsaveComponent(index, *((160, 0) if index == 0 else (256, 160)))
            continue
        entry = table.lookup(XSAVE_LEAF, index)
        if entry.eax:
            found[index] = XsaveComponent(index, entry.eax, entry.ebx, entry.ecx)
    return found


def xsave_size(components: Mapping[int, XsaveComponent]) -> int:
    """Bytes of the XSAVE area in standard format with all these user components enabled."""
    return max([XSAVE_LEGACY, *(c.offset + c.size for c in components.values() if c.index > 1 and not c.supervisor)])


def compacted_size(components: Mapping[int, XsaveComponent]) -> int:
    """Bytes of the XSAVE area in compacted format with all these components enabled (SDM vol. 1, 13.4.3)."""
    end = XSAVE_LEGACY
    for index in sorted(components):
        if index < 2:
            continue
        if components[index].flags & 2:
            end = (end + 63) & ~63
        end += components[index].size
    return end


def address_widths(table: CpuidTable) -> tuple[int, int]:
    """Physical and linear address width in bits; 36 and 48 (or 32) where the table does not say."""
    eax = table.lookup(ADDRESS_LEAF, 0).eax
    long_mode = table.lookup(0x80000001, 0).edx >> BY_NAME["lm"].bit & 1
    return eax & 0xFF or 36, eax >> 8 & 0xFF or (48 if long_mode else 32)


def clflush_line(table: CpuidTable) -> int:
    """Bytes that CLFLUSH writes back, 0 where unknown."""
    return (table.lookup(1, 0).ebx >> 8 & 0xFF) * 8


@frozen(order=True)
class Signature:
    """Family, model and stepping as people count them. SDM vol. 2A, figure 3-6."""

    family: int
    model: int
    stepping: int
    raw: int = field(default=0, repr=False)

    @classmethod
    def of(cls, table: CpuidTable) -> Signature:
        eax = table.lookup(1, 0).eax
        family, model = eax >> 8 & 0xF, eax >> 4 & 0xF
        if family in (6, 15):
            model |= (eax >> 16 & 0xF) << 4
        if family == 15:
            family += eax >> 20 & 0xFF
        return cls(family, model, eax & 0xF, eax)

    def __str__(self) -> str:
        return f"family {self.family}, model {self.model}, stepping {self.stepping}"


def vendor_of(table: CpuidTable) -> str:
    """The vendor, or "" for a table that names none (a capability that can present any)."""
    return "" if table.vendor == NO_VENDOR else table.vendor


def with_vendor(table: CpuidTable, vendor: str) -> CpuidTable:
    """The table naming another vendor (twelve ASCII characters), or with "" none: `any vendor can be presented`."""
    raw = (vendor or NO_VENDOR).encode("ascii").ljust(12, b"\0")
    ebx, edx, ecx = (int.from_bytes(raw[start : start + 4], "little") for start in (0, 4, 8))
    entries = dict(table.entries)
    entries[0, 0] = evolve(table.lookup(0, 0), ebx=ebx, ecx=ecx, edx=edx)
    return CpuidTable(entries)


def brand_of(table: CpuidTable) -> str:
    """The brand string of leaves 0x80000002 to 0x80000004."""
    raw = b"".join(
        register.to_bytes(4, "little") for leaf in range(0x80000002, 0x80000005) for register in table.lookup(leaf, 0)
    )
    return raw.split(b"\0")[0].decode("ascii", "replace").strip()


def brand_entries(brand: str) -> dict[tuple[int, int], CpuidRegisters]:
    """The three leaves of a brand string of up to 47 ASCII characters."""
    raw = brand.encode("ascii")[:47].ljust(48, b"\0")
    words = [int.from_bytes(raw[start : start + 4], "little") for start in range(0, 48, 4)]
    return {(0x80000002 + row, 0): CpuidRegisters(*words[row * 4 : row * 4 + 4]) for row in range(3)}


@lru_cache(maxsize=4096)
def exact_mask(leaf: int, subleaf: int, register: str) -> int:
    """The bits of a register that must be equal on both sides unless zero in the contract."""
    if BASIC_END <= leaf < EXTENDED_BASE:
        return 0
    mask = _ALL & ~FEATURE_MASKS.get((leaf, subleaf, register), 0)
    if leaf in _FREE_LEAVES:
        return 0
    return mask & ~_FREE_REGISTERS.get((leaf, subleaf, register), 0)


def exact_values(table: CpuidTable) -> Iterator[tuple[int, int, str, int]]:
    """(leaf, subleaf, register, value) of everything in a table that must be equal, zeros left out."""
    for (leaf, subleaf), registers in table.entries.items():
        for name in REGISTERS:
            value = getattr(registers, name) & exact_mask(leaf, subleaf, name)
            if value:
                yield leaf, subleaf, name, value


def consistent_features(present: Features, table: CpuidTable) -> Features:
    """The largest consistent subset of `present`, given the places and widths that `table` offers."""
    components = xsave_components(table)
    kept = present - MIRROR_FEATURES - RUNTIME_FEATURES
    kept -= {item for item, needed in _COMPONENTS_NEEDED.items() if not needed <= set(components)}
    if address_widths(table)[1] < 57:
        kept -= {BY_NAME["la57"]}
    if not clflush_line(table):
        kept -= {BY_NAME["clflush"]}
    return with_dependencies_removed(kept)


def assemble(
    table: CpuidTable,
    present: Features,
    *,
    keep_leaf: Callable[[int], bool] = lambda _leaf: True,
    unknown_components: bool = True,
) -> CpuidTable:
    """A self-consistent table of at most these features, from the entries of `table`.

    Features without what they need go; leaves without the feature they describe go, and those that `keep_leaf`
    refuses; hypervisors' leaves go; leaf 0xD holds the remaining components with sums to match; AMD's mirror bits
    follow their originals; widths follow la57; highest leaves are what is left.

    Args:
        unknown_components: whether XSAVE components that no known feature owns may stay.
    """
    kept = consistent_features(present, table)
    names = {item.name for item in kept}
    widths = address_widths(table)
    components = {
        index: component
        for index, component in xsave_components(table).items()
        if index < 2
        or (
            ("xsaves" in names or not component.supervisor)
            and (
                any(owner in names for owner in COMPONENT_OWNERS[index])
                if index in COMPONENT_OWNERS
                else unknown_components
            )
        )
    }
    entries = {
        (leaf, subleaf): registers
        for (leaf, subleaf), registers in table.entries.items()
        if (leaf < BASIC_END or EXTENDED_BASE <= leaf < EXTENDED_END)
        and leaf != XSAVE_LEAF
        and (leaf not in LEAF_GUARDS or LEAF_GUARDS[leaf] in names)
        and keep_leaf(leaf)
    }
    if "xsave" in names:
        entries |= _xsave_entries(components, compacted="xsavec" in names)
    vendor = vendor_of(table)
    if vendor in AMD_VENDORS:
        kept |= {BY_NAME[mirror] for mirror, original in MIRRORS.items() if original in names}
    linear = widths[1] if "la57" in names else min(widths[1], 48)
    entries[ADDRESS_LEAF, 0] = evolve(entries.get((ADDRESS_LEAF, 0), ZERO), eax=widths[0] | linear << 8)
    return _with_highest_leaves(with_features(CpuidTable(entries), kept), vendor)


def _xsave_entries(
    components: Mapping[int, XsaveComponent], *, compacted: bool
) -> dict[tuple[int, int], CpuidRegisters]:
    user = sum(1 << c.index for c in components.values() if not c.supervisor)
    system = sum(1 << c.index for c in components.values() if c.supervisor)
    size = xsave_size(components)
    # EBX is "size for what XCR0 enables now". Engines that track XCR0 overwrite it; for one that does not, the full
    # size is the value that no guest can be hurt by.
    packed = compacted_size(components) if compacted else 0
    entries = {
        (XSAVE_LEAF, 0): CpuidRegisters(user & _ALL, size, size, user >> 32),
        (XSAVE_LEAF, 1): CpuidRegisters(0, packed, system & _ALL, system >> 32),
    }
    for component in components.values():
        if component.index > 1:
            entries[XSAVE_LEAF, component.index] = CpuidRegisters(component.size, component.offset, component.flags, 0)
    return entries


def _with_highest_leaves(table: CpuidTable, vendor: str) -> CpuidTable:
    top = table.lookup(0, 0)
    entries = dict(table.entries)
    if (0x80000001, 0) in entries:
        # AMD repeats the signature here, Intel has zeros.
        signature = table.lookup(1, 0).eax if vendor in AMD_VENDORS else 0
        entries[0x80000001, 0] = evolve(entries[0x80000001, 0], eax=signature)
    if (7, 0) in entries:
        entries[7, 0] = evolve(entries[7, 0], eax=0)
    entries = {key: registers for key, registers in entries.items() if registers != ZERO}
    structured = max((subleaf for leaf, subleaf in entries if leaf == 7), default=0)
    if structured:
        entries[7, 0] = evolve(entries.get((7, 0), ZERO), eax=structured)
    basic = max((leaf for leaf, _ in entries if leaf < BASIC_END), default=0)
    extended = max((leaf for leaf, _ in entries if leaf >= EXTENDED_BASE), default=EXTENDED_BASE)
    entries[0, 0] = evolve(top, eax=basic)
    # AMD repeats the vendor here, Intel has zeros.
    echo = (top.ebx, top.ecx, top.edx) if vendor in AMD_VENDORS else (0, 0, 0)
    entries[EXTENDED_BASE, 0] = CpuidRegisters(extended, *echo)
    return CpuidTable(entries)
