"""Initial RAM disks for guests of tests, benchmarks and the demonstration: a newc cpio archive with busybox.

The archive is not compressed (the kernel's unpacking would be paid in guest time) and deterministic: the same input
gives the same bytes, with no times, owners or inode numbers of this machine. Format: the kernel's
Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Mapping

from attrs import frozen

_APPLETS = """
    ash awk basename cat chmod cp cttyhack cut date dd dirname dmesg echo env expr false find free grep head
    hostname id insmod kill killall ln ls md5sum mkdir mknod mount mv nproc od pidof poweroff printf ps pwd readlink
    reboot rm rmdir sed seq setsid sh sha256sum sleep sort stty switch_root sync tail tee test time top touch tr
    true tty umount uname uptime usleep wc which xargs yes zcat
"""
APPLETS = tuple(_APPLETS.split())
"""Names under which busybox is linked into /bin."""

SHELL_INIT = """\
#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev 2>/dev/null
export PATH=/bin PS1='vmf# ' HOME=/
echo "vmf: init is running"
while true; do setsid cttyhack sh; done
"""
"""Mounts the kernel's file systems, says so, and gives a shell on the console."""

COMMAND_INIT = """\
#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev 2>/dev/null
export PATH=/bin PS1='vmf# ' HOME=/
echo "vmf: init is running"
{command}
echo "vmf: the command ended with status $?"
while true; do setsid cttyhack sh; done
"""


@frozen
class Entry:
    """One member of the archive.

    Attributes:
        path: without a leading slash.
        mode: type and permissions, as in stat(2).
        data: content of a file, or target of a symbolic link.
        device: (major, minor) of a device node.
    """

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def cpio(entries: Iterable[Entry]) -> bytes:
    """The entries as a newc archive, in their order."""
    out = bytearray()
    for number, entry in enumerate((*entries, Entry("TRAILER!!!", 0)), 1):
        name = entry.path.encode() + b"\0"
        links = 2 if stat.S_ISDIR(entry.mode) else 1
        fields = (number, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
        out += b"070701" + b"".join(b"%08X" % value for value in fields) + name
        out += bytes(-len(out) % 4)
        out += entry.data
        out += bytes(-len(out) % 4)
    return bytes(out) + bytes(-len(out) % 512)


def initrd(busybox: bytes, init: str = SHELL_INIT, files: Mapping[str, bytes] | None = None) -> bytes:
    """An initrd with busybox and its applets in /bin, `init` as /init, and `files` (path to content, mode 0755)."""
    extra = {path.lstrip("/"): content for path, content in (files or {}).items()}
    folders = {"bin", "dev", "proc", "sys", "tmp", "root"}
    for path in extra:
        parts = path.split("/")[:-1]
        folders.update("/".join(parts[: depth + 1]) for depth in range(len(parts)))
    entries = [Entry(folder, stat.S_IFDIR | 0o755) for folder in sorted(folders)]
    entries.append(Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)))
    entries.append(Entry("dev/ttyS0", stat.S_IFCHR | 0o600, device=(4, 64)))
    entries.append(Entry("dev/null", stat.S_IFCHR | 0o666, device=(1, 3)))
    entries.append(Entry("bin/busybox", stat.S_IFREG | 0o755, busybox))
    entries += [Entry(f"bin/{name}", stat.S_IFLNK | 0o777, b"busybox") for name in APPLETS]
    entries.append(Entry("init", stat.S_IFREG | 0o755, init.encode()))
    entries += [Entry(path, stat.S_IFREG | 0o755, content) for path, content in sorted(extra.items())]
    return cpio(entries)
