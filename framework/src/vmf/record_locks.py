"""Record locks of open files (fcntl(2), "open file description locks"), a byte each.

They belong to the open file and not to the process: two machines in one process exclude each other, and closing some
other descriptor of the file frees nothing. The kernel frees them when the last descriptor is closed, however the
process ends. Over NFS and SMB they are locks at the server, and SMB's are mandatory: one that covered data would keep
out its own readers, so ours are on bytes far behind a file's end.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

F_OFD_GETLK, F_OFD_SETLK = 36, 37  # <asm-generic/fcntl.h>; Python has names for them where it was built on a new libc
_FLOCK = struct.Struct("hhqqi4x")  # struct flock: l_type, l_whence, l_start, l_len, l_pid

NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
"""Numbers of the OSError that these calls raise where a file system has no record locks."""


def lock(descriptor: int, offset: int, *, exclusive: bool) -> bool:
    """Try to lock one byte; False when another open file has it. Raises OSError where there are no locks."""
    kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
    try:
        fcntl.fcntl(descriptor, F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, offset, 1, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def unlock(descriptor: int, offset: int) -> None:
    """Raises OSError where there are no locks."""
    fcntl.fcntl(descriptor, F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, offset, 1, 0))


def is_locked(descriptor: int, offset: int) -> bool:
    """Whether another open file has any lock on that byte. Raises OSError where there are no locks."""
    answer = fcntl.fcntl(descriptor, F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, offset, 1, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
