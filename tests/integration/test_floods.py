"""A waiting `vmf` process under hundreds of connections: it waits on, it does not grow, and the source gets through."""

from __future__ import annotations

import random
import socket
import threading
import time
from pathlib import Path

import pytest

from vmf.machine.config import MachineConfig
from vmf.teleport.authentication import Verifier
from vmf.teleport.protocol import messages as m
from vmf.testing.hosts import Host
from vmf.testing.serial_check import check

SECRET = "under the stone bridge"
CONNECTIONS = 500
HELLO = m.encode(m.Hello(bytes(16), m.PROTOCOL_VERSIONS, m.FEATURES, "stranger", "box"))
CLIENT_HELLO = bytes.fromhex("1603010200010001fc0303")
"""How a TLS client begins; the rest never comes."""


class Flood:
    """Keeps `CONNECTIONS` strangers at a port: whoever is dropped comes again. They say nothing, something wrong, or
    something right but not to the end, a byte at a time."""

    def __init__(self, port: int) -> None:
        self.came = 0
        self._port = port
        self._chance = random.Random(3)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _words(self) -> bytes:
        noise = bytes(self._chance.randrange(256) for _ in range(40))
        return self._chance.choice([b"", noise, HELLO, CLIENT_HELLO, b"GET / HTTP/1.1\r\n"])

    def _run(self) -> None:
        inside: list[tuple[socket.socket, bytes]] = []
        while not self._stop.is_set():
            for _ in range(20):
                if len(inside) < CONNECTIONS:
                    try:
                        one = socket.create_connection(("127.0.0.1", self._port), 5)
                    except OSError:
                        continue
                    one.setblocking(False)
                    self.came += 1
                    inside.append((one, self._words()))
            kept: list[tuple[socket.socket, bytes]] = []
            for one, words in inside:
                try:
                    if words:
                        one.send(words[:1])
                    elif one.recv(1) == b"":
                        raise ConnectionError
                except BlockingIOError:
                    pass
                except OSError:
                    one.close()
                    continue
                kept.append((one, words[1:]))
            inside = kept
            self._stop.wait(0.05)
        for one, _ in inside:
            one.close()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


def resident_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError


@pytest.mark.parametrize("transport", ["tcp", "tls"])
def test_a_flood(transport: str, hosts: tuple[Host, Host], builtin: MachineConfig, tmp_path: Path) -> None:
    source, target = hosts
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    if transport == "tls":
        pytest.importorskip("vmf_transport_tls")
        assert source.vmf("tls", "init").returncode == 0
        assert source.vmf("tls", "issue", "localhost", "--out", str(target.directory / "tls")).returncode == 0
    for host in hosts:
        host.define(builtin)
    port = target.wait("box", transport=transport, password_verifier=str(Verifier.of(SECRET)))
    source.start("box")
    source.wait_for_output("box", b"tick 3 ")
    pid = target.pid("box")
    assert pid is not None
    before = resident_kib(pid)
    flood = Flood(port)
    try:
        end = time.monotonic() + 60
        while flood.came < CONNECTIONS:
            assert time.monotonic() < end, flood.came
            time.sleep(0.1)
        assert target.state("box") == "teleportingin"
        options = ("--host", "localhost", "--port", str(port), "--transport", transport, "--password-file", str(secret))
        done = source.vmf("controlvm", "box", "teleport", *options, "--check")
        assert (done.returncode, done.stderr) == (0, "")
        threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
        grown = resident_kib(pid) - before
        done = source.vmf("controlvm", "box", "teleport", *options)
        assert (done.returncode, done.stderr) == (0, "")
    finally:
        flood.close()
    target.wait_for_more("box")
    assert check(source.output("box") + target.output("box")).problems == ()
    log = target.home.paths("box").vmm_log.read_text()
    print(f"{transport}: {flood.came} connections, {threads} threads, +{grown} KiB, {len(log.splitlines())} lines")
    assert threads < 120
    assert grown < 64 << 10
    assert len(log.splitlines()) < 400
    assert "Traceback" not in log
