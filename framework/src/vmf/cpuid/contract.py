"""Making a contract: what one machine's guest will see, for as long as it lives.

The contract is taken from a capability (everything a backend can present and execute here, or what several can) by
leaving out; nothing the capability lacks ever gets in. What a backend need not be able to do for it to be presented
(see `vmf.cpuid.layout`: topology, brand, the hypervisor bit) is set to the same for everybody:

- one vCPU: APIC id 0, one logical processor, one core, one thread, in every leaf that tells;
- the hypervisor bit is set (unless removed), as the guest does run in a VM, but no hypervisor's leaves at 0x40000000:
  a paravirtual interface would tie the machine to the one hypervisor that offers it;
- OSXSAVE and OSPKE are clear: engines that follow the guest's CR4 set them;
- levels 1 to 4 and profiles have a neutral brand string, since the host's own would be wrong after the first
  teleport. Vendor, family, model and stepping stay: guests choose workarounds by them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from attrs import evolve

from vmf.cpuid.features import (
    BY_NAME,
    FREE_FEATURES,
    CpuidError,
    Feature,
    Features,
    features,
    features_of,
    names,
    requirements,
    with_requirements,
)
from vmf.cpuid.layout import (
    ADDRESS_LEAF,
    AMD_VENDORS,
    LEAF_GUARDS,
    address_widths,
    assemble,
    brand_entries,
    consistent_features,
    exact_values,
    vendor_of,
    with_vendor,
)
from vmf.cpuid.levels import (
    BASELINE,
    LINEAR_BITS_LIMIT,
    PHYSICAL_BITS_LIMIT,
    LevelLike,
    Profile,
    parse_level,
    restrict,
)
from vmf.cpuid.table import EXTENDED_BASE, ZERO, CpuidRegisters, CpuidTable

DEFAULT_VENDOR: Final = "GenuineIntel"
"""What a machine of a backend that can present any vendor shows."""
AMD_SIGNATURE: Final = 0x0080_0F12
"""Family 23, model 1, stepping 2 (Zen): what it shows as an AMD CPU."""
_HYPERVISOR: Final = BY_NAME["hypervisor"]
_MULTIPROCESSOR: Final = frozenset({BY_NAME["ht"], BY_NAME["cmp_legacy"]})
_SETTABLE: Final = frozenset({_HYPERVISOR, BY_NAME["nonstop_tsc"]})
"""What can be set although the capability lacks it: the VMM itself sees to it."""
_PORTABLE_LEAVES: Final = frozenset({0x0, 0x1, 0x2, 0x4, 0x7, 0x15, EXTENDED_BASE, *range(0x80000001, 0x80000009)})
"""Leaves of levels 1 to 4: those of every x86-64 CPU, caches, and those whose feature was let in."""


def make_contract(
    capability: CpuidTable,
    level: LevelLike = 0,
    add: Iterable[str | Feature] = (),
    remove: Iterable[str | Feature] = (),
    *,
    vendor: str | None = None,
    tsc_khz: int | None = None,
) -> CpuidTable:
    """The contract of a machine.

    Args:
        capability: what the backend (or every backend that was asked, see `vmf.cpuid.negotiate`) can present.
        level: portability level 0 to 4, or a profile's name.
        add: features to let in although the level leaves them out, with all they require (`--cpuid-set`).
        remove: features to leave out, with all that require them (`--cpuid-remove`). "hypervisor" is one.
        vendor: for a capability that can present any vendor: which; `DEFAULT_VENDOR` if not said.
        tsc_khz: rate of the guest's TSC in kHz, told in leaf 0x15; None leaves that leaf as the capability has it.

    Returns:
        A table that is consistent in itself and within the capability (`compare` finds nothing).

    Raises:
        CpuidError: unknown level or feature; a feature to add that the capability lacks, or that is also to be
            removed; another vendor than the capability's; nothing left that a 64-bit system could run on.
    """
    chosen = parse_level(level)
    own = vendor_of(capability)
    if vendor is not None and own and vendor != own:
        raise CpuidError(
            f"CPU vendor {vendor}: the backend can present {own} only.",
            f"Leave the vendor at {own}, or choose a CPU backend that can present any.",
        )
    if not own:
        capability = _as_vendor(capability, vendor or DEFAULT_VENDOR)

    wanted, unwanted = features(add), features(remove)
    available = consistent_features(features_of(capability), capability)
    _check_wishes(wanted, unwanted, available)
    kept = restrict(available, level) | (with_requirements(wanted) & available) | (wanted & _SETTABLE)
    kept -= unwanted
    kept -= {item for item in kept if requirements(item) & unwanted}
    lost = BASELINE & available - kept
    if lost:
        raise CpuidError(
            f"No x86-64 system can run without the CPU feature{'s' * (len(lost) > 1)} {', '.join(names(lost))}, which"
            f" {'this level' if not unwanted & lost else '--cpuid-remove'} takes away.",
            "Choose a less restrictive level." if not unwanted & lost else "Do not remove it.",
        )
    kept -= _MULTIPROCESSOR

    portable = isinstance(chosen, Profile) or chosen.number > 0
    limited = not isinstance(chosen, Profile) and chosen.number > 0
    base = _limit_numbers(capability, kept) if limited else capability
    if portable:
        base = CpuidTable({**base.entries, **brand_entries(f"vmf virtual CPU ({chosen.name})")})
    leaves = _PORTABLE_LEAVES | {item.leaf for item in kept}

    def keep_leaf(leaf: int) -> bool:
        # A leaf that describes a feature stands or falls with the feature; `assemble` sees to that.
        return not limited or leaf in leaves or leaf in LEAF_GUARDS

    table = assemble(_one_vcpu(base), kept, keep_leaf=keep_leaf, unknown_components=not limited)
    table = _with_hypervisor(table, _HYPERVISOR not in unwanted)
    return table if tsc_khz is None else with_tsc(table, tsc_khz)


def _as_vendor(table: CpuidTable, vendor: str) -> CpuidTable:
    """A capability of any vendor, as one of this vendor; its own signature is that of the default vendor's CPU."""
    entries = dict(with_vendor(table, vendor).entries)
    if vendor in AMD_VENDORS:
        entries[1, 0] = evolve(table.lookup(1, 0), eax=AMD_SIGNATURE)
    return CpuidTable(entries)


