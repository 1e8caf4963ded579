"""An interrupted handover as its user meets it: what the commands say, and that nothing starts twice in silence."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from vmf.errors import TeleportUncertain
from vmf.machine.config import MachineConfig
from vmf.machine.journal import FileJournal
from vmf.teleport.journal import Entry
from vmf.teleport.protocol.handover import Note
from vmf.teleport.protocol.states import Role
from vmf.testing.faults import Fault, FaultProxy
from vmf.testing.hosts import Host
from vmf.transport.base import Address


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    with Host(tmp_path / "source") as source, Host(tmp_path / "target") as target:
        yield source, target


@pytest.fixture
def in_doubt(hosts: tuple[Host, Host], builtin: MachineConfig) -> Iterator[FaultProxy]:
    """RUNNING got lost: it runs at the target, and the source cannot know."""
    source, target = hosts
    for host in hosts:
        host.define(builtin)
    source.start("box")
    source.wait_for_output("box", b"tick 2 ")
    with FaultProxy(target.wait("box"), Fault("cut", "RUNNING")) as proxy:
        with source.client("box") as client, pytest.raises(TeleportUncertain) as caught:
            client.teleport("127.0.0.1", proxy.port)
        assert "--resolve resume|discard" in caught.value.remedy
        target.wait_for_state("box", "running")
        yield proxy


def test_it_runs_there(hosts: tuple[Host, Host], in_doubt: FaultProxy) -> None:
    source, target = hosts
    shown = source.vmf("showvminfo", "box").stdout
    assert "uncertain" in shown
    assert "teleport --status" in shown
    status = source.vmf("controlvm", "box", "teleport", "--status")
    assert status.returncode == 1
    assert "says that it has the machine" in status.stdout
    assert "--resolve discard" in status.stdout
    assert "may run twice" in status.stdout
    refused = source.vmf("controlvm", "box", "teleport", "--resolve", "resume")
    assert refused.returncode == 1
    assert "has the machine" in refused.stderr
    assert "--force" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    # The target can be asked for as long as its source has not confirmed, and says so.
    assert "has not confirmed" in target.vmf("showvminfo", "box").stdout
    done = source.vmf("controlvm", "box", "teleport", "--resolve", "discard", "--json")
    assert done.returncode == 0, done.stderr
    assert "given up here" in json.loads(done.stdout)["done"]
    source.wait_gone("box")
    assert source.state("box") == "teleported"
    target.wait_for_more("box")
    assert source.vmf("controlvm", "box", "teleport", "--status").returncode == 0


def test_nobody_can_be_asked(hosts: tuple[Host, Host], in_doubt: FaultProxy) -> None:
    """Neither answer is safe then; whoever knows better says so twice."""
    source, _ = hosts
    in_doubt.deaf = True
    status = source.vmf("controlvm", "box", "teleport", "--status", "--json")
    doubt = json.loads(status.stdout)["doubt"]
    assert doubt["answer"] == "unreachable"
    assert not doubt["resume"]["allowed"]
    assert not doubt["discard"]["allowed"]
    for how in ("resume", "discard"):
        refused = source.vmf("controlvm", "box", "teleport", "--resolve", how)
        assert refused.returncode == 1
        assert "cannot be asked" in refused.stderr
    # Elsewhere it may be reached under another address.
    direct = source.vmf("controlvm", "box", "teleport", "--status", "--json", "--port", str(in_doubt.target))
    assert json.loads(direct.stdout)["doubt"]["answer"] == "runs"
    forced = source.vmf("controlvm", "box", "teleport", "--resolve", "discard", "--force")
    assert forced.returncode == 0, forced.stderr
    source.wait_gone("box")
    assert source.state("box") == "poweredoff"


def test_the_source_dies_in_doubt(hosts: tuple[Host, Host], in_doubt: FaultProxy) -> None:
    source, target = hosts
    source.kill("box", signal.SIGKILL)
    source.wait_gone("box")
    assert source.state("box") == "uncertain"
    shown = source.vmf("showvminfo", "box").stdout
    assert "uncertain" in shown
    refused = source.vmf("startvm", "box", "--detach")
    assert refused.returncode == 1
    assert "it may run there" in refused.stderr
    assert source.pid("box") is None
    status = source.vmf("controlvm", "box", "teleport", "--status")
    assert "its memory is lost" in status.stdout
    assert "has the machine" in status.stdout
    lost = source.vmf("controlvm", "box", "teleport", "--resolve", "resume")
    assert lost.returncode == 1
    assert "cannot go on here" in lost.stderr
    assert source.vmf("controlvm", "box", "teleport", "--resolve", "discard").returncode == 0
    assert source.state("box") == "teleported"
    target.wait_for_more("box")


def test_a_poweroff_does_not_end_the_doubt(hosts: tuple[Host, Host], in_doubt: FaultProxy) -> None:
    source, _ = hosts
    assert source.vmf("controlvm", "box", "poweroff").returncode == 0
    source.wait_gone("box")
    assert source.state("box") == "uncertain"
    assert source.vmf("startvm", "box", "--detach").returncode == 1


def test_another_machine_takes_the_port_and_answers(
    hosts: tuple[Host, Host], in_doubt: FaultProxy, builtin: MachineConfig
) -> None:
    """The port on which an arrival can be asked about is free for the next machine of that host, which then answers."""
    from attrs import evolve

    from vmf.machine.config import TeleporterConfig

    source, target = hosts
    port = in_doubt.target
    with socket.socket() as taken, pytest.raises(OSError, match="in use"):
        taken.bind(("127.0.0.1", port))
    teleporter = TeleporterConfig(enabled=True, port=port, address="127.0.0.1")
    target.define(evolve(builtin, name="other", uuid=str(uuid4()), teleporter=teleporter))
    started = target.vmf("startvm", "other", "--detach")
    assert started.returncode == 0, started.stderr
    with source.client("box") as client:
        assert client.teleport_status(ask=True)["doubt"]["answer"] == "runs"
        target.kill("box", signal.SIGKILL)
        target.wait_gone("box")
        doubt = client.teleport_status(ask=True)["doubt"]
    assert doubt["answer"] == "ended"
    assert "Machine 'box' is aborted there" in doubt["said"]


def test_options_that_exclude_each_other(hosts: tuple[Host, Host]) -> None:
    source, _ = hosts
    for arguments in (("--status", "--check"), ("--resolve", "resume", "--cancel"), ("--force",)):
        assert source.vmf("controlvm", "box", "teleport", *arguments).returncode == 2


def test_nothing_in_doubt(hosts: tuple[Host, Host], builtin: MachineConfig) -> None:
    source, _ = hosts
    source.define(builtin)
    calm = source.vmf("controlvm", "box", "teleport", "--status")
    assert calm.returncode == 0
    assert "no teleport of it is under way or in doubt" in calm.stdout
    nothing = source.vmf("controlvm", "box", "teleport", "--resolve", "discard")
    assert nothing.returncode == 1
    assert "no teleport to resolve" in nothing.stderr
    source.start("box")
    assert source.vmf("controlvm", "box", "teleport", "--status").returncode == 0
    running = source.vmf("controlvm", "box", "teleport", "--resolve", "resume")
    assert running.returncode == 1
    assert "no teleport to resolve" in running.stderr


def interrupted(source: Host, target: Host, peer: Address) -> None:
    """As if both processes had died in the handover: what each had written down."""
    identifier = uuid4().bytes
    for host, role, note in ((source, Role.SOURCE, Note.HANDED_OVER), (target, Role.TARGET, Note.PROMISED)):
        FileJournal(host.home, "box").begin(Entry(identifier, role, note, peer))


def test_a_target_with_a_password_is_asked_with_it(
    hosts: tuple[Host, Host], builtin: MachineConfig, tmp_path: Path
) -> None:
    source, target = hosts
    secret = tmp_path / "secret"
    secret.write_text("eleven herons at dawn\n")
    secret.chmod(0o600)
    for host in hosts:
        host.define(builtin)
    arguments = ("--teleporter", "on", "--teleporter-address", "localhost", "--teleporter-password-file", str(secret))
    assert target.vmf("modifyvm", "box", *arguments).returncode == 0
    started = target.vmf("startvm", "box", "--detach", "--json")
    interrupted(source, target, Address("tcp", "localhost", int(json.loads(started.stdout)["address"].split(":")[-1])))
    status = json.loads(source.vmf("controlvm", "box", "teleport", "--status", "--json").stdout)
    assert status["doubt"]["answer"] == "unreachable"
    assert "password" in status["doubt"]["said"]
    assert source.vmf("controlvm", "box", "teleport", "--resolve", "discard").returncode == 1
    done = source.vmf("controlvm", "box", "teleport", "--resolve", "discard", "--password-file", str(secret))
    assert done.returncode == 0, done.stderr
    assert "never arrived" in done.stdout
    assert source.state("box") == "poweredoff"


def test_a_target_behind_tls_is_asked_over_tls(hosts: tuple[Host, Host], builtin: MachineConfig) -> None:
    """The note says how the target was reached, so nothing has to be given again."""
    source, target = hosts
    for host in hosts:
        host.define(builtin)
    assert source.vmf("tls", "init").returncode == 0
    assert source.vmf("tls", "issue", "localhost", "--out", str(target.directory / "tls")).returncode == 0
    arguments = ("--teleporter", "on", "--teleporter-transport", "tls", "--teleporter-address", "localhost")
    assert target.vmf("modifyvm", "box", *arguments).returncode == 0
    started = target.vmf("startvm", "box", "--detach", "--json")
    port = int(json.loads(started.stdout)["address"].split(":")[-1])
    interrupted(source, target, Address("tls", "localhost", port, {"tls_dir": str(source.directory / "tls")}))
    status = source.vmf("controlvm", "box", "teleport", "--status")
    assert status.returncode == 1
    assert f"tls:localhost:{port} says that the machine never arrived" in status.stdout
    plain = source.vmf("controlvm", "box", "teleport", "--status", "--json", "--transport", "tcp")
    assert json.loads(plain.stdout)["doubt"]["answer"] == "unreachable"
