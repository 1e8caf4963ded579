"""The feature model: one bit of CPUID as a thing with a name, and what it cannot be used without.

A feature is a bit of one of the registers that `vmf.cpuid.bits` lists. A documented bit has its documented name; any
other bit of those registers is named by its place, `cpuid-7.0-ebx-14` (leaf and subleaf in hexadecimal, register,
bit), so that nothing a host shows is ever nameless, and every name, both sorts, can be written in `--cpuid-set` and
`--cpuid-remove`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Final

from attrs import evolve, field, frozen, validators

from vmf.cpuid.bits import ALIASES, FEATURE_BITS, FEATURE_MASKS, MIRRORS, NEEDS
from vmf.cpuid.table import ZERO, CpuidRegisters, CpuidTable
from vmf.errors import ConfigError

REGISTERS: Final = ("eax", "ebx", "ecx", "edx")


class CpuidError(ConfigError):
    """A wish about CPUID cannot be fulfilled: an unknown feature, level or profile, or one the backend lacks."""

    code = "cpuid"


@frozen(order=True, cache_hash=True)
class Feature:
    """One feature bit of CPUID.

    Attributes:
        leaf, subleaf: EAX and ECX as the instruction takes them.
        register: "eax", "ebx", "ecx" or "edx".
        bit: 0 to 31.
    """

    leaf: int
    subleaf: int
    register: str = field(validator=validators.in_(REGISTERS))
    bit: int = field(validator=[validators.ge(0), validators.le(31)])

    @property
    def name(self) -> str:
        """As Linux writes it in /proc/cpuinfo, or by place."""
        known = FEATURE_BITS.get((self.leaf, self.subleaf, self.register), {}).get(self.bit)
        return known or f"cpuid-{self.leaf:x}.{self.subleaf:x}-{self.register}-{self.bit}"

    @property
    def documented(self) -> bool:
        """Whether the bit has a name of its own."""
        return self.bit in FEATURE_BITS.get((self.leaf, self.subleaf, self.register), {})

    @property
    def place(self) -> str:
        """Where the manuals say it is: "CPUID.7.0:EBX[5]"."""
        return f"CPUID.{self.leaf:X}H.{self.subleaf}:{self.register.upper()}[{self.bit}]"

    def __str__(self) -> str:
        return self.name


Features = frozenset[Feature]

BY_NAME: Final[Mapping[str, Feature]] = {
    name: Feature(*register, bit) for register, names in FEATURE_BITS.items() for bit, name in names.items()
}
"""Every documented feature."""

MIRROR_FEATURES: Final[Features] = frozenset(BY_NAME[name] for name in MIRRORS)
"""AMD's repetition of leaf 1 EDX; it follows its originals and is never judged on its own."""

RUNTIME_FEATURES: Final[Features] = frozenset(BY_NAME[name] for name in ("osxsave", "ospke"))
"""Bits that mirror CR4 of the running guest: no capability, never part of a contract."""

FREE_FEATURES: Final[Features] = (
    MIRROR_FEATURES
    | RUNTIME_FEATURES
    | frozenset(BY_NAME[name] for name in ("hypervisor", "ht", "cmp_legacy", "nonstop_tsc"))
)
"""Bits that every backend can present with any value, because no engine has to do anything for them: what the VMM
itself is and promises (a hypervisor; a TSC of constant rate, see `vmf.machine.clock`) and the topology's shape."""

_BITS: Final[Mapping[tuple[int, int, str], tuple[Feature, ...]]] = {
    register: tuple(Feature(*register, bit) for bit in range(32)) for register in FEATURE_MASKS
}
"""All bits of all feature registers, made once: tables are read often."""

_PLACE = re.compile(
    r"(?:cpuid[-_.])?(?:0x)?([0-9a-f]{1,8})h?[.:_]([0-9a-f]{1,8})[-_.:](e[abcd]x)[-_.:\[]([0-9]{1,2})\]?"
)


