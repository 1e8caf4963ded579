"""What must hold for any tables whatever: tables like real hosts', with anything taken away, added or moved."""

from __future__ import annotations

import itertools

from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from vmf.cpuid import Capability, CpuidError, CpuidRegisters, CpuidTable, compare, diff, make_contract, negotiate
from vmf.cpuid.bits import FEATURE_MASKS, MIRRORS
from vmf.cpuid.compare import level_that_avoids
from vmf.cpuid.features import (
    BY_NAME,
    Feature,
    feature,
    features_of,
    with_dependencies_removed,
    with_features,
    with_requirements,
)
from vmf.cpuid.layout import address_widths, exact_values, vendor_of, with_vendor, xsave_components
from vmf.cpuid.levels import LEVELS, PROFILES, passes, restrict
from vmf.testing.cpuid_tables import HOSTS

timeless = settings(deadline=None, max_examples=60)
"""The machines that run this are shared: how long one example takes says nothing."""

_ALL_BITS = sorted(
    Feature(*register, bit) for register, mask in FEATURE_MASKS.items() for bit in range(32) if mask >> bit & 1
)
bits = st.sampled_from(_ALL_BITS)
u32 = st.integers(0, 0xFFFF_FFFF)
registers = st.builds(CpuidRegisters, u32, u32, u32, u32)
# Leaves of numbers, guarded and free ones, and some that no manual knows.
number_leaves = st.sampled_from([0x2, 0x5, 0xA, 0x15, 0x16, 0x1C, 0x2F, 0x40000000, 0x80000005, 0x80000030])


@st.composite
def tables(draw: st.DrawFn) -> CpuidTable:
    base = HOSTS[draw(st.sampled_from(sorted(HOSTS)))]
    present = features_of(base)
    present -= draw(st.frozensets(st.sampled_from(sorted(present)), max_size=12))
    present |= draw(st.frozensets(bits, max_size=6))
    entries = dict(with_features(base, present).entries)
    for leaf in draw(st.lists(number_leaves, max_size=2)):
        entries[leaf, 0] = draw(registers)
    if draw(st.booleans()):
        widths = draw(st.integers(32, 52)) | draw(st.sampled_from([48, 57])) << 8
        entries[0x80000008, 0] = evolve(entries[0x80000008, 0], eax=widths)
    components = [key for key in entries if key[0] == 0xD and key[1] > 1]
    if components and draw(st.booleans()):
        key = draw(st.sampled_from(components))
        if draw(st.booleans()):
            del entries[key]
        else:
            entries[key] = evolve(entries[key], ebx=draw(st.integers(576, 4096)))
    if draw(st.booleans()):
        entries[1, 0] = evolve(entries[1, 0], ebx=draw(st.sampled_from([0, 8, 16])) << 8)
    table = CpuidTable(entries)
    return with_vendor(table, draw(st.sampled_from([vendor_of(base), vendor_of(base), "", "AuthenticAMD"])))


@st.composite
def close_tables(draw: st.DrawFn) -> tuple[CpuidTable, CpuidTable]:
    """A table and one that differs in a single thing, or in nothing: hosts drawn apart differ in so much that no
    difference is ever the only one."""
    table = draw(tables())
    entries = dict(table.entries)
    kind = draw(st.sampled_from(["nothing", "feature", "width", "moved", "gone", "line", "vendor"]))
    components = [key for key in entries if key[0] == 0xD and key[1] > 1]
    if kind == "feature":
        lost = draw(st.sampled_from(sorted(features_of(table))))
        return table, with_features(table, features_of(table) - {lost})
    if kind == "vendor":
        return table, with_vendor(table, draw(st.sampled_from(["", "GenuineIntel", "AuthenticAMD"])))
    if kind == "width":
        physical, linear = address_widths(table)
        physical += draw(st.integers(-2, 2))
        entries[0x80000008, 0] = evolve(entries[0x80000008, 0], eax=physical | linear << 8)
    elif kind == "line":
        entries[1, 0] = evolve(entries[1, 0], ebx=draw(st.sampled_from([0, 8, 16])) << 8)
    elif components and kind in ("moved", "gone"):
        key = draw(st.sampled_from(components))
        moved = evolve(entries[key], ebx=entries[key].ebx + 64)
        entries = {k: v for k, v in entries.items() if k != key} | ({key: moved} if kind == "moved" else {})
    return table, CpuidTable(entries)


