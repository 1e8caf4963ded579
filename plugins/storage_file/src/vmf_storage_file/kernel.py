"""The kernel's calls that Python has no names for, or only slow ones: record locks of open files, fallocate, kinds of
file systems, transfers of many pieces of guest RAM.

Locks are *open file description* locks (fcntl(2), F_OFD_SETLK): they belong to the open file, not to the process, so
that two machines in one process exclude each other, and closing some other descriptor of the file frees nothing. The
kernel frees them when the last descriptor is closed, however the process ends. Over NFS and SMB they are locks at the
server. On an image they cover single bytes far behind its end (SMB's locks are mandatory: one that covered data would
keep out its own readers).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Callable, Sequence

from vmf.memory.scattered import RamRanges

F_OFD_GETLK, F_OFD_SETLK = 36, 37  # <asm-generic/fcntl.h>; `fcntl` has no names for them before Python 3.9 everywhere
_FLOCK = struct.Struct("hhqqi4x")  # struct flock: l_type, l_whence, l_start, l_len, l_pid

FALLOC_FL_KEEP_SIZE = 0x01  # <linux/falloc.h>
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10
UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV})

_FILE_SYSTEMS = {  # statfs(2), f_type
    0x6969: "nfs", 0xFF534D42: "cifs", 0xFE534D42: "smb2", 0x517B: "smb", 0x00C36400: "ceph", 0x01021997: "9p",
    0x65735546: "fuse", 0x7461636F: "ocfs2", 0x01161970: "gfs2", 0xEF53: "ext4", 0x58465342: "xfs", 0x9123683E: "btrfs",
    0x01021994: "tmpfs", 0x794C7630: "overlayfs", 0x2FC12FC1: "zfs",
}  # fmt: skip
NETWORKED = frozenset({"nfs", "cifs", "smb2", "smb", "ceph", "9p", "fuse", "ocfs2", "gfs2"})
"""File systems on which another host may have changed what this host has in its caches."""

_libc = ctypes.CDLL(None, use_errno=True)  # its calls release the GIL
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)
_libc.fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)
_preadv2, _pwritev2 = getattr(_libc, "preadv2", None), getattr(_libc, "pwritev2", None)  # glibc 2.26, musl 1.2.5
for _function in (_preadv2, _pwritev2):
    if _function is not None:
        _function.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong, ctypes.c_int)
        _function.restype = ctypes.c_ssize_t


def lock(descriptor: int, offset: int, *, exclusive: bool) -> bool:
    """Try to lock one byte; False when somebody else has it. Raises OSError where there are no locks."""
    kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
    try:
        fcntl.fcntl(descriptor, F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, offset, 1, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
"""What the calls below raise where a file system has no record locks."""


def let_group_write(descriptor: int) -> None:
    """Give a file that was just made mode 0660, whatever the umask is: both hosts of a teleport write it."""
    with contextlib.suppress(OSError):  # a file system without modes
        os.fchmod(descriptor, 0o660)


def unlock(descriptor: int, offset: int) -> None:
    fcntl.fcntl(descriptor, F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, offset, 1, 0))


def is_locked(descriptor: int, offset: int) -> bool:
    """Whether another open file has any lock on that byte."""
    answer = fcntl.fcntl(descriptor, F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, offset, 1, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2). Raises OSError."""
    while _libc.fallocate(descriptor, mode, offset, length):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def read(descriptor: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
    """preadv2(2) into at most IOV_MAX buffers; of guest RAM's, none becomes a Python object. Raises OSError."""
    if isinstance(buffers, RamRanges) and _preadv2 is not None:
        return _transfer(_preadv2, descriptor, buffers, offset, flags)
    return os.preadv(descriptor, buffers, offset, flags)


def write(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
    """pwritev2(2), as `read`."""
    if isinstance(buffers, RamRanges) and _pwritev2 is not None:
        return _transfer(_pwritev2, descriptor, buffers, offset, 0)
    return os.pwritev(descriptor, buffers, offset)


def _transfer(call: Callable[..., int], descriptor: int, buffers: RamRanges, offset: int, flags: int) -> int:
    vectors = buffers.iovecs()
    while (count := call(descriptor, vectors.ctypes.data, len(vectors), offset, flags)) < 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    return count


def file_system(descriptor: int) -> str:
    """What kind of file system a file is on ("ext4", "nfs"); a hexadecimal number for one without a name here."""
    buffer = (ctypes.c_ulong * 32)()
    if _libc.fstatfs(descriptor, buffer):
        return "?"
    kind = buffer[0] & 0xFFFFFFFF
    return _FILE_SYSTEMS.get(kind, f"{kind:#x}")
