"""TCP sockets for transports: names and addresses, listening, connecting, and what every TCP channel has in common.

An empty host (or `*`) listens on every address of this host, both IPv4 and IPv6 where there is IPv6. A name that has
several addresses is connected to one after the other, each with a fair share of the time.

A channel's socket stays in blocking mode and the time-out is the kernel's (SO_SNDTIMEO, SO_RCVTIMEO): one system call
for each operation, no poll before it, and "no progress for so long" is exactly what the kernel measures, since a call
that moved some bytes before the time was over reports them.

`shutdown` is shutdown(2): it makes blocked calls of other threads return. `close` first shuts down, then waits for
those calls to have left (the two locks) before it frees the descriptor, whose number might otherwise be somebody
else's by the time they use it.
"""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import os
import select
import socket
import struct
import threading
import time
from typing import Any, NoReturn

from vmf.errors import TransportClosed, TransportError, TransportTimeout
from vmf.transport.base import Address, Channel

_BACKLOG = 128
"""Connections that the kernel holds until they are accepted; a flood beyond that makes honest ones try again, late."""
_ANY = ("", "*")
_PORT_ATTEMPTS = 20
_RESOLVE_SECONDS = 20.0
_PRIVILEGED_PORTS = 1024

_SIOCOUTQ = 0x5411  # <linux/sockios.h>: bytes in the send queue that are not acknowledged

KEEPALIVE_IDLE_S = 10
KEEPALIVE_INTERVAL_S = 5
KEEPALIVE_PROBES = 6
USER_TIMEOUT_MS = 60_000
"""A peer that acknowledges nothing for so long is gone (TCP_USER_TIMEOUT, tcp(7))."""

_GONE = {errno.ECONNRESET, errno.EPIPE, errno.ESHUTDOWN, errno.ENOTCONN, errno.ECONNABORTED, errno.EBADF}
_CHECK_NETWORK = "Check the network between the hosts and that the other vmf process is alive, then try again."

Resolved = tuple[socket.AddressFamily, Any]
"""Family and socket address."""


def _seconds(timeout: float) -> str:
    return f"{timeout:g} s"


def check_port(address: Address, lowest: int) -> None:
    if not lowest <= address.port <= 65535:
        raise TransportError(
            f"port {address.port} in {address} is not a TCP port.", f"Use a port from {lowest} to 65535."
        )


def resolve(address: Address, timeout: float) -> list[Resolved]:
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


def is_loopback(address: Address) -> bool:
    """Whether a listener there is reached from this host only. Raises TransportError for an unknown host."""
    if address.host in _ANY:
        return False
    found = resolve(address, _RESOLVE_SECONDS)
    return all(ipaddress.ip_address(str(where[0]).partition("%")[0]).is_loopback for _, where in found)


def address_of(scheme: str, where: tuple[Any, ...]) -> Address:
    """An Address of a socket address."""
    # An IPv4 peer of a listener for both families looks like ::ffff:192.0.2.7 (RFC 4291, 2.5.5.2).
    return Address(scheme, str(where[0]).removeprefix("::ffff:"), int(where[1]))


