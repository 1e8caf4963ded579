"""How far the locks on a file reach: to every host that mounts its file system, or only to the processes of this one.

Record locks always work between the processes of one host. Between hosts they work when the file system passes them on
to its server (or its cluster), which some mount options, and some file systems altogether, do not do. Then a lock that
was got proves nothing about other hosts, and nothing says so when it is taken. The kernel's table of mounts does
(proc(5), mountinfo; nfs(5), mount.cifs(8)).

A FUSE file system passes locks on only if its program has code for it, which nothing outside tells: those of which it
is known are listed, all others count as not doing it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

MOUNTINFO = Path("/proc/self/mountinfo")

_FUSE_WITH_LOCKS = frozenset(
    {"fuseblk", "fuse.glusterfs", "fuse.ceph", "fuse.ceph-fuse", "fuse.mfs", "fuse.juicefs"}
)  # fmt: skip
"""`fuseblk` is a disk of this host."""
_WITHOUT_LOCKS = frozenset(
    {"9p", "virtiofs", "vboxsf", "vmhgfs", "prl_fs", "afs", "beegfs", "orangefs", "pvfs2", "coda"}
)  # fmt: skip
"""Kinds that many hosts can mount, and whose locks stay on the host unless their server is set up otherwise."""
_NFS, _SMB = frozenset({"nfs", "nfs4"}), frozenset({"cifs", "smb3"})
MANDATORY = _SMB
"""Here a lock keeps its holder from writing those bytes, too."""


def mount_of(descriptor: int) -> tuple[str, frozenset[str]]:
    """(kind of file system, its options) of an open file; ("", {}) where the kernel does not say."""
    try:
        info = Path(f"/proc/self/fdinfo/{descriptor}").read_text()
        table = MOUNTINFO.read_text(errors="surrogateescape")
    except OSError:
        return "", frozenset()
    found = re.search(r"^mnt_id:\s*(\d+)$", info, re.MULTILINE)
    return find(table, found[1]) if found is not None else ("", frozenset())


def local_locks_at(path: str) -> str:
    """`local_locks` for the file or directory at a path; "" when it cannot be looked at."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return local_locks(*mount_of(descriptor))
    finally:
        os.close(descriptor)


def find(table: str, mount: str) -> tuple[str, frozenset[str]]:
    """The mount of that number in the text of a mountinfo table."""
    for line in table.splitlines():
        if line.partition(" ")[0] == mount:
            kind, _, rest = line.partition(" - ")[2].partition(" ")
            return kind, frozenset(rest.rpartition(" ")[2].split(","))
    return "", frozenset()


def local_locks(kind: str, options: Collection[str]) -> str:
    """Why locks there reach this host only, a clause; "" where they reach every host, or no other host is there."""
    given: list[str] = []
    if kind in _NFS:
        given = [each for each in ("nolock", "local_lock=all", "local_lock=posix") if each in options]
    elif kind in _SMB:
        given = [each for each in ("nobrl",) if each in options]
    elif kind in ("gfs2", "ocfs2", "lustre"):
        given = [each for each in ("localflocks", "localflock") if each in options]
    elif kind in _WITHOUT_LOCKS or (kind.partition(".")[0] == "fuse" and kind not in _FUSE_WITH_LOCKS):
        return f"{kind} does not pass locks on to other hosts"
    return f"it is mounted with {given[0]}" if given else ""
