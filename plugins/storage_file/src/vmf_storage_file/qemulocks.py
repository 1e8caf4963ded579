"""QEMU's locks on an image, so that QEMU and vmf do not write one disk at once.

QEMU and its tools mark what they do with a file by shared locks on single bytes of it (its block/file-posix.c; the
numbers are part of what its releases agree upon): byte 100 + P says "I use permission P", byte 200 + P "I do not share
permission P with anybody". A user sets its locks first, and then looks whether another open file has the opposite
ones. All locks are shared and of open files (OFD), so setting them always succeeds; of two that come at once perhaps
both give up. QEMU leaves them out with `locking=off`, and looks past them with `--force-share` (`-U`).

vmf does the same as a virtual disk of QEMU does. The bytes lie in the disk's first sector, which does not matter as
long as locks are advisory. SMB's are mandatory: there none are set.
"""

from __future__ import annotations

from vmf import record_locks

USES, KEEPS = 100, 200
READ, WRITE, RESIZE = 0, 1, 3
"""Numbers of permissions."""
KEPT = (WRITE, RESIZE)
"""What vmf shares with nobody, reading or writing."""


def take(descriptor: int, *, exclusive: bool) -> bool:
    """Mark the use of an image until the descriptor is closed; False when another program's use forbids it.

    Args:
        exclusive: to write it; otherwise to read it.

    Raises OSError where there are no locks.
    """
    uses = (READ, WRITE) if exclusive else (READ,)
    own = (*(USES + each for each in uses), *(KEEPS + each for each in KEPT))
    if not all(record_locks.lock(descriptor, offset, exclusive=False) for offset in own):
        return False  # a program that is not QEMU locks whole ranges
    against = (*(KEEPS + each for each in uses), *(USES + each for each in KEPT))
    return not any(record_locks.is_locked(descriptor, offset) for offset in against)
