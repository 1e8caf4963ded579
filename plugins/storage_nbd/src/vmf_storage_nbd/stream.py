"""The byte stream to a server: a socket, or TLS on it. One thread sends and another receives at the same time.

Over TLS both directions share one OpenSSL connection, which only one thread may be in: the socket does not block, a
lock is held for each of OpenSSL's calls, and waiting happens outside of it.
"""

from __future__ import annotations

import select
import socket
import ssl
import threading
from collections.abc import Sequence

CONNECT_TIMEOUT_S = 10.0
SILENCE_MS = 30_000
"""Unacknowledged for so long, a connection counts as broken (TCP_USER_TIMEOUT)."""
_QUICKACK = getattr(socket, "TCP_QUICKACK", None)
IOV_MAX = 1024


class Closed(OSError):
    """The server closed the connection."""


def _is_tcp(connection: socket.socket) -> bool:
    return connection.family in (socket.AF_INET, socket.AF_INET6)


def hurry(connection: socket.socket) -> None:
    """Before a receive: acknowledge at once what comes. Linux forgets it each time.

    Else the server's next packet may wait 40 ms for our delayed acknowledgement.
    """
    if _QUICKACK is not None and _is_tcp(connection):
        connection.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)


def send_at_once(connection: socket.socket) -> None:
    """No packet of ours waits for an acknowledgement of the one before."""
    if _is_tcp(connection):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class Stream:
    """A plain one. All methods raise OSError."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        self._socket = connection
        send_at_once(connection)
        if _is_tcp(connection):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_MS)

    def send(self, buffers: Sequence[memoryview]) -> None:
        left = list(buffers)
        while left:
            sent = self._socket.sendmsg(left[:IOV_MAX])
            while left and sent >= left[0].nbytes:
                sent -= left.pop(0).nbytes
            if sent:
                left[0] = left[0].cast("B")[sent:]

    def receive(self, buffer: memoryview) -> None:
        """Fill it."""
        while buffer.nbytes:
            hurry(self._socket)
            count = self._socket.recv_into(buffer)
            if not count:
                raise Closed("the server closed the connection")
            buffer = buffer[count:]

    def send_last(self, data: bytes) -> None:
        """Send a few bytes if the connection takes them at once; it is no matter if not."""
        self._socket.send(data, socket.MSG_DONTWAIT)

    def shutdown(self) -> None:
        """Wake whoever waits; any thread."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # gone already

    def close(self) -> None:
        self._socket.close()


class TlsStream(Stream):
    """One over TLS; the handshake is done."""

    def __init__(self, connection: ssl.SSLSocket) -> None:
        super().__init__(connection)
        connection.setblocking(False)
        self._tls = connection
        self._engine = threading.Lock()

    def send(self, buffers: Sequence[memoryview]) -> None:
        if sum(buffer.nbytes for buffer in buffers) < 1 << 16:
            buffers = [memoryview(b"".join(buffers))]  # one record instead of several
        for buffer in buffers:
            view = buffer.cast("B")
            while view.nbytes:
                try:
                    with self._engine:
                        sent = self._tls.send(view)
                    view = view[sent:]
                except ssl.SSLWantWriteError:
                    self._wait(select.POLLOUT)
                except ssl.SSLWantReadError:
                    self._wait(select.POLLIN)

    def send_last(self, data: bytes) -> None:
        with self._engine:
            self._tls.send(data)  # it does not block

    def receive(self, buffer: memoryview) -> None:
        while buffer.nbytes:
            try:
                with self._engine:
                    count = self._tls.recv_into(buffer)
            except ssl.SSLWantReadError:
                self._wait(select.POLLIN)
                continue
            except ssl.SSLWantWriteError:
                self._wait(select.POLLOUT)
                continue
            if not count:
                raise Closed("the server closed the connection")
            buffer = buffer[count:]

    def _wait(self, what: int) -> None:
        poll = select.poll()
        poll.register(self._tls.fileno(), what)
        poll.poll(1000)  # bounded: the other thread may have taken what was to come