def feature(name: str) -> Feature:
    """The feature of that name: documented name, alias of it, or a place as `Feature.name` writes it.

    Case, "-", "." and "_" do not matter. Raises CpuidError with the nearest names otherwise.
    """
    wanted = name.strip().lower()
    place = _PLACE.fullmatch(wanted)
    if place is not None:
        leaf, subleaf, register, bit = int(place[1], 16), int(place[2], 16), place[3], int(place[4])
        if not FEATURE_MASKS.get((leaf, subleaf, register), 0) >> bit & 1 or bit > 31:
            raise CpuidError(
                f"CPUID feature {name!r}: leaf {leaf:#x}.{subleaf} {register}, bit {bit}, is not a feature bit.",
                "Name a bit of a feature register; `vmf cpuid show --json` lists them.",
            )
        return Feature(leaf, subleaf, register, bit)
    plain = re.sub(r"[-.\s]", "_", wanted)
    found = BY_NAME.get(ALIASES.get(plain, plain))
    if found is None:
        near = difflib.get_close_matches(plain, [*BY_NAME, *ALIASES], n=3, cutoff=0.6)
        hint = f"Did you mean {' or '.join(near)}?" if near else "`vmf cpuid show` lists the names."
        raise CpuidError(f"There is no CPUID feature called {name!r}.", hint)
    return found


def features(names: Iterable[str | Feature]) -> Features:
    """Several at once; features may be given as records too."""
    return frozenset(item if isinstance(item, Feature) else feature(item) for item in names)


def features_of(table: CpuidTable) -> Features:
    """Every feature bit set in a table, unknown ones and those of a running system (osxsave) included."""
    found: list[Feature] = []
    for (leaf, subleaf, register), mask in FEATURE_MASKS.items():
        value = getattr(table.lookup(leaf, subleaf), register) & mask
        row = _BITS[leaf, subleaf, register]
        while value:
            low = value & -value
            found.append(row[low.bit_length() - 1])
            value ^= low
    return frozenset(found)


def with_features(table: CpuidTable, present: Features) -> CpuidTable:
    """The same table with exactly these feature bits; all numbers, and bits that are no features, stay."""
    values: dict[tuple[int, int, str], int] = dict.fromkeys(FEATURE_MASKS, 0)
    for item in present:
        values[item.leaf, item.subleaf, item.register] |= 1 << item.bit
    entries = dict(table.entries)
    for (leaf, subleaf, register), bits in values.items():
        before = entries.get((leaf, subleaf), ZERO)
        value = getattr(before, register) & ~FEATURE_MASKS[leaf, subleaf, register] | bits
        if value != getattr(before, register):
            entries[leaf, subleaf] = _with_register(before, register, value)
    return CpuidTable(entries)


def _with_register(registers: CpuidRegisters, name: str, value: int) -> CpuidRegisters:
    return evolve(registers, **{name: value})


@cache
def requirements(item: Feature) -> Features:
    """Everything a feature cannot be used without, directly or not; itself excluded."""
    direct = frozenset(BY_NAME[name] for name in NEEDS.get(item.name, ()))
    return direct.union(*(requirements(need) for need in direct))


@cache
def dependents(item: Feature) -> Features:
    """Everything that cannot be used without this feature; itself excluded."""
    return frozenset(other for other in BY_NAME.values() if item in requirements(other))


def with_dependencies_removed(present: Features) -> Features:
    """The features all of whose requirements are there: the largest consistent subset."""
    return frozenset(item for item in present if requirements(item) <= present)


def with_requirements(wanted: Features) -> Features:
    """The features and all they require: the smallest consistent superset."""
    return wanted.union(*(requirements(item) for item in wanted))


def names(items: Iterable[Feature]) -> list[str]:
    """Names in a stable order for people: documented ones first, by leaf and bit."""
    return [item.name for item in sorted(items, key=lambda item: (not item.documented, item))]
