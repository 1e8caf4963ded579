"""vmf cpuid show, compare, baseline; the --cpuid options of createvm and modifyvm."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from vmf.cpuid.negotiate import Capability
from vmf.machine.home import Home
from vmf.testing.cpuid_tables import HOSTS


@pytest.fixture(scope="module")
def khz() -> int:
    from vmf.plugins.bridge import PluginRegistry

    return PluginRegistry().cpu_backend("unicorn").tsc_khz()


@pytest.fixture
def files(tmp_path: Path, khz: int) -> dict[str, Path]:
    """What `vmf cpuid show --json` would print on hosts of several generations, all with this host's TSC."""
    made = {}
    for name, table in HOSTS.items():
        made[name] = tmp_path / f"{name}.json"
        made[name].write_text(json.dumps({"backend": "kvm", "capability": Capability(table, khz).to_wire()}))
    return made


def test_show(here: Any) -> None:
    shown = here("cpuid", "show", "--backend", "unicorn").stdout
    assert "vendor:         any" in shown
    assert "80000001.0 edx" in shown
    record = json.loads(here("cpuid", "show", "--backend", "unicorn", "--json").stdout)
    assert record["backend"] == "unicorn"
    assert "sse4_2" in record["features"]
    assert Capability.from_wire(record["capability"]).tsc_khz > 0
    less = json.loads(here("cpuid", "show", "--backend", "unicorn", "--level", "4", "--set", "aes", "--json").stdout)
    assert "sse4_2" not in less["features"]
    assert "aes" in less["features"]
    assert less["vendor"] == "GenuineIntel"


def test_what_show_prints_is_a_file_for_the_others(here: Any, tmp_path: Path) -> None:
    (tmp_path / "me.json").write_text(here("cpuid", "show", "--backend", "unicorn", "--json").stdout)
    said = here("cpuid", "compare", "me.json", "--backend", "unicorn").stdout
    assert "All have the very same features." in said
    assert "can go to me (unicorn)" in said


def test_compare_tells_who_can_take_a_machine(here: Any, files: dict[str, Path]) -> None:
    said = here("cpuid", "compare", files["haswell"], "--backend", "unicorn").stdout
    assert "A machine made here at level 0 can go to haswell (kvm)." in said
    assert "Common portability level: 3 (x86-64-v2); vendor GenuineIntel." in said
    row = next(line for line in said.splitlines() if line.startswith("avx2 "))
    assert row.split() == ["avx2", "-", "yes", "2"]


def test_compare_exits_with_1_when_a_contract_cannot_be_honoured(here: Any, files: dict[str, Path]) -> None:
    said = here("cpuid", "compare", files["nehalem"], files["haswell"], "--backend", "unicorn", status=1).stdout
    assert "cannot go to nehalem (kvm):" in said
    assert "CPU features pclmulqdq, aes, fsgsbase, smep" in said
    assert "--cpuid-portability-level" in said
    here("cpuid", "compare", files["nehalem"], files["haswell"], "--backend", "unicorn", "--level", "3")
    done = here("cpuid", "compare", files["nehalem"], "--backend", "unicorn", "--json", status=1)
    answer = json.loads(done.stdout)
    assert not answer["ok"]
    (host,) = answer["hosts"]
    assert {"movbe", "aes"} <= {each["feature"] for each in host["differences"]}
    assert answer["agreement"]["level"] == 3
    assert answer["command"] == "vmf modifyvm NAME --cpuid-portability-level 3"
    # A machine that is born here as an Intel one cannot go to AMD, at any level.
    amd = here("cpuid", "compare", files["milan"], "--level", "4", "--backend", "unicorn", status=1)
    assert "CPU vendor" in amd.stdout


