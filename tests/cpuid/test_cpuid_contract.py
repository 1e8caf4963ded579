"""Levels, profiles, contracts, comparison and read-back on tables like real hosts'."""

from __future__ import annotations

import pytest
from attrs import evolve

from vmf.cpuid import Capability, CpuidError, CpuidTable, blockers, compare, diff, make_contract, negotiate, without
from vmf.cpuid.compare import compare_tsc, fold, level_that_avoids, notes
from vmf.cpuid.contract import with_tsc
from vmf.cpuid.features import feature, features, features_of, names
from vmf.cpuid.layout import (
    Signature,
    XsaveComponent,
    address_widths,
    brand_of,
    compacted_size,
    vendor_of,
    with_vendor,
    xsave_components,
    xsave_size,
)
from vmf.cpuid.levels import BASELINE, LEVELS, PROFILES, level_of, lowest_level_without, parse_level, restrict
from vmf.testing.cpuid_tables import EMULATOR, HASWELL, HOSTS, MILAN, NAPLES, NEHALEM, QEMU64, SKYLAKE_SP

AMD_LIKE = with_vendor(EMULATOR, "AuthenticAMD")


def has(table: CpuidTable, *wanted: str) -> list[bool]:
    return [feature(name) in features_of(table) for name in wanted]


def test_levels_are_those_of_the_psabi() -> None:
    assert [(level.number, level.name) for level in LEVELS] == [
        (0, "host"), (1, "x86-64-v4"), (2, "x86-64-v3"), (3, "x86-64-v2"), (4, "x86-64-v1"),
    ]  # fmt: skip
    expected = {"nehalem": 3, "haswell": 2, "skylake-sp": 1, "naples": 2, "milan": 2, "qemu64": 4, "emulator": 3}
    assert {name: level_of(features_of(table)) for name, table in HOSTS.items()} == expected
    assert level_of(frozenset()) is None
    assert lowest_level_without(feature("avx512f")) == 2
    assert lowest_level_without(feature("avx2")) == 3
    assert lowest_level_without(feature("popcnt")) == 4
    assert lowest_level_without(feature("aes")) == 1
    assert lowest_level_without(feature("sse2")) is None
    assert lowest_level_without(feature("cpuid-7.1-ecx-31")) == 1


@pytest.mark.parametrize("level", [0, "0", "host", 3, "3", "x86-64-v2", "vbox-1", " VBOX-1 "])
def test_levels_by_number_and_name(level: int | str) -> None:
    assert parse_level(level).name in ("host", "x86-64-v2", "vbox-1")


@pytest.mark.parametrize("level", [-1, 5, "5", "v9", "auto", True, ""])
def test_no_such_level(level: int | str) -> None:
    with pytest.raises(CpuidError, match="portability level"):
        make_contract(HASWELL, level)


def test_a_level_masks_what_it_should() -> None:
    two, three, four = (make_contract(SKYLAKE_SP, level) for level in (2, 3, 4))
    assert has(two, "avx2", "fma", "abm", "movbe", "xsave", "avx512f", "aes", "pcid") == [True] * 5 + [False] * 3
    assert has(three, "sse4_2", "popcnt", "cx16", "lahf_lm", "avx", "xsave") == [True] * 4 + [False] * 2
    assert has(four, "sse2", "nx", "lm", "pni", "cx16") == [True] * 3 + [False] * 2
    assert three.lookup(0xD, 0).eax == 0
    assert address_widths(three) == (39, 48)
    assert brand_of(three) == "vmf virtual CPU (x86-64-v2)"
    assert vendor_of(three) == "GenuineIntel"


def test_xsave_sizes_follow_the_components() -> None:
    """Known sums: Skylake-SP 2696 bytes with PKRU; AVX alone 832; AVX-512 without PKRU 2688."""
    assert make_contract(SKYLAKE_SP).lookup(0xD, 0).ecx == 2696
    one, two = make_contract(SKYLAKE_SP, 1), make_contract(SKYLAKE_SP, 2)
    assert (one.lookup(0xD, 0).eax, one.lookup(0xD, 0).ecx) == (0xE7, 2688)
    assert (two.lookup(0xD, 0).eax, two.lookup(0xD, 0).ecx) == (0x7, 832)
    assert two.lookup(0xD, 5).eax == 0, "no place without its component"
    assert one.lookup(0xD, 1).ebx == 0, "no compacted format without XSAVEC"
    milan = make_contract(MILAN)
    # 576 + AVX 256 + PKRU 8 + CET 16 + 24.
    assert milan.lookup(0xD, 1).ebx == 880
    assert sorted(xsave_components(milan)) == [0, 1, 2, 9, 11, 12]
    assert sorted(xsave_components(make_contract(MILAN, remove=["xsaves"]))) == [0, 1, 2, 9]


