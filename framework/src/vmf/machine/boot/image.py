"""Reading image files, and saying what they are."""

from __future__ import annotations

import enum
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attrs import frozen

from vmf.errors import ImageError
from vmf.machine.boot.elf import ELF_MAGIC, parse_elf

HEAD_SIZE = 64 << 10
"""Bytes at the start of a file that are enough to say what it is."""

MULTIBOOT_SEARCH = 8192
"""A multiboot header lies within so many bytes from the start."""
_MULTIBOOT_MAGIC = 0x1BADB002

USE_X86_LINUX = "Use an x86-64 Linux kernel (bzImage or vmlinux), or a bare-metal image."

KERNEL_MAP_BASE = 0xFFFF_FFFF_8000_0000
"""__START_KERNEL_map: where a 64-bit Linux kernel links itself (Documentation/arch/x86/x86_64/mm.rst)."""


class ImageKind(enum.Enum):
    """What a guest image is."""

    BZIMAGE = "Linux bzImage"
    VMLINUX = "Linux ELF kernel"
    ELF = "bare-metal ELF image"
    MULTIBOOT = "multiboot image"
    FLAT = "flat bare-metal image"

    @property
    def is_linux(self) -> bool:
        return self in (ImageKind.BZIMAGE, ImageKind.VMLINUX)


_FOREIGN_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x1f\x8b", "a gzip file"),
    (0, b"\xfd7zXZ\0", "an xz file"),
    (0, b"BZh", "a bzip2 file"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file"),
    (0, b"\x04\x22\x4d\x18", "an LZ4 file"),
    (0, b"\x02\x21\x4c\x18", "an LZ4 file"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"!<arch>\n", "an archive or Debian package"),
    (0, b"\xed\xab\xee\xdb", "an RPM package"),
    (0, b"07070", "a cpio archive (an initrd?)"),
    (0, b"QFI\xfb", "a qcow2 disk image"),
    (0, b"KDMV", "a VMDK disk image"),
    (0, b"hsqs", "a squashfs file system"),
    (0, b"%PDF", "a PDF document"),
    (0, b"\x89PNG", "a picture"),
    (0, b"\xca\xfe\xba\xbe", "a Java class or Mach-O file"),
    (0, b"\xcf\xfa\xed\xfe", "a Mach-O program"),
    (0, b"\x27\x05\x19\x56", "a U-Boot image"),
    (0x40, b"\x7f\x10\xda\xbe", "a VDI disk image"),
    (0x38, b"ARM\x64", "an ARM64 Linux kernel"),
    (0x24, b"\x18\x28\x6f\x01", "an ARM Linux kernel (zImage)"),
    (0x30, b"RISCV\0\0\0", "a RISC-V Linux kernel"),
    (0x38, b"RSC\x05", "a RISC-V Linux kernel"),
    (257, b"ustar", "a tar archive"),
    (0x8001, b"CD001", "a CD/DVD image"),
    (0x438, b"\x53\xef", "an ext2/3/4 file system"),
)