capabilities = st.builds(Capability, tables(), st.sampled_from([0, 2_000_000, 2_000_100, 3_000_000]), st.booleans())
level_numbers = st.integers(0, 4)


def honours(contract: CpuidTable, capability: CpuidTable) -> bool:
    """The definition of "within", written apart from `compare`."""
    free = {"hypervisor", "ht", "cmp_legacy", "nonstop_tsc", "osxsave", "ospke", *MIRRORS}
    for (leaf, subleaf, register), mask in FEATURE_MASKS.items():
        ours, theirs = (getattr(table.lookup(leaf, subleaf), register) for table in (contract, capability))
        for bit in range(32):
            if (ours & ~theirs & mask) >> bit & 1 and Feature(leaf, subleaf, register, bit).name not in free:
                return False
    places = xsave_components(capability)
    return (
        vendor_of(capability) in ("", vendor_of(contract))
        and all(mine <= other for mine, other in zip(address_widths(contract), address_widths(capability), strict=True))
        and all(places.get(index) == component for index, component in xsave_components(contract).items())
        and {*exact_values(contract)} <= {*exact_values(capability)}
    )


def contract_of(capability: CpuidTable, level: int | str) -> CpuidTable | None:
    try:
        return make_contract(capability, level)
    except CpuidError:
        return None  # a profile that leaves no 64-bit system


@timeless
@given(tables(), level_numbers | st.sampled_from(["vbox-1", "vbox-2"]))
def test_a_contract_is_within_its_capability_and_consistent(capability: CpuidTable, level: int | str) -> None:
    contract = contract_of(capability, level)
    assert contract is not None
    assert honours(contract, capability)
    assert compare(contract, capability) == []
    present = features_of(contract)
    assert with_dependencies_removed(present) == present
    assert diff(contract, contract) == []
    assert make_contract(contract, level) == contract, "making it again changes nothing"


@timeless
@given(tables(), level_numbers)
def test_contracts_of_higher_levels_are_within_those_of_lower_ones(capability: CpuidTable, level: int) -> None:
    for higher in range(level, 5):
        assert compare(make_contract(capability, higher), make_contract(capability, level)) == []


@timeless
@given(st.frozensets(bits, max_size=60))
def test_levels_and_profiles_are_nested(present: frozenset[Feature]) -> None:
    present = with_requirements(present)
    for chain in ([level.number for level in LEVELS], ["host", *PROFILES]):
        sets = [restrict(present, level) for level in chain]
        assert all(more >= less for more, less in itertools.pairwise(sets))


@timeless
@given(bits)
def test_level_allow_lists_are_nested(item: Feature) -> None:
    through = [passes(item, level.number) for level in LEVELS]
    assert through == sorted(through, reverse=True)


@timeless
@given(st.tuples(tables(), tables()) | close_tables())
def test_compare_is_empty_exactly_within(pair: tuple[CpuidTable, CpuidTable]) -> None:
    for a, b in (pair, pair[::-1]):
        contract = make_contract(a)
        assert (compare(contract, b) == []) == honours(contract, b)
        assert (compare(a, b) == []) == honours(a, b)


@timeless
@given(st.tuples(tables(), tables()) | close_tables())
def test_the_level_that_avoids_a_difference_really_does(pair: tuple[CpuidTable, CpuidTable]) -> None:
    a, b = pair
    level = level_that_avoids(compare(make_contract(a), b))
    if level is not None:
        assert compare(make_contract(a, level), b) == []
        if level:
            assert compare(make_contract(a, level - 1), b) != []


