"""Whole machines over TLS: a teleport between two hosts, refusals after which both go on, what a listener hears."""

from __future__ import annotations

import datetime
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from attrs import evolve

import vmf
from vmf.machine.config import MachineConfig
from vmf.machine.machine import wait_until
from vmf.memory.guest import MIB
from vmf.testing.hosts import Host
from vmf.testing.serial_check import check

sealed = pytest.importorskip("vmf_transport_tls.sealed")
PATTERN = b"the secret of this machine, 48 bytes, in its RAM"
PATTERN_AT = 30 * MIB


def ok(host: Host, *arguments: str) -> str:
    done = host.vmf(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def teleport(source: Host, port: int, *options: str, host: str = "localhost") -> tuple[int, str]:
    done = source.vmf("controlvm", "box", "teleport", "--host", host, "--port", str(port), *options)
    assert "Traceback" not in done.stderr + done.stdout
    return done.returncode, done.stderr


def certificates(source: Host, target: Host) -> None:
    """The two commands of the documentation, and the copy."""
    ok(source, "tls", "init")
    ok(source, "tls", "issue", "localhost", "--out", str(target.directory / "tls"))


def test_a_teleport_over_tls(hosts: tuple[Host, Host], builtin: MachineConfig) -> None:
    source, target = hosts
    certificates(source, target)
    for host in hosts:
        host.define(builtin)
    ok(target, "modifyvm", "box", "--teleporter", "on", "--teleporter-transport", "tls")
    ok(target, "modifyvm", "box", "--teleporter-address", "127.0.0.1", "--teleporter-allow", socket.gethostname())
    assert "Teleports allowed from" in ok(target, "showvminfo", "box")
    said = ok(target, "startvm", "box", "--detach")
    assert "tls:127.0.0.1:" in said
    port = int(said.rpartition("tls:127.0.0.1:")[2].split()[0])
    source.start("box")
    source.wait_for_output("box", b"tick 3 ")
    status, error = teleport(source, port, "--transport", "tls", "--check")
    assert (status, error) == (0, "")
    status, error = teleport(source, port, "--transport", "tls")
    assert (status, error) == (0, "")
    target.wait_for_more("box")
    source.wait_gone("box")
    assert source.state("box") == "teleported"
    assert target.state("box") == "running"
    assert check(source.output("box") + target.output("box")).problems == ()


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def directory(path: Path, ca: trustme.CA, *names: str, **when: Any) -> Path:
    path.mkdir(mode=0o700)
    for role in ("server", "client"):
        issued = ca.issue_cert(*names, **when)
        issued.private_key_pem.write_to_path(path / f"{role}-key.pem")
        os.chmod(path / f"{role}-key.pem", 0o600)
        issued.cert_chain_pems[0].write_to_path(path / f"{role}-cert.pem")
    ca.cert_pem.write_to_path(path / "ca-cert.pem")
    return path


def test_refusals_leave_both_as_they_were(
    hosts: tuple[Host, Host], builtin: MachineConfig, authority: trustme.CA, tmp_path: Path
) -> None:
    source, target = hosts
    for host in hosts:
        host.define(builtin)
    now = datetime.datetime.now(datetime.UTC)
    past = {"not_before": now - datetime.timedelta(days=9), "not_after": now - datetime.timedelta(days=1)}
    good = directory(source.directory / "tls", authority, "source.example")
    stranger = directory(tmp_path / "stranger", authority, "stranger.example")
    foreign = directory(tmp_path / "foreign", trustme.CA(), "source.example")
    expired = directory(tmp_path / "expired", authority, "source.example", **past)
    directory(target.directory / "tls", authority, "localhost")
    port = target.wait("box", transport="tls", allow=("source.example",))
    source.start("box")
    source.wait_for_output("box", b"tick 3 ")
    log = target.home.paths("box").vmm_log

    tls = ("--transport", "tls")
    cases: list[tuple[tuple[str, ...], str, str, str]] = [
        # options, host, said at the source, said at the target ("" where the source never came so far)
        ((*tls, "--tls-dir", str(tmp_path / "none")), "localhost", "no usable certificates", ""),
        ((*tls, "--tls-dir", str(expired)), "localhost", "expired on", ""),
        (
            (*tls, "--tls-dir", str(foreign)),
            "localhost",
            "not issued by an authority",
            "does not accept our certificate",
        ),
        ((*tls, "--tls-dir", str(stranger)), "localhost", "stranger.example", "certificate is for stranger.example"),
        (tls, "127.0.0.1", "not for '127.0.0.1'", "does not accept our certificate"),
        ((), "localhost", "speaks TLS", "does not speak TLS"),
        (("--tls-dir", str(good)), "localhost", "neither encrypts", ""),
    ]
    for options, host, at_source, at_target in cases:
        before = len(log.read_text())
        status, error = teleport(source, port, *options, host=host)
        assert status == 1
        assert error.startswith("vmf: error: ")
        assert error.count("\n") == 1
        assert at_source in error, error
        if at_target:
            target.wait_for_state("box", "teleportingin")
            lines = wait_for_line(log, before, at_target)
            assert len([line for line in lines if "WARNING" in line]) == 1, lines
        assert source.state("box") == "running"
        assert target.state("box") == "teleportingin"
    source.wait_for_more("box")
    status, error = teleport(source, port, *tls)
    assert (status, error) == (0, "")
    target.wait_for_more("box")
    assert check(source.output("box") + target.output("box")).problems == ()


def wait_for_line(log: Path, start: int, text: str) -> list[str]:
    """What was logged since `start` once `text` stands in it."""
    wait_until(lambda: text in log.read_text()[start:], 10)
    lines = log.read_text()[start:].splitlines()
    assert any(text in line for line in lines), lines
    return lines


def test_a_source_with_tls_and_a_plain_target(hosts: tuple[Host, Host], builtin: MachineConfig) -> None:
    source, target = hosts
    certificates(source, target)
    for host in hosts:
        host.define(builtin)
    port = target.wait("box")
    source.start("box")
    source.wait_for_output("box", b"tick 3 ")
    status, error = teleport(source, port, "--transport", "tls")
    assert status == 1
    assert "does not speak TLS" in error
    assert "--teleporter-transport tls" in error
    assert source.state("box") == "running"
    assert target.state("box") == "teleportingin"


class Recorder:
    """A proxy that keeps everything that passes."""

    def __init__(self, port: int) -> None:
        self.seen = bytearray()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self._target = port
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        one, _ = self._server.accept()
        with one, socket.create_connection(("127.0.0.1", self._target)) as two:
            back = threading.Thread(target=self._pass, args=(two, one))
            back.start()
            self._pass(one, two)
            back.join()

    def _pass(self, come: socket.socket, go: socket.socket) -> None:
        try:
            while data := come.recv(1 << 18):
                self.seen += data
                go.sendall(data)
            go.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # one of them has broken the connection

    def close(self) -> None:
        self._thread.join(20)
        self._server.close()


class Meddler(Recorder):
    """A proxy that does something to one of the frames in which RAM crosses, once."""

    def __init__(self, port: int, how: str) -> None:
        self._how = how
        self.done = False
        super().__init__(port)

    def _pass(self, come: socket.socket, go: socket.socket) -> None:
        stream = come.makefile("rb")
        try:
            while len(header := stream.read(5)) == 5:
                ram = header[0] == sealed.KIND
                body = stream.read(int.from_bytes(header[1 if ram else 3 :], "big"))
                unit = header + body
                if ram and not self.done:
                    self.done = True
                    if self._how == "flip":
                        unit = unit[:-20] + bytes([unit[-20] ^ 4]) + unit[-19:]
                    elif self._how == "repeat":
                        unit += unit
                    elif self._how == "drop":
                        unit = b""
                    elif self._how == "late":
                        following = stream.read(5)
                        ram = following[0] == sealed.KIND
                        following += stream.read(int.from_bytes(following[1 if ram else 3 :], "big"))
                        unit = following + unit
                    else:
                        unit = unit[: len(unit) // 2]
                go.sendall(unit)
                if self._how == "cut" and self.done:
                    break
            go.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # one of them has broken the connection


@pytest.mark.parametrize("how", ["flip", "repeat", "drop", "late", "cut"])
def test_harm_to_the_frames_of_ram(hosts: tuple[Host, Host], builtin: MachineConfig, how: str) -> None:
    """One clear error at each side; the source goes on, the target waits, and the next attempt succeeds."""
    if not sealed.available():
        pytest.skip("cryptography is older than 47: RAM goes through TLS")
    source, target = hosts
    certificates(source, target)
    for host in hosts:
        host.define(builtin)
    port = target.wait("box", transport="tls")
    source.start("box")
    source.wait_for_output("box", b"tick 3 ")
    log = target.home.paths("box").vmm_log
    meddler = Meddler(port, how)
    status, error = teleport(source, meddler.port, "--transport", "tls")
    meddler.close()
    assert meddler.done
    assert status == 1
    assert error.startswith("vmf: error: ")
    assert error.count("\n") == 1
    assert "Traceback" not in log.read_text()
    target.wait_for_state("box", "teleportingin")
    wait_for_line(log, 0, "closed the connection" if how == "cut" else "had been altered on the way")
    source.wait_for_more("box")
    status, error = teleport(source, port, "--transport", "tls")
    assert (status, error) == (0, "")
    target.wait_for_more("box")
    assert check(source.output("box") + target.output("box")).problems == ()


@pytest.fixture
def registry() -> vmf.PluginRegistry:
    return vmf.PluginRegistry()


@pytest.fixture
def machines(
    builtin: MachineConfig, registry: vmf.PluginRegistry, hosts: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[vmf.Machine, vmf.Machine]]:
    """In this process, so that something can be planted in the guest's RAM."""
    certificates(*hosts)
    monkeypatch.setenv("VMF_HOME", str(hosts[0].directory))
    teleporter = evolve(builtin.teleporter, address="127.0.0.1", transport="tls", tls_dir=hosts[1].directory / "tls")
    with vmf.Machine(builtin, registry) as source:
        yield source, vmf.Machine(evolve(builtin, name="there", teleporter=teleporter), registry)


@pytest.mark.parametrize("transport", ["tcp", "tls"])
def test_a_listener_hears_nothing(
    transport: str, machines: tuple[vmf.Machine, vmf.Machine], builtin: MachineConfig, registry: vmf.PluginRegistry
) -> None:
    source, target = machines
    if transport == "tcp":
        target = vmf.Machine(evolve(builtin, name="there"), registry)
    with target:
        source.start()
        source.hardware.memory.buffer[PATTERN_AT : PATTERN_AT + len(PATTERN)] = PATTERN
        where = target.listen("127.0.0.1", 0, transport=transport)
        recorder = Recorder(where.port)
        waiting = threading.Thread(target=target.wait_for_teleport)
        waiting.start()
        source.teleport("localhost", recorder.port, transport=transport)
        waiting.join(20)
        recorder.close()
        assert target.state is vmf.MachineState.RUNNING
        buffer = target.hardware.memory.buffer
        assert bytes(buffer[PATTERN_AT : PATTERN_AT + len(PATTERN)]) == PATTERN
        assert len(recorder.seen) > 4096
        # TCP's bytes contain it, so the test would see it; no piece of it may be in those of TLS.
        assert (PATTERN in recorder.seen) is (transport == "tcp")
        pieces = [PATTERN[at : at + 12] for at in range(len(PATTERN) - 11)]
        assert any(piece in recorder.seen for piece in pieces) is (transport == "tcp")
