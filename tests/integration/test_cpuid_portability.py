"""The CPUID contract of whole machines: chosen, negotiated with waiting hosts, checked, and kept over a teleport."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from attrs import evolve

from vmf.cpuid.contract import make_contract
from vmf.cpuid.features import CpuidError, features_of, names
from vmf.cpuid.layout import vendor_of
from vmf.cpuid.negotiate import Capability
from vmf.cpuid.table import CpuidTable
from vmf.errors import ContractOverridden, MachineError, VmfError
from vmf.machine.config import CpuidConfig, MachineConfig
from vmf.machine.machine import Machine, wait_until
from vmf.machine.teleport_view import TeleportView
from vmf.plugins.bridge import PluginRegistry
from vmf.testing.cpuid_tables import MILAN, NEHALEM, QEMU64, SKYLAKE_SP
from vmf.testing.hosts import Host


def ok(host: Host, *arguments: str) -> str:
    done = host.vmf(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def registry() -> PluginRegistry:
    return PluginRegistry()


def started(config: MachineConfig, registry: PluginRegistry) -> Machine:
    machine = Machine(config, registry)
    try:
        machine.start(paused=True)
    except BaseException:
        machine.close()
        raise
    return machine


def cpu_of(machine: Machine) -> set[str]:
    return set(names(features_of(machine.hardware.cpuid)))


@contextmanager
def waiting(config: MachineConfig, registry: PluginRegistry, own: Capability | None = None) -> Iterator[int]:
    """A machine that waits on loopback, and claims another backend's capability; its port."""
    machine = Machine(evolve(config, name="there"), registry)
    port = machine.listen("127.0.0.1", 0).port

    def wait() -> None:
        with suppress(VmfError), pytest.MonkeyPatch.context() as patch:
            if own is not None:
                patch.setattr(TeleportView, "cpuid_capability", lambda self: own)
            machine.wait_for_teleport()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    try:
        yield port
        assert machine.state.value == "teleportingin", "it waits on, whatever was asked"
    finally:
        machine.close()
        thread.join(60)


# The level and the lists of the definition


@pytest.mark.parametrize("level", ["0", "3", "4", "x86-64-v1", "vbox-1"])
def test_the_level_makes_the_contract(builtin: MachineConfig, registry: PluginRegistry, level: str) -> None:
    backend = registry.cpu_backend("unicorn")
    config = evolve(builtin, cpuid=CpuidConfig(level))
    with started(config, registry) as machine:
        expected = make_contract(backend.cpuid_capability(), level, tsc_khz=backend.tsc_khz())
        assert machine.hardware.cpuid == expected
        told = machine.info()["cpuid"]
        assert told["requested"] == level
        assert CpuidTable.from_wire(told["leaves"]) == expected
        assert told["vendor"] == "GenuineIntel"


def test_features_are_set_and_removed_on_top(builtin: MachineConfig, registry: PluginRegistry) -> None:
    config = evolve(builtin, cpuid=CpuidConfig("4", set=("aes",), remove=("hypervisor",)))
    with started(config, registry) as machine:
        assert "aes" in cpu_of(machine)
        assert not {"popcnt", "hypervisor"} & cpu_of(machine)


def test_what_the_backend_lacks_cannot_be_set(builtin: MachineConfig, registry: PluginRegistry) -> None:
    with pytest.raises(CpuidError, match=r"avx2 .*cannot be set"):
        started(evolve(builtin, cpuid=CpuidConfig(set=("avx2",))), registry)


# Peers


@pytest.mark.parametrize(
    ("peer", "level", "vendor", "lacking"),
    [
        (SKYLAKE_SP, "3", "GenuineIntel", set()),
        (NEHALEM, "3", "GenuineIntel", {"aes", "movbe", "smep"}),
        (MILAN, "3", "AuthenticAMD", {"pku"}),
        (QEMU64, "4", "AuthenticAMD", {"popcnt", "aes", "ssse3"}),
    ],
    ids=["skylake", "nehalem", "milan", "qemu64"],
)
def test_auto_negotiates_with_who_waits(
    builtin: MachineConfig,
    registry: PluginRegistry,
    peer: CpuidTable,
    level: str,
    vendor: str,
    lacking: set[str],
) -> None:
    khz = registry.cpu_backend("unicorn").tsc_khz()
    with waiting(builtin, registry, Capability(peer, khz, False, "kvm")) as port:
        config = evolve(builtin, cpuid=CpuidConfig("auto", peers=(f"127.0.0.1:{port}",)))
        with started(config, registry) as machine:
            told = machine.info()["cpuid"]
            assert told["level"] == level
            assert told["requested"] == "auto"
            assert any("127.0.0.1" in line for line in told["explanation"])
            assert vendor_of(machine.hardware.cpuid) == vendor
            assert not lacking & cpu_of(machine)
            free = {"hypervisor", "nonstop_tsc", "ht", "cmp_legacy"}
            theirs = set(names(features_of(peer)))
            assert {item for item in cpu_of(machine) - free if not item.startswith("amd_")} <= theirs
        # With a level given, the same hosts are asked, and nobody is promised more than they have.
        with started(evolve(config, cpuid=evolve(config.cpuid, portability_level="0")), registry) as machine:
            assert machine.info()["cpuid"]["level"] == "0"
            assert not lacking & cpu_of(machine)