@timeless
@given(capabilities, capabilities)
def test_negotiation_is_commutative(a: Capability, b: Capability) -> None:
    assert negotiate([a, b]) == negotiate([b, a])


@timeless
@given(capabilities, capabilities, capabilities)
def test_negotiation_is_associative(a: Capability, b: Capability, c: Capability) -> None:
    flat = negotiate([a, b, c])
    assert negotiate([negotiate([a, b]), c]) == flat
    assert negotiate([a, negotiate([b, c])]) == flat
    assert set(negotiate([a, negotiate([b, c])]).missing) == set(flat.missing)


@timeless
@given(capabilities)
def test_negotiation_is_idempotent(a: Capability) -> None:
    once = negotiate([a])
    assert negotiate([a, a]) == once
    assert negotiate([once]) == once
    assert compare(once.table, a.table) == []


@timeless
@given(capabilities, capabilities, capabilities)
def test_another_party_never_makes_it_richer(a: Capability, b: Capability, c: Capability) -> None:
    before, after = negotiate([a, b]), negotiate([a, b, c])
    assert after.common - before.common <= {BY_NAME[name] for name in MIRRORS}
    assert after.level >= before.level
    assert after.physical_bits <= before.physical_bits
    assert {*xsave_components(after.table)} <= {*xsave_components(before.table)}
    assert before.possible or not after.possible


@timeless
@given(tables(), tables(), st.frozensets(bits, max_size=10))
def test_a_weaker_party_never_makes_it_richer(a: CpuidTable, b: CpuidTable, lost: frozenset[Feature]) -> None:
    weaker = with_features(b, features_of(b) - lost)
    assert negotiate([a, weaker]).common <= negotiate([a, b]).common


@timeless
@given(st.tuples(tables(), tables()) | close_tables(), level_numbers)
def test_a_negotiated_contract_is_within_both_sides(pair: tuple[CpuidTable, CpuidTable], level: int) -> None:
    a, b = pair
    agreement = negotiate([a, b])
    if not agreement.possible:
        return
    for contract in (agreement.contract(), agreement.contract(level)):
        assert honours(contract, a)
        assert honours(contract, b)
        assert compare(contract, a) == compare(contract, b) == []


@timeless
@given(tables())
def test_wire_round_trip(table: CpuidTable) -> None:
    assert CpuidTable.from_wire(table.to_wire()) == table
    capability = Capability(table, 1, True, "host/kvm")
    again = Capability.from_wire(capability.to_wire())
    assert again == capability
    assert again.name == "host/kvm"


@timeless
@given(bits)
def test_every_bit_has_a_name_that_finds_it(item: Feature) -> None:
    assert item.name
    assert feature(item.name) == item
    assert feature(item.name.upper()) == item


@timeless
@given(tables(), st.frozensets(bits, max_size=4))
def test_removed_is_removed(capability: CpuidTable, unwanted: frozenset[Feature]) -> None:
    try:
        contract = make_contract(capability, 0, remove=unwanted)
    except CpuidError:
        return  # the baseline
    originals = {BY_NAME[original] for original in MIRRORS.values()}
    mirrors = {BY_NAME[name] for name in MIRRORS}
    assert not features_of(contract) & (unwanted - mirrors)
    assert not originals & features_of(contract) & unwanted


@timeless
@given(tables(), bits, level_numbers)
def test_set_is_set_or_refused_by_name(capability: CpuidTable, item: Feature, level: int) -> None:
    message = ""
    contract = capability
    try:
        contract = make_contract(capability, level, add=[item])
    except CpuidError as error:
        message = str(error)
    if message:
        assert item.name in message
    else:
        assert item in features_of(contract)
        assert compare(contract, capability) == []
