"""Everybody who is turned away by a waiting machine, as its users see it: one clear line at each side, the target waits
on, the source's guest goes on. And what a listener on the wire gets to hear.
"""

from __future__ import annotations

import datetime
import os
import random
import re
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trustme
from attrs import evolve, frozen

from vmf.machine.config import MachineConfig
from vmf.machine.machine import wait_until
from vmf.teleport.authentication import Verifier
from vmf.testing.hosts import Host
from vmf.testing.network import Recorder
from vmf.testing.serial_check import check

pytest.importorskip("vmf_transport_tls")
SECRET = "a heron, standing"
CHARS = bytes(range(33, 127))


def directory(path: Path, ca: trustme.CA, *names: str, **when: Any) -> Path:
    """A directory of certificates in QEMU's layout, not made by the code under test."""
    path.mkdir(mode=0o700)
    for role in ("server", "client"):
        issued = ca.issue_cert(*names, **when)
        issued.private_key_pem.write_to_path(path / f"{role}-key.pem")
        os.chmod(path / f"{role}-key.pem", 0o600)
        issued.cert_chain_pems[0].write_to_path(path / f"{role}-cert.pem")
    ca.cert_pem.write_to_path(path / "ca-cert.pem")
    return path


def teleport(source: Host, port: int, *options: str, host: str = "localhost") -> tuple[int, str]:
    done = source.vmf("controlvm", "box", "teleport", "--host", host, "--port", str(port), *options)
    assert "Traceback" not in done.stderr + done.stdout
    reason = done.stderr.removeprefix("vmf: error: ").strip()
    assert not reason or reason not in done.stdout, "said twice"
    return done.returncode, done.stderr


@frozen
class Case:
    """How somebody comes, and what is said of it; `at_target` is "" for those who do not get that far."""

    name: str
    come: Callable[[], str]
    at_source: str
    at_target: str


def raw(port: int, context: ssl.SSLContext | None, said: bytes = b"") -> str:
    """Somebody who is not vmf; what his library says."""
    with socket.create_connection(("127.0.0.1", port), 20) as plain:
        try:
            if context is None:
                plain.sendall(said)
                return plain.recv(1000).decode("latin-1")
            with context.wrap_socket(plain, server_hostname="localhost") as sealed:
                sealed.recv(1)
                return "nothing"
        except OSError as error:
            return str(error)


