"""Comparing a contract with what a backend has: before a teleport, and after CPUID was set.

`compare` answers "can that backend honour this contract?". It reports everything at once, each difference with what
would have avoided it. `diff` answers "does the backend present what it was told to?" and is strict: every bit, but
those that follow the running guest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final, Literal

from attrs import evolve, frozen

from vmf.cpuid.bits import FEATURE_MASKS
from vmf.cpuid.features import (
    BY_NAME,
    FREE_FEATURES,
    MIRROR_FEATURES,
    REGISTERS,
    RUNTIME_FEATURES,
    Feature,
    Features,
    features_of,
)
from vmf.cpuid.layout import (
    COMPONENT_OWNERS,
    XSAVE_LEAF,
    Signature,
    XsaveComponent,
    address_widths,
    brand_of,
    clflush_line,
    exact_mask,
    exact_values,
    vendor_of,
    xsave_components,
)
from vmf.cpuid.levels import (
    BASELINE,
    LINEAR_BITS_LIMIT,
    PHYSICAL_BITS_LIMIT,
    lowest_level_without,
)
from vmf.cpuid.table import ZERO, CpuidTable

if TYPE_CHECKING:
    from vmf.teleport.check import Blocker

TSC_TOLERANCE_PPM: Final = 250
"""How far two TSC rates may differ and still pass as one: what KVM, too, takes without scaling."""

Kind = Literal["feature", "vendor", "width", "xsave", "leaf", "tsc", "signature", "brand", "override"]


@frozen
class Difference:
    """One thing in which a backend differs from a contract.

    Attributes:
        kind: what sort of thing.
        field: what differs, as the user knows it: "CPU feature avx2", "physical address width".
        contract: the contract's value (what the machine needs).
        capability: the backend's value.
        level: the lowest portability level at which the machine could have gone there, or None.
        command: the command that would have avoided it, or "".
        remedy: what to do, with that command in it.
        feature: the feature, where it is one.
    """

    kind: Kind
    field: str
    contract: str
    capability: str
    level: int | None = None
    command: str = ""
    remedy: str = ""
    feature: Feature | None = None

    def __str__(self) -> str:
        return f"{self.field}: the machine has {self.contract}, the backend {self.capability}. {self.remedy}".strip()

    def blocker(self) -> Blocker:
        """The same as the teleport's check reports it: contract is the source's value, capability the target's."""
        from vmf.teleport.check import Blocker

        return Blocker(self.field, self.contract, self.capability, self.remedy)


def blockers(differences: Iterable[Difference]) -> list[Blocker]:
    """Differences as the teleport's check reports them."""
    return [difference.blocker() for difference in differences]


def fold(differences: Iterable[Difference]) -> list[Difference]:
    """The same in fewer lines, for people: features with the same remedy together, in the first one's place."""
    groups: dict[object, list[Difference]] = {}
    for item in differences:
        alone = item.kind != "feature" or item.level is None
        groups.setdefault(id(item) if alone else (item.level, item.remedy), []).append(item)
    result: list[Difference] = []
    for group in groups.values():
        first = group[0]
        if len(group) > 1:
            listed = ", ".join(item.feature.name for item in group if item.feature is not None)
            first = evolve(first, field=f"CPU features {listed}", feature=None)
        result.append(first)
    return result


@frozen
class _Advice:
    """How the user's machine is called and set, for the remedies."""

    machine: str
    level: int

    def difference(
        self, kind: Kind, field: str, contract: str, capability: str, level: int | None, item: Feature | None = None,
        *, otherwise: str,
    ) -> Difference:  # fmt: skip
        """A difference that `level` avoids; where no higher level than the machine's does, `otherwise` helps."""
        command = ""
        if level is not None and level > self.level:
            command = f"vmf modifyvm {self.machine} --cpuid-portability-level {level}"
        elif item is not None and item not in BASELINE:
            command = f"vmf modifyvm {self.machine} --cpuid-remove {item.name}"
        if command:
            otherwise = f"Power the machine off, run `{command}`, and start it again."
        level = level if level is not None and level > self.level else None
        return Difference(kind, field, contract, capability, level, command, otherwise, item)