def test_baseline(here: Any, files: dict[str, Path]) -> None:
    said = here("cpuid", "baseline", files["haswell"], files["skylake-sp"]).stdout
    assert "vmf modifyvm NAME --cpuid-portability-level 2" in said
    assert "features: pni" in said
    answer = json.loads(here("cpuid", "baseline", files["haswell"], files["nehalem"], "--json").stdout)
    assert answer["level_name"] == "x86-64-v2"
    assert answer["command"].endswith("--cpuid-portability-level 3")
    assert "this host (unicorn)" in here("cpuid", "baseline", files["milan"], "--here", "--backend", "unicorn").stdout
    refused = here("cpuid", "baseline", files["milan"], files["haswell"], status=1).stdout
    assert "different vendors: AuthenticAMD, GenuineIntel" in refused


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "is not what `vmf cpuid show --json` prints"),
        ('{"backend": "kvm", "capability": {"name": "x"}}', "not a mapping of name, table"),
        ('{"backend":"kvm","capability":{"name":"","table":[[1]],"tsc_khz":1,"tsc_scaling":false}}', "six integers"),
        ("[" * 100_000, "is not JSON"),
        (" " * ((1 << 20) + 2), "is larger than"),
    ],
)
def test_a_wrong_file_is_named(here: Any, tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "odd.json").write_text(content)
    error = here("cpuid", "baseline", "odd.json", status=2).stderr
    assert error.startswith("vmf: error: odd.json")
    assert said in error
    assert error.count("\n") == 1


def test_neither_file_nor_host(here: Any) -> None:
    assert "no such file, and it is not HOST:PORT" in here("cpuid", "compare", "gone.json", status=2).stderr
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        peer = f"127.0.0.1:{probe.getsockname()[1]}"
        error = here("cpuid", "baseline", peer, status=1).stderr
    assert f"{peer} cannot be asked: nobody listens" in error
    assert "teleporter on" in error
    assert "level 'best'" in here("cpuid", "compare", "x:1", "--level", "best", status=2).stderr


# The definition


def test_options_of_the_definition(here: Any, home: Home) -> None:
    here("createvm", "web", "--memory", 8, "--cpuid-portability-level", "x86-64-v2", "--cpuid-set", "aes")
    assert home.load("web").cpuid.portability_level == "x86-64-v2"
    here("modifyvm", "web", "--cpuid-set", "rdrand", "--cpuid-remove", "hypervisor")
    assert home.load("web").cpuid.set == ("aes", "rdrand"), "what is given adds to what is there"
    here("modifyvm", "web", "--cpuid-remove", "aes")
    assert home.load("web").cpuid.set == ("rdrand",), "the newer word holds"
    assert home.load("web").cpuid.remove == ("hypervisor", "aes")
    here("modifyvm", "web", "--cpuid-remove", "none", "--cpuid-set", "none", "--cpuid-set", "movbe")
    assert (home.load("web").cpuid.set, home.load("web").cpuid.remove) == (("movbe",), ())
    here("modifyvm", "web", "--teleport-peer", "a:1", "--teleport-peer", "[::1]:2", "--cpuid-portability-level=auto")
    assert home.load("web").cpuid.peers == ("a:1", "[::1]:2")
    shown = here("showvminfo", "web").stdout
    assert "a:1, [::1]:2" in shown
    assert json.loads(here("showvminfo", "web", "--json").stdout)["config"]["cpuid"]["peers"] == ["a:1", "[::1]:2"]
    here("modifyvm", "web", "--teleport-peer", "none", "--cpuid-portability-level", 2)
    assert home.load("web").cpuid.peers == ()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cpuid-portability-level", "5"], 'cpuid.portability_level = "5": is no portability level'),
        (["--cpuid-portability-level", "auto"], "has nobody to negotiate with"),
        (["--cpuid-set", "avx3"], 'names no CPU feature with "avx3"'),
        (["--cpuid-set", "aes", "--cpuid-remove", "aes"], '"aes": is in cpuid.remove, too'),
        (["--teleport-peer", "host"], 'has no TCP port in "host"'),
        (["--teleport-peer", "host:0"], "has no TCP port"),
        (["--teleport-peer", "::1:6000"], "::1:6000"),
        (["--teleport-peer", "ho st:6000"], "neither an IP address nor a host name"),
    ],
)
def test_wrong_options_are_refused(here: Any, home: Home, arguments: list[str], said: str) -> None:
    error = here("createvm", "web", "--memory", 8, *arguments, status=2).stderr
    assert said in error
    assert home.names() == []
