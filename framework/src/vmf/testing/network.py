"""Networks for tests: a proxy that records, and two hosts in network namespaces of their own.

A namespace has its own interfaces, addresses, routes and ports: two processes in different ones can only talk as two
hosts can, through the virtual cable (veth) between them. Making one takes root and iproute2.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from vmf.errors import MachineError
from vmf.testing.hosts import Host

_SECONDS = 30
ADDRESSES = ("192.0.2.1", "192.0.2.2")
"""Of the two hosts; RFC 5737 reserves them for documentation, and only the namespaces see them."""
STORAGE_NETWORKS = ("198.51.100", "203.0.113")
"""Of the cables from the storage to each of the hosts; the storage is .1 on both."""


class Recorder:
    """A proxy on loopback for any number of connections that keeps everything that passes.

    Attributes:
        port: where it listens.
        seen: all bytes, both ways.
        from_client: of each connection, in order, what came from who connected.
    """

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.seen = bytearray()
        self.from_client: list[bytearray] = []
        self._target = (host, port)
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._run, name="recorder", daemon=True).start()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
                far = socket.create_connection(self._target)
            except OSError:
                return
            said = bytearray()
            self.from_client.append(said)
            threading.Thread(target=self._pass, args=(near, far, said), name="recorder-out", daemon=True).start()
            threading.Thread(target=self._pass, args=(far, near, None), name="recorder-in", daemon=True).start()

    def _pass(self, come: socket.socket, go: socket.socket, said: bytearray | None) -> None:
        try:
            while data := come.recv(1 << 18):
                self.seen += data
                if said is not None:
                    said += data
                go.sendall(data)
            go.shutdown(socket.SHUT_WR)
        except OSError:
            for each in (come, go):  # one of them has broken the connection: so do we
                try:
                    each.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

    def close(self) -> None:
        """Take no more connections."""
        try:
            self._server.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._server.close()


class NamespacedHost(Host):
    """A host whose processes live in a network namespace.

    Attributes:
        address: of this host, for the other one.
    """

    def __init__(
        self, directory: Path, namespace: str, address: str, environment: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(directory, environment)
        self.namespace = namespace
        self.address = address

    def command(self, *arguments: str) -> list[str]:
        """The command line that runs `vmf` there."""
        return ["ip", "netns", "exec", self.namespace, *super().command(*arguments)]

    def start(self, name: str) -> dict[str, Any]:
        self._teleporter(name, enabled=False)
        return self._startvm(name)

    def wait(self, name: str, **settings: Any) -> int:
        """As `Host.wait`, but on the cable's address."""
        self._teleporter(name, enabled=True, **{"address": self.address, **settings})
        return int(self._startvm(name)["address"].rpartition(":")[2])

    def _startvm(self, name: str) -> dict[str, Any]:
        done = self.vmf("startvm", name, "--detach", "--insecure", "--json", timeout=300)
        if done.returncode:
            raise MachineError(done.stderr.strip())
        ready: dict[str, Any] = json.loads(done.stdout)
        return ready


def missing() -> str:
    """Why no namespaces can be made here, one line; "" when they can."""
    if shutil.which("ip") is None:
        return "network namespaces need iproute2 (no `ip` command here)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"vmf-try-{os.getpid()}"
    done = _ip("netns", "add", name, check=False)
    if done.returncode:
        return f"no network namespaces here: {_said(done)}"
    try:
        done = _ip("-n", name, "link", "add", "try0", "type", "veth", "peer", "name", "try1", check=False)
        return f"no virtual cables (veth) here: {_said(done)}" if done.returncode else ""
    finally:
        _ip("netns", "delete", name, check=False)


def _said(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip().splitlines() or ["no reason given"])[-1]


def _ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=_SECONDS, check=check)


@contextmanager
def two_networked_hosts(directory: Path) -> Iterator[tuple[NamespacedHost, NamespacedHost]]:
    """Two hosts with a cable between them; everything they run ends with the block.

    Raises subprocess.CalledProcessError when something cannot be made; see `missing`.
    """
    names = [f"vmf-{os.getpid()}-{side}" for side in ("a", "b")]
    with ExitStack() as stack:
        for name in names:
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "delete", name, check=False)
        _ip("-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1])
        hosts = []
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for link in ("lo", "cable"):
                _ip("-n", name, "link", "set", link, "up")
            hosts.append(stack.enter_context(NamespacedHost(directory / name, name, address)))
        yield hosts[0], hosts[1]


@contextmanager
def storage_host(hosts: Sequence[NamespacedHost]) -> Iterator[tuple[list[str], list[str]]]:
    """A third namespace with a cable of its own to each host: (prefix of commands there, its address for each host).

    The hosts reach it at different addresses, as two hosts do that mount one share by different paths.
    """
    name = f"vmf-{os.getpid()}-s"
    with ExitStack() as stack:
        _ip("netns", "add", name)
        stack.callback(_ip, "netns", "delete", name, check=False)
        _ip("-n", name, "link", "set", "lo", "up")
        for number, (host, network) in enumerate(zip(hosts, STORAGE_NETWORKS, strict=True)):
            cable = f"to{number}"
            _ip("-n", name, "link", "add", cable, "type", "veth", "peer", "name", "store", "netns", host.namespace)
            for namespace, link, place in ((name, cable, 1), (host.namespace, "store", 2)):
                _ip("-n", namespace, "address", "add", f"{network}.{place}/24", "dev", link)
                _ip("-n", namespace, "link", "set", link, "up")
        yield ["ip", "netns", "exec", name], [f"{network}.1" for network in STORAGE_NETWORKS]
