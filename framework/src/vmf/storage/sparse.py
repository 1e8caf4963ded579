"""Sparse files: where they have data, copies that keep the holes, and a digest that does not depend on them.

A hole reads as zeroes, so everything here that mistakes an error for a hole would destroy data. Only ENXIO says "from
here on there is nothing but a hole" (lseek(2)). A file system or a device that cannot tell (EINVAL, ENOTSUP, ENOSYS;
block devices) is read completely, and every other error is an error.
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import zlib
from collections.abc import Callable, Iterator

CHUNK = 4 << 20
"""Bytes: the unit of reading, of the digest, and of the looks at whether somebody cancelled."""
CANNOT_TELL = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.ENODEV})
_ZEROES = bytes(CHUNK)
_PAIR = struct.Struct("<QI")
ALGORITHM = f"crc32-{CHUNK}"


class CutShort(OSError):
    """A file ended before its end."""

    def __init__(self, at: int, size: int) -> None:
        super().__init__(errno.EIO, f"it ends at byte {at} instead of {size}")


def data_extents(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of every stretch that has data, in order. Raises OSError when that cannot be found out."""
    at = 0
    while at < size:
        try:
            start = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                if os.lseek(descriptor, 0, os.SEEK_END) < size:
                    raise CutShort(os.lseek(descriptor, 0, os.SEEK_END), size) from None
                return
            if error.errno not in CANNOT_TELL:
                raise
            yield at, size
            return
        if start >= size:
            return
        try:
            end = min(os.lseek(descriptor, start, os.SEEK_HOLE), size)
        except OSError as error:
            if error.errno not in CANNOT_TELL:
                raise
            end = size
        if start < at or end <= start:  # a file system that contradicts itself, or is written to meanwhile
            start, end = at, size
        yield start, end
        at = end


def chunks(descriptor: int, size: int) -> Iterator[tuple[int, int, bool]]:
    """(offset, length, whether it may hold data) of every chunk of the file, in order and without a gap.

    Chunks begin at multiples of `CHUNK`, so that they do not depend on where the holes are. Stretches without data are
    one chunk of any length.
    """
    done = 0
    for start, end in data_extents(descriptor, size):
        start = max(done, start - start % CHUNK)
        end = min(-(-end // CHUNK) * CHUNK, size)
        if start > done:
            yield done, start - done, False
        for at in range(start, end, CHUNK):
            yield at, min(CHUNK, end - at), True
        done = max(done, end)
    if done < size:
        yield done, size - done, False


def read_fully(descriptor: int, view: memoryview, offset: int) -> None:
    """Fill `view` from `offset`. Raises OSError; CutShort when the file ends before."""
    done = 0
    while done < view.nbytes:
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if not count:
            raise CutShort(offset + done, offset + view.nbytes)
        done += count


def write_fully(descriptor: int, view: memoryview, offset: int) -> None:
    """Write all of `view` at `offset`. Raises OSError."""
    done = 0
    while done < view.nbytes:
        count = os.pwrite(descriptor, view[done:], offset + done)
        if not count:
            raise OSError(errno.EIO, "nothing could be written")
        done += count


def is_zero(view: memoryview) -> bool:
    """Whether every byte (of at most `CHUNK`) is zero."""
    return bytes(view) == (_ZEROES if view.nbytes == CHUNK else _ZEROES[: view.nbytes])  # views compare slowly


class Digest:
    """What a file holds, as a short text; equal for equal content, wherever the holes are.

    CRC-32 of every chunk that is not all zeroes, all of them put together by BLAKE2b. It finds what went wrong, not
    what somebody forged: who can write a snapshot can write its digest, too.
    """

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, offset: int, view: memoryview) -> None:
        """The next chunk, as `chunks` cuts them; those without data may be left out."""
        if not is_zero(view):
            self._hash.update(_PAIR.pack(offset, zlib.crc32(view)))

    def __str__(self) -> str:
        return f"{ALGORITHM}:{self._hash.hexdigest()}"


def digest(descriptor: int, size: int, step: Callable[[int], None] | None = None) -> str:
    """Read a file completely; its digest.

    Args:
        step: called with the bytes that are done, after every chunk; what it raises ends the reading.

    Raises OSError, CutShort.
    """
    found = Digest()
    block = memoryview(bytearray(min(CHUNK, size)))
    for at, length, data in chunks(descriptor, size):
        if data:
            view = block[:length]
            read_fully(descriptor, view, at)
            found.add(at, view)
        if step is not None:
            step(at + length)
    if (end := os.lseek(descriptor, 0, os.SEEK_END)) < size:
        raise CutShort(end, size)
    return str(found)