def _check_wishes(wanted: Features, unwanted: Features, available: Features) -> None:
    for item in sorted(wanted):
        if item in FREE_FEATURES - _SETTABLE:
            raise CpuidError(
                f"CPU feature {item.name} cannot be set: it follows from the number of vCPUs or from the guest.",
                f"Leave out `--cpuid-set {item.name}`.",
            )
        if item not in available | _SETTABLE:
            raise CpuidError(
                f"CPU feature {item.name} ({item.place}) cannot be set: the backend cannot present it here.",
                f"Leave out `--cpuid-set {item.name}`; `vmf cpuid show` lists what can be presented.",
            )
        clash = (requirements(item) | {item}) & unwanted
        if clash:
            raise CpuidError(
                f"CPU feature {item.name} cannot be set while {names(clash)[0]} is removed.",
                f"Leave out either `--cpuid-set {item.name}` or `--cpuid-remove {names(clash)[0]}`.",
            )


def _limit_numbers(table: CpuidTable, kept: Features) -> CpuidTable:
    """The same without numbers that hosts differ in, and with widths that all have."""
    entries = dict(table.entries)
    for leaf, subleaf, register, value in exact_values(table):
        # The CLFLUSH line must stay for CLFLUSH to make sense.
        if leaf in _PORTABLE_LEAVES and (leaf, register) != (1, "ebx"):
            old = entries[leaf, subleaf]
            entries[leaf, subleaf] = evolve(old, **{register: getattr(old, register) & ~value})
    physical, linear = address_widths(table)
    if BY_NAME["la57"] not in kept:
        linear = min(linear, LINEAR_BITS_LIMIT)
    old = entries.get((ADDRESS_LEAF, 0), ZERO)
    entries[ADDRESS_LEAF, 0] = evolve(old, eax=min(physical, PHYSICAL_BITS_LIMIT) | linear << 8)
    return CpuidTable(entries)


