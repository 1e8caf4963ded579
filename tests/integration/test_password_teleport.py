"""Whole machines and passwords: over tcp and over tls, right and wrong, and where the password must not turn up."""

from __future__ import annotations

import re
import socket
import threading
import time
from pathlib import Path

import pytest
from attrs import evolve

from vmf.machine.config import MachineConfig
from vmf.testing.hosts import Host
from vmf.testing.serial_check import check

SECRET = "eleven herons at dawn"


def ok(host: Host, *arguments: str) -> str:
    done = host.vmf(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def teleport(source: Host, port: int, *options: str) -> tuple[int, str]:
    done = source.vmf("controlvm", "box", "teleport", "--host", "localhost", "--port", str(port), *options)
    assert "Traceback" not in done.stderr + done.stdout
    assert len(done.stderr.splitlines()) <= 1 + ("warning" in done.stderr)
    return done.returncode, done.stderr


class Recorder:
    """A proxy for any number of connections that keeps everything that passes."""

    def __init__(self, port: int) -> None:
        self.seen = bytearray()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self._target = port
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                one, _ = self._server.accept()
            except OSError:
                return
            two = socket.create_connection(("127.0.0.1", self._target))
            for ends in ((one, two), (two, one)):
                threading.Thread(target=self._pass, args=ends, daemon=True).start()

    def _pass(self, come: socket.socket, go: socket.socket) -> None:
        try:
            while data := come.recv(1 << 18):
                self.seen += data
                go.sendall(data)
            go.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # one of them has broken the connection

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()


@pytest.mark.parametrize("transport", ["tcp", "tls"])
def test_passwords(transport: str, hosts: tuple[Host, Host], builtin: MachineConfig, tmp_path: Path) -> None:
    source, target = hosts
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    for path, text in ((right, SECRET), (wrong, "twelve herons at dawn")):
        path.write_text(text + "\n")
        path.chmod(0o600)
    if transport == "tls":
        pytest.importorskip("vmf_transport_tls")
        ok(source, "tls", "init")
        ok(source, "tls", "issue", "localhost", "--out", str(target.directory / "tls"))
    for host in hosts:
        host.define(builtin)
    ok(target, "modifyvm", "box", "--teleporter", "on", "--teleporter-address", "127.0.0.1")
    ok(target, "modifyvm", "box", "--teleporter-transport", transport, "--teleporter-password-file", str(right))
    said = ok(target, "startvm", "box", "--detach")
    match = re.search(r"127\.0\.0\.1:(\d+)", said)
    assert match is not None
    recorder = Recorder(int(match[1]))
    source.start("box")
    source.wait_for_output("box", b"tick 3 ")
    log = target.home.paths("box").vmm_log
    through = ("--transport", transport)

    status, error = teleport(source, recorder.port, *through)
    assert status == 1
    assert "the target asks for a password" in error
    assert "--password-file" in error
    status, error = teleport(source, recorder.port, *through, "--check", "--password-file", str(wrong))
    assert status == 1
    assert "the target refused: the password is wrong." in error
    time.sleep(1.1)
    status, error = teleport(source, recorder.port, *through, "--password-file", str(wrong))
    assert status == 1
    assert "the password is wrong" in error
    assert "the password is wrong" in log.read_text()
    assert source.state("box") == "running"
    assert target.state("box") == "teleportingin"
    time.sleep(2.1)
    assert teleport(source, recorder.port, *through, "--check", "--password-file", str(right)) == (0, "")
    status, error = teleport(source, recorder.port, *through, "--teleporter-password-file", str(right))
    assert (status, error) == (0, "")
    target.wait_for_more("box")
    source.wait_gone("box")
    assert check(source.output("box") + target.output("box")).problems == ()
    recorder.close()

    # Nowhere: on the wire, in definitions, logs, sockets' directories, what the commands said.
    verifier = target.home.load("box").teleporter.password_verifier
    assert verifier is not None
    stored = verifier.rpartition("$")[2].split(":")
    assert len(recorder.seen) > 4096
    for word in (SECRET, "herons", *stored):
        assert word.encode() not in recorder.seen
    for host in hosts:
        for path in host.directory.rglob("*"):
            if path.is_file():
                text = path.read_bytes()
                assert b"herons" not in text, path
                assert stored[0].encode() not in text or path.name == "machine.toml", path


def test_a_source_with_a_password_goes_to_nobody_who_asks_for_none(
    hosts: tuple[Host, Host], builtin: MachineConfig
) -> None:
    source, target = hosts
    for host in hosts:
        host.define(builtin)
    port = target.wait("box")
    source.start("box")
    status, error = teleport(source, port, "--password", SECRET)
    assert status == 1
    assert "asks for no password" in error
    assert "can be seen by others" in error
    assert source.state("box") == "running"
    assert target.state("box") == "teleportingin"


def test_a_false_target_is_refused(hosts: tuple[Host, Host], builtin: MachineConfig) -> None:
    """It has another password, as whoever only listens on the port would."""
    source, target = hosts
    from vmf.teleport.authentication import Verifier

    other = str(Verifier.of("something else"))
    source.define(builtin)
    target.define(evolve(builtin, name="box"))
    port = target.wait("box", password_verifier=other)
    source.start("box")
    status, error = teleport(source, port, "--password", SECRET)
    assert status == 1
    assert "the password is wrong" in error
    assert source.state("box") == "running"
