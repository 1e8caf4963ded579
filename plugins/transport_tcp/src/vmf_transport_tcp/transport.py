"""Listening and connecting: `tcp:host:port` with names, IPv4 and IPv6 addresses.

An empty host (or `*`) listens on every address of this host, both IPv4 and IPv6 where there is IPv6. A name that has
several addresses is connected to one after the other, each with a fair share of the time.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
from typing import Any

from vmf.errors import TransportClosed, TransportError, TransportTimeout
from vmf.transport.base import Address, Channel, Listener, Transport
from vmf_transport_tcp.channel import TcpChannel

SCHEME = "tcp"
_BACKLOG = 16
_ANY = ("", "*")
_RESOLVE_SECONDS = 20.0
_PRIVILEGED_PORTS = 1024

Resolved = tuple[socket.AddressFamily, Any]
"""Family and socket address."""


def _seconds(timeout: float) -> str:
    return f"{timeout:g} s"


def _check_port(address: Address, lowest: int) -> None:
    if not lowest <= address.port <= 65535:
        raise TransportError(
            f"port {address.port} in {address} is not a TCP port.", f"Use a port from {lowest} to 65535."
        )


def _resolve(address: Address, timeout: float) -> list[Resolved]:
    """All socket addresses of a host. getaddrinfo(3) has no time-out: it runs in a thread that may be left."""
    answer: list[Resolved] = []
    failure: list[Exception] = []

    def ask() -> None:
        try:
            found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
            answer.extend((family, where) for family, _, _, _, where in found)
        except (OSError, UnicodeError) as error:
            failure.append(error)

    thread = threading.Thread(target=ask, name="vmf-resolve", daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise TransportTimeout(
            f"looking up the host {address.host!r} took longer than {_seconds(timeout)}.",
            "Check the name server, or give the host's IP address.",
        )
    if failure or not answer:
        reason = getattr(failure[0], "strerror", None) if failure else None
        raise TransportError(
            f"unknown host {address.host!r}: {reason or 'it has no address'}.",
            "Check the spelling, or give the host's IP address.",
        )
    return list(dict.fromkeys(answer))


def _address(where: tuple[Any, ...]) -> Address:
    # An IPv4 peer of a listener for both families looks like ::ffff:192.0.2.7 (RFC 4291, 2.5.5.2).
    return Address(SCHEME, str(where[0]).removeprefix("::ffff:"), int(where[1]))


class TcpListener(Listener):
    """A listening socket and a pipe to wake whoever waits on it."""

    def __init__(self, listening: socket.socket) -> None:
        """Takes the socket over."""
        listening.setblocking(False)
        self._socket = listening
        self.address = _address(listening.getsockname())
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._accepting = threading.Lock()
        self._guard = threading.Lock()
        self._shut = False
        self._closed = False

    def _closed_error(self) -> TransportClosed:
        return TransportClosed(f"{self.address} does not listen any more.")

    def accept(self, timeout: float | None) -> Channel:
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._accepting:
            if self._shut:
                raise self._closed_error()
            poll = select.poll()
            poll.register(self._socket, select.POLLIN)
            poll.register(self._wake_read, select.POLLIN)
            while True:
                left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
                ready = poll.poll(left)
                if self._shut:
                    raise self._closed_error()
                if not ready:
                    raise TransportTimeout(f"nobody connected to {self.address} within {_seconds(timeout or 0)}.")
                try:
                    connection, peer = self._socket.accept()
                    try:
                        return TcpChannel(connection, _address(connection.getsockname()), _address(peer))
                    except OSError:
                        connection.close()  # the peer is gone already
                except OSError as error:
                    if error.errno not in (errno.EAGAIN, errno.ECONNABORTED, errno.EPROTO):
                        raise TransportError(
                            f"accepting a connection on {self.address} failed: {error.strerror}.",
                            "Raise the limit of open files (ulimit -n).",
                        ) from error

    def shutdown(self) -> None:
        with self._guard:
            self._shut = True
            if not self._closed:
                try:
                    os.write(self._wake_write, b"x")
                except BlockingIOError:
                    pass  # it holds thousands of wake-ups already

    def close(self) -> None:
        self.shutdown()
        with self._accepting, self._guard:
            if self._closed:
                return
            self._closed = True
            self._socket.close()
            os.close(self._wake_read)
            os.close(self._wake_write)


class TcpTransport(Transport):
    """Plain TCP: not encrypted, not authenticated."""

    scheme = SCHEME

    def listen(self, address: Address) -> Listener:
        _check_port(address, 0)
        if address.host in _ANY:
            candidates: list[Resolved] = [(socket.AF_INET, ("0.0.0.0", address.port))]
            if socket.has_dualstack_ipv6():
                candidates.insert(0, (socket.AF_INET6, ("::", address.port)))
        else:
            candidates = _resolve(address, _RESOLVE_SECONDS)
        failure: OSError | None = None
        for family, where in candidates:
            try:
                return self._listen_at(family, where, dual=address.host in _ANY)
            except OSError as error:
                if failure is None or error.errno != errno.EAFNOSUPPORT:
                    failure = error
        assert failure is not None
        raise self._listen_error(address, failure) from failure

    @staticmethod
    def _listen_at(family: socket.AddressFamily, where: tuple[Any, ...], dual: bool) -> TcpListener:
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            # Connections of the last minute in TIME_WAIT must not keep us from the port; another listener still does.
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if dual else 1)
            listening.bind(where)
            listening.listen(_BACKLOG)
            return TcpListener(listening)
        except BaseException:
            listening.close()
            raise

    @staticmethod
    def _listen_error(address: Address, error: OSError) -> TransportError:
        match error.errno:
            case errno.EADDRINUSE:
                return TransportError(
                    f"cannot listen on {address}: port {address.port} is in use.",
                    "Choose another port (0 picks a free one), or end the program that listens there.",
                )
            case errno.EACCES | errno.EPERM if address.port < _PRIVILEGED_PORTS:
                return TransportError(
                    f"cannot listen on {address}: port {address.port} is reserved for privileged programs.",
                    f"Choose a port from {_PRIVILEGED_PORTS} up (0 picks a free one).",
                )
            case errno.EADDRNOTAVAIL:
                return TransportError(
                    f"cannot listen on {address}: this host has no address {address.host}.",
                    "Choose an address of this host, or leave it empty to listen on all of them.",
                )
        return TransportError(f"cannot listen on {address}: {error.strerror}.", "Choose another address or port.")

    def connect(self, address: Address, timeout: float) -> Channel:
        _check_port(address, 1)
        deadline = time.monotonic() + timeout
        candidates = _resolve(address, timeout)
        failures: list[tuple[str, OSError]] = []
        for index, (family, where) in enumerate(candidates):
            share = (deadline - time.monotonic()) / (len(candidates) - index)
            try:
                return self._connect_to(family, where, max(share, 0.001))
            except OSError as error:
                failures.append((str(where[0]), error))
        raise self._connect_error(address, failures, timeout) from failures[-1][1]

    @staticmethod
    def _connect_to(family: socket.AddressFamily, where: tuple[Any, ...], timeout: float) -> TcpChannel:
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout)
            connection.connect(where)
            local, remote = connection.getsockname(), connection.getpeername()
            if local == remote:
                # The kernel picked the very port we connect to as ours, and TCP let us talk to ourselves.
                raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
            return TcpChannel(connection, _address(local), _address(remote))
        except BaseException:
            connection.close()
            raise

    @staticmethod
    def _connect_error(
        address: Address, failures: list[tuple[str, OSError]], timeout: float
    ) -> TransportError:
        def number(error: OSError) -> int | None:
            return errno.ETIMEDOUT if isinstance(error, TimeoutError) else error.errno

        numbers = {number(error) for _, error in failures}
        tried = f" (tried {', '.join(host for host, _ in failures)})" if len(failures) > 1 else ""
        if errno.ECONNREFUSED in numbers:
            return TransportError(
                f"nobody listens at {address}{tried}.",
                "Start the target machine with its teleporter on (`vmf startvm NAME`), and check host and port.",
            )
        if errno.ETIMEDOUT in numbers:
            return TransportTimeout(
                f"{address} did not answer within {_seconds(timeout)}{tried}.",
                "Check that the host is up and that no firewall drops connections to the port.",
            )
        if numbers & {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EADDRNOTAVAIL}:
            return TransportError(
                f"there is no route to {address}{tried}.", "Check the address and this host's network."
            )
        if numbers & {errno.EACCES, errno.EPERM}:
            return TransportError(
                f"connecting to {address} is forbidden on this host{tried}.", "Check this host's firewall."
            )
        reasons = "; ".join(f"{host}: {error.strerror or error}" for host, error in failures)
        return TransportError(f"cannot connect to {address} ({reasons}).", "Check the address and the network.")
