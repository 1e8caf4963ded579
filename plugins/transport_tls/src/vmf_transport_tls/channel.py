"""One TLS connection as a channel.

Theory of operation. One thread sends while another receives, and an OpenSSL connection must not be used by two
threads at once; neither may it be locked while a system call waits, or a silent peer would stop our own sending. So
the connection never sees the socket: it works on two buffers (ssl.MemoryBIO), `incoming` and `outgoing`, under the
lock `_state`, which is only held for computing. System calls happen outside of it, on a blocking socket with the
kernel's time-outs, as for plain TCP (`vmf.transport.sockets`). Measured, this is as fast as an SSLSocket or faster:
that makes three system calls for every 16 KiB.

Encrypted records must leave in the order in which they were made: `_sending` is held from the first encryption to the
last byte written. When receiving makes an answer (to a request for new keys), whoever holds `_sending` next takes it
along. Lock order: `_sending` or `_receiving`, then `_state`.

The end of the stream is not trusted: an attacker can always cut a TCP connection, so vmf's protocol never takes an
end for success, and no "close notify" is needed or sent.
"""

from __future__ import annotations

import socket
import ssl
import threading
from typing import NoReturn

import numpy as np
from attrs import frozen

from vmf.errors import TransportError
from vmf.memory.guest import PAGE_SIZE
from vmf.transport.base import Address, Buffer, ByteRanges
from vmf.transport.sockets import SocketChannel
from vmf_transport_tls.pieces import GATHER_PAGES, page_rows, pieces

_PIECE = 256 << 10
"""Bytes that are encrypted before they are written to the socket; also the most that is read at once."""


@frozen
class Stream:
    """A TLS connection that has shaken hands, and its two buffers."""

    tls: ssl.SSLObject
    incoming: ssl.MemoryBIO
    outgoing: ssl.MemoryBIO


