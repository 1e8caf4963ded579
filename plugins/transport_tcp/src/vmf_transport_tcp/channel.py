"""One TCP connection as a channel: what is sent and received goes straight from and into the caller's memory."""

from __future__ import annotations

import socket

from vmf.transport.base import Buffer, ByteRanges
from vmf.transport.sockets import SocketChannel
from vmf_transport_tcp.vectors import IOV_MAX, Vector, recv_some, send_some


class TcpChannel(SocketChannel):
    """See `vmf.transport.sockets` for its theory of operation."""

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
