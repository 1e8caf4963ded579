"""Listening and connecting: `tls:host:port`.

Options of an address: `tls_dir` (directory with the certificates), for listening `allow` (names of sources that may
teleport here; none means everybody whom the CA knows), for connecting `tls_hostname` (the name that must be in the
target's certificate, instead of the host that is connected to).

The listener shakes hands on a thread for each connection, so that a slow or silent one holds up nobody; `accept`
gives only connections whose certificate was checked. At most `MAX_HANDSHAKES` are under way: when one more comes, one
is dropped (`vmf.transport.crowd` says which), so connections that do nothing keep nobody out.
"""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time
from typing import Any

from vmf.errors import TransportClosed, TransportError, TransportTimeout
from vmf.transport import sockets
from vmf.transport.base import Address, Channel, Listener, Transport
from vmf.transport.crowd import Crowd
from vmf_transport_tls import files, handshake
from vmf_transport_tls.channel import TlsChannel

log = logging.getLogger(__name__)

SCHEME = "tls"
HANDSHAKE_SECONDS = 5.0
MAX_HANDSHAKES = 16
MAX_WAITING = 16
"""Connections that wait for `accept`; more are closed. Refusals get half of the room, further ones are not told."""
_OPTIONS = {"listen": {"tls_dir", "allow"}, "connect": {"tls_dir", "tls_hostname"}}


def _check_options(address: Address, action: str) -> None:
    unknown = sorted(set(address.options) - _OPTIONS[action])
    if unknown:
        raise TransportError(
            f"the tls transport has no setting {unknown[0]!r} for this side.",
            f"It knows {', '.join(sorted(_OPTIONS[action]))}.",
        )