@frozen
class ImageFile:
    """An open regular file. `what` names it in messages, e.g. "kernel /boot/vmlinuz"."""

    what: str
    fd: int
    size: int
    head: bytes

    def read(self, offset: int, size: int) -> bytes:
        """[offset, offset+size); an ImageError when the file ends before."""
        if offset + size > self.size:
            raise self.truncated(f"it has {self.size} bytes where {offset + size} are needed")
        parts = bytearray(size)
        self.read_into(offset, memoryview(parts))
        return bytes(parts)

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` from `offset` on."""
        position = 0
        while position < len(view):
            try:
                count = os.preadv(self.fd, [view[position:]], offset + position)
            except OSError as error:
                raise self.wrong(f"cannot be read: {error.strerror}", "Check the disk it is on.") from error
            if not count:
                raise self.truncated(f"it ends at {offset + position} bytes")
            position += count

    def truncated(self, why: str) -> ImageError:
        return ImageError(f"{self.what} is truncated or damaged: {why}.", "Copy or install it again.")

    def wrong(self, why: str, remedy: str = USE_X86_LINUX) -> ImageError:
        return ImageError(f"{self.what} {why}.", remedy)


@contextmanager
def open_image(role: str, path: Path) -> Iterator[ImageFile]:
    """Open a file for reading; `role` ("kernel", "initrd", "image") goes into the messages."""
    what = f"{role} {path}"
    try:
        # O_NONBLOCK: a FIFO without a writer must be refused, not waited for.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        remedy = "Check the path." if not isinstance(error, PermissionError) else "Make it readable for this user."
        raise ImageError(f"{what} cannot be opened: {reason}.", remedy) from error
    try:
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            raise ImageError(f"{what} is a directory.", "Name the file in it.")
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{what} is not a regular file.", "Copy its content into a file.")
        if status.st_size == 0:
            raise ImageError(f"{what} is empty.", "Copy or install it again.")
        try:
            head = os.pread(fd, HEAD_SIZE, 0)
        except OSError as error:
            raise ImageError(f"{what} cannot be read: {error.strerror}.", "Check the disk it is on.") from error
        yield ImageFile(what, fd, status.st_size, head)
    finally:
        os.close(fd)


def identify(path: Path, role: str = "image") -> ImageKind:
    """What `path` is. Raises ImageError for everything that cannot be a guest here, saying what it seems to be."""
    with open_image(role, path) as image:
        return kind_of(image)


def kind_of(image: ImageFile) -> ImageKind:
    """As `identify`, of an open file."""
    head = image.head
    if head[:4] == ELF_MAGIC:
        if head[4:5] == b"\x01" and multiboot_header(head) is not None:
            return ImageKind.MULTIBOOT
        elf = parse_elf(head, image.what)
        first = elf.segments[0]
        if first.vaddr == KERNEL_MAP_BASE + first.paddr and _says_linux(image):
            return ImageKind.VMLINUX
        return ImageKind.ELF
    if head[0x202:0x206] == b"HdrS" and head[0x1FE:0x200] == b"\x55\xaa":
        return ImageKind.BZIMAGE
    for offset, magic, name in _FOREIGN_MAGIC:
        if head[offset : offset + len(magic)] == magic:
            raise image.wrong(f"is {name}, not a guest for this machine")
    if head[:2] == b"MZ":
        if len(head) < 0x206:
            raise image.truncated(f"it has only {len(head)} bytes")
        raise image.wrong("is a DOS, Windows or EFI program without a Linux boot header")
    if head[0x1FE:0x200] == b"\x55\xaa":
        raise image.wrong("is a boot sector or disk image: this machine has no firmware to boot it")
    text = head[:4096]
    if not text.translate(None, bytes(range(0x20, 0x7F)) + b"\t\r\n\f"):
        raise image.wrong("is a text file")
    if not text.strip(b"\0"):
        raise image.truncated(f"its first {len(text)} bytes are all zero")
    return ImageKind.FLAT


def multiboot_header(head: bytes) -> int | None:
    """The flags of the multiboot header, or None without one (Multiboot Specification 3.1)."""
    for offset in range(0, min(len(head), MULTIBOOT_SEARCH) - 11, 4):
        magic, flags, checksum = struct.unpack_from("<III", head, offset)
        if magic == _MULTIBOOT_MAGIC and (magic + flags + checksum) & 0xFFFF_FFFF == 0:
            return int(flags)
    return None


def _says_linux(image: ImageFile) -> bool:
    """Whether the kernel's banner stands in the file."""
    chunk, overlap, position = 4 << 20, 32, 0
    while position < image.size:
        if b"Linux version " in image.read(position, min(chunk + overlap, image.size - position)):
            return True
        position += chunk
    return False


def u32(data: bytes, offset: int) -> int:
    """Little-endian 32 bits at `offset`."""
    return int(struct.unpack_from("<I", data, offset)[0])