def test_a_peer_with_another_tsc_rate_is_no_peer(builtin: MachineConfig, registry: PluginRegistry) -> None:
    khz = registry.cpu_backend("unicorn").tsc_khz()
    other = Capability(NEHALEM, khz + khz // 10, False, "kvm")
    with waiting(builtin, registry, other) as port:
        config = evolve(builtin, cpuid=CpuidConfig("auto", peers=(f"127.0.0.1:{port}",)))
        with pytest.raises(CpuidError, match="TSC rates differ"):
            started(config, registry)


def test_peers_that_cannot_be_asked_are_all_named(builtin: MachineConfig, registry: PluginRegistry) -> None:
    first, second = f"127.0.0.1:{free_port()}", "no.such.host.invalid:6000"
    machine = Machine(evolve(builtin, cpuid=CpuidConfig("auto", peers=(first, second))), registry)
    with pytest.raises(MachineError) as caught:
        machine.start()
    text = str(caught.value)
    assert first in text
    assert second in text
    assert "nobody listens" in text
    assert "vmf modifyvm box --teleport-peer none" in text
    assert machine.state.value == "poweredoff"


# Read back


def test_a_backend_that_overrides_the_contract_is_refused(
    builtin: MachineConfig, registry: PluginRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The core compares what the vCPU really shows, where the backend can tell."""
    backend = registry.cpu_backend("unicorn")
    honest = backend.create_vcpu
    closed: list[bool] = []

    def create(environment):  # type: ignore[no-untyped-def]
        vcpu = honest(environment)
        vcpu.read_cpuid = lambda: make_contract(backend.cpuid_capability(), 0, tsc_khz=backend.tsc_khz())
        close = vcpu.close
        vcpu.close = lambda: (closed.append(True), close())[1]
        return vcpu

    monkeypatch.setattr(backend, "create_vcpu", create)
    with started(builtin, registry) as machine:
        assert machine.hardware.cpuid.vendor == "GenuineIntel"
    closed.clear()
    with pytest.raises(ContractOverridden, match="CPU feature aes hidden, presented present") as caught:
        started(evolve(builtin, cpuid=CpuidConfig(remove=("aes",))), registry)
    assert [each.feature.name for each in caught.value.differences] == ["aes"]
    assert closed, "the vCPU is freed"
    # At a teleport it is one more blocker, not a broken session.
    monkeypatch.setattr(backend, "create_vcpu", honest)
    masked = evolve(builtin, cpuid=CpuidConfig(remove=("aes",)))
    with waiting(builtin, registry) as port, started(masked, registry) as source:
        monkeypatch.setattr(backend, "create_vcpu", create)
        blockers = source.check_teleport("127.0.0.1", port)
        assert [blocker.field for blocker in blockers] == ["CPU feature aes"]
        monkeypatch.setattr(backend, "create_vcpu", honest)
        assert source.check_teleport("127.0.0.1", port) == ()
        assert source.state.value == "paused"


# The command, between processes


def test_negotiated_checked_teleported(hosts: tuple[Host, Host], builtin: MachineConfig) -> None:
    """The whole of it with `vmf`: a waiting host is asked, the preflight says yes, the machine goes, and keeps it."""
    source, target = hosts
    target.define(builtin)
    port = target.wait("box")
    image = str(builtin.image)
    ok(source, "createvm", "box", "--memory", "32", "--cpu-backend", "unicorn", "--image", image)
    peer = f"127.0.0.1:{port}"
    ok(source, "modifyvm", "box", "--cpuid-portability-level", "auto", "--teleport-peer", peer)
    ok(source, "modifyvm", "box", "--cpuid-remove", "aes")
    said = ok(source, "startvm", "box", "--detach")
    assert "CPUID contract: Common portability level: 0 (host)" in said
    source.wait_for_output("box", b"tick 2 ")
    before = json.loads(ok(source, "showvminfo", "box", "--json"))["live"]["cpuid"]
    assert before["peers"] == [peer]
    assert "aes" not in before["features"]
    shown = ok(source, "showvminfo", "box")
    assert "auto" in shown
    assert "level 0 (host), GenuineIntel" in shown
    # Asking and checking disturb nobody.
    for _ in range(2):
        where = ("--host", "127.0.0.1", "--port", str(port))
        assert "every check passed" in ok(source, "controlvm", "box", "teleport", "--check", *where)
        assert json.loads(ok(source, "cpuid", "compare", peer, "--backend", "unicorn", "--json"))["ok"]
    assert source.state("box") == "running"
    assert target.state("box") == "teleportingin"
    source.wait_for_more("box")
    ok(source, "controlvm", "box", "teleport", "--host", "127.0.0.1", "--port", str(port))
    target.wait_for_more("box")
    after = json.loads(ok(target, "showvminfo", "box", "--json"))["live"]["cpuid"]
    assert after["leaves"] == before["leaves"]
    assert after["level"] == "0"


def test_check_lists_every_blocker_and_moves_nothing(
    hosts: tuple[Host, Host], builtin: MachineConfig, tmp_path: Path
) -> None:
    source, target = hosts
    other = tmp_path / "other.bin"
    assert builtin.image is not None
    other.write_bytes(Path(builtin.image).read_bytes() + bytes(4096))
    target.define(evolve(builtin, memory_mib=48, image=other))
    source.define(builtin)
    source.start("box")
    port = str(target.wait("box"))
    where = ("teleport", "--check", "--host", "127.0.0.1", "--port", port)
    done = source.vmf("controlvm", "box", *where)
    assert done.returncode == 1
    assert "for 2 reasons" in done.stdout
    assert "vmf modifyvm box --memory 32" in done.stdout
    assert "image" in done.stdout
    done = source.vmf("controlvm", "box", *where, "--json")
    assert done.returncode == 1
    answer = json.loads(done.stdout)
    assert not answer["ok"]
    assert len(answer["blockers"]) == 2
    assert all(blocker["remedy"] for blocker in answer["blockers"])
    source.wait_for_more("box")
    assert source.state("box") == "running"
    assert target.state("box") == "teleportingin"
    # Nobody there is an error, not a blocker.
    done = source.vmf("controlvm", "box", "teleport", "--check", "--host", "127.0.0.1", "--port", str(free_port()))
    assert done.returncode == 1
    assert done.stderr.startswith("vmf: error: nobody listens")


def test_an_unreachable_peer_prevents_the_start(hosts: tuple[Host, Host], builtin: MachineConfig) -> None:
    source, _ = hosts
    peer = f"127.0.0.1:{free_port()}"
    source.define(evolve(builtin, cpuid=CpuidConfig("auto", peers=(peer,))))
    done = source.vmf("startvm", "box", "--detach")
    assert done.returncode == 1
    assert peer in done.stderr
    assert "--teleport-peer none" in done.stderr
    ok(source, "modifyvm", "box", "--teleport-peer", "none", "--cpuid-portability-level", "3")
    ok(source, "startvm", "box", "--detach")
    assert json.loads(ok(source, "showvminfo", "box", "--json"))["live"]["cpuid"]["level"] == "3"


# Linux


@pytest.mark.linux
@pytest.mark.parametrize(
    ("peer", "vendor", "has", "lacks"),
    [
        (MILAN, "AuthenticAMD", "popcnt", "avx"),
        (QEMU64, "AuthenticAMD", "sse2", "popcnt"),
        (NEHALEM, "GenuineIntel", "popcnt", "aes"),
    ],
    ids=["milan", "qemu64", "nehalem"],
)
def test_linux_sees_what_was_negotiated_and_counts_by_the_tsc(
    shell: MachineConfig, registry: PluginRegistry, peer: CpuidTable, vendor: str, has: str, lacks: str
) -> None:
    """Whatever the user's command line: an AMD contract needs the TSC's rate on it, else Linux counts jiffies."""
    khz = registry.cpu_backend("unicorn").tsc_khz()
    output = bytearray()
    with waiting(shell, registry, Capability(peer, khz, False, "kvm")) as port:
        config = evolve(shell, cmdline="console=ttyS0", cpuid=CpuidConfig("auto", peers=(f"127.0.0.1:{port}",)))
        with Machine(config, registry) as machine:
            machine.console.add_listener(output.extend)
            machine.start()
            assert wait_until(lambda: b"# " in output, 120), bytes(output[-500:])
            # Where the rate was told on the command line the clock source is "tsc-early" for the first seconds.
            machine.type(b"sleep 4; cat /sys/devices/system/clocksource/*/current_cl* /proc/cpuinfo\n")
            machine.type(b"echo FIN''ISHED\n")
            assert wait_until(lambda: b"FINISHED" in output, 60), bytes(output[-500:])
    lines = [line.strip() for line in output.decode(errors="replace").splitlines()]
    assert "tsc" in lines, "the clock source"
    assert f"vendor_id\t: {vendor}" in lines
    (flags,) = {line for line in lines if line.startswith("flags\t")}
    assert has in flags.split()
    assert lacks not in flags.split()
    (rate,) = {line.partition(": ")[2] for line in lines if line.startswith("cpu MHz")}
    # Within what counts as one rate (250 ppm): on a busy host Linux refines the number that it was told a little.
    assert abs(float(rate) * 1000 - khz) * 4000 < khz
