"""An export as a disk image, and as the place of a lease.

A connection that breaks is made anew by the next request; requests that were under way have failed. What a server
had not yet made durable may be lost with it, so the first flush after that fails, too, if anything was written since
the last one: the guest must know.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from vmf.errors import StorageError
from vmf.storage.base import AREA_SIZE, SECTOR_SIZE, LeaseStore, StorageImage
from vmf_storage_nbd import protocol as p
from vmf_storage_nbd.address import NbdAddress
from vmf_storage_nbd.client import Client
from vmf_storage_nbd.handshake import Export, open_export

ZEROES = bytes(1 << 20)
MAX_LENGTH = 1 << 31
"""Of requests without data, bytes; the protocol's field has 32 bits."""


class Connection:
    """A client that is replaced when it breaks. Any thread.

    Attributes:
        first: what the export was when it was opened; it must stay so.
        replaced: how often the connection was made anew.
    """

    def __init__(self, address: NbdAddress, export: str) -> None:
        self._address = address
        self._name = export
        self._lock = threading.Lock()
        self._client: Client | None = self._connect()
        self.first: Export = self._client.export
        self.replaced = 0
        self._closed = False
        self._given_up = False

    def _connect(self) -> Client:
        stream, export = open_export(self._address, self._name)
        return Client(self._address.server, export, stream)

    def client(self) -> Client:
        """A working one. Raises StorageError."""
        client = self._client
        if client is not None and not client.broken:
            return client
        with self._lock:
            if self._closed or self._given_up:
                raise StorageError(f"{self._address.uri} is closed.")
            if self._client is None or self._client.broken:
                fresh = self._connect()
                if (fresh.export.size, fresh.export.has) != (self.first.size, self.first.has):
                    fresh.close()
                    raise StorageError(
                        f"{self._address.uri} is another disk since the connection broke.", "Start the machine anew."
                    )
                self._client = fresh
                self.replaced += 1
            return self._client

    def abort(self) -> None:
        """Fail everything that waits, and connect no more. Any thread; does not wait."""
        self._given_up = True
        if (client := self._client) is not None:
            client.abort()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            client, self._client = self._client, None
        if client is not None:
            client.close()


class NbdImage(StorageImage):
    """An open export."""

    def __init__(self, address: NbdAddress, read_only: bool) -> None:
        """Raises StorageError, NotFoundError."""
        self._connection = Connection(address, address.export)
        export = self._connection.first
        self.uri = address.uri
        self.size = export.size
        self.read_only = read_only
        self.block_size = max(export.preferred, SECTOR_SIZE)
        self.can_discard = bool(export.has & p.Has.TRIM) and not read_only
        self._written = False
        self._written_on = 0
        if export.has & p.Has.READ_ONLY and not read_only:
            self.close()
            raise StorageError(
                f"the NBD server lets nobody write to {address.uri}.", "Export it writable, or attach it --read-only."
            )

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        client = self._connection.client()
        for at, views, length in self._pieces(client, offset, buffers):
            client.request(p.Command.READ, at, length, fill=views)

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        client = self._changing()
        for at, views, length in self._pieces(client, offset, buffers):
            client.request(p.Command.WRITE, at, length, send=views)

    def flush(self) -> None:
        client = self._connection.client()
        if self._written and self._written_on != self._connection.replaced:
            self._written = False
            raise StorageError(
                f"the connection to {self.uri} broke before what was written was durable.",
                "The guest has been told; check its file systems.",
            )
        written, self._written = self._written, False
        if client.export.has & p.Has.FLUSH:
            try:
                client.request(p.Command.FLUSH)
            except BaseException:
                self._written = self._written or written
                raise

    def discard(self, offset: int, length: int) -> None:
        self._check_range(offset, length)
        if not self.can_discard:
            return
        client = self._changing()
        for at, size in _steps(offset, length, MAX_LENGTH):
            client.request(p.Command.TRIM, at, size)

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        self._check_range(offset, length)
        client = self._changing()
        if client.export.has & p.Has.WRITE_ZEROES:
            flags = 0 if may_unmap else p.CMD_FLAG_NO_HOLE
            for at, size in _steps(offset, length, MAX_LENGTH):
                client.request(p.Command.WRITE_ZEROES, at, size, flags=flags)
            return
        for at, size in _steps(offset, length, min(len(ZEROES), client.export.max_payload)):
            client.request(p.Command.WRITE, at, size, send=[memoryview(ZEROES)[:size]])

    def _changing(self) -> Client:
        client = self._connection.client()
        if not self._written:
            self._written_on = self._connection.replaced
        self._written = True
        return client

    def _pieces(
        self, client: Client, offset: int, buffers: Sequence[memoryview]
    ) -> Iterator[tuple[int, list[memoryview], int]]:
        """Requests that the server takes: (offset, buffers, bytes)."""
        self._check_range(offset, sum(buffer.nbytes for buffer in buffers))
        limit = client.export.max_payload
        views: list[memoryview] = []
        length = 0
        for buffer in buffers:
            view = buffer.cast("B")
            while view.nbytes:
                part = view[: limit - length]
                views.append(part)
                length += part.nbytes
                view = view[part.nbytes :]
                if length == limit:
                    yield offset, views, length
                    offset += length
                    views, length = [], 0
        if length:
            yield offset, views, length

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise StorageError(f"{self.uri}: [{offset}, {offset + length}) is not within its {self.size} bytes.")

    def abort(self) -> None:
        self._connection.abort()

    def close(self) -> None:
        self._connection.close()


def _steps(offset: int, length: int, limit: int) -> Iterator[tuple[int, int]]:
    for at in range(offset, offset + length, limit):
        yield at, min(limit, offset + length - at)


class LeaseExport(LeaseStore):
    """A small export of the same server that keeps the lease of another one. Nothing excludes anybody there."""

    def __init__(self, address: NbdAddress, export: str) -> None:
        """Raises NotFoundError when there is no such export, StorageError when it cannot be used."""
        self.place = f"export {export!r} of the NBD server {address.server}"
        self.excludes = False
        self.shared_slowly = True
        self._connection = Connection(address, export)
        found = self._connection.first
        if found.size < AREA_SIZE or found.has & p.Has.READ_ONLY:
            self._connection.close()
            raise StorageError(
                f"{self.place} cannot keep a lease: it is read-only or smaller than {AREA_SIZE} bytes.",
                "Make it writable, and at least that large.",
            )

    def read(self) -> bytes:
        area = bytearray(AREA_SIZE)
        self._connection.client().request(p.Command.READ, 0, AREA_SIZE, fill=[memoryview(area)])
        return bytes(area)

    def write(self, offset: int, block: bytes) -> None:
        client = self._connection.client()
        if client.export.has & p.Has.FUA:
            client.request(p.Command.WRITE, offset, len(block), flags=p.CMD_FLAG_FUA, send=[memoryview(block)])
            return
        client.request(p.Command.WRITE, offset, len(block), send=[memoryview(block)])
        if client.export.has & p.Has.FLUSH:
            client.request(p.Command.FLUSH)

    def lock(self) -> bool:
        return True

    def unlock(self) -> None:
        pass

    def still_locked(self) -> bool:
        return True

    def abort(self) -> None:
        self._connection.abort()

    def close(self) -> None:
        self._connection.close()