def test_compacted_components_are_aligned_where_they_say_so() -> None:
    """SDM vol. 1, 13.4.3: flag bit 1 of a component moves it to the next multiple of 64 bytes."""
    places = {2: XsaveComponent(2, 256, 576), 9: XsaveComponent(9, 8, 832), 17: XsaveComponent(17, 64, 2752, 2)}
    assert compacted_size(places) == 832 + 64 + 64
    assert compacted_size({**places, 17: XsaveComponent(17, 64, 2752)}) == 832 + 8 + 64
    assert xsave_size(places) == 2752 + 64


@pytest.mark.parametrize(("physical", "linear", "fields"), [
    (40, 48, []), (38, 48, ["physical address width"]),
    (39, 48, ["physical address width"]), (52, 47, ["linear address width"]),
])  # fmt: skip
def test_address_widths_to_the_bit(physical: int, linear: int, fields: list[str]) -> None:
    contract = make_contract(NEHALEM)
    widths = evolve(NEHALEM.lookup(0x80000008, 0), eax=physical | linear << 8)
    found = compare(contract, CpuidTable({**NEHALEM.entries, (0x80000008, 0): widths}), machine="deb")
    assert [item.field for item in found] == fields
    # Levels promise 39 and 48 bits.
    assert [item.level for item in found] == ([1] if physical == 39 else [None] * len(found))
    for item in found:
        assert ("--teleport-peer" in item.remedy) == (item.level is None)


def test_a_feature_without_its_xsave_component_is_not_promised() -> None:
    broken = CpuidTable({key: value for key, value in SKYLAKE_SP.entries.items() if key != (0xD, 7)})
    contract = make_contract(broken)
    assert has(contract, "avx512f", "avx512vl", "avx2") == [False, False, True]
    assert 5 not in xsave_components(contract)


def test_topology_is_one_vcpu_everywhere() -> None:
    for table in HOSTS.values():
        contract = make_contract(table)
        assert contract.lookup(1, 0).ebx >> 16 == 1, "APIC id 0, one logical processor"
        assert has(contract, "ht", "cmp_legacy") == [False, False]
        assert contract.lookup(4, 0).eax >> 14 == 0
        assert contract.lookup(0x80000008, 0).ecx == 0
        assert tuple(contract.lookup(0xB, 1)) == (0, 1, 0x201, 0)
        assert contract.lookup(0x8000001D, 0).eax >> 14 == 0


def test_hypervisor_policy_and_runtime_bits() -> None:
    contract = make_contract(HASWELL)
    assert has(contract, "hypervisor", "osxsave") == [True, False]
    assert not any(0x40000000 <= leaf < 0x80000000 for leaf, _ in contract.entries)
    assert has(make_contract(HASWELL, remove=["hypervisor"]), "hypervisor") == [False]


def test_highest_leaves_are_what_is_there() -> None:
    assert make_contract(HASWELL).lookup(0, 0).eax == 0xD
    assert make_contract(HASWELL, 3).lookup(0, 0).eax == 0x4
    assert make_contract(SKYLAKE_SP).lookup(0, 0).eax == 0x16
    assert make_contract(HASWELL, 4).lookup(0x80000000, 0).eax == 0x80000008
    assert make_contract(MILAN, 4).lookup(0x80000000, 0).ebx == MILAN.lookup(0, 0).ebx
    told = make_contract(HASWELL, 3, tsc_khz=2_400_000)
    assert tuple(told.lookup(0x15, 0)) == (1, 2, 1_200_000_000, 0)
    assert told.lookup(0, 0).eax == 0x15
    with pytest.raises(CpuidError, match="TSC rate"):
        with_tsc(told, 1 << 32)


def test_leaves_fall_with_their_feature() -> None:
    assert make_contract(SKYLAKE_SP).lookup(0x14, 0).eax == 1
    assert make_contract(SKYLAKE_SP, remove=["intel_pt"]).lookup(0x14, 0).eax == 0
    assert make_contract(HASWELL, remove=["monitor"]).lookup(5, 0).eax == 0
    assert make_contract(MILAN, remove=["topoext"]).lookup(0x8000001D, 0).eax == 0


