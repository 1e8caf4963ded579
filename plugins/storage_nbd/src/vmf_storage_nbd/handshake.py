"""From a fresh connection to an export that is ready for requests: fixed newstyle negotiation."""

from __future__ import annotations

import socket
import ssl
import struct

from attrs import frozen

from vmf.errors import NotFoundError, StorageError
from vmf.storage.base import SECTOR_SIZE
from vmf_storage_nbd import protocol as p
from vmf_storage_nbd.address import NbdAddress, connect, tls_context
from vmf_storage_nbd.stream import Stream, TlsStream, hurry, send_at_once


@frozen
class Export:
    """What the server says of an export.

    Attributes:
        size: bytes.
        has: what it can do.
        structured: it answers in structured replies.
        preferred: block size that it likes best, bytes.
        max_payload: longest request, bytes.
    """

    size: int
    has: p.Has
    structured: bool
    preferred: int
    max_payload: int


class Refused(StorageError):
    """The server turned an option down.

    Attributes:
        reply: the reply's type, 0 where it is not known.
    """

    def __init__(self, message: str, remedy: str = "", reply: int = 0) -> None:
        super().__init__(message, remedy)
        self.reply = reply


def open_export(address: NbdAddress, export: str) -> tuple[Stream, Export]:
    """Connect and choose an export. Raises NotFoundError when the server has none of that name, or StorageError."""
    connection = connect(address)
    try:
        return _Handshake(address, connection).go(export)
    except (OSError, EOFError) as error:
        connection.close()
        raise StorageError(
            f"the NBD server {address.server} broke off: {error or 'it closed the connection'}.",
            "Does it speak NBD (and TLS, with nbds:) there, and does it accept our certificate?",
        ) from error
    except BaseException:
        connection.close()
        raise


class _Handshake:
    def __init__(self, address: NbdAddress, connection: socket.socket) -> None:
        self._address = address
        self._socket = connection
        send_at_once(connection)

    def go(self, export: str) -> tuple[Stream, Export]:
        if self._receive(8) != p.INIT_MAGIC or self._receive(8) != p.OPTION_MAGIC:
            raise StorageError(
                f"who answers at {self._address.server} is no NBD server (or one of the old style).",
                "Check host and port.",
            )
        (flags,) = struct.unpack(">H", self._receive(2))
        if not flags & p.FLAG_FIXED_NEWSTYLE:
            raise StorageError(f"the NBD server {self._address.server} is too old.", "Use one of this decade.")
        self._socket.sendall(struct.pack(">I", flags & (p.FLAG_FIXED_NEWSTYLE | p.FLAG_NO_ZEROES)))
        if self._address.tls:
            self._start_tls()
        structured = True
        try:
            self._option(p.Option.STRUCTURED_REPLY, b"")
        except Refused as refused:
            if refused.reply == p.REP_ERR_TLS_REQD:
                raise
            structured = False
        found = self._choose(export, structured)
        if isinstance(self._socket, ssl.SSLSocket):
            return TlsStream(self._socket), found
        return Stream(self._socket), found

    def _start_tls(self) -> None:
        context, name = tls_context(self._address)
        self._option(p.Option.STARTTLS, b"")
        try:
            self._socket = context.wrap_socket(self._socket, server_hostname=name)
        except ssl.SSLCertVerificationError as error:
            raise StorageError(
                f"the certificate of the NBD server {self._address.server} is not accepted: {error.verify_message}.",
                "It must come from the CA in ca-cert.pem and bear the server's name (or that of tls-hostname=).",
            ) from error

    def _choose(self, export: str, structured: bool) -> Export:
        name = export.encode()
        infos = struct.pack(">HH", 1, p.INFO_BLOCK_SIZE)
        try:
            answers = self._option(p.Option.GO, struct.pack(">I", len(name)) + name + infos)
        except Refused as refused:
            if refused.reply != p.REP_ERR_UNKNOWN:
                raise
            raise NotFoundError(
                f"the NBD server {self._address.server} has no export {export!r}.",
                "Name one that it has; with QEMU's tools `qemu-nbd --list` shows them.",
            ) from None
        size, has, preferred, max_payload = -1, p.Has(0), 4096, p.DEFAULT_MAX_PAYLOAD
        for answer in answers:
            (kind,) = struct.unpack_from(">H", answer)
            if kind == p.INFO_EXPORT and len(answer) == 12:
                size, bits = struct.unpack_from(">QH", answer, 2)
                has = p.Has(bits)
            elif kind == p.INFO_BLOCK_SIZE and len(answer) == 14:
                smallest, preferred, max_payload = struct.unpack_from(">III", answer, 2)
                if smallest > SECTOR_SIZE:
                    raise StorageError(
                        f"{self._address.uri} reads and writes blocks of {smallest} bytes only.",
                        f"Let the server present blocks of {SECTOR_SIZE} bytes.",
                    )
        max_payload = min(max(max_payload, SECTOR_SIZE), p.DEFAULT_MAX_PAYLOAD) // SECTOR_SIZE * SECTOR_SIZE
        if not 0 <= size < 1 << 63 or not has & p.Has.FLAGS:
            raise StorageError(f"the NBD server {self._address.server} does not describe {export!r}.", "")
        return Export(size, has, structured, min(max(preferred, SECTOR_SIZE), 1 << 20), max_payload)

    def _option(self, option: p.Option, data: bytes) -> list[bytes]:
        """Ask; the data of the REP_INFO replies before the final acknowledgement. Raises Refused."""
        self._socket.sendall(p.OPTION_MAGIC + struct.pack(">II", option, len(data)) + data)
        answers: list[bytes] = []
        while True:
            magic, about, kind, length = struct.unpack(">QIII", self._receive(20))
            if magic != p.OPTION_REPLY_MAGIC or about != option or length > p.MAX_OPTION_REPLY or len(answers) > 64:
                raise StorageError(f"the NBD server {self._address.server} answers nonsense.", "Check host and port.")
            body = self._receive(length)
            if kind == p.REP_ACK:
                return answers
            if kind & p.REP_ERROR:
                reason = p.REP_ERRORS.get(kind, f"error {kind - p.REP_ERROR}")
                remedy = (
                    "Write nbds:// instead of nbd://." if kind == p.REP_ERR_TLS_REQD
                    else "Does it offer TLS there?" if option is p.Option.STARTTLS else ""
                )  # fmt: skip
                raise Refused(f"the NBD server {self._address.server} refuses {option.name}: {reason}.", remedy, kind)
            if kind == p.REP_INFO and length >= 2:
                answers.append(body)

    def _receive(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            hurry(self._socket)
            piece = self._socket.recv(size - len(data))
            if not piece:
                raise EOFError("it closed the connection")
            data += piece
        return bytes(data)
