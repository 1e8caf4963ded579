"""What tells hosts, their boots and their file systems apart."""

from __future__ import annotations

import ctypes
import os
import re
import socket
from pathlib import Path

_MACHINE_ID = "/etc/machine-id"
_BOOT_ID = "/proc/sys/kernel/random/boot_id"

_OWN_DISK = frozenset({  # statfs(2), f_type: ext4, XFS, btrfs, tmpfs, ZFS, F2FS, bcachefs, ramfs, JFS
    0xEF53, 0x58465342, 0x9123683E, 0x01021994, 0x2FC12FC1, 0xF2F52010, 0xCA451A4E, 0x858458F6, 0x3153464A,
})  # fmt: skip
"""File systems of one host, which keep a file's inode number for as long as the file is there."""
_CHANGING_NUMBERS = frozenset({0x794C7630, 0x4D44, 0x2011BAB0, 0x5346544E, 0x7366746E})
"""File systems of one host that may give a file another inode number at the next mount: overlayfs, FAT, exFAT, NTFS."""
_NFS = 0x6969

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)


def host_name() -> str:
    return socket.gethostname()


def machine_id() -> str:
    """Names this installation (machine-id(5)); "" where there is none that could.

    D-Bus's own (/var/lib/dbus/machine-id) is not asked instead: where a template's machine id was taken out, so that
    each host makes its own, that one is often left over.
    """
    try:
        found = Path(_MACHINE_ID).read_text("ascii").strip()
    except (OSError, ValueError):
        return ""
    # systemd's placeholder is "uninitialized"
    return found if re.fullmatch("[0-9a-f]{32}", found) and found.strip("0") else ""


def boot_id() -> str:
    """Names the time since the kernel started; "" where the system does not tell."""
    try:
        return Path(_BOOT_ID).read_text().strip()
    except OSError:
        return ""


def is_this(name: str, installation: str, boot: str) -> bool:
    """Whether a host that told its name, `machine_id` and `boot_id` is this one, perhaps before its last start."""
    if not name or (boot and boot == boot_id()):
        return True  # containers of one kernel count as one host
    # Installations are cloned together with their ids, so the name must agree as well.
    return bool(installation) and (installation, name) == (machine_id(), host_name())


def is_shared(descriptor: int) -> bool:
    """Whether another host could have the file open, too: on a network file system, and on one not known here."""
    return _kind(descriptor) not in _OWN_DISK | _CHANGING_NUMBERS


def keeps_numbers(descriptor: int) -> bool:
    """Whether a file's inode number tells for good that it is the same file."""
    return _kind(descriptor) in _OWN_DISK | {_NFS}


def pid_namespace() -> int:
    """Names the PID namespace of this process; 0 where the system does not tell."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def _kind(descriptor: int) -> int:
    buffer = (ctypes.c_ulong * 32)()
    return 0 if _libc.fstatfs(descriptor, buffer) else buffer[0] & 0xFFFFFFFF
