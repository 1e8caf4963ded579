"""What several backends can all present: the meet of their capabilities.

The order is "can honour every contract that the other can". In that order two capabilities have a greatest lower
bound, register kind by register kind (see `vmf.cpuid.layout`): feature bits and; widths minimum; XSAVE components
only where they are at the same place; exact numbers only where they are equal. What describes and binds nobody
(caches, signature, brand) takes one value that does not depend on the order of asking. So negotiation is commutative,
associative and idempotent, and another party, or a weaker one, never makes the result richer: it does not matter
which host asks which, nor how the hosts are grouped.

Two things have no lower bound and make an agreement impossible instead: two vendors, and two TSC rates among hosts
that cannot scale theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from attrs import evolve, field, frozen, validators

from vmf.cpuid.bits import FEATURE_MASKS
from vmf.cpuid.compare import TSC_TOLERANCE_PPM
from vmf.cpuid.contract import make_contract
from vmf.cpuid.features import FREE_FEATURES, REGISTERS, CpuidError, Feature, Features, features_of, names
from vmf.cpuid.layout import (
    ADDRESS_LEAF,
    BASIC_END,
    XSAVE_LEAF,
    Signature,
    address_widths,
    assemble,
    brand_entries,
    brand_of,
    exact_mask,
    vendor_of,
    with_vendor,
    xsave_components,
    xsave_size,
)
from vmf.cpuid.levels import HIGHEST_LEVEL, LEVELS, LevelLike, level_of
from vmf.cpuid.table import EXTENDED_BASE, ZERO, CpuidRegisters, CpuidTable
from vmf.errors import StateError

_NEUTRAL_BRAND: Final = "vmf virtual CPU"
_BRAND_LEAVES: Final = range(0x80000002, 0x80000005)


@frozen
class Capability:
    """What one backend on one host can present.

    Attributes:
        table: every leaf it can present and execute.
        tsc_khz: its TSC rate in kHz, 0 where unknown.
        tsc_scaling: it can give a guest any TSC rate.
        name: which host and backend, for explanations.
    """

    table: CpuidTable
    tsc_khz: int = field(default=0, validator=[validators.ge(0), validators.lt(1 << 32)])
    tsc_scaling: bool = False
    name: str = field(default="", eq=False)

    def to_wire(self) -> dict[str, Any]:
        """Plain data for the wire and for files."""
        return {
            "name": self.name,
            "table": self.table.to_wire(),
            "tsc_khz": self.tsc_khz,
            "tsc_scaling": self.tsc_scaling,
        }

    @classmethod
    def from_wire(cls, data: object) -> Capability:
        """The inverse of `to_wire`; raises StateError on anything else."""
        if not isinstance(data, Mapping) or set(data) != {"name", "table", "tsc_khz", "tsc_scaling"}:
            raise StateError("CPUID capability: not a mapping of name, table, tsc_khz and tsc_scaling.")
        name, khz, scaling = data["name"], data["tsc_khz"], data["tsc_scaling"]
        if not (isinstance(name, str) and len(name) <= 255 and name.isprintable()):
            raise StateError("CPUID capability: the name is not a printable text of at most 255 characters.")
        if type(khz) is not int or not 0 <= khz < 1 << 32 or type(scaling) is not bool:
            raise StateError("CPUID capability: the TSC rate is impossible.")
        return cls(CpuidTable.from_wire(data["table"]), khz, scaling, name)


@frozen
class Agreement:
    """The result of a negotiation. Equality leaves out the explanations.

    Attributes:
        table: what all can present: the capability to make a contract from.
        united: features that at least one has.
        vendors: vendors that parties insist on; more than one cannot agree.
        tsc_range: lowest and highest TSC rate, kHz, of the parties that cannot scale theirs; None without such.
        tsc_scalable: lowest TSC rate, kHz, of those that can; None without such.
        missing: for each feature that is not common, who lacks it.
        parties: who took part.
    """

    table: CpuidTable
    united: Features
    vendors: frozenset[str]
    tsc_range: tuple[int, int] | None = None
    tsc_scalable: int | None = None
    missing: Mapping[Feature, tuple[str, ...]] = field(factory=dict, eq=False)
    parties: tuple[str, ...] = field(default=(), eq=False)

    @property
    def common(self) -> Features:
        """Features that all can present."""
        return features_of(self.table)

    @property
    def level(self) -> int:
        """The common portability level: the least restrictive one that all can honour whole.

        0 where all have the very same features, else 1 to 4 by the psABI features in common (4 also where not even
        those of v1 are: `problems` says so then).
        """
        if self.common - FREE_FEATURES == self.united - FREE_FEATURES:
            return 0
        return level_of(self.common) or HIGHEST_LEVEL

    @property
    def vendor(self) -> str:
        """The vendor, or "" where nobody insists on one (or no agreement is possible)."""
        return next(iter(self.vendors)) if len(self.vendors) == 1 else ""

    @property
    def physical_bits(self) -> int:
        return address_widths(self.table)[0]

    @property
    def linear_bits(self) -> int:
        return address_widths(self.table)[1]

    @property
    def xsave_bytes(self) -> int:
        """Size of the XSAVE area, standard format, with all common components; 0 without XSAVE."""
        components = xsave_components(self.table)
        return xsave_size(components) if components else 0

    @property
    def tsc_khz(self) -> int | None:
        """A TSC rate that all can give, kHz: None where unknown, or where there is none (see `problems`)."""
        if self.tsc_range is None:
            return self.tsc_scalable
        return self.tsc_range[0] if _same_rate(self.tsc_range) else None

    @property
    def problems(self) -> list[str]:
        """Why there is no agreement, one sentence each; empty when there is."""
        found: list[str] = []
        if len(self.vendors) > 1:
            found.append(f"The CPUs are of different vendors: {', '.join(sorted(self.vendors))}.")
        if self.tsc_range is not None and not _same_rate(self.tsc_range):
            low, high = self.tsc_range
            found.append(f"The TSC rates differ ({low} to {high} kHz), and not all hosts can scale theirs.")
        baseline = LEVELS[HIGHEST_LEVEL].required
        if not baseline <= self.common:
            lost = names(baseline - self.common)
            found.append(f"Not all have the x86-64 baseline: {', '.join(lost)} missing.")
        return found

    @property
    def possible(self) -> bool:
        return not self.problems

    def contract(self, level: LevelLike | None = None, **options: Any) -> CpuidTable:
        """A contract that all parties can honour, at the common level or at another one.

        Takes `make_contract`'s other options. Raises CpuidError where no agreement is possible.
        """
        if self.problems:
            who = ", ".join(self.parties) or "these hosts"
            raise CpuidError(
                f"No CPUID contract suits all of {who}: {' '.join(self.problems)}",
                "Name other teleport peers, or choose another CPU backend on one side.",
            )
        return make_contract(self.table, self.level if level is None else level, **options)

    def explain(self) -> list[str]:
        """How the agreement came about, in sentences for people."""
        level = LEVELS[self.level]
        lines = [f"Common portability level: {level.number} ({level.name}); vendor {self.vendor or 'any'}."]
        lines += self.problems
        rate = f"{self.tsc_khz} kHz" if self.tsc_khz else "no common rate known"
        lines.append(
            f"Addresses: {self.physical_bits} bits physical, {self.linear_bits} linear."
            f" XSAVE area: {self.xsave_bytes} bytes. TSC: {rate}."
        )
        lacking: dict[tuple[str, ...], list[Feature]] = {}
        for item, who in self.missing.items():
            lacking.setdefault(who, []).append(item)
        for who, items in sorted(lacking.items()):
            lines.append(f"Without {', '.join(names(items))}: {', '.join(who)} cannot present it.")
        return lines


def negotiate(parties: Iterable[CpuidTable | Capability | Agreement]) -> Agreement:
    """What all parties can present. Raises CpuidError when there are none.

    An agreement may be a party: it stands for those who made it.
    """
    agreements = [_alone(party, number) for number, party in enumerate(parties, 1)]
    if not agreements:
        raise CpuidError("Nobody to negotiate a CPUID contract with.", "Name at least one host or backend.")
    result = agreements[0]
    for other in agreements[1:]:
        result = _both(result, other)
    return result


def _same_rate(rates: tuple[int, int]) -> bool:
    low, high = rates
    return (high - low) * 1_000_000 <= low * TSC_TOLERANCE_PPM


def _alone(party: CpuidTable | Capability | Agreement, number: int) -> Agreement:
    if isinstance(party, Agreement):
        return party
    capability = party if isinstance(party, Capability) else Capability(party)
    vendor = vendor_of(capability.table)
    # The meet with itself is the canonical form: it drops what no meet keeps, so that asking twice changes nothing.
    table = assemble(capability.table, features_of(capability.table))
    table = meet(table, table, vendor, (table,))
    khz = capability.tsc_khz
    return Agreement(
        table=table,
        united=features_of(table),
        vendors=frozenset({vendor} if vendor else ()),
        tsc_range=(khz, khz) if khz and not capability.tsc_scaling else None,
        tsc_scalable=khz if khz and capability.tsc_scaling else None,
        parties=(capability.name or f"party {number}",),
    )


def _both(a: Agreement, b: Agreement) -> Agreement:
    vendors = a.vendors | b.vendors
    # Family and model mean something beside their vendor only: who can present any vendor can present any of them.
    named = tuple(side.table for side in (a, b) if side.vendors) or (a.table, b.table)
    table = meet(a.table, b.table, next(iter(vendors)) if len(vendors) == 1 else "", named)
    united, common = a.united | b.united, features_of(table)
    ranges = [rates for rates in (a.tsc_range, b.tsc_range) if rates is not None]
    scalable = [rate for rate in (a.tsc_scalable, b.tsc_scalable) if rate is not None]
    missing: dict[Feature, tuple[str, ...]] = {}
    sides = ((a, a.common), (b, b.common))
    for item in sorted(united - common - FREE_FEATURES):
        who: list[str] = []
        for side, has in sides:
            who += side.missing.get(item, () if item in has else side.parties)
        # Nobody lacks the bit itself: what it needs is gone.
        missing[item] = tuple(who) or a.parties + b.parties
    return Agreement(
        table=table,
        united=united,
        vendors=vendors,
        tsc_range=(min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else None,
        tsc_scalable=min(scalable) if scalable else None,
        missing=missing,
        parties=a.parties + b.parties,
    )


def meet(a: CpuidTable, b: CpuidTable, vendor: str, named: tuple[CpuidTable, ...]) -> CpuidTable:
    """The greatest table that both can present, as a capability of `vendor` ("" for any).

    Signature and brand are taken from `named`, which are one or both of them.
    """
    entries: dict[tuple[int, int], CpuidRegisters] = {}
    for leaf, subleaf in {*a.entries, *b.entries}:
        if leaf != XSAVE_LEAF:
            entries[leaf, subleaf] = _meet_registers(a, b, leaf, subleaf)
    entries |= _meet_descriptions(a, b, named)
    entries |= _meet_xsave(a, b)
    (physical_a, linear_a), (physical_b, linear_b) = address_widths(a), address_widths(b)
    widths = min(physical_a, physical_b) | min(linear_a, linear_b) << 8
    entries[ADDRESS_LEAF, 0] = evolve(entries.get((ADDRESS_LEAF, 0), ZERO), eax=widths)
    table = with_vendor(CpuidTable(entries), vendor)
    return assemble(table, features_of(table))


def _meet_registers(a: CpuidTable, b: CpuidTable, leaf: int, subleaf: int) -> CpuidRegisters:
    values: dict[str, int] = {}
    for register in REGISTERS:
        left = getattr(a.lookup(leaf, subleaf), register)
        right = getattr(b.lookup(leaf, subleaf), register)
        bits = FEATURE_MASKS.get((leaf, subleaf, register), 0)
        exact = exact_mask(leaf, subleaf, register)
        # The CLFLUSH line is the one exact field that shares its register with descriptions, which the contract sets.
        values[register] = left & right & bits | (left & exact if left & exact == right & exact else 0)
    return CpuidRegisters(**values)


def _descriptive_groups(table: CpuidTable) -> dict[int, tuple[tuple[int, int, int, int, int], ...]]:
    """Leaves that only describe, all subleaves of one together: leaf to rows of subleaf and four registers."""
    groups: dict[int, list[tuple[int, int, int, int, int]]] = {}
    for (leaf, subleaf), registers in table.entries.items():
        if leaf in (0, XSAVE_LEAF, EXTENDED_BASE, *_BRAND_LEAVES) or BASIC_END <= leaf < EXTENDED_BASE:
            continue
        if any((leaf, subleaf, name) in FEATURE_MASKS or exact_mask(leaf, subleaf, name) for name in REGISTERS):
            continue
        groups.setdefault(leaf, []).append((subleaf, *registers))
    return {leaf: tuple(sorted(rows)) for leaf, rows in groups.items()}


def _meet_descriptions(
    a: CpuidTable, b: CpuidTable, named: tuple[CpuidTable, ...]
) -> dict[tuple[int, int], CpuidRegisters]:
    left, right = _descriptive_groups(a), _descriptive_groups(b)
    entries: dict[tuple[int, int], CpuidRegisters] = {}
    for leaf in {*left, *right}:
        # A total order on whole descriptions: the smaller one, or the only one, describes.
        rows = min(groups[leaf] for groups in (left, right) if leaf in groups)
        entries |= {(leaf, subleaf): ZERO for groups in (left, right) for subleaf, *_ in groups.get(leaf, ())}
        entries |= {(leaf, subleaf): CpuidRegisters(*registers) for subleaf, *registers in rows}
    brands = {brand_of(table) for table in named} - {""}
    brand = brands.pop() if len(brands) == 1 else _NEUTRAL_BRAND if brands else ""
    entries |= brand_entries(brand)
    signatures = [signature for signature in map(Signature.of, named) if signature.raw]
    raw = min(signatures).raw if signatures else 0
    one = _meet_registers(a, b, 1, 0)
    entries[1, 0] = evolve(one, eax=raw, ebx=one.ebx & exact_mask(1, 0, "ebx"))
    package = min(table.lookup(0x80000001, 0).ebx for table in named)
    entries[0x80000001, 0] = evolve(_meet_registers(a, b, 0x80000001, 0), ebx=package)
    return entries


def _meet_xsave(a: CpuidTable, b: CpuidTable) -> dict[tuple[int, int], CpuidRegisters]:
    left, right = xsave_components(a), xsave_components(b)
    shared = [component for index, component in left.items() if right.get(index) == component]
    user = sum(1 << component.index for component in shared if not component.supervisor)
    system = sum(1 << component.index for component in shared if component.supervisor)
    low = 0xFFFF_FFFF
    entries = {
        (XSAVE_LEAF, 0): CpuidRegisters(user & low, 0, 0, user >> 32),
        (XSAVE_LEAF, 1): CpuidRegisters(_meet_registers(a, b, XSAVE_LEAF, 1).eax, 0, system & low, system >> 32),
    }
    for component in shared:
        if component.index > 1:
            entries[XSAVE_LEAF, component.index] = CpuidRegisters(component.size, component.offset, component.flags)
    return entries
