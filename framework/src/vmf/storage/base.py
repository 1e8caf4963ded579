"""What a storage plugin implements.

A driver opens disk images of one URI scheme. Devices never see an image: they work with a `vmf.storage.drive.Drive`,
which holds the image only while this machine may use it (see `vmf.storage.lease`) and has the same methods for I/O.

I/O goes between the image and guest RAM, with no copy in Python. Buffers are a list of views, or a
`vmf.memory.scattered.RamRanges`: a sequence of views, too, which whoever calls the kernel can have as iovecs. All I/O
methods may be called from several threads at once, do not hold the GIL while they wait, and raise StorageError, which a
device reports to its guest as an error of that request; the image stays usable.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from attrs import frozen

SECTOR_SIZE = 512
"""Bytes. Sizes of images are multiples of it, as are offsets and lengths of all I/O."""


class StorageImage(ABC):
    """An open disk image."""

    uri: str
    size: int
    """Bytes, a multiple of SECTOR_SIZE."""
    read_only: bool
    block_size: int = 4096
    """Bytes: what the image reads and writes best (its logical blocks are SECTOR_SIZE)."""
    can_discard: bool = False
    """`discard` gives space back; otherwise it does nothing."""
    writes_wait: bool = True
    """`writev` waits for the storage. False where it as a rule returns as soon as the host's page cache has the data:
    then a device may do what the page cache takes, or `readv_at_once` finds there, in turn on one thread."""

    @abstractmethod
    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the writable buffers, one after the other, from image offset `offset` (bytes)."""

    def readv_at_once(self, offset: int, buffers: Sequence[memoryview]) -> bool:
        """`readv` where that needs no waiting: False when it does, with parts of the buffers perhaps filled.

        It saves two changes of threads for what lies in the host's page cache. Called on the vCPU thread, and for large
        reads on an I/O thread.
        """
        return False

    @abstractmethod
    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write the buffers, one after the other, at `offset`. After an error any part may have been written."""

    @abstractmethod
    def flush(self) -> None:
        """Return when everything whose write returned before is durable."""

    def discard(self, offset: int, length: int) -> None:  # noqa: B027 - a hint
        """The guest does not need [offset, offset+length) any more; what it reads there afterwards is undefined."""

    @abstractmethod
    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        """Make [offset, offset+length) read as zeroes, by giving the space back if `may_unmap` and that is quicker."""

    def abort(self) -> None:  # noqa: B027 - what waits for a kernel cannot be woken
        """Make every call that waits fail soon, from any thread: nobody wants the image any more. `close` follows."""

    @abstractmethod
    def close(self) -> None:
        """Free it; idempotent. Does not flush, and waits for nothing but the host's kernel."""


@frozen
class ImageInfo:
    """What a driver finds out about an image without using it.

    Attributes:
        uri: with an absolute path where there is one, as a definition has it.
        size: bytes.
        allocated: bytes that it takes where it is stored; None when that cannot be told.
        writable: this user, here and now, could open it for writing.
        why_read_only: the reason when not, a clause ("you have no permission to write it").
        format: "raw", or what the server says.
        looks_like: an image format ("qcow2") that the content shows (`vmf.storage.formats`) and that is not read here:
            the guest would see the file's bytes, not the disk in it; "" when there is none, or `format=raw` was given.
        local_locks: why locks where its lease is kept reach this host only, a clause; "" where they reach all.
        where: for people: what it is and on what kind of storage ("file on nfs4").
    """

    uri: str
    size: int
    allocated: int | None
    writable: bool
    why_read_only: str = ""
    format: str = "raw"
    where: str = ""
    looks_like: str = ""
    local_locks: str = ""


