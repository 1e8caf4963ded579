"""Listening and connecting, and one clear error for each way it fails."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from pathlib import Path

import pytest

import vmf.transport.sockets as module
import vmf_transport_tcp.plugin as plugin
from vmf.errors import TransportClosed, TransportError, TransportTimeout
from vmf.transport.base import Address
from vmf_transport_tcp.transport import TcpTransport


def at(host: str, port: int = 0) -> Address:
    return Address("tcp", host, port)


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def exchange(listen: str, connect: str) -> None:
    transport = TcpTransport()
    listener = transport.listen(at(listen))
    assert listener.address.port > 0
    one = transport.connect(at(connect, listener.address.port), 5)
    two = listener.accept(5)
    assert one.local == two.remote
    assert one.remote.port == two.local.port == listener.address.port
    one.send(b"hello")
    got = bytearray(5)
    two.recv_into(memoryview(got))
    assert got == b"hello"
    for each in (one, two, listener):
        each.close()


@pytest.mark.parametrize(
    ("listen", "connect"),
    [("127.0.0.1", "127.0.0.1"), ("", "127.0.0.1"), ("*", "localhost"), ("localhost", "localhost")],
)
def test_ipv4(listen: str, connect: str) -> None:
    exchange(listen, connect)


@pytest.mark.skipif(not has_ipv6(), reason="this host has no IPv6")
@pytest.mark.parametrize(("listen", "connect"), [("::1", "::1"), ("", "::1")])
def test_ipv6(listen: str, connect: str) -> None:
    exchange(listen, connect)


def test_a_name_with_a_dead_first_address_still_connects(monkeypatch: pytest.MonkeyPatch) -> None:
    listener = TcpTransport().listen(at("127.0.0.1"))
    port = listener.address.port
    found = [(socket.AF_INET, 1, 6, "", (host, port)) for host in ("127.0.0.2", "127.0.0.1")]
    monkeypatch.setattr(module.socket, "getaddrinfo", lambda *a, **k: found)
    channel = TcpTransport().connect(at("twofold.example", port), 5)
    assert channel.remote.host == "127.0.0.1"
    channel.close()
    listener.close()


def complaint(error: TransportError, *words: str) -> None:
    assert error.remedy
    for word in words:
        assert word in error.message
    assert "\n" not in str(error)


def test_port_in_use() -> None:
    listener = TcpTransport().listen(at("127.0.0.1"))
    with pytest.raises(TransportError) as caught:
        TcpTransport().listen(listener.address)
    complaint(caught.value, str(listener.address), "in use")
    listener.close()
    TcpTransport().listen(listener.address).close()


def test_address_of_another_host() -> None:
    with pytest.raises(TransportError) as caught:
        TcpTransport().listen(at("192.0.2.1"))
    complaint(caught.value, "192.0.2.1", "has no address")


def test_privileged_port(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
    if os.geteuid() == 0 or int(limit.read_text()) <= 81:
        # this user may: let the kernel's answer for one who may not be made up

        def refuse(*rest: object, **named: object) -> None:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr(module, "_listen_at", refuse)
    with pytest.raises(TransportError) as caught:
        TcpTransport().listen(at("127.0.0.1", 81))
    complaint(caught.value, "port 81", "privileged")


@pytest.mark.parametrize("port", [-1, 65_536])
def test_impossible_ports(port: int) -> None:
    with pytest.raises(TransportError, match="not a TCP port"):
        TcpTransport().listen(at("127.0.0.1", port))
    with pytest.raises(TransportError, match="not a TCP port"):
        TcpTransport().connect(at("127.0.0.1", port), 1)


def test_connecting_to_port_zero() -> None:
    with pytest.raises(TransportError, match="not a TCP port"):
        TcpTransport().connect(at("127.0.0.1", 0), 1)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 80, "bad host", "x..y"])
def test_unknown_host(host: str) -> None:
    with pytest.raises(TransportError) as caught:
        TcpTransport().connect(at(host, 6000), 20)
    complaint(caught.value, host)
    with pytest.raises(TransportError) as caught:
        TcpTransport().listen(at(host, 6000))
    complaint(caught.value, host)


def test_slow_name_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.socket, "getaddrinfo", lambda *a, **k: time.sleep(1) or [])
    with pytest.raises(TransportTimeout) as caught:
        TcpTransport().connect(at("slow.example", 6000), 0.1)
    complaint(caught.value, "slow.example", "0.1 s")


def test_nobody_listening() -> None:
    listener = TcpTransport().listen(at("127.0.0.1"))
    listener.close()
    with pytest.raises(TransportError) as caught:
        TcpTransport().connect(listener.address, 5)
    complaint(caught.value, "nobody listens", str(listener.address))
    assert "startvm" in caught.value.remedy


def test_no_answer() -> None:
    """A listener whose queue is full drops new connections, like a firewall."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
            fillers.append(filler)
        time.sleep(0.1)
        began = time.monotonic()
        with pytest.raises(TransportTimeout) as caught:
            TcpTransport().connect(at("127.0.0.1", port), 0.3)
        assert 0.2 < time.monotonic() - began < 3
        complaint(caught.value, "did not answer within 0.3 s", str(port))
        for filler in fillers:
            filler.close()


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EHOSTUNREACH, "no route"),
        (errno.ENETUNREACH, "no route"),
        (errno.EACCES, "forbidden"),
        (errno.ENOBUFS, "cannot connect"),
    ],
)
def test_other_refusals(monkeypatch: pytest.MonkeyPatch, number: int, words: str) -> None:
    def refuse(*rest: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module, "_connect_to", refuse)
    with pytest.raises(TransportError) as caught:
        TcpTransport().connect(at("127.0.0.1", 6000), 1)
    complaint(caught.value, words, "tcp:127.0.0.1:6000")