class TlsListener(Listener):
    """See the module's theory of operation."""

    def __init__(
        self,
        acceptor: sockets.Acceptor,
        credentials: files.Credentials,
        allow: tuple[str, ...],
        handshake_seconds: float = HANDSHAKE_SECONDS,
    ) -> None:
        """Takes the acceptor over."""
        self.address = acceptor.address
        self.notices = credentials.notices
        self._acceptor = acceptor
        self._credentials = credentials
        self._allow = allow
        self._seconds = handshake_seconds
        self._ready: queue.SimpleQueue[TlsChannel | TransportError | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._pending: Crowd[socket.socket] = Crowd(MAX_HANDSHAKES)
        """Handshakes under way."""
        self._shut = False
        """Guarded by `_lock`."""
        self._thread = threading.Thread(target=self._accept, name="vmf-tls-accept", daemon=True)
        self._thread.start()

    @property
    def addresses(self) -> tuple[Address, ...]:
        return self._acceptor.addresses

    def accept(self, timeout: float | None) -> Channel:
        """As the base class says. Raises TransportRefused for a connection that was turned away."""
        if self._shut:
            raise self._closed()
        try:
            got = self._ready.get(timeout=timeout)
        except queue.Empty:
            raise TransportTimeout(f"nobody connected to {self.address} within {timeout:g} s.") from None
        if got is None or self._shut:
            self._ready.put(None)
            if isinstance(got, TlsChannel):
                got.close()
            raise self._closed()
        if isinstance(got, TransportError):
            raise got
        return got

    def _closed(self) -> TransportClosed:
        return TransportClosed(f"{self.address} does not listen any more.")

    def _accept(self) -> None:
        """The accepting thread."""
        while True:
            try:
                connection, peer = self._acceptor.accept(None)
            except TransportClosed:
                return
            except TransportError as error:
                self._offer(error)
                time.sleep(0.1)  # out of descriptors, say: do not spin
                continue
            leaves = self._pending.enter(connection, sockets.address_of(SCHEME, peer).host)
            if leaves is not None:
                _break(leaves)
            if self._shut:
                _break(connection)
            thread = threading.Thread(
                target=self._shake_hands, args=(connection, peer), name="vmf-tls-handshake", daemon=True
            )
            try:
                thread.start()
            except RuntimeError:  # the system has no more threads: this one is not served, later ones may be
                self._pending.leave(connection)
                connection.close()

    def _shake_hands(self, connection: socket.socket, peer: Any) -> None:
        """A thread for each connection."""
        kept = False
        try:
            remote = sockets.address_of(SCHEME, peer)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stream, names = handshake.serve(
                connection,
                remote,
                self._credentials,
                self._allow,
                self._seconds,
                lambda: self._pending.advance(connection, 1),
            )
            local = sockets.address_of(SCHEME, connection.getsockname())
            if not self._pending.leave(connection):
                return  # dropped at the last moment
            own = self._credentials
            channel = TlsChannel(connection, local, remote, stream, names, own.notices, own.end_point)
            log.info("%s is %s", remote, handshake.quoted(names))
            kept = self._offer(channel)
        except TransportError as error:
            self._offer(error)
        except OSError as error:
            log.info("a connection broke: %s", error)
        finally:
            self._pending.leave(connection)
            if not kept:
                connection.close()

    def _offer(self, what: TlsChannel | TransportError) -> bool:
        """Put it where `accept` finds it; False when there is no room."""
        with self._lock:
            room = MAX_WAITING if isinstance(what, TlsChannel) else MAX_WAITING // 2
            if self._shut or self._ready.qsize() >= room:
                return False
            self._ready.put(what)
            return True

    def shutdown(self) -> None:
        with self._lock:
            if self._shut:
                return
            self._shut = True
        for connection in self._pending.everybody():
            _break(connection)
        self._acceptor.shutdown()
        self._ready.put(None)

    def close(self) -> None:
        self.shutdown()
        self._thread.join()
        self._acceptor.close()
        while True:
            try:
                left = self._ready.get_nowait()
            except queue.Empty:
                break
            if isinstance(left, TlsChannel):
                left.close()
        self._ready.put(None)  # for an `accept` that still waits


def _break(connection: socket.socket) -> None:
    """Wake the thread that shakes hands on it; that thread closes it."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it was faster


class TlsTransport(Transport):
    """TLS 1.3 with certificates on both sides."""

    scheme = SCHEME
    authenticates = True

    def listen(self, address: Address) -> Listener:
        _check_options(address, "listen")
        allow = address.options.get("allow", ())
        if isinstance(allow, str) or not all(isinstance(name, str) and name for name in allow):
            raise TransportError(f"allow = {allow!r} is not a list of names.", 'Write a list, like ["host.example"].')
        credentials = files.load(files.directory_of(address.options), "server")
        for notice in credentials.notices:
            log.warning("%s", notice)
        return TlsListener(sockets.listen(address), credentials, tuple(allow))

    def connect(self, address: Address, timeout: float) -> Channel:
        _check_options(address, "connect")
        credentials = files.load(files.directory_of(address.options), "client")
        for notice in credentials.notices:
            log.warning("%s", notice)
        deadline = time.monotonic() + timeout
        hostname = str(address.options.get("tls_hostname") or address.host).rstrip(".").partition("%")[0]
        connection = sockets.connect(address, timeout)
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            local = sockets.address_of(SCHEME, connection.getsockname())
            remote = sockets.address_of(SCHEME, connection.getpeername())
            left = max(0.1, min(2 * HANDSHAKE_SECONDS, deadline - time.monotonic()))
            stream, names = handshake.call(connection, address, credentials, hostname, left)
            shown = stream.tls.getpeercert(binary_form=True)
            end_point = files.end_point_of(files.parse_certificate(shown)) if shown else b""
            return TlsChannel(connection, local, remote, stream, names, credentials.notices, end_point)
        except OSError as error:
            connection.close()
            raise TransportClosed(f"{address} broke the connection: {error.strerror}.", "Try again.") from error
        except BaseException:
            connection.close()
            raise