def _one_vcpu(table: CpuidTable) -> CpuidTable:
    """The same with the topology of one vCPU."""
    entries = dict(table.entries)
    for (leaf, subleaf), old in table.entries.items():
        new: CpuidRegisters | None = old
        if leaf == 0x1:
            # [15:8] CLFLUSH line, [23:16] logical processors, [31:24] initial APIC id.
            new = evolve(old, ebx=old.ebx & 0xFF00 | 1 << 16)
        elif leaf == 0x4 or (leaf == 0x8000001D and old.eax & 0x1F):
            new = evolve(old, eax=old.eax & 0x3FFF)
        elif leaf in (0xB, 0x1F):
            new = _ONE_THREAD.get(subleaf)
        elif leaf == ADDRESS_LEAF:
            new = evolve(old, ecx=0)
        elif leaf == 0x8000001E:
            new = ZERO
        if new is None:
            del entries[leaf, subleaf]
        else:
            entries[leaf, subleaf] = new
    return CpuidTable(entries)


_ONE_THREAD: Final = {0: CpuidRegisters(0, 1, 0x100, 0), 1: CpuidRegisters(0, 1, 0x201, 0)}
"""Leaves 0xB and 0x1F: one thread in the core, one in the package, x2APIC id 0."""


def _with_hypervisor(table: CpuidTable, present: bool) -> CpuidTable:
    old = table.lookup(1, 0)
    bit = 1 << _HYPERVISOR.bit
    return CpuidTable({**table.entries, (1, 0): evolve(old, ecx=old.ecx | bit if present else old.ecx & ~bit)})


def tsc_leaf(tsc_khz: int) -> CpuidRegisters:
    """Leaf 0x15 for a TSC rate: ratio 2/1 of a crystal of half the rate, in Hz (SDM vol. 2A, CPUID).

    Guests multiply crystal and ratio in 32 bits, so the ratio must be small; it is greater than 2 only where the
    crystal would not fit otherwise, beyond 8.5 GHz (an emulator's clock). Raises CpuidError for a rate that is none.
    """
    if not 1 <= tsc_khz < 1 << 32:
        raise CpuidError(f"A TSC rate of {tsc_khz} kHz cannot be told in CPUID.", "Give the rate in kHz.")
    ratio = 2
    while (crystal := tsc_khz * 1000 // ratio) >> 32:
        ratio *= 2
    return CpuidRegisters(1, ratio, crystal, 0)


def with_tsc(table: CpuidTable, tsc_khz: int) -> CpuidTable:
    """The table telling a TSC rate in leaf 0x15, and no leaf 0x16. Raises CpuidError for a rate that is none."""
    entries = {key: value for key, value in table.entries.items() if key[0] != 0x16}
    entries[0x15, 0] = tsc_leaf(tsc_khz)
    top = table.lookup(0, 0)
    basic = max(leaf for leaf, _ in entries if leaf < 0x4000_0000)
    entries[0, 0] = evolve(top, eax=basic)
    return CpuidTable(entries)


def without(contract: CpuidTable, *unwanted: str | Feature) -> CpuidTable:
    """A contract with less in it; what a CPUID policy plugin returns."""
    gone = features(unwanted)
    kept = features_of(contract) - gone
    kept -= {item for item in kept if requirements(item) & gone}
    table = assemble(contract, kept)
    return _with_hypervisor(table, _HYPERVISOR in kept)