class TlsChannel(SocketChannel):
    """See the module's theory of operation.

    Attributes:
        peer: names in the other side's certificate.
        notices: what the user should know, like a certificate that expires soon.
    """

    def __init__(
        self,
        connection: socket.socket,
        local: Address,
        remote: Address,
        stream: Stream,
        peer: tuple[str, ...],
        notices: tuple[str, ...] = (),
        end_point: bytes = b"",
    ) -> None:
        """Takes the socket over; `end_point` is the data of the channel binding."""
        super().__init__(connection, local, remote)
        self.peer = peer
        self.notices = notices
        self._end_point = end_point
        self._tls = stream.tls
        self._incoming = stream.incoming
        self._outgoing = stream.outgoing
        self._state = threading.Lock()
        self._gather = np.empty((GATHER_PAGES, PAGE_SIZE), dtype=np.uint8)
        """Of the sender."""
        self._scatter = np.empty((GATHER_PAGES, PAGE_SIZE), dtype=np.uint8)
        """Of the receiver."""
        self._wire = memoryview(bytearray(_PIECE))

    def _broken(self, error: ssl.SSLError, doing: str) -> NoReturn:
        """Raise what an error of the TLS connection itself means."""
        self._check_open()
        if isinstance(error, ssl.SSLZeroReturnError):
            self._ended()
        reason = error.reason or str(error)
        if "ALERT" in reason and "BAD_RECORD_MAC" in reason:
            what = "what came there had been altered on the way, or was said twice, late or not at all"
        elif "BAD_RECORD_MAC" in reason or "DIGEST_CHECK_FAILED" in reason:
            what = "what came had been altered on the way, or was said twice, late or not at all"
        else:
            what = reason.replace("_", " ").lower()
        raise TransportError(
            f"the encrypted connection to {self.remote} broke ({doing}): {what}.",
            "Something on the way alters the data, or the other side failed. Teleport again.",
        ) from error

    @property
    def cipher(self) -> str:
        """Name of the cipher suite in use."""
        with self._state:
            chosen = self._tls.cipher()
        return chosen[0] if chosen else ""

    def channel_binding(self) -> tuple[str, bytes] | None:
        """The hash of the target's certificate (RFC 5929): Python's ssl has no better one for TLS 1.3."""
        return ("tls-server-end-point", self._end_point) if self._end_point else None

    # Sending

    def send(self, *buffers: Buffer) -> None:
        with self._sending:
            self._check_open()
            for buffer in buffers:
                self._encrypt(memoryview(buffer).cast("B"))
            self._flush()

    def send_ranges(self, base: memoryview, ranges: ByteRanges) -> None:
        """As the base class says. Raises ValueError for a range outside."""
        rows = page_rows(base)
        gathered = memoryview(self._gather.data).cast("B")
        with self._sending:
            self._check_open()
            for piece in pieces(base.nbytes, ranges):
                if isinstance(piece, tuple):
                    offset, length = piece
                    self._encrypt(base[offset : offset + length])
                else:
                    # "clip" because with "raise" NumPy would copy through a buffer of its own
                    np.take(rows, piece, axis=0, out=self._gather[: len(piece)], mode="clip")
                    self._encrypt(gathered[: len(piece) * PAGE_SIZE])
            self._flush()

    def _encrypt(self, view: memoryview) -> None:
        """Encrypt everything; write what fills a piece. Under `_sending`."""
        done, size = 0, view.nbytes
        while done < size:
            end = min(size, done + _PIECE)
            try:
                with self._state:
                    while done < end:
                        done += self._tls.write(view[done:end])
                    full = self._outgoing.pending >= _PIECE // 2
            except ssl.SSLError as error:
                self._broken(error, "sending")
            if full:
                self._flush()

    def _flush(self) -> None:
        """Write what is encrypted. Under `_sending`."""
        with self._state:
            data = self._outgoing.read()
        try:
            if data:
                self._socket.sendall(data, socket.MSG_NOSIGNAL)
        except OSError as error:
            self._fail(error, "sending")

    # Receiving

    def recv_into(self, buffer: memoryview) -> None:
        with self._receiving:
            self._fill(buffer.cast("B"))

    def recv_ranges(self, base: memoryview, ranges: ByteRanges) -> None:
        """As the base class says. Raises ValueError for a range outside, or a `base` that is read-only."""
        if base.readonly:
            raise ValueError("cannot receive into a read-only buffer")
        rows = page_rows(base)
        scattered = memoryview(self._scatter.data).cast("B")
        with self._receiving:
            for piece in pieces(base.nbytes, ranges):
                if isinstance(piece, tuple):
                    offset, length = piece
                    self._fill(base[offset : offset + length])
                else:
                    self._fill(scattered[: len(piece) * PAGE_SIZE])
                    rows[piece] = self._scatter[: len(piece)]

    def _fill(self, view: memoryview) -> None:
        """Decrypt into the whole view. Under `_receiving`."""
        done, size = 0, view.nbytes
        while done < size:
            self._check_open()
            try:
                with self._state:
                    # A call decrypts one record; read() raises when there is no whole one left.
                    while done < size:
                        done += int(self._tls.read(size - done, view[done:]))
            except ssl.SSLWantReadError:
                self._more()
            except ssl.SSLError as error:
                self._answer()
                self._broken(error, "receiving")

    def _more(self) -> None:
        """Wait for more from the socket."""
        self._answer()
        try:
            number = self._socket.recv_into(self._wire)
        except OSError as error:
            self._fail(error, "receiving")
        if not number or self._shut:  # after a shutdown the kernel still delivers what keeps coming
            self._ended()
        with self._state:
            self._incoming.write(self._wire[:number])

    def _answer(self) -> None:
        """Send what receiving made TLS say; a sender that is at work takes it along."""
        if self._outgoing.pending and self._sending.acquire(blocking=False):
            try:
                self._flush()
            finally:
                self._sending.release()
