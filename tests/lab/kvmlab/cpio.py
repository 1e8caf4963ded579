"""cpio archives in the "newc" format, as the kernel unpacks them (Documentation/driver-api/early-userspace)."""

from __future__ import annotations

import stat


class Archive:
    """Collects members in order; directories must come before what is in them."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0

    def directory(self, name: str) -> None:
        self._add(name, stat.S_IFDIR | 0o755, b"")

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        self._add(name, stat.S_IFREG | mode, data)

    def finish(self) -> bytes:
        """The archive; nothing can be added any more."""
        self._add("TRAILER!!!", 0, b"")
        return b"".join(self._parts)

    def _add(self, name: str, mode: int, data: bytes) -> None:
        self._inode += 1
        encoded = name.encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, size, device (2), special device (2), name's size, checksum
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        self._parts += [header, encoded, bytes(-(len(header) + len(encoded)) % 4), data, bytes(-len(data) % 4)]