class LeaseStore(ABC):
    """Where the lease of one image is kept: a small area that all hosts which see the image see, too.

    `read` may be called from several threads, everything else from one at a time. Errors: StorageError.

    Attributes:
        shared_slowly: reading costs a round trip to another host.
        place: for people ("/srv/web.img.vmf-lease").
        excludes: `lock` keeps every other host out, and the system frees it when its holder dies. Without it (a
            record on a block device or an NBD export) only agreement between source and target decides.
        excludes_here: it keeps out the other processes of this host, at least. True where `excludes` is.
        weakness: why it does not exclude, a clause for people; "" where it does.
    """

    place: str
    excludes: bool
    excludes_here: bool = False
    weakness: str = ""
    shared_slowly: bool = False

    @abstractmethod
    def read(self) -> bytes:
        """What is there now (AREA_SIZE bytes, or fewer when less was ever written), past this host's caches."""

    @abstractmethod
    def write(self, offset: int, block: bytes) -> None:
        """Write one block of the area at `offset` (bytes), durably."""

    @abstractmethod
    def lock(self) -> bool:
        """Try to get the exclusive lock and keep it; False when another holder has it. True when nothing excludes.

        Raises StorageError. It may find out only here that nothing excludes.
        """

    @abstractmethod
    def unlock(self) -> None:
        """Give the lock back; idempotent."""

    def locked_elsewhere(self) -> bool:
        """Whether somebody holds the lock now: a living owner. False where that cannot be told."""
        return False

    @abstractmethod
    def still_locked(self) -> bool:
        """Whether the storage still honours our lock, as far as can be told quickly."""

    def abort(self) -> None:  # noqa: B027 - as of an image
        """Make every call that waits fail soon, from any thread. `close` follows."""

    @abstractmethod
    def close(self) -> None:
        """Unlock and free it; idempotent."""


AREA_SIZE = 8192
"""Bytes that a lease needs."""


class ImageMark:
    """A mark on an image, see `StorageDriver.mark`.

    Attributes:
        token: to be told to the other host.
    """

    def __init__(self, token: str) -> None:
        self.token = token

    def close(self) -> None:
        """Take the mark off; idempotent."""


class StorageDriver(ABC):
    """Opens images of one URI scheme. Errors of all methods: StorageError and ConfigError."""

    scheme: str
    """As in `scheme:...`, equal to the entry point's name."""

    @abstractmethod
    def probe(self, uri: str) -> ImageInfo:
        """Look at an image without opening it for use. Raises NotFoundError when there is none."""

    @abstractmethod
    def open(self, uri: str, read_only: bool) -> StorageImage:
        """Open it. Raises StorageError also when it is read-only and that is not asked for."""

    def lease_store(self, uri: str, *, create: bool) -> LeaseStore | None:
        """Where this image's lease is; None when the storage has no place for one.

        Args:
            create: make the place when it is missing; otherwise None means, too, that there is no lease yet.
        """
        return None

    def mark(self, uri: str) -> ImageMark:
        """Make this image recognisable, for `recognises` on another host, until the mark is closed.

        For images that are only read (the others are recognised by their lease). Here: by some of their content.
        """
        return ImageMark(self._digest(uri))

    def recognises(self, uri: str, token: str) -> bool:
        """Whether the image at `uri`, as this host sees it, is the one that bears the mark."""
        return token == self._digest(uri)

    def _digest(self, uri: str) -> str:
        image = self.open(uri, True)
        try:
            digest = hashlib.sha256(str(image.size).encode())
            step = max(image.size // 64, 65536) // SECTOR_SIZE * SECTOR_SIZE
            for offset in range(0, image.size, step):
                block = bytearray(min(65536, image.size - offset))
                image.readv(offset, [memoryview(block)])
                digest.update(block)
            return "content:" + digest.hexdigest()
        finally:
            image.close()

    def create(self, uri: str, size: int) -> None:
        """Make a new image of `size` bytes that reads as zeroes. Raises StorageError when it exists."""
        from vmf.errors import StorageError

        raise StorageError(
            f"images of {self.scheme}: cannot be made by vmf ({uri}).",
            f"Make it with the storage server's own tools; a file of that name is ./{uri}.",
        )

    def copy(self, uri: str, target: str, progress: Callable[[int, int], None] | None = None) -> None:
        """Copy the image to the new file `target`, sparse, sharing blocks where the file system can.

        Raises StorageError when a byte of it could not be read; then there is no `target`. The caller makes it durable.

        Args:
            progress: called with (bytes done, bytes in all) every few MiB; what it raises ends the copying.
        """
        from vmf.errors import StorageError

        raise StorageError(
            f"images of {self.scheme}: cannot be copied by vmf ({uri}).", "Use the storage server's own snapshots."
        )