class Acceptor:
    """Listening sockets of one port, and a pipe to wake whoever waits on them."""

    def __init__(self, scheme: str, *listening: socket.socket) -> None:
        """Takes the sockets over; `scheme` is for the addresses."""
        self._sockets = {each.fileno(): each for each in listening}
        for each in listening:
            each.setblocking(False)
        self.addresses = tuple(address_of(scheme, each.getsockname()) for each in listening)
        self.address = self.addresses[0]
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._accepting = threading.Lock()
        self._guard = threading.Lock()
        self._shut = False
        self._closed = False

    def _closed_error(self) -> TransportClosed:
        return TransportClosed(f"{self.address} does not listen any more.")

    def accept(self, timeout: float | None) -> tuple[socket.socket, Any]:
        """The next connection and its peer's socket address. Raises as `Listener.accept`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._accepting:
            if self._shut:
                raise self._closed_error()
            poll = select.poll()
            for descriptor in self._sockets:
                poll.register(descriptor, select.POLLIN)
            poll.register(self._wake_read, select.POLLIN)
            while True:
                left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
                ready = poll.poll(left)
                if self._shut:
                    raise self._closed_error()
                if not ready:
                    raise TransportTimeout(f"nobody connected to {self.address} within {_seconds(timeout or 0)}.")
                try:
                    return self._sockets[ready[0][0]].accept()
                except OSError as error:
                    if error.errno not in (errno.EAGAIN, errno.ECONNABORTED, errno.EPROTO):
                        raise TransportError(
                            f"accepting a connection on {self.address} failed: {error.strerror}.",
                            "Raise the limit of open files (ulimit -n).",
                        ) from error

    def shutdown(self) -> None:
        """Wake `accept` for good; any thread; idempotent."""
        with self._guard:
            self._shut = True
            if not self._closed:
                try:
                    os.write(self._wake_write, b"x")
                except BlockingIOError:
                    pass  # it holds thousands of wake-ups already

    def close(self) -> None:
        """Free the sockets; idempotent."""
        self.shutdown()
        with self._accepting, self._guard:
            if self._closed:
                return
            self._closed = True
            for each in self._sockets.values():
                each.close()
            os.close(self._wake_read)
            os.close(self._wake_write)


def listen(address: Address) -> Acceptor:
    """As `Transport.listen`. A name is listened to at all of its addresses, with one port."""
    check_port(address, 0)
    if address.host in _ANY:
        return _listen_everywhere(address)
    candidates = resolve(address, _RESOLVE_SECONDS)
    for attempt in range(_PORT_ATTEMPTS):
        try:
            return Acceptor(address.scheme, *_listen_at_all(candidates))
        except OSError as error:
            # A free port of the first address may be taken at the second one: another one is tried.
            if error.errno != errno.EADDRINUSE or address.port or attempt == _PORT_ATTEMPTS - 1:
                raise _listen_error(address, error) from error
    raise AssertionError


def _listen_everywhere(address: Address) -> Acceptor:
    candidates: list[Resolved] = [(socket.AF_INET, ("0.0.0.0", address.port))]
    if socket.has_dualstack_ipv6():
        candidates.insert(0, (socket.AF_INET6, ("::", address.port)))
    failure: OSError | None = None
    for family, where in candidates:
        try:
            return Acceptor(address.scheme, _listen_at(family, where, dual=True))
        except OSError as error:
            if failure is None or error.errno != errno.EAFNOSUPPORT:
                failure = error
    assert failure is not None
    raise _listen_error(address, failure) from failure


def _listen_at_all(candidates: list[Resolved]) -> list[socket.socket]:
    """A socket for each address that this host has; raises OSError when it has none, or one of them is in use."""
    opened: list[socket.socket] = []
    failure: OSError | None = None
    try:
        for family, where in candidates:
            port = opened[0].getsockname()[1] if opened else where[1]
            try:
                opened.append(_listen_at(family, (where[0], port, *where[2:]), dual=False))
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                failure = failure if failure is not None and error.errno == errno.EAFNOSUPPORT else error
        if not opened:
            assert failure is not None
            raise failure
    except BaseException:
        for each in opened:
            each.close()
        raise
    return opened


def _listen_at(family: socket.AddressFamily, where: tuple[Any, ...], dual: bool) -> socket.socket:
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Connections of the last minute in TIME_WAIT must not keep us from the port; another listener still does.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if dual else 1)
        listening.bind(where)
        listening.listen(_BACKLOG)
        return listening
    except BaseException:
        listening.close()
        raise


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


def connect(address: Address, timeout: float) -> socket.socket:
    """As `Transport.connect`: a connected socket."""
    check_port(address, 1)
    deadline = time.monotonic() + timeout
    candidates = resolve(address, timeout)
    failures: list[tuple[str, OSError]] = []
    for index, (family, where) in enumerate(candidates):
        share = (deadline - time.monotonic()) / (len(candidates) - index)
        try:
            return _connect_to(family, where, max(share, 0.001))
        except OSError as error:
            failures.append((str(where[0]), error))
    raise _connect_error(address, failures, timeout) from failures[-1][1]


def _connect_to(family: socket.AddressFamily, where: tuple[Any, ...], timeout: float) -> socket.socket:
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout)
        connection.connect(where)
        local, remote = connection.getsockname(), connection.getpeername()
        if local == remote:
            # The kernel picked the very port we connect to as ours, and TCP let us talk to ourselves.
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        return connection
    except BaseException:
        connection.close()
        raise


def _connect_error(address: Address, failures: list[tuple[str, OSError]], timeout: float) -> TransportError:
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
        return TransportError(f"there is no route to {address}{tried}.", "Check the address and this host's network.")
    if numbers & {errno.EACCES, errno.EPERM}:
        return TransportError(
            f"connecting to {address} is forbidden on this host{tried}.", "Check this host's firewall."
        )
    reasons = "; ".join(f"{host}: {error.strerror or error}" for host, error in failures)
    return TransportError(f"cannot connect to {address} ({reasons}).", "Check the address and the network.")


class SocketChannel(Channel):
    """A channel on one TCP socket, but for sending and receiving; those hold `_sending` and `_receiving`."""

    def __init__(self, connection: socket.socket, local: Address, remote: Address) -> None:
        """Takes the socket over."""
        self.local = local
        self.remote = remote
        self._socket = connection
        self._shut = False
        self._closed = False
        self._timeout: float | None = None
        self._sending = threading.Lock()
        self._receiving = threading.Lock()
        connection.setblocking(True)
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            for level, option, value in (
                (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
                (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
                (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S),
                (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S),
                (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES),
                (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS),
            ):
                connection.setsockopt(level, option, value)

    def set_timeout(self, seconds: float | None) -> None:
        """Raises ValueError for a time-out that is not positive (the kernel would take 0 for "for ever")."""
        if seconds is not None and seconds <= 0:
            raise ValueError(f"time-out {seconds} s is not positive")
        microseconds = 0 if seconds is None else max(1, round(seconds * 1e6))
        value = struct.pack("@ll", *divmod(microseconds, 1_000_000))
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        except OSError as error:
            self._fail(error, "use")
        self._timeout = seconds

    def _check_open(self) -> None:
        if self._shut:
            raise TransportClosed(f"the connection to {self.remote} was shut down on this side.")

    def _fail(self, error: OSError, doing: str) -> NoReturn:
        """Raise what an OSError of a send or receive means."""
        self._check_open()
        if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK):
            raise TransportTimeout(
                f"{self.remote} made no progress for {self._timeout:g} s ({doing}).", _CHECK_NETWORK
            ) from error
        if error.errno == errno.ETIMEDOUT:
            raise TransportTimeout(f"{self.remote} does not answer any more ({doing}).", _CHECK_NETWORK) from error
        if error.errno in _GONE:
            raise TransportClosed(f"{self.remote} broke the connection ({doing}).", _CHECK_NETWORK) from error
        raise TransportError(
            f"the connection to {self.remote} failed ({doing}): {error.strerror}.", _CHECK_NETWORK
        ) from error

    def _ended(self) -> NoReturn:
        self._check_open()
        raise TransportClosed(f"{self.remote} closed the connection.", _CHECK_NETWORK)

    def unsent_bytes(self) -> int:
        if self._closed:
            return 0
        answer = bytearray(4)
        try:
            fcntl.ioctl(self._socket.fileno(), _SIOCOUTQ, answer)
        except (OSError, ValueError):
            return 0  # closed in this moment by another thread
        return int(struct.unpack("@i", answer)[0])

    def shutdown(self) -> None:
        self._shut = True
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the peer was faster, or it is closed

    def close(self) -> None:
        self.shutdown()
        with self._sending, self._receiving:
            self._closed = True
            self._socket.close()
