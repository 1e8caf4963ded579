"""Section `cpuid` of a definition."""

from __future__ import annotations

import pytest

from vmf.machine.config import ConfigErrors, CpuidConfig, MachineConfig, dump, parse, split_peer


def text(section: str) -> str:
    return f'version = 1\nname = "web"\nmemory_mib = 8\n[cpuid]\n{section}\n'


def test_a_number_is_a_level_too() -> None:
    config = parse(text("portability_level = 3"), "test")
    assert config.cpuid == CpuidConfig("3")
    assert parse(dump(config), "test") == config


def test_everything_survives_the_file() -> None:
    cpuid = CpuidConfig("auto", ("aes", "cpuid-7.1-ecx-31"), ("rdrand",), ("a:1", "[::1]:65535"), "AuthenticAMD")
    config = MachineConfig("web", 8, cpuid=cpuid)
    assert parse(dump(config), "test") == config


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        ("portability_level = true", ["cpuid.portability_level"]),
        ("portability_level = 7", ["cpuid.portability_level"]),
        ("portability_level = 1.5", ["cpuid.portability_level"]),
        ('set = "aes"', ["cpuid.set"]),
        ("set = [5]\nremove = [6]", ["cpuid.set", "cpuid.remove"]),
        ('set = ["avx3"]\nremove = ["aes"]\npeers = ["x"]', ["cpuid.set", "cpuid.peers"]),
        ('set = ["sse3"]\nremove = ["pni"]', ["cpuid.set"]),
        ("level = 3", ["cpuid.level"]),
        ('vendor = "AuthenticIntel"', ["cpuid.vendor"]),
        ("vendor = 5", ["cpuid.vendor"]),
        ('portability_level = "auto"', ["cpuid.portability_level"]),
        ('peers = ["host:65536"]', ["cpuid.peers"]),
        ('peers = ["host:\u0663"]', ["cpuid.peers"]),
    ],
)
def test_what_is_wrong_is_named(section: str, keys: list[str]) -> None:
    with pytest.raises(ConfigErrors) as caught:
        parse(text(section), "test")
    assert [problem.key for problem in caught.value.problems] == keys
    assert all(problem.reason and problem.remedy for problem in caught.value.problems)


def test_an_object_made_in_python_is_checked_too() -> None:
    with pytest.raises(ConfigErrors) as caught:
        MachineConfig("web", 8, cpuid=CpuidConfig("auto", set=5, remove=("aes",)))  # type: ignore[arg-type]
    assert {problem.key for problem in caught.value.problems} == {"cpuid.set", "cpuid.portability_level"}


@pytest.mark.parametrize(
    ("given", "host", "port"),
    [("a:1", "a", 1), ("[::1]:22", "::1", 22), ("10.0.0.1:6000", "10.0.0.1", 6000), ("a", "a", 0), ("::1", "::1", 0)],
)
def test_host_and_port(given: str, host: str, port: int) -> None:
    assert split_peer(given) == (host, port)
