"""The user's specification, word for word with `vmf` for `VBoxManage`, on whole machines with the built-in guest."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from attrs import evolve

from vmf.machine.config import MachineConfig
from vmf.testing.hosts import Host
from vmf.testing.serial_check import check

IMAGE_OPTIONS = ("--memory", "32", "--cpu-backend", "unicorn")


def ok(host: Host, *arguments: str) -> str:
    done = host.vmf(*arguments)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def refused(host: Host, *arguments: str) -> str:
    """The one clear error."""
    done = host.vmf(*arguments)
    assert done.returncode != 0, done.stdout
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.startswith("vmf: error: "), done.stderr
    return done.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_the_specifications_procedure(hosts: tuple[Host, Host], builtin: MachineConfig) -> None:
    source, target = hosts
    port = str(free_port())
    for host, name in ((source, "sourcevmname"), (target, "targetvmname")):
        ok(host, "createvm", name, *IMAGE_OPTIONS, "--image", str(builtin.image))
    # "On the target host, configure the virtual machine to wait for a teleport request to arrive when it is started"
    ok(target, "modifyvm", "targetvmname", "--teleporter", "on", "--teleporter-port", port)
    # The one word that the specification does not have: it would wait for anybody who reaches this host.
    for detach in ((), ("--detach",)):
        said = refused(target, "startvm", "targetvmname", *detach)
        assert "with neither TLS nor a password" in said
        for remedy in ("--teleporter-password-file", "--teleporter-transport tls", "localhost", "--insecure"):
            assert remedy in said
    # "Start the VM on the target host. Instead of running, the VM shows ... that it is waiting"
    waiting = subprocess.Popen(
        [sys.executable, "-m", "vmf.cli", "startvm", "targetvmname", "--insecure"],
        env=target.environment,
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert waiting.stdout is not None
        shown = ""
        while "wait" not in shown.lower():
            line = waiting.stdout.readline()
            assert line, shown
            shown += line
        assert port in shown
        assert json.loads(ok(target, "showvminfo", "targetvmname", "--json"))["state"] == "teleportingin"
        # "Start the VM on the source host as usual."
        ok(source, "startvm", "sourcevmname", "--detach")
        source.wait_for_output("sourcevmname", b"tick 3 ")
        # "When it is running and you want it to be teleported, issue the following command on the source host"
        said = ok(source, "controlvm", "sourcevmname", "teleport", "--host", "localhost", "--port", port)
        assert "downtime" in said
        target.wait_for_more("targetvmname")
        source.wait_gone("sourcevmname")
        assert json.loads(ok(target, "showvminfo", "targetvmname", "--json"))["state"] == "running"
        assert json.loads(ok(source, "showvminfo", "sourcevmname", "--json"))["state"] == "teleported"
        report = check(source.output("sourcevmname") + target.output("targetvmname"))
        assert report.problems == ()
        ok(target, "controlvm", "targetvmname", "poweroff")
        assert waiting.wait(30) == 0
    finally:
        if waiting.poll() is None:
            waiting.kill()
        waiting.wait()
        waiting.stdout.close()


Change = Callable[[MachineConfig], MachineConfig]
DIFFERENCES: list[tuple[str, Change, str]] = [
    ("memory", lambda config: evolve(config, memory_mib=64), "memory"),
    ("device", lambda config: evolve(config, devices=("pc", "pc")), "device"),
]


@pytest.mark.parametrize(("what", "change", "said"), DIFFERENCES[:1])
def test_a_target_with_other_hardware_is_refused_and_both_go_on(
    hosts: tuple[Host, Host], builtin: MachineConfig, what: str, change: Change, said: str
) -> None:
    source, target = hosts
    source.define(builtin)
    target.define(change(builtin))
    source.start("box")
    source.wait_for_output("box", b"tick 2 ")
    port = str(target.wait("box"))
    message = refused(source, "controlvm", "box", "teleport", "--host", "localhost", "--port", port)
    assert said in message
    assert "vmf modifyvm" in message
    source.wait_for_more("box")
    assert source.state("box") == "running"
    assert target.state("box") == "teleportingin"


def test_another_command_line_and_memory_are_reported_together(
    hosts: tuple[Host, Host], builtin: MachineConfig, tmp_path: object
) -> None:
    source, target = hosts
    source.define(builtin)
    assert builtin.image is not None
    other = source.directory / "other.bin"
    other.write_bytes(open(builtin.image, "rb").read() + bytes(4096))  # noqa: SIM115 - a few KiB
    target.define(evolve(builtin, memory_mib=48, image=str(other)))
    source.start("box")
    port = str(target.wait("box"))
    message = refused(source, "controlvm", "box", "teleport", "--host", "localhost", "--port", port)
    assert "memory" in message
    assert "image" in message
    source.wait_for_more("box")


def test_nobody_listens(hosts: tuple[Host, Host], builtin: MachineConfig) -> None:
    source, _ = hosts
    source.define(builtin)
    source.start("box")
    port = str(free_port())
    assert port in refused(source, "controlvm", "box", "teleport", "--host", "localhost", "--port", port)
    source.wait_for_more("box")


def test_an_unknown_host_name(hosts: tuple[Host, Host], builtin: MachineConfig) -> None:
    source, _ = hosts
    source.define(builtin)
    source.start("box")
    message = refused(source, "controlvm", "box", "teleport", "--host", "no-such-host.invalid", "--port", "6000")
    assert "no-such-host.invalid" in message
    source.wait_for_more("box")


def test_a_port_in_use(hosts: tuple[Host, Host], builtin: MachineConfig) -> None:
    _, target = hosts
    target.define(builtin)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ok(target, "modifyvm", "box", "--teleporter", "on", "--teleporter-port", str(port))
        ok(target, "modifyvm", "box", "--teleporter-address", "127.0.0.1")
        for detach in ((), ("--detach",)):
            assert str(port) in refused(target, "startvm", "box", *detach)
    assert target.state("box") in ("poweredoff", "poweroff")


def test_something_else_listens(hosts: tuple[Host, Host], builtin: MachineConfig) -> None:
    """A server that speaks another protocol: one clear error, the machine goes on."""
    source, _ = hosts
    source.define(builtin)
    source.start("box")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(20)
        client = subprocess.Popen(
            [sys.executable, "-m", "vmf.cli", "controlvm", "box", "teleport", "--host", "localhost", "--port",
             str(server.getsockname()[1])],
            env=source.environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        peer, _ = server.accept()
        peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 20)
        _, error = client.communicate(timeout=60)
        peer.close()
    assert client.returncode != 0
    assert error.startswith("vmf: error: ")
    assert "Traceback" not in error
    source.wait_for_more("box")


def test_ctrl_c_at_the_source_cancels_the_teleport_and_the_machine_goes_on(
    hosts: tuple[Host, Host], builtin: MachineConfig
) -> None:
    """The target is stopped (SIGSTOP), so that the teleport hangs until somebody cancels it."""
    source, target = hosts
    for host in hosts:
        host.define(builtin)
    source.start("box")
    source.wait_for_output("box", b"tick 2 ")
    port = target.wait("box")
    target.kill("box", signal.SIGSTOP)
    client = subprocess.Popen(
        [sys.executable, "-m", "vmf.cli", "controlvm", "box", "teleport", "--host", "localhost", "--port", str(port)],
        env=source.environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    source.wait_for_state("box", "teleporting")
    time.sleep(0.3)
    client.send_signal(signal.SIGINT)
    _, error = client.communicate(timeout=30)
    target.kill("box", signal.SIGCONT)
    assert client.returncode != 0
    assert "Traceback" not in error
    source.wait_for_state("box", "running")
    source.wait_for_more("box")
    target.wait_for_state("box", "teleportingin")
    with source.client("box") as control:
        control.teleport("127.0.0.1", port)
    target.wait_for_more("box")


@pytest.mark.parametrize("side", [0, 1])
def test_cancel_from_either_side(hosts: tuple[Host, Host], builtin: MachineConfig, side: int) -> None:
    """`teleport --cancel` from another terminal; at the target it ends the waiting."""
    source, target = hosts
    for host in hosts:
        host.define(builtin)
    source.start("box")
    port = target.wait("box")
    target.kill("box", signal.SIGSTOP)
    client = subprocess.Popen(
        [sys.executable, "-m", "vmf.cli", "controlvm", "box", "teleport", "--host", "localhost", "--port", str(port)],
        env=source.environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    source.wait_for_state("box", "teleporting")
    if side == 1:
        # The target cannot answer while it is stopped; cancelled there it must not come alive and take the machine.
        target.kill("box", signal.SIGKILL)
    else:
        ok(source, "controlvm", "box", "teleport", "--cancel")
    _, error = client.communicate(timeout=60)
    assert client.returncode != 0
    assert error.startswith("vmf: error: ")
    source.wait_for_state("box", "running")
    source.wait_for_more("box")


def test_a_paused_machine_teleports_and_stays_paused(hosts: tuple[Host, Host], builtin: MachineConfig) -> None:
    source, target = hosts
    for host in hosts:
        host.define(builtin)
    source.start("box")
    source.wait_for_output("box", b"tick 2 ")
    ok(source, "controlvm", "box", "pause")
    port = target.wait("box")
    ok(source, "controlvm", "box", "teleport", "--host", "localhost", "--port", str(port))
    assert target.state("box") == "paused"
    assert b"tick" not in target.output("box")
    ok(target, "controlvm", "box", "resume")
    target.wait_for_more("box")
    assert check(source.output("box") + target.output("box")).problems == ()


def test_a_reset_at_the_target_starts_the_same_guest(hosts: tuple[Host, Host], builtin: MachineConfig) -> None:
    source, target = hosts
    for host in hosts:
        host.define(builtin)
    source.start("box")
    source.wait_for_output("box", b"tick 5 ")
    port = target.wait("box")
    with source.client("box") as client:
        client.teleport("127.0.0.1", port)
    ok(target, "controlvm", "box", "reset")
    target.wait_for_output("box", b"tick 1 ")
    target.wait_for_output("box", b"tick 2 ")
