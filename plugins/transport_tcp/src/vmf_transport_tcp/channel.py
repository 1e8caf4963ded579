"""One TCP connection as a channel.

The socket stays in blocking mode and the time-out is the kernel's (SO_SNDTIMEO, SO_RCVTIMEO): one system call for
each operation, no poll before it, and "no progress for so long" is exactly what the kernel measures, since a call
that moved some bytes before the time was over reports them.

`shutdown` is shutdown(2): it makes blocked calls of other threads return. `close` first shuts down, then waits for
those calls to have left (the two locks) before it frees the descriptor, whose number might otherwise be somebody
else's by the time they use it.
"""

from __future__ import annotations

import errno
import fcntl
import socket
import struct
import threading
from typing import NoReturn

from vmf.errors import TransportClosed, TransportError, TransportTimeout
from vmf.transport.base import Address, Buffer, ByteRanges, Channel
from vmf_transport_tcp.vectors import IOV_MAX, Vector, recv_some, send_some

_SIOCOUTQ = 0x5411  # <linux/sockios.h>: bytes in the send queue that are not acknowledged

KEEPALIVE_IDLE_S = 10
KEEPALIVE_INTERVAL_S = 5
KEEPALIVE_PROBES = 6
USER_TIMEOUT_MS = 60_000
"""A peer that acknowledges nothing for so long is gone (TCP_USER_TIMEOUT, tcp(7))."""

_GONE = {errno.ECONNRESET, errno.EPIPE, errno.ESHUTDOWN, errno.ENOTCONN, errno.ECONNABORTED, errno.EBADF}
_CHECK_NETWORK = "Check the network between the hosts and that the other vmf process is alive, then try again."


class TcpChannel(Channel):
    """See the module's theory of operation."""

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

    def send(self, *buffers: Buffer) -> None:
        views = [view for buffer in buffers if (view := memoryview(buffer).cast("B")).nbytes]
        with self._sending:
            self._check_open()
            try:
                while views:
                    number = self._socket.sendmsg(views[:IOV_MAX], (), socket.MSG_NOSIGNAL)
                    done = 0
                    while done < len(views) and number >= views[done].nbytes:
                        number -= views[done].nbytes
                        done += 1
                    del views[:done]
                    if number:
                        views[0] = views[0][number:]
            except OSError as error:
                self._fail(error, "sending")

    def recv_into(self, buffer: memoryview) -> None:
        view = buffer.cast("B")
        size = view.nbytes
        with self._receiving:
            self._check_open()
            try:
                done = 0
                while done < size:
                    number = self._socket.recv_into(view[done:])
                    if not number or self._shut:  # after a shutdown the kernel still delivers what keeps coming
                        self._ended()
                    done += number
            except OSError as error:
                self._fail(error, "receiving")

    def send_ranges(self, base: memoryview, ranges: ByteRanges) -> None:
        """As the base class says, in system calls of up to 1,024 ranges. Raises ValueError for a range outside."""
        vector = Vector(base, ranges)
        with self._sending:
            self._check_open()
            fd = self._socket.fileno()
            try:
                while vector.moved < vector.total:
                    vector.advance(send_some(fd, vector))
            except OSError as error:
                self._fail(error, "sending")

    def recv_ranges(self, base: memoryview, ranges: ByteRanges) -> None:
        """As the base class says, in system calls of up to 1,024 ranges. Raises ValueError for a range outside, or
        for a `base` that is read-only."""
        if base.readonly:
            raise ValueError("cannot receive into a read-only buffer")
        vector = Vector(base, ranges)
        with self._receiving:
            self._check_open()
            fd = self._socket.fileno()
            try:
                while vector.moved < vector.total:
                    number = recv_some(fd, vector)
                    if not number or self._shut:
                        self._ended()
                    vector.advance(number)
            except OSError as error:
                self._fail(error, "receiving")

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