def test_accept_times_out_and_is_woken() -> None:
    listener = TcpTransport().listen(at("127.0.0.1"))
    with pytest.raises(TransportTimeout, match="nobody connected"):
        listener.accept(0.05)
    failures: list[BaseException] = []

    def wait() -> None:
        try:
            listener.accept(None)
        except TransportClosed as error:
            failures.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)
    listener.shutdown()
    listener.shutdown()
    thread.join(2)
    assert len(failures) == 1
    with pytest.raises(TransportClosed):
        listener.accept(None)
    listener.close()
    listener.close()
    with pytest.raises(TransportClosed):
        listener.accept(1)


def test_plugin() -> None:
    assert plugin.vmf_api_version == 1
    assert plugin.vmf_transport().scheme == "tcp"


@pytest.mark.skipif(not has_ipv6(), reason="this host has no IPv6")
def test_brackets_of_ipv6_addresses_are_no_part_of_them() -> None:
    assert at("[::1]", 7) == at("::1", 7)
    assert str(at("[::1]", 7)) == "tcp:[::1]:7"
    exchange("[::1]", "[::1]")


def test_a_name_is_listened_to_at_all_of_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `localhost`, which a client may look up in either order."""
    hosts = ["127.0.0.1", "127.0.0.2", *(["::1"] if has_ipv6() else [])]

    def lookup(host: str, port: int, **_: object) -> list[tuple[int, int, int, str, tuple[object, ...]]]:
        families = {each: socket.AF_INET6 if ":" in each else socket.AF_INET for each in hosts}
        return [(families[each], 0, 0, "", (each, port, 0, 0)[: 4 if ":" in each else 2]) for each in hosts]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    listener = TcpTransport().listen(at("many", 0))
    monkeypatch.undo()
    port = listener.address.port
    assert [(each.host, each.port) for each in listener.addresses] == [(each, port) for each in hosts]
    for host in hosts:
        one = TcpTransport().connect(at(host, port), 5)
        two = listener.accept(5)
        assert two.local.host == host
        one.close()
        two.close()
    listener.close()
    for host in hosts:
        with pytest.raises(TransportError):
            TcpTransport().connect(at(host, port), 5)


def test_a_name_of_which_one_address_is_in_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = socket.create_server(("127.0.0.2", 0))
    port = taken.getsockname()[1]
    found = [(socket.AF_INET, 0, 0, "", (host, port)) for host in ("127.0.0.1", "127.0.0.2")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(TransportError, match=f"port {port} is in use"):
        TcpTransport().listen(at("many", port))
    monkeypatch.undo()
    taken.close()
    TcpTransport().listen(at("127.0.0.1", port)).close()  # the first one was freed again
