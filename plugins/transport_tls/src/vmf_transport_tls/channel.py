"""One TLS connection as a channel.

Theory of operation. One thread sends while another receives, and an OpenSSL connection must not be used by two
threads at once; neither may it be locked while a system call waits, or a silent peer would stop our own sending. So
the connection never sees the socket: it works on two buffers (ssl.MemoryBIO), `incoming` and `outgoing`, under the
lock `_state`, which is only held for computing. System calls happen outside of it, on a blocking socket with the
kernel's time-outs, as for plain TCP (`vmf.transport.sockets`).

What is said goes through that. Guest RAM (`send_ranges`, `recv_ranges`) goes beside it, as frames between the TLS
records, where both ends can: `vmf_transport_tls.sealed` says how and why it is safe. So that a frame is never taken for
TLS's, what comes from the socket is cut at the records, and only whole ones are given to OpenSSL.

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
from attrs import field, frozen

from vmf.errors import TransportError
from vmf.memory.guest import PAGE_SIZE
from vmf.transport.base import Address, Buffer, ByteRanges
from vmf.transport.sockets import SocketChannel
from vmf_transport_tls import sealed
from vmf_transport_tls.pieces import GATHER_PAGES, page_rows, pieces

_PIECE = 256 << 10
"""Bytes that are encrypted before they are written to the socket."""
_AHEAD = 64 << 10
"""The most that is read when it is not known yet what comes."""
_WIRE = sealed.HEADER.size + sealed.MOST + sealed.TAG_SIZE + 2 * _AHEAD
"""Bytes of the buffer for what comes from the socket: a whole frame, and what came with it."""
_TLS_HEADER = 5
_TLS_MOST = (16 << 10) + 256
"""Bytes behind the header (RFC 8446, 5.2)."""
ALTERED = "what came had been altered on the way, or was said twice, late or not at all"


def undecipherable(reason: str) -> bool:
    """Whether OpenSSL's reason means that a record does not decrypt under the keys of this connection.

    OpenSSL 3.2 and later put RECORD_LAYER_FAILURE on top of the precise reason, and Python's `ssl` tells the top only.
    What else ends there (a record of an unknown type, or one that is too long) was altered as well.
    """
    marks = ("DECRYPTION_FAILED", "BAD_RECORD_MAC", "DIGEST_CHECK_FAILED", "RECORD_LAYER_FAILURE")
    return any(mark in reason for mark in marks)


@frozen
class Stream:
    """A TLS connection that has shaken hands, and its two buffers.

    Attributes:
        shares: random bytes of the source and of the target for sealing RAM; None when it goes through TLS.
    """

    tls: ssl.SSLObject
    incoming: ssl.MemoryBIO
    outgoing: ssl.MemoryBIO
    shares: tuple[bytes, bytes] | None = field(default=None, repr=False)


class TlsChannel(SocketChannel):
    """See the module's theory of operation.

    Attributes:
        peer: names in the other side's certificate.
        notices: what the user should know, like a certificate that expires soon.
    """

    computes = True

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
        # Not zeroed: what is never used of these takes no memory.
        self._gather = np.empty((GATHER_PAGES, PAGE_SIZE), dtype=np.uint8)
        """Of the sender."""
        self._scatter = np.empty((GATHER_PAGES, PAGE_SIZE), dtype=np.uint8)
        """Of the receiver."""
        self._frame = memoryview(np.empty(sealed.HEADER.size + sealed.MOST + sealed.TAG_SIZE, dtype=np.uint8).data)
        """Of the sender."""
        self._wire = memoryview(np.empty(_WIRE, dtype=np.uint8).data)
        """Of the receiver: from `_start` to `_end` lies what came and was not used."""
        self._start = self._end = 0
        self._keep(stream.incoming.read())  # came with the handshake: maybe not all of it is TLS's
        self._said = self._heard = 0
        """Bytes that went through TLS, by direction."""
        self._sealer: sealed.Sealer | None = None
        self._opener: sealed.Opener | None = None
        if stream.shares is not None:
            ways = (sealed.SOURCE_TO_TARGET, sealed.TARGET_TO_SOURCE)
            ours, theirs = ways[::-1] if stream.tls.server_side else ways
            self._sealer = sealed.Sealer(*stream.shares, ours)
            self._opener = sealed.Opener(*stream.shares, theirs)

    def _broken(self, error: ssl.SSLError, doing: str) -> NoReturn:
        """Raise what an error of the TLS connection itself means."""
        self._check_open()
        if isinstance(error, ssl.SSLZeroReturnError):
            self._ended()
        reason = error.reason or str(error)
        if "ALERT" in reason and "BAD_RECORD_MAC" in reason:
            what = "what came there had been altered on the way, or was said twice, late or not at all"
        elif undecipherable(reason):
            what = ALTERED
        else:
            what = reason.replace("_", " ").lower()
        raise self._altered(doing, what) from error

    def _altered(self, doing: str, what: str) -> TransportError:
        return TransportError(
            f"the encrypted connection to {self.remote} broke ({doing}): {what}.",
            "Something on the way alters the data, or the other side failed. Teleport again.",
        )

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
        send = self._encrypt if self._sealer is None else self._seal
        with self._sending:
            self._check_open()
            if self._sealer is not None:
                self._flush()
            for piece in pieces(base.nbytes, ranges):
                if isinstance(piece, tuple):
                    offset, length = piece
                    send(base[offset : offset + length])
                else:
                    # "clip" because with "raise" NumPy would copy through a buffer of its own
                    np.take(rows, piece, axis=0, out=self._gather[: len(piece)], mode="clip")
                    send(gathered[: len(piece) * PAGE_SIZE])
            if self._sealer is None:
                self._flush()

    def _seal(self, view: memoryview) -> None:
        """Send it in frames. Under `_sending`, with nothing of TLS's waiting to be written."""
        assert self._sealer is not None
        for start in range(0, view.nbytes, sealed.MOST):
            size = self._sealer.seal(view[start : start + sealed.MOST], self._said, self._frame)
            try:
                self._socket.sendall(self._frame[:size], socket.MSG_NOSIGNAL)
            except OSError as error:
                self._fail(error, "sending")

    def _encrypt(self, view: memoryview) -> None:
        """Encrypt everything; write what fills a piece. Under `_sending`."""
        done, size = 0, view.nbytes
        while done < size:
            end = min(size, done + _PIECE)
            try:
                with self._state:
                    while done < end:
                        taken = self._tls.write(view[done:end])
                        done += taken
                        self._said += taken
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
        receive = self._fill if self._opener is None else self._unseal
        with self._receiving:
            for piece in pieces(base.nbytes, ranges):
                if isinstance(piece, tuple):
                    offset, length = piece
                    receive(base[offset : offset + length])
                else:
                    receive(scattered[: len(piece) * PAGE_SIZE])
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
                        taken = int(self._tls.read(size - done, view[done:]))
                        done += taken
                        self._heard += taken
            except ssl.SSLWantReadError:
                self._more()
            except ssl.SSLError as error:
                self._answer()
                self._broken(error, "receiving")

    def _unseal(self, view: memoryview) -> None:
        """Receive it in frames. Under `_receiving`."""
        assert self._opener is not None
        for start in range(0, view.nbytes, sealed.MOST):
            part = view[start : start + sealed.MOST]
            frame = self._next_frame()
            try:
                self._opener.open(frame, self._heard, part)
            except sealed.Forged as error:
                raise self._altered("receiving", ALTERED) from error

    def _next_frame(self) -> memoryview:
        """The next frame as it came; it stays until the next call that receives."""
        while (length := self._frame_length()) is None:
            self._give_record()
            try:
                with self._state:
                    early = self._tls.read(1)
            except ssl.SSLWantReadError:
                early = b""  # something between the two TLS libraries
            except ssl.SSLError as error:
                self._answer()
                self._broken(error, "receiving")
            if early:
                raise self._altered("receiving", ALTERED)
            self._answer()
        self._have(sealed.HEADER.size + length)
        return self._use(sealed.HEADER.size + length)

    def _more(self) -> None:
        """Wait for more that is TLS's, and give it to OpenSSL."""
        self._answer()
        if self._opener is None:
            self._have(1)
            with self._state:
                self._incoming.write(self._use(self._end - self._start))
        elif self._frame_length() is None:
            self._give_record()
        else:  # a frame where something was to be said
            raise self._altered("receiving", ALTERED)

    def _frame_length(self) -> int | None:
        """Of the frame that comes next, None when a TLS record does."""
        self._have(sealed.HEADER.size)
        try:
            return sealed.frame_length(self._wire[self._start : self._end])
        except sealed.Forged as error:
            raise self._altered("receiving", ALTERED) from error

    def _give_record(self) -> None:
        """Give one TLS record, whatever is in it, to OpenSSL."""
        self._have(_TLS_HEADER)
        length = int.from_bytes(self._wire[self._start + 3 : self._start + 5], "big")
        size = _TLS_HEADER + (length if length <= _TLS_MOST else 0)  # of what is too long the header says enough
        self._have(size)
        with self._state:
            self._incoming.write(self._use(size))

    def _have(self, size: int) -> None:
        """Wait until so many bytes lie in `_wire`, which has room for them."""
        if self._start == self._end:
            self._start = self._end = 0
        elif len(self._wire) - self._start < max(size, _AHEAD):
            self._keep(bytes(self._wire[self._start : self._end]))
        while self._end - self._start < size:
            self._check_open()
            # Of a frame, no more: what follows would have to be moved to make room for the next one.
            whole = size > _AHEAD
            limit = self._start + (size if whole else _AHEAD)
            try:
                number = self._socket.recv_into(self._wire[self._end : limit], 0, socket.MSG_WAITALL if whole else 0)
            except OSError as error:
                self._fail(error, "receiving")
            if not number or self._shut:  # after a shutdown the kernel still delivers what keeps coming
                self._ended()
            self._end += number

    def _keep(self, data: bytes) -> None:
        """Nothing but that is in `_wire`."""
        self._start, self._end = 0, len(data)
        self._wire[: self._end] = data

    def _use(self, size: int) -> memoryview:
        """Take what `_have` found; it stays there until the next `_have`."""
        view = self._wire[self._start : self._start + size]
        self._start += size
        return view

    def _answer(self) -> None:
        """Send what receiving made TLS say; a sender that is at work takes it along."""
        if self._outgoing.pending and self._sending.acquire(blocking=False):
            try:
                self._flush()
            finally:
                self._sending.release()
