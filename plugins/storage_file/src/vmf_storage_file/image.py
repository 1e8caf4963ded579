"""A raw image: offsets in the image are offsets in the file."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence

from vmf.errors import StorageError, StorageFull
from vmf.memory.scattered import total_bytes
from vmf.storage.base import StorageImage
from vmf_storage_file import kernel

IOV_MAX = 1024
"""Buffers in one call, <limits.h>."""
ZEROES = bytes(1 << 20)

_REASONS = {
    errno.ENOSPC: ("the file system is full", "Free some space there."),
    errno.EDQUOT: ("the quota for it is used up", "Free some space there."),
    errno.EFBIG: ("it would become larger than its file system allows", "Keep it on another file system."),
    errno.EIO: ("its storage failed", "Look into the host's kernel log; was a lock at the file server lost?"),
    errno.ESTALE: ("it was removed or replaced at the file server", "Put it back, and start the machine anew."),
    errno.EROFS: ("its file system became read-only", "Look into the host's kernel log."),
}


def explain(path: str, action: str, error: OSError) -> StorageError:
    reason, remedy = _REASONS.get(error.errno or 0, (error.strerror or str(error), "Look at the host's storage."))
    kind = StorageFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
    return kind(f"{path} cannot be {action}: {reason}.", remedy)


class FileImage(StorageImage):
    """An open file or block device. All I/O goes through the kernel's page cache; `flush` is fdatasync(2)."""

    def __init__(self, uri: str, path: str, descriptor: int, size: int, *, read_only: bool) -> None:
        self.uri = uri
        self.size = size
        self.read_only = read_only
        self.block_size = 4096
        self.can_discard = not read_only
        self.writes_wait = False
        self._path = path
        self._descriptor = descriptor
        self._regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        self._no_punch = self._no_zero_range = False
        self._no_nowait = not hasattr(os, "RWF_NOWAIT")

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self._transfer(kernel.read, "read", offset, buffers)

    def readv_at_once(self, offset: int, buffers: Sequence[memoryview]) -> bool:
        if self._no_nowait:
            return False
        total = total_bytes(buffers)
        self._check_range(offset, total)
        try:
            return kernel.read(self._descriptor, buffers[:IOV_MAX], offset, os.RWF_NOWAIT) == total
        except OSError as error:
            if error.errno != errno.EAGAIN:  # this file system cannot tell; a real failure is found by `readv`, too
                self._no_nowait = True
            return False

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self._transfer(kernel.write, "written", offset, buffers)

    def _transfer(
        self,
        call: Callable[[int, Sequence[memoryview], int], int],
        action: str,
        offset: int,
        buffers: Sequence[memoryview],
    ) -> None:
        total = total_bytes(buffers)
        self._check_range(offset, total)
        done = 0
        left = buffers
        try:
            while done < total:
                count = call(self._descriptor, left[:IOV_MAX], offset + done)
                if count == 0:
                    raise StorageError(
                        f"{self._path} ends at byte {offset + done}, but had {self.size} bytes when it was opened.",
                        "Somebody truncated it: restore it from a backup.",
                    )
                done += count
                if done < total:  # a signal, a full disk, or more buffers than one call takes
                    left = _rest(buffers, done)
        except OSError as error:
            raise explain(self._path, action, error) from error

    def flush(self) -> None:
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise explain(self._path, "written to its storage", error) from error

    def discard(self, offset: int, length: int) -> None:
        self._check_range(offset, length)
        if length and not self._no_punch:
            self._punch(offset, length)

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        self._check_range(offset, length)
        if not length or (may_unmap and not self._no_punch and self._punch(offset, length)):
            return
        if not self._no_zero_range and self._regular:
            try:
                kernel.fallocate(self._descriptor, kernel.FALLOC_FL_ZERO_RANGE, offset, length)
                return
            except OSError as error:
                if error.errno not in kernel.UNSUPPORTED:
                    raise explain(self._path, "written", error) from error
                self._no_zero_range = True
        for at in range(offset, offset + length, len(ZEROES)):
            self.writev(at, [memoryview(ZEROES)[: min(len(ZEROES), offset + length - at)]])

    def _punch(self, offset: int, length: int) -> bool:
        """Make a hole, which reads as zeroes; False where the file system has none."""
        try:
            kernel.fallocate(self._descriptor, kernel.FALLOC_FL_PUNCH_HOLE | kernel.FALLOC_FL_KEEP_SIZE, offset, length)
            return True
        except OSError as error:
            if error.errno not in kernel.UNSUPPORTED:
                raise explain(self._path, "written", error) from error
            self._no_punch = True
            return False

    def _check_range(self, offset: int, length: int) -> None:
        if self._descriptor < 0:
            raise StorageError(f"{self._path} is closed.")
        if offset < 0 or length < 0 or offset + length > self.size:
            raise StorageError(f"{self._path}: [{offset}, {offset + length}) is not within its {self.size} bytes.")

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _rest(buffers: Sequence[memoryview], done: int) -> list[memoryview]:
    """What is left of the buffers behind the first `done` bytes."""
    left: list[memoryview] = []
    for buffer in buffers:
        if done >= buffer.nbytes:
            done -= buffer.nbytes
        else:
            left.append(buffer.cast("B")[done:] if done else buffer)
            done = 0
    return left