def bare(certificates: Path | None, *, version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if version is not None:
        context.maximum_version = version
    if certificates is not None:
        context.load_cert_chain(certificates / "client-cert.pem", certificates / "client-key.pem")
    return context


def test_the_matrix(hosts: tuple[Host, Host], builtin: MachineConfig, tmp_path: Path) -> None:
    source, target = hosts
    for host in hosts:
        host.define(builtin)
    ca, now = trustme.CA(), datetime.datetime.now(datetime.UTC)
    past = {"not_before": now - datetime.timedelta(days=9), "not_after": now - datetime.timedelta(days=1)}
    good = directory(source.directory / "tls", ca, "source.example")
    stranger = directory(tmp_path / "stranger", ca, "stranger.example")
    foreign = directory(tmp_path / "foreign", trustme.CA(), "source.example")
    ca.cert_pem.write_to_path(foreign / "ca-cert.pem")  # it trusts the target; not so the other way round
    expired = directory(tmp_path / "expired", ca, "source.example", **past)
    directory(target.directory / "tls", ca, "localhost")
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    for path, text in ((right, SECRET), (wrong, SECRET + "?")):
        path.write_text(text)
        path.chmod(0o600)
    verifier = str(Verifier.of(SECRET))
    port = target.wait("box", transport="tls", allow=("source.example",), password_verifier=verifier)
    source.start("box")
    source.wait_for_output("box", b"tick 3 ")
    log = target.home.paths("box").vmm_log
    recorder = Recorder(port)
    with_password = ("--password-file", str(right))
    protected = ("--transport", "tls", *with_password)

    def vmf(*options: str, to: str = "localhost", through: int = port) -> Callable[[], str]:
        def come() -> str:
            status, error = teleport(source, through, *options, host=to)
            assert status == 1
            assert error.startswith("vmf: error: ")
            assert error.count("\n") == 1
            return error

        return come

    def replay() -> str:
        """Record a whole session that was let in, and say it again."""
        status, error = teleport(source, recorder.port, *protected, "--check")
        assert (status, error) == (0, "")
        said = bytes(recorder.from_client[-1])
        assert len(said) > 1000
        return raw(port, None, said)

    no_tls = "does not speak TLS"
    cases = [
        Case("no certificate", vmf(*protected, "--tls-dir", str(tmp_path / "none")), "no usable certificates", ""),
        Case("no certificate, raw", lambda: raw(port, bare(None)), "certificate required", "showed no certificate"),
        Case("foreign CA", vmf(*protected, "--tls-dir", str(foreign)), "does not accept our", "not issued by an"),
        Case("expired", vmf(*protected, "--tls-dir", str(expired)), "expired on", ""),
        Case("expired, raw", lambda: raw(port, bare(expired)), "expired", "certificate has expired"),
        Case("wrong name", vmf(*protected, to="127.0.0.1"), "not for '127.0.0.1'", "does not accept our certificate"),
        Case("not allowed", vmf(*protected, "--tls-dir", str(stranger)), "does not allow", "is for stranger.example"),
        Case("no password", vmf("--transport", "tls"), "asks for a password", "asks for a password"),
        Case(
            "wrong password",
            vmf("--transport", "tls", "--password-file", str(wrong)),
            "the target refused: the password is wrong",
            "the password is wrong",
        ),
        Case("plaintext vmf", vmf(*with_password), "speaks TLS", no_tls),
        Case("plaintext", lambda: raw(port, None, b"GET / HTTP/1.1\r\n\r\n"), "speaks TLS", no_tls),
        Case("TLS 1.2", lambda: raw(port, bare(good, version=ssl.TLSVersion.TLSv1_2)), "version", "TLS 1.3"),
        Case("replayed", replay, "", "recorded and said again"),
    ]
    for case in cases:
        before = len(log.read_text())
        said = case.come()
        assert case.at_source in said, (case.name, said)
        if case.at_target:
            wait_until(lambda case=case, before=before: case.at_target in log.read_text()[before:], 10)  # type: ignore[misc]
            lines = [line for line in log.read_text()[before:].splitlines() if "WARNING" in line]
            assert len(lines) == 1, (case.name, lines)
            assert case.at_target in lines[0], (case.name, lines)
            assert "[SSL" not in lines[0]
        assert source.state("box") == "running", case.name
        assert target.state("box") == "teleportingin", case.name
        if case.name == "wrong password":
            time.sleep(1.1)
    source.wait_for_more("box")
    assert teleport(source, port, *protected) == (0, "")
    target.wait_for_more("box")
    assert check(source.output("box") + target.output("box")).problems == ()
    recorder.close()


def test_a_replayed_password(hosts: tuple[Host, Host], builtin: MachineConfig, tmp_path: Path) -> None:
    """Over plain TCP: what was recorded opens nothing, and is no guess."""
    source, target = hosts
    for host in hosts:
        host.define(builtin)
    right = tmp_path / "right"
    right.write_text(SECRET)
    right.chmod(0o600)
    port = target.wait("box", password_verifier=str(Verifier.of(SECRET)))
    source.start("box")
    with Recorder(port) as recorder:
        assert teleport(source, recorder.port, "--check", "--password-file", str(right)) == (0, "")
        said = bytes(recorder.from_client[-1])
    log = target.home.paths("box").vmm_log
    before = len(log.read_text())
    raw(port, None, said)
    wait_until(lambda: "of another session" in log.read_text()[before:], 10)
    assert "of another session" in log.read_text()[before:]
    assert target.state("box") == "teleportingin"
    assert teleport(source, port, "--password-file", str(right)) == (0, "")


@pytest.mark.parametrize("transport", ["tcp", "tls"])
def test_what_a_listener_hears(
    transport: str, hosts: tuple[Host, Host], builtin: MachineConfig, tmp_path: Path
) -> None:
    """The guest's image ends in 64 random characters, so they are in its RAM."""
    source, target = hosts
    pattern = bytes(random.Random(7).choices(CHARS, k=64))
    assert builtin.image is not None
    image = tmp_path / "guest.bin"
    image.write_bytes(builtin.image.read_bytes() + pattern)
    if transport == "tls":
        assert source.vmf("tls", "init").returncode == 0
        issued = source.vmf("tls", "issue", "localhost", "--out", str(target.directory / "tls"))
        assert issued.returncode == 0
    for host in hosts:
        host.define(evolve(builtin, image=image))
    with Recorder(target.wait("box", transport=transport)) as recorder:
        source.start("box")
        source.wait_for_output("box", b"tick 3 ")
        assert teleport(source, recorder.port, "--transport", transport) == (0, "")
        target.wait_for_more("box")
        assert len(recorder.seen) > 100_000
        pieces = [pattern[at : at + 8] for at in range(len(pattern) - 7)]
        assert (pattern in recorder.seen) is (transport == "tcp")
        assert any(piece in recorder.seen for piece in pieces) is (transport == "tcp")
        clear = re.search(rb"VMFT|tick", bytes(recorder.seen))
        assert (clear is not None) is (transport == "tcp")
    assert check(source.output("box") + target.output("box")).problems == ()
