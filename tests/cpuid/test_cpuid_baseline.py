"""What `vmf cpuid baseline` suggests holds: machines made so on any of the hosts can go to all the others."""

from __future__ import annotations

import itertools
import shlex

import pytest

from vmf.cpuid.baseline import Party, honours, suggest
from vmf.cpuid.contract import make_contract
from vmf.cpuid.negotiate import Capability, negotiate
from vmf.testing.cpuid_tables import HOSTS, make_table

KHZ = 2_000_000


def party(name: str, peer: str = "") -> Party:
    return Party(name, "kvm", Capability(HOSTS[name], KHZ, False, name), peer)


@pytest.mark.parametrize("chosen", [*itertools.combinations(HOSTS, 2), *itertools.combinations(HOSTS, 3)])
def test_the_command_keeps_its_promise(chosen: tuple[str, ...]) -> None:
    parties = [party(name) for name in chosen]
    agreement = negotiate([each.capability for each in parties])
    suggestion = suggest(parties)
    assert bool(suggestion.command) == agreement.possible
    if not agreement.possible:
        return
    words = shlex.split(suggestion.command)
    level = words[words.index("--cpuid-portability-level") + 1]
    removed = [after for word, after in itertools.pairwise(words) if word == "--cpuid-remove"]
    vendor = agreement.vendor or None
    for maker, other in itertools.permutations(parties, 2):
        contract = make_contract(maker.capability.table, level, remove=removed, vendor=vendor, tsc_khz=KHZ)
        assert honours(contract, maker.capability, other.capability, level) == []


def test_a_missing_basic_feature_is_removed_by_name() -> None:
    names = "fpu de pse tsc msr pae cx8 pge cmov pat clflush mmx fxsr sse sse2 syscall nx lm"
    plain = Party("a", "x", Capability(make_table("GenuineIntel", 1, names + " pse36"), KHZ))
    other = Party("b", "x", Capability(make_table("GenuineIntel", 1, names), KHZ))
    assert suggest([plain, other]).command == "vmf modifyvm NAME --cpuid-portability-level 4 --cpuid-remove pse36"


def test_too_few_address_bits_need_peers() -> None:
    names = "fpu de pse tsc msr pae cx8 pge cmov pat pse36 clflush mmx fxsr sse sse2 syscall nx lm"
    wide = Party("a", "x", Capability(make_table("GenuineIntel", 1, names, physical=46), KHZ))
    narrow = Capability(make_table("GenuineIntel", 1, names, physical=36), KHZ)
    assert suggest([wide, Party("b", "x", narrow)]).command == ""
    assert "HOST:PORT" in suggest([wide, Party("b", "x", narrow)]).note
    command = suggest([wide, Party("b", "x", narrow, "b:6000")]).command
    assert command == "vmf modifyvm NAME --cpuid-portability-level auto --teleport-peer b:6000"


def test_an_emulator_must_be_told_of_the_vendor() -> None:
    suggestion = suggest([party("emulator"), party("milan", "m:1")])
    assert "AuthenticAMD" in suggestion.note
    assert "--teleport-peer m:1" in suggestion.note
    assert suggest([party("emulator"), party("haswell")]).note == ""
