"""Feature bits: their names, and what needs what."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from vmf.cpuid.bits import ALIASES, FEATURE_BITS, FEATURE_MASKS, NEEDS
from vmf.cpuid.features import (
    BY_NAME,
    CpuidError,
    Feature,
    dependents,
    feature,
    features,
    features_of,
    names,
    requirements,
    with_dependencies_removed,
    with_features,
    with_requirements,
)
from vmf.cpuid.table import CpuidRegisters, CpuidTable
from vmf.testing.cpuid_tables import HOSTS


def test_every_documented_name_means_one_bit() -> None:
    counts = Counter(name for row in FEATURE_BITS.values() for name in row.values())
    assert [name for name, count in counts.items() if count > 1] == []
    assert len(counts) > 400


def test_tables_speak_of_known_features_only() -> None:
    assert not {name for name in NEEDS if name not in BY_NAME}
    assert not {name for needs in NEEDS.values() for name in needs if name not in BY_NAME}
    assert not {name for name in ALIASES.values() if name not in BY_NAME}
    assert not set(ALIASES) & set(BY_NAME), "an alias must not hide a real name"


@pytest.mark.parametrize(
    ("name", "place"),
    [
        # SDM vol. 2A tables 3-10, 3-11 and "CPUID leaf 7"; APM vol. 3 appendix E.
        ("fpu", (1, 0, "edx", 0)), ("pbe", (1, 0, "edx", 31)), ("clflush", (1, 0, "edx", 19)),
        ("sse4_2", (1, 0, "ecx", 20)), ("hypervisor", (1, 0, "ecx", 31)), ("x2apic", (1, 0, "ecx", 21)),
        ("avx2", (7, 0, "ebx", 5)), ("avx512vl", (7, 0, "ebx", 31)), ("la57", (7, 0, "ecx", 16)),
        ("pks", (7, 0, "ecx", 31)), ("spec_ctrl", (7, 0, "edx", 26)), ("amx_tile", (7, 0, "edx", 24)),
        ("avx512_bf16", (7, 1, "eax", 5)), ("lam", (7, 1, "eax", 26)), ("avx10", (7, 1, "edx", 19)),
        ("bhi_ctrl", (7, 2, "edx", 4)), ("xsaves", (0xD, 1, "eax", 3)), ("xfd", (0xD, 1, "eax", 4)),
        ("lm", (0x80000001, 0, "edx", 29)), ("nx", (0x80000001, 0, "edx", 20)),
        ("rdtscp", (0x80000001, 0, "edx", 27)), ("topoext", (0x80000001, 0, "ecx", 22)),
        ("mwaitx", (0x80000001, 0, "ecx", 29)), ("nonstop_tsc", (0x80000007, 0, "edx", 8)),
        ("amd_ssbd", (0x80000008, 0, "ebx", 24)), ("btc_no", (0x80000008, 0, "ebx", 29)),
        ("npt", (0x8000000A, 0, "edx", 0)), ("vnmi", (0x8000000A, 0, "edx", 25)),
        ("autoibrs", (0x80000021, 0, "eax", 8)), ("srso_no", (0x80000021, 0, "eax", 29)),
        ("arat", (6, 0, "eax", 2)), ("hfi", (6, 0, "eax", 19)), ("ptwrite", (0x14, 0, "ebx", 4)),
    ],
)  # fmt: skip
def test_places_are_those_of_the_manuals(name: str, place: tuple[int, int, str, int]) -> None:
    assert feature(name) == Feature(*place)
    assert Feature(*place).name == name


@pytest.mark.parametrize(
    ("written", "meant"),
    [("SSE4.2", "sse4_2"), ("avx512-bf16", "avx512_bf16"), ("lzcnt", "abm"), ("sse3", "pni"),
     ("invtsc", "nonstop_tsc"),
     (" AES ", "aes"), ("sha", "sha_ni"), ("cpuid-7.0-ebx-5", "avx2"), ("0x80000001.0:edx[29]", "lm")],
)  # fmt: skip
def test_other_spellings(written: str, meant: str) -> None:
    assert feature(written).name == meant


def test_a_wrong_name_is_an_error_with_the_nearest_ones() -> None:
    with pytest.raises(CpuidError, match=r"no CPUID feature called 'avx2x'.*Did you mean .*avx2"):
        feature("avx2x")
    with pytest.raises(CpuidError, match="vmf cpuid show"):
        feature("qqqqqq")
    for not_a_bit in ("cpuid-1.0-eax-3", "cpuid-7.0-ebx-32", "cpuid-24.0-ebx-3", "cpuid-40000001.0-eax-0"):
        with pytest.raises(CpuidError, match="is not a feature bit"):
            feature(not_a_bit)


def test_an_unknown_bit_is_named_by_its_place_and_can_be_named() -> None:
    table = CpuidTable({(7, 1): CpuidRegisters(ecx=1 << 31), (0x80000021, 0): CpuidRegisters(eax=1 << 4)})
    assert names(features_of(table)) == ["cpuid-7.1-ecx-31", "cpuid-80000021.0-eax-4"]
    assert {feature(name) for name in names(features_of(table))} == features_of(table)
    assert not any(item.documented for item in features_of(table))


def test_partial_registers_give_their_feature_bits_only() -> None:
    table = CpuidTable({(0x24, 0): CpuidRegisters(ebx=2 | 1 << 17), (6, 0): CpuidRegisters(ecx=0x0201)})
    assert names(features_of(table)) == ["aperfmperf", "avx10_256"]


def test_setting_features_leaves_numbers_alone() -> None:
    for table in HOSTS.values():
        present = features_of(table)
        assert with_features(table, present) == table
        bare = with_features(table, frozenset())
        assert features_of(bare) == frozenset()
        assert bare.lookup(0x80000008, 0).eax == table.lookup(0x80000008, 0).eax
        assert with_features(bare, present) == table


def test_dependencies() -> None:
    assert features(["avx", "xsave", "sse2", "fpu"]) <= requirements(feature("avx2"))
    assert features(["avx2", "fma", "vaes", "avx512f", "amx_tile"]) & dependents(feature("xsave")) == features(
        ["avx2", "fma", "vaes", "avx512f", "amx_tile"]
    )
    host = features_of(HOSTS["skylake-sp"])
    assert with_dependencies_removed(host) == host, "a real CPU is consistent"
    left = with_dependencies_removed(host - features(["avx"]))
    gone = set(names(host - left))
    assert {"avx", "avx2", "fma", "f16c", "avx512f", "avx512vl"} <= gone
    assert not {"xsave", "sse4_2", "bmi2", "aes"} & gone
    assert with_requirements(features(["sse4_2"])) >= features(["sse4_1", "ssse3", "pni", "sse2", "fxsr"])


def test_dependencies_have_no_cycle() -> None:
    for item in BY_NAME.values():
        assert item not in requirements(item)


def test_real_hosts_are_consistent() -> None:
    for name, table in HOSTS.items():
        present = features_of(table)
        assert with_dependencies_removed(present) == present, name


def test_masks_cover_the_named_bits() -> None:
    for register, row in FEATURE_BITS.items():
        for bit in row:
            assert FEATURE_MASKS[register] >> bit & 1


def test_this_hosts_flags_are_known_words() -> None:
    """Optional sanity check against the kernel's own names."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = [line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")] if cpuinfo.exists() else []
    if not flags:
        pytest.skip("no x86 flags in /proc/cpuinfo here")
    # What Linux derives itself, or names after a vendor-neutral idea.
    synthetic = {
        "rep_good", "nopl", "xtopology", "cpuid", "extd_apicid", "tsc_known_freq", "vmmcall", "up", "pti", "ibrs",
        "ibpb", "stibp", "ssbd", "constant_tsc", "tsc_reliable", "arch_perfmon", "pebs", "bts", "amd_dcm", "art",
        "tpr_shadow", "flexpriority", "ept", "vpid", "ept_ad", "ibrs_enhanced", "cdp_l3", "cdp_l2", "invpcid_single",
        "user_shstk", "cpuid_fault", "swap", "retpoline", "proc_feedback", "hw_pstate", "xtpr", "debug_swap",
        "fsrm", "aperfmperf", "intel_ppin", "split_lock_detect", "bus_lock_detect", "ds_cpl",
    }  # fmt: skip
    known = set(BY_NAME) | set(ALIASES) | synthetic
    unknown = set(flags[0].split(":")[1].split()) - known
    # Words of newer kernels than this table are no failure; most must be known.
    assert len(unknown) <= 5, unknown
