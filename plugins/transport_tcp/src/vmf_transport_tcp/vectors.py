"""Scatter and gather of many memory ranges through one socket, without a Python loop over the ranges.

The ranges become an array of `struct iovec` made by NumPy, which sendmsg(2) and recvmsg(2) take as it is, `IOV_MAX`
entries a call. A call that moved only a part is resumed by a binary search in the running sum of the lengths.

The functions are called through ctypes: that releases the GIL, touches no Python object for a range, and lets guest
RAM be read or filled in place. sendmsg is used where writev(2) would do because it takes MSG_NOSIGNAL.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

IOV_MAX = 1024
"""Most entries one call takes: UIO_MAXIOV in <linux/uio.h>."""

ByteRanges = npt.NDArray[np.uint64]


class _Msghdr(ctypes.Structure):
    """struct msghdr, <sys/socket.h>."""

    _fields_ = [
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint32),
        ("iov", ctypes.c_void_p),
        ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    ]


_libc = ctypes.CDLL(None, use_errno=True)
_sendmsg = _libc.sendmsg
_recvmsg = _libc.recvmsg
for _function in (_sendmsg, _recvmsg):
    _function.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
    _function.restype = ctypes.c_ssize_t


class Vector:
    """What is left of a list of ranges, as iovecs."""

    def __init__(self, base: memoryview, ranges: ByteRanges) -> None:
        """`ranges` are rows (offset, length) inside `base`. Raises ValueError for a row that leaves it."""
        offset, length = ranges[:, 0], ranges[:, 1]
        size = np.uint64(base.nbytes)
        if bool(((offset > size) | (length > size - np.minimum(offset, size))).any()):
            raise ValueError(f"a byte range leaves the buffer of {base.nbytes} bytes")
        filled = length > 0  # a call with empty ranges alone would move nothing, for ever
        offset, length = offset[filled], length[filled]
        if not len(length):
            self.total = self.moved = 0
            return
        self._keep = np.frombuffer(base, dtype=np.uint8)
        """Holds the memory while its address is in use."""
        self._iov = np.empty((len(length), 2), dtype=np.uint64)
        np.add(offset, np.uint64(self._keep.ctypes.data), out=self._iov[:, 0])
        self._iov[:, 1] = length
        self._ends = np.cumsum(length, dtype=np.uint64)
        self._address = self._iov.ctypes.data
        self._row = 0
        self._end_of_row = int(self._ends[0])
        self._header = _Msghdr()
        self.total = int(self._ends[-1])
        self.moved = 0

    def window(self) -> int:
        """Address of a msghdr for the next call; only while `moved < total`."""
        self._header.iov = self._address + 16 * self._row
        self._header.iovlen = min(IOV_MAX, len(self._iov) - self._row)
        return ctypes.addressof(self._header)

    def advance(self, number: int) -> None:
        """`number` more bytes were moved."""
        self.moved += number
        if self.moved >= self.total:
            return
        if self.moved >= self._end_of_row:
            self._row = int(np.searchsorted(self._ends, np.uint64(self.moved), side="right"))
            self._end_of_row = int(self._ends[self._row])
        entry = self._iov[self._row]
        rest = self._end_of_row - self.moved
        entry[:] = int(entry[0]) + int(entry[1]) - rest, rest  # where a row ends stays as it is


def _move(function: Callable[[int, int, int], int], fd: int, vector: Vector, flags: int) -> int:
    while True:
        number = function(fd, vector.window(), flags)
        if number >= 0:
            return number
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def send_some(fd: int, vector: Vector) -> int:
    """One sendmsg(2) of what is left, again after EINTR. Raises OSError; BlockingIOError after the time-out."""
    return _move(_sendmsg, fd, vector, socket.MSG_NOSIGNAL)


def recv_some(fd: int, vector: Vector) -> int:
    """One recvmsg(2) into what is left, again after EINTR; 0 at the end of the stream. Raises like `send_some`.

    It waits for all of the window: a return to Python for every piece that the network brings would cost more than the
    piece. When the time-out comes in between it returns what there is.
    """
    return _move(_recvmsg, fd, vector, socket.MSG_WAITALL)