def test_set_brings_back_what_a_level_masks_and_all_it_needs() -> None:
    contract = make_contract(MILAN, 3, add=["avx2", "aes", "smep"])
    assert has(contract, "avx2", "avx", "xsave", "aes", "smep", "fma", "pcid") == [True] * 5 + [False] * 2
    assert contract.lookup(0xD, 0).ecx == 832
    assert compare(contract, MILAN) == []
    unknown = evolve(MILAN.lookup(0x80000021, 0), eax=MILAN.lookup(0x80000021, 0).eax | 1 << 4)
    host = CpuidTable({**MILAN.entries, (0x80000021, 0): unknown})
    assert has(make_contract(host, 4, add=["cpuid-80000021.0-eax-4"]), "cpuid-80000021.0-eax-4") == [True]
    assert has(make_contract(host, 4), "cpuid-80000021.0-eax-4") == [False]


def test_remove_takes_what_needs_it_along() -> None:
    contract = make_contract(MILAN, remove=["avx"])
    assert has(contract, "avx", "avx2", "fma", "vaes", "aes", "xsave") == [False] * 4 + [True] * 2
    assert contract.lookup(0xD, 0).eax == 1 | 2 | 1 << 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"add": ["avx512f"]}, r"avx512f \(CPUID.7H.0:EBX\[16\]\) cannot be set: the backend cannot present it"),
        ({"add": ["avx2"], "remove": ["avx"]}, "avx2 cannot be set while avx is removed"),
        ({"add": ["ht"]}, "ht cannot be set"),
        ({"add": ["osxsave"]}, "osxsave cannot be set"),
        ({"remove": ["sse2"]}, "without the CPU feature sse2, which --cpuid-remove takes away"),
        ({"level": "vbox-3"}, "without the CPU features cmov, sse, sse2, which this level takes away"),
        ({"add": ["axv2"]}, "Did you mean avx2"),
        ({"vendor": "GenuineIntel"}, "can present AuthenticAMD only"),
    ],
)
def test_impossible_wishes(options: dict[str, object], message: str) -> None:
    with pytest.raises(CpuidError, match=message):
        make_contract(MILAN, **options)  # type: ignore[arg-type]


def test_a_capability_of_any_vendor() -> None:
    assert vendor_of(make_contract(EMULATOR)) == "GenuineIntel"
    as_amd = make_contract(EMULATOR, vendor="AuthenticAMD")
    assert vendor_of(as_amd) == "AuthenticAMD"
    assert has(as_amd, "amd_fpu", "amd_apic") == [True, False]
    assert compare(make_contract(MILAN, 3), EMULATOR) == []
    assert compare(make_contract(HASWELL, 3), EMULATOR) == []
    assert compare(as_amd, MILAN) == []


def test_virtualbox_profiles() -> None:
    one, two = make_contract(MILAN, "vbox-1"), make_contract(MILAN, "vbox-2")
    assert has(one, "ssse3", "avx2", "aes", "cx16", "svm", "sha_ni", "xsaveopt") == [False] * 7
    assert has(one, "pni", "lahf_lm", "bmi1", "x2apic", "clflush") == [True] * 5
    assert has(two, "pni", "lahf_lm") == [False, False]
    assert has(two, "sse2", "clflush") == [True, True]
    assert features_of(two) < features_of(one)
    assert list(PROFILES) == ["vbox-1", "vbox-2", "vbox-3"]
    assert brand_of(one) == "vmf virtual CPU (vbox-1)"


def test_compare_names_feature_level_and_command() -> None:
    contract = make_contract(HASWELL)
    differences = {item.field: item for item in compare(contract, AMD_LIKE, machine="deb")}
    assert "CPU vendor" in differences
    assert differences["CPU vendor"].level is None
    avx2 = differences["CPU feature avx2"]
    assert (avx2.contract, avx2.capability, avx2.level) == ("present", "absent", 3)
    assert avx2.command == "vmf modifyvm deb --cpuid-portability-level 3"
    assert avx2.command in avx2.remedy
    aes = differences["CPU feature aes"]
    assert aes.level == 1
    assert aes.command == avx2.command, "one command is enough for all of them"
    assert differences["physical address width"].contract == "46 bits"
    assert "XSAVE state avx" not in differences, "said already with the feature"
    first = blockers([avx2])[0]
    assert (first.field, first.source, first.target) == ("CPU feature avx2", "present", "absent")
    assert "--cpuid-portability-level 3" in first.remedy