def compare(
    contract: CpuidTable,
    capability: CpuidTable,
    *,
    machine: str = "NAME",
    level: int = 0,
    tsc_khz: int | None = None,
    capability_tsc_khz: int | None = None,
    tsc_scaling: bool = False,
) -> list[Difference]:
    """Everything in a contract that a backend with that capability could not honour; empty when it can.

    Args:
        machine: the machine's name, for the commands in the remedies.
        level: the portability level the contract was made with (profiles count as 0): remedies go beyond it.
        tsc_khz, capability_tsc_khz: the machine's TSC rate and the backend's native one, kHz; compared when both are
            given.
        tsc_scaling: the backend can give any rate.

    Free to differ, as any backend can present them: brand, caches, topology, signature (see `notes`), highest leaves,
    and the sums in leaf 0xD, which follow from the components.
    """
    advice = _Advice(machine, level)
    found = [
        *_vendor(contract, capability),
        *_features(contract, capability, advice),
        *_widths(contract, capability, advice),
        *_xsave(contract, capability, advice),
        *_numbers(contract, capability, advice),
    ]
    if tsc_khz is not None and capability_tsc_khz is not None and not tsc_scaling:
        found += compare_tsc(tsc_khz, capability_tsc_khz)
    return _with_one_command(found, machine)


def _with_one_command(found: list[Difference], machine: str) -> list[Difference]:
    """The same, every command naming the level that avoids all that levels can avoid: one command is enough."""
    highest = max((item.level for item in found if item.level is not None), default=0)
    command = f"vmf modifyvm {machine} --cpuid-portability-level {highest}"
    remedy = f"power the machine off, run `{command}`, and start it again."
    result: list[Difference] = []
    for item in found:
        if item.level is None:
            result.append(item)
        elif item.level == highest:
            result.append(evolve(item, command=command, remedy=remedy[0].upper() + remedy[1:]))
        else:
            text = f"Portability level {item.level} leaves it out, and level {highest} all that is missing: {remedy}"
            result.append(evolve(item, command=command, remedy=text))
    return result


def compare_tsc(tsc_khz: int, native_khz: int, supported: bool | None = None) -> list[Difference]:
    """Whether a backend can give a TSC of that rate; `supported` overrides the rule of 250 ppm."""
    if supported is None:
        supported = abs(tsc_khz - native_khz) * 1_000_000 <= native_khz * TSC_TOLERANCE_PPM
    if supported:
        return []
    remedy = "No portability level hides the TSC rate: choose a host of the same rate, or one that can scale it."
    return [Difference("tsc", "TSC rate", f"{tsc_khz} kHz", f"{native_khz} kHz", remedy=remedy)]


def _vendor(contract: CpuidTable, capability: CpuidTable) -> Iterator[Difference]:
    ours, theirs = vendor_of(contract), vendor_of(capability)
    if theirs and ours != theirs:
        remedy = (
            "No portability level hides the vendor: choose a host with the same, or a CPU backend that presents any."
        )
        yield Difference("vendor", "CPU vendor", ours or "none", theirs, remedy=remedy)


def _features(contract: CpuidTable, capability: CpuidTable, advice: _Advice) -> Iterator[Difference]:
    for item in sorted(features_of(contract) - features_of(capability) - FREE_FEATURES):
        yield advice.difference(
            "feature", f"CPU feature {item.name}", "present", "absent", lowest_level_without(item), item,
            otherwise="No x86-64 system can do without it: choose another host or CPU backend.",
        )  # fmt: skip


def _widths(contract: CpuidTable, capability: CpuidTable, advice: _Advice) -> Iterator[Difference]:
    limits = (PHYSICAL_BITS_LIMIT, LINEAR_BITS_LIMIT)
    rows = zip(("physical", "linear"), address_widths(contract), address_widths(capability), limits, strict=True)
    for which, ours, theirs, limit in rows:
        if ours > theirs:
            yield advice.difference(
                "width", f"{which} address width", f"{ours} bits", f"{theirs} bits", 1 if theirs >= limit else None,
                otherwise=f"No portability level promises so few bits: run `vmf modifyvm {advice.machine}"
                " --cpuid-portability-level auto --teleport-peer HOST:PORT` with that host while powered off.",
            )  # fmt: skip


def _owner(component: XsaveComponent, present: Features) -> Feature:
    owners = [BY_NAME[name] for name in COMPONENT_OWNERS.get(component.index, ())]
    return next((owner for owner in owners if owner in present), BY_NAME["xsave"])


