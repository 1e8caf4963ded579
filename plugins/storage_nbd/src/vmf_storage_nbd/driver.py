"""The driver of NBD exports."""

from __future__ import annotations

from vmf.errors import NotFoundError, StorageError
from vmf.storage import formats
from vmf.storage.base import SECTOR_SIZE, ImageInfo, LeaseStore, StorageDriver, StorageImage
from vmf_storage_nbd import protocol as p
from vmf_storage_nbd.address import parse
from vmf_storage_nbd.image import Connection, LeaseExport, NbdImage

LEASE_SUFFIX = ".vmf-lease"
"""The export `NAME.vmf-lease` keeps the lease of the export `NAME`, unless `lease=` names another one."""


class NbdDriver(StorageDriver):
    """One of the schemes."""

    def __init__(self, scheme: str) -> None:
        self.scheme = scheme

    def probe(self, uri: str) -> ImageInfo:
        address = parse(uri)
        connection = Connection(address, address.export)
        try:
            export = connection.first
            found = "" if address.declared_raw or export.size < formats.HEAD else _looks_like(connection, export.size)
        finally:
            connection.close()
        if not export.size or export.size % SECTOR_SIZE:
            raise StorageError(
                f"{uri} has {export.size} bytes, which is no disk: a disk has a multiple of {SECTOR_SIZE}.",
                "Export a disk image.",
            )
        read_only = bool(export.has & p.Has.READ_ONLY)
        return ImageInfo(
            uri=uri,
            size=export.size,
            allocated=None,
            writable=not read_only,
            why_read_only="its server lets nobody write to it" if read_only else "",
            format="as the server reads it",
            looks_like=found,
            where=f"NBD server {address.server}" + (", over TLS" if address.tls else ""),
        )

    def open(self, uri: str, read_only: bool) -> StorageImage:
        return NbdImage(parse(uri), read_only)

    def lease_store(self, uri: str, *, create: bool) -> LeaseStore | None:
        address = parse(uri)
        try:
            return LeaseExport(address, address.lease or address.export + LEASE_SUFFIX)
        except NotFoundError:
            if address.lease is not None:
                raise
            return None


def _looks_like(connection: Connection, size: int) -> str:
    """The image format that an export's content shows: its server does not read it as that."""
    head, tail = bytearray(formats.HEAD), bytearray(formats.TAIL)
    for at, block in ((0, head), (size - formats.TAIL, tail)):
        connection.client().request(p.Command.READ, at, len(block), fill=[memoryview(block)])
    return formats.recognise(bytes(head), bytes(tail))