def test_what_no_level_hides_is_to_be_removed() -> None:
    poor = make_contract(EMULATOR, remove=["pat", "mce"])
    (difference,) = compare(make_contract(EMULATOR, 4), poor, machine="deb", level=4)
    assert difference.command == "vmf modifyvm deb --cpuid-remove pat"
    # Set by hand on top of a level that would have left it out.
    (difference,) = compare(make_contract(MILAN, 3, add=["aes"]), EMULATOR, machine="deb", level=3)
    assert difference.level is None
    assert difference.command == "vmf modifyvm deb --cpuid-remove aes"


def test_other_xsave_layout_is_refused() -> None:
    """PKRU is at 2688 on Intel and at 832 on AMD: same feature, same size, other place."""
    intel_like = with_vendor(MILAN, "GenuineIntel")
    contract = make_contract(MILAN, 2, add=["pku"])
    found = compare(with_vendor(contract, ""), with_vendor(SKYLAKE_SP, ""), machine="deb")
    assert [(item.field, item.contract, item.capability) for item in found] == [
        ("XSAVE state pkru", "8 bytes at 832", "8 bytes at 2688")
    ]
    assert found[0].level == 1
    assert [item.kind for item in compare(contract, intel_like)] == ["vendor"]


def test_exact_numbers_and_lines() -> None:
    contract = make_contract(NEHALEM)
    host = CpuidTable({**NEHALEM.entries, (5, 0): evolve(NEHALEM.lookup(5, 0), eax=128)})
    (difference,) = compare(contract, host, machine="deb")
    assert (difference.field, difference.contract, difference.capability) == ("CPUID leaf 0x5.0 eax", "0x40", "0x80")
    assert difference.level == 1
    wide = CpuidTable({**NEHALEM.entries, (1, 0): evolve(NEHALEM.lookup(1, 0), ebx=16 << 8)})
    (difference,) = compare(contract, wide, machine="deb")
    assert (difference.field, difference.contract, difference.capability) == (
        "CLFLUSH line size", "64 bytes", "128 bytes",
    )  # fmt: skip
    assert difference.command == "vmf modifyvm deb --cpuid-remove clflush"


def test_tsc_rate() -> None:
    contract = make_contract(NEHALEM)
    assert compare(contract, NEHALEM, tsc_khz=2_000_000, capability_tsc_khz=2_000_500) == []
    assert compare(contract, NEHALEM, tsc_khz=2_000_000, capability_tsc_khz=3_000_000, tsc_scaling=True) == []
    (difference,) = compare(contract, NEHALEM, tsc_khz=2_000_000, capability_tsc_khz=2_001_000)
    assert (difference.kind, difference.contract, difference.capability) == ("tsc", "2000000 kHz", "2001000 kHz")
    assert compare_tsc(1, 2, supported=True) == []


def test_older_hosts_and_newer_ones() -> None:
    assert compare(make_contract(NAPLES, 1), MILAN) == []
    found = compare(make_contract(MILAN), NAPLES)
    level = level_that_avoids(found)
    assert level == 1
    assert compare(make_contract(MILAN, level), NAPLES) == []
    assert [item.kind for item in notes(make_contract(MILAN), NAPLES)] == ["signature", "brand"]
    assert len(fold(found)) < 4
    assert "pcid" in fold(found)[0].field


def test_read_back_is_strict_but_for_the_running_guest() -> None:
    requested = make_contract(MILAN, 2)
    assert diff(requested, requested) == []
    runtime = {
        **requested.entries,
        (1, 0): evolve(requested.lookup(1, 0), ecx=requested.lookup(1, 0).ecx | 1 << 27),
        (0xD, 0): evolve(requested.lookup(0xD, 0), ebx=576),
    }
    assert diff(requested, CpuidTable(runtime)) == [], "OSXSAVE and the present XSAVE size"
    overridden = {
        **requested.entries,
        (7, 0): evolve(requested.lookup(7, 0), ebx=requested.lookup(7, 0).ebx | 1 << 18),
    }
    (difference,) = diff(requested, CpuidTable(overridden), machine="deb")
    assert (difference.field, difference.contract, difference.capability) == (
        "CPU feature rdseed", "hidden", "present",
    )  # fmt: skip
    assert difference.command == "vmf modifyvm deb --cpuid-set rdseed"
    lost = {**requested.entries, (7, 0): evolve(requested.lookup(7, 0), ebx=requested.lookup(7, 0).ebx & ~(1 << 5))}
    (difference,) = diff(requested, CpuidTable(lost), machine="deb")
    assert difference.command == "vmf modifyvm deb --cpuid-remove avx2"
    brand = {**requested.entries, (0x80000002, 0): evolve(requested.lookup(0x80000002, 0), eax=1)}
    (difference,) = diff(requested, CpuidTable(brand))
    assert difference.field == "CPUID leaf 0x80000002.0 eax"
    extra = {**requested.entries, (0x40000000, 0): evolve(requested.lookup(0, 0), eax=0x40000001)}
    assert diff(requested, CpuidTable(extra)), "a paravirtual interface nobody asked for"


