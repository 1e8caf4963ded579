"""The lease of a raw image: a small file beside it, FILE.vmf-lease, under a lock.

On a file system of this host the page cache is what everybody sees. On one of the network a read must reach the server:
it is done with O_DIRECT where that works, and by opening the file anew where it does not (NFS and SMB look at the
server when a file is opened).

The lock is on a byte far behind the end: SMB's locks are mandatory, and one on the record itself would keep others from
reading whose it is. It is freed with the last descriptor, so it tells whether the owner lives.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading

from vmf import record_locks
from vmf.errors import StorageError
from vmf.storage.base import AREA_SIZE, LeaseStore
from vmf_storage_file import kernel, mounts
from vmf_storage_file.image import explain

SUFFIX = ".vmf-lease"
LOCK = 1 << 61
"""The byte that is locked."""


def _open(path: str, *, create: bool) -> int:
    flags = os.O_RDWR | os.O_CLOEXEC
    if create:
        try:
            made = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o660)
        except FileExistsError:
            pass
        else:
            kernel.let_group_write(made)
            return made
    return os.open(path, flags)


class LeaseFile(LeaseStore):
    """An open lease file."""

    def __init__(self, path: str, *, create: bool) -> None:
        """Raises FileNotFoundError unless it is there or is to be made; StorageError when it cannot be used."""
        self.place = path
        self._locked = False
        self._reading = threading.Lock()
        self._direct = -1
        try:
            self._descriptor = _open(path, create=create)
            self._writable = True
        except FileNotFoundError:
            raise
        except OSError as error:
            if create or error.errno not in (errno.EACCES, errno.EROFS, errno.EPERM):
                raise StorageError(
                    f"the lease {path} cannot be opened: {error.strerror}.",
                    "Whoever writes the image must be able to make and write that file: look at the permissions.",
                ) from error
            self._writable = False
            try:
                self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as unreadable:
                raise StorageError(f"the lease {path} cannot be read: {unreadable.strerror}.") from unreadable
        self.weakness = mounts.local_locks(*mounts.mount_of(self._descriptor))
        self.excludes, self.excludes_here = not self.weakness, True
        self.shared_slowly = bool(self.weakness) or kernel.file_system(self._descriptor) in kernel.NETWORKED
        if self.shared_slowly:
            try:
                self._direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
                self._page = mmap.mmap(-1, AREA_SIZE)
                self._read_direct()
            except OSError:
                self._drop_direct()

    def read(self) -> bytes:
        try:
            if self._direct >= 0:
                return self._read_direct()
            if not self.shared_slowly:
                return os.pread(self._descriptor, AREA_SIZE, 0)
            descriptor = os.open(self.place, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return os.pread(descriptor, AREA_SIZE, 0)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise explain(self.place, "read", error) from error

    def _read_direct(self) -> bytes:
        with self._reading:
            count = os.preadv(self._direct, [self._page], 0)
            return self._page[:count]

    def write(self, offset: int, block: bytes) -> None:
        try:
            written = os.pwrite(self._descriptor, block, offset)
            if written != len(block):
                raise OSError(errno.ENOSPC, "")
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise explain(self.place, "written", error) from error

    def lock(self) -> bool:
        if not self._writable:
            raise StorageError(
                f"the lease {self.place} cannot be written: permission denied.",
                "Whoever writes the image must be able to write that file: look at the permissions.",
            )
        try:
            if not record_locks.lock(self._descriptor, LOCK, exclusive=True):
                return False
        except OSError as error:
            if error.errno not in record_locks.NO_LOCKS:
                raise explain(self.place, "locked", error) from error
            self.excludes = self.excludes_here = False
            self.weakness = self.weakness or f"its file system has no locks ({error.strerror})"
            return True
        self._locked = True
        if not self._in_place():
            # Deleted and made anew between our opening and our locking: ours is nobody's any more.
            self.unlock()
            return False
        return True

    def unlock(self) -> None:
        if self._locked:
            self._locked = False
            record_locks.unlock(self._descriptor, LOCK)

    def still_locked(self) -> bool:
        return not self.excludes_here or (self._locked and os.fstat(self._descriptor).st_nlink > 0)

    def _in_place(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.place), os.fstat(self._descriptor))
        except OSError:
            return False

    def locked_elsewhere(self) -> bool:
        try:
            return record_locks.is_locked(self._descriptor, LOCK)
        except OSError:
            return False

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            self._locked = False
            os.close(descriptor)
        self._drop_direct()

    def _drop_direct(self) -> None:
        direct, self._direct = self._direct, -1
        if direct >= 0:
            os.close(direct)
