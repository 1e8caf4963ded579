"""Portability levels: how much of a CPU a machine shows, so that other hosts can show the same.

Level 0 is everything the backend can present. Levels 1 to 4 are the x86-64 micro-architecture levels v4, v3, v2 and
v1 of the psABI (System V ABI, AMD64 supplement, table 3.1), and they are *allow lists*: a feature passes only when
the level names it. Three sorts are named:

1. the psABI's own features of that level and of all lower ones;
2. the basics a 64-bit kernel needs and every x86-64 engine executes (paging, MSRs, TSC, SYSCALL, NX...);
3. what is safe anywhere because no engine has to do anything for it (`FREE_FEATURES`: the hypervisor bit, the
   promise of a constant TSC).

Everything else is left out, however common: AES, PCID, RDRAND, SMEP, the speculation controls; and SEP, MTRR, MCE,
APIC, MONITOR and VME, which no 64-bit kernel needs and not every backend has. `--cpuid-set` lets single ones back in.
Unknown bits never pass levels 1 to 4. Levels 1 to 4 also promise at most 39 physical address bits and 48 linear ones.

Level N+1 is made from level N's list by leaving out, so that levels are nested by construction.

VirtualBox's levels 1 to 3 are *deny lists* over whatever the host has. They are offered as the profiles "vbox-1" to
"vbox-3" for people who come from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from attrs import frozen

from vmf.cpuid.features import (
    BY_NAME,
    FREE_FEATURES,
    CpuidError,
    Feature,
    Features,
    dependents,
    feature,
    with_dependencies_removed,
)

HIGHEST_LEVEL: Final = 4
PHYSICAL_BITS_LIMIT: Final = 39
"""Physical address width that levels 1 to 4 promise at most: what Intel's client CPUs and the Unicorn engine have."""
LINEAR_BITS_LIMIT: Final = 48

LevelLike = int | str
"""0 to 4, or the name of a level ("x86-64-v3", "host") or of a profile ("vbox-1")."""

BASICS: Final[tuple[str, ...]] = ("de", "pse", "tsc", "msr", "pae", "pge", "pat", "pse36", "clflush", "nx", "lm")
"""Not in the psABI's table, needed by 64-bit kernels, executed by every engine."""

_PSABI: Final[Mapping[str, tuple[str, ...]]] = {
    "x86-64-v1": ("cmov", "cx8", "fpu", "fxsr", "mmx", "syscall", "sse", "sse2"),
    "x86-64-v2": ("cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"),
    # The psABI says OSXSAVE, which is XSAVE that the guest's kernel has switched on.
    "x86-64-v3": ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"),
    "x86-64-v4": ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
}
"""What each psABI level adds to the one below it."""


@frozen
class Level:
    """One portability level.

    Attributes:
        number: 0 to 4.
        name: "host" or the psABI's name.
        required: the psABI features of this level and all lower ones: what a CPU must have to be of that level.
        allowed: names that pass, or None for everything.
        added: what this level lets through beyond the next more portable one.
    """

    number: int
    name: str
    required: Features
    allowed: Features | None
    added: Features


def _build() -> tuple[Level, ...]:
    levels: list[Level] = []
    required: Features = frozenset()
    allowed: Features = frozenset(map(feature, BASICS)) | FREE_FEATURES
    for number, (name, names) in zip(range(HIGHEST_LEVEL, 0, -1), _PSABI.items(), strict=True):
        own = frozenset(BY_NAME[item] for item in names)
        basics = frozenset(map(feature, BASICS)) if number == HIGHEST_LEVEL else frozenset()
        required |= own
        allowed |= own
        levels.append(Level(number, name, required, allowed, own | basics))
    levels.append(Level(0, "host", frozenset(), None, frozenset()))
    return tuple(reversed(levels))


LEVELS: Final[tuple[Level, ...]] = _build()
"""By number."""

BASELINE: Final[Features] = LEVELS[HIGHEST_LEVEL].required | {BY_NAME["lm"]}
"""Without these no x86-64 operating system runs."""

_AVX512 = tuple(name for name in BY_NAME if name.startswith("avx512"))
_VBOX: Final[Mapping[str, tuple[str, ...]]] = {
    "vbox-1": (
        "ssse3", "pcid", "sse4_1", "sse4_2", "movbe", "aes", "vmx", "pclmulqdq", "popcnt", "f16c", "xsave", "avx",
        "rdrand", "cx16", "cr8_legacy", "svm", "abm", "sse4a", "xop", "fma4", "tbm", "3dnow", "3dnowext", "rdtscp",
        "fsgsbase", "avx2", "smep", "bmi2", "invpcid", *_AVX512, "rdseed", "adx", "clflushopt", "smap", "sha_ni",
    ),
    "vbox-2": ("pni", "lahf_lm"),
    "vbox-3": ("sse", "sse2", "clflush", "cmov"),
}  # fmt: skip
"""What each of VirtualBox's levels strips in addition to the one before."""


@frozen
class Profile:
    """A named deny list. `removed` includes everything that cannot be used without what is stripped."""

    name: str
    stripped: Features
    removed: Features


def _build_profiles() -> dict[str, Profile]:
    profiles: dict[str, Profile] = {}
    stripped: Features = frozenset()
    for name, names in _VBOX.items():
        stripped |= frozenset(BY_NAME[item] for item in names)
        removed = stripped.union(*(dependents(item) for item in stripped))
        profiles[name] = Profile(name, stripped, removed)
    return profiles


PROFILES: Final[Mapping[str, Profile]] = _build_profiles()


def parse_level(level: LevelLike) -> Level | Profile:
    """The level or profile meant by a number, a decimal string or a name; raises CpuidError."""
    if isinstance(level, str):
        text = level.strip().lower()
        for known in LEVELS:
            if text in (known.name, str(known.number)):
                return known
        if text in PROFILES:
            return PROFILES[text]
    elif not isinstance(level, bool) and 0 <= level <= HIGHEST_LEVEL:
        return LEVELS[level]
    choices = ", ".join([*(f"{known.number} ({known.name})" for known in LEVELS), *PROFILES])
    raise CpuidError(f"There is no CPUID portability level {level!r}.", f"Choose one of {choices}, or auto.")


def passes(item: Feature, level: LevelLike) -> bool:
    """Whether a level lets a feature through."""
    chosen = parse_level(level)
    if isinstance(chosen, Profile):
        return item not in chosen.removed
    return chosen.allowed is None or item in chosen.allowed


def restrict(present: Features, level: LevelLike) -> Features:
    """What a level leaves of a set of features: nested for 0 to 4, consistent."""
    return with_dependencies_removed(frozenset(item for item in present if passes(item, level)))


def lowest_level_without(item: Feature) -> int | None:
    """The least restrictive level (1 to 4) that leaves a feature out, or None when all levels have it."""
    return next((level.number for level in LEVELS if not passes(item, level.number)), None)


def level_of(present: Features) -> int | None:
    """The least restrictive level (1 to 4) all of whose psABI features are there; None when not even v1's are."""
    return next((level.number for level in LEVELS[1:] if level.required <= present), None)