def test_policy_helper() -> None:
    contract = make_contract(MILAN)
    less = without(contract, "avx")
    assert has(less, "avx", "avx2", "aes", "hypervisor") == [False, False, True, True]
    assert compare(less, contract) == []
    assert without(contract) == contract


def test_negotiation_among_hosts() -> None:
    agreement = negotiate(
        [Capability(MILAN, 2_445_000, name="a/kvm"), Capability(NAPLES, 2_445_100, name="b/kvm"),
         Capability(EMULATOR, 1_000_000, True, name="c/unicorn")]
    )  # fmt: skip
    assert agreement.possible
    assert agreement.level == 3
    assert agreement.vendor == "AuthenticAMD"
    assert (agreement.physical_bits, agreement.linear_bits, agreement.xsave_bytes) == (40, 48, 0)
    assert agreement.tsc_khz == 2_445_000
    assert agreement.missing[feature("avx2")] == ("c/unicorn",)
    assert agreement.missing[feature("pcid")] == ("b/kvm", "c/unicorn")
    text = "\n".join(agreement.explain())
    assert "level: 3 (x86-64-v2)" in text
    assert "b/kvm, c/unicorn cannot present it" in text
    for table in (MILAN, NAPLES, EMULATOR):
        assert compare(agreement.contract(), table) == []
        assert compare(agreement.contract(0), table) == []
    assert level_of(features_of(agreement.contract())) == 3


def test_negotiation_among_equals_keeps_everything() -> None:
    agreement = negotiate([MILAN, MILAN])
    assert agreement.level == 0
    assert agreement.contract() == make_contract(negotiate([MILAN]).table)
    assert features_of(agreement.contract()) == features_of(make_contract(MILAN))


def test_who_presents_any_vendor_presents_its_peers_family() -> None:
    """Family 6 is a Pentium Pro's descendant at Intel and a K7 at AMD: it must not stray to the other vendor."""
    for parties in ([EMULATOR, MILAN, NAPLES], [MILAN, NAPLES, EMULATOR]):
        contract = negotiate(parties).contract()
        assert vendor_of(contract) == "AuthenticAMD"
        assert contract.lookup(1, 0).eax == contract.lookup(0x80000001, 0).eax == NAPLES.lookup(1, 0).eax
    assert Signature.of(make_contract(EMULATOR, vendor="AuthenticAMD")).family == 23
    assert make_contract(EMULATOR).lookup(1, 0).eax == EMULATOR.lookup(1, 0).eax
    assert make_contract(EMULATOR).lookup(0x80000001, 0).eax == 0


def test_negotiation_that_fails_says_why() -> None:
    agreement = negotiate([Capability(HASWELL, name="a"), Capability(MILAN, name="b")])
    assert agreement.problems == ["The CPUs are of different vendors: AuthenticAMD, GenuineIntel."]
    with pytest.raises(CpuidError, match="different vendors"):
        agreement.contract()
    apart = negotiate([Capability(MILAN, 2_000_000), Capability(MILAN, 3_000_000)])
    assert "TSC rates differ (2000000 to 3000000 kHz)" in apart.problems[0]
    assert negotiate([Capability(MILAN, 2_000_000), Capability(MILAN, 3_000_000, tsc_scaling=True)]).possible
    bare = CpuidTable({(0, 0): MILAN.lookup(0, 0)})
    assert "x86-64 baseline" in negotiate([MILAN, bare]).problems[0]
    with pytest.raises(CpuidError, match="Nobody"):
        negotiate([])


def test_negotiated_xsave_layout_drops_what_lies_elsewhere() -> None:
    agreement = negotiate([with_vendor(MILAN, ""), with_vendor(SKYLAKE_SP, "")])
    assert feature("pku") not in agreement.common
    assert sorted(xsave_components(agreement.table)) == [0, 1, 2]
    assert agreement.xsave_bytes == 832


def test_levels_keep_the_baseline() -> None:
    for table in HOSTS.values():
        for level in LEVELS:
            assert restrict(features_of(table), level.number) >= BASELINE, names(BASELINE)
    assert features(["lm", "sse2"]) <= BASELINE
    assert compare(make_contract(QEMU64, 4), MILAN) == []
