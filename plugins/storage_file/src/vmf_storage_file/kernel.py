"""The kernel's calls that Python has no names for, or only slow ones: fallocate, kinds of file systems, transfers of
many pieces of guest RAM."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Callable, Sequence

from vmf.memory.scattered import RamRanges

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


def let_group_write(descriptor: int) -> None:
    """Give a file that was just made mode 0660, whatever the umask is: both hosts of a teleport write it."""
    with contextlib.suppress(OSError):  # a file system without modes
        os.fchmod(descriptor, 0o660)


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