def _xsave(contract: CpuidTable, capability: CpuidTable, advice: _Advice) -> Iterator[Difference]:
    ours, theirs = xsave_components(contract), xsave_components(capability)
    present, available = features_of(contract), features_of(capability)
    otherwise = "Choose a host whose CPU has the same XSAVE layout."
    for index, component in ours.items():
        other = theirs.get(index)
        if other == component:
            continue
        owner = BY_NAME["xsave"] if index < 2 else _owner(component, present)
        if owner not in available and owner in present:
            continue  # the missing feature is reported already
        level = lowest_level_without(owner) if index < 2 or index in COMPONENT_OWNERS else 1
        yield advice.difference(
            "xsave", f"XSAVE state {component.name}", str(component), str(other or "absent"), level, owner,
            otherwise=otherwise,
        )  # fmt: skip


def _numbers(contract: CpuidTable, capability: CpuidTable, advice: _Advice) -> Iterator[Difference]:
    for leaf, subleaf, register, value in exact_values(contract):
        other = getattr(capability.lookup(leaf, subleaf), register) & exact_mask(leaf, subleaf, register)
        if value == other:
            continue
        if (leaf, register) == (1, "ebx"):
            yield advice.difference(
                "leaf", "CLFLUSH line size", f"{clflush_line(contract)} bytes", f"{clflush_line(capability)} bytes",
                None, BY_NAME["clflush"], otherwise="",
            )  # fmt: skip
            continue
        yield advice.difference(
            "leaf", f"CPUID leaf {leaf:#x}.{subleaf} {register}", f"{value:#x}", f"{other:#x}", 1,
            otherwise=f"Remove the feature that brings leaf {leaf:#x} with `--cpuid-remove`.",
        )  # fmt: skip


def level_that_avoids(differences: Iterable[Difference]) -> int | None:
    """The lowest portability level that would avoid them all, or None when there is none."""
    level = 0
    for difference in differences:
        if difference.level is None:
            return None
        level = max(level, difference.level)
    return level


def notes(contract: CpuidTable, capability: CpuidTable) -> list[Difference]:
    """What differs and does not matter to a teleport, for people who want to know: signature and brand."""
    found: list[Difference] = []
    ours, theirs = Signature.of(contract), Signature.of(capability)
    remedy = "The guest keeps what it saw at its start."
    if theirs.raw and ours.raw != theirs.raw:
        found.append(Difference("signature", "CPU signature", str(ours), str(theirs), remedy=remedy))
    names = brand_of(contract), brand_of(capability)
    if names[1] and names[0] != names[1]:
        found.append(Difference("brand", "CPU brand", *names, remedy=remedy))
    return found


def diff(requested: CpuidTable, read_back: CpuidTable, *, machine: str = "NAME") -> list[Difference]:
    """Where a backend presents something else than it was told to; `contract` is what was requested.

    Left out are the bits that follow the running guest: OSXSAVE, OSPKE and, in leaf 0xD, the sizes for what XCR0 and
    IA32_XSS enable now.
    """
    found: list[Difference] = []
    for leaf, subleaf in sorted({*requested.entries, *read_back.entries}):
        ours = requested.entries.get((leaf, subleaf), ZERO)
        theirs = read_back.entries.get((leaf, subleaf), ZERO)
        for register in REGISTERS:
            if leaf == XSAVE_LEAF and subleaf < 2 and register == "ebx":
                continue
            mask = FEATURE_MASKS.get((leaf, subleaf, register), 0)
            wanted, got = getattr(ours, register), getattr(theirs, register)
            changed = (wanted ^ got) & mask
            for bit in range(32):
                item = Feature(leaf, subleaf, register, bit)
                if changed >> bit & 1 and item not in RUNTIME_FEATURES:
                    found.append(_override(item, bool(wanted >> bit & 1), machine))
            if (wanted ^ got) & ~mask:
                remedy = "This CPU backend cannot keep the machine's contract: choose another (`--cpu-backend`)."
                found.append(
                    Difference(
                        "override",
                        f"CPUID leaf {leaf:#x}.{subleaf} {register}",
                        f"{wanted & ~mask:#x}",
                        f"{got & ~mask:#x}",
                        remedy=remedy,
                    )
                )
    return found


def _override(item: Feature, wanted: bool, machine: str) -> Difference:
    option = "remove" if wanted else "set"
    command = f"vmf modifyvm {machine} --cpuid-{option} {item.name}"
    remedy = (
        f"This CPU backend overrides it: choose another (`--cpu-backend`), or let the machine have it so"
        f" with `{command}`."
    )
    if item in MIRROR_FEATURES or (wanted and item in BASELINE):
        command, remedy = "", "This CPU backend overrides it: choose another (`--cpu-backend`)."
    values = ("present", "hidden")
    return Difference(
        "override", f"CPU feature {item.name}", values[not wanted], values[wanted], None, command, remedy, item
    )
