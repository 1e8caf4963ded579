"""Images that are not raw: how they are recognised, and what to do with them.

vmf reads images as raw disks. It never reads one as anything else because of what stands in it: a guest that writes the
header of another format to its disk would otherwise choose which files of the host are opened for it. So what looks
like another format is refused before its first use, and an image that a machine has used stays what it is.

A LUKS header is no reason to refuse: it is what a guest's own encrypted disk begins with.
"""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

from vmf.errors import StorageError
from vmf.storage.uri import file_path, scheme_of, with_option

if TYPE_CHECKING:
    from vmf.storage.base import ImageInfo

HEAD, TAIL = 1024, 512
"""Bytes at the beginning and at the end of an image in which formats show themselves."""

_MAGIC = (
    (0, b"QFI\xfb\0\0\0\1", "qcow"), (0, b"QFI\xfb", "qcow2"), (0, b"QED\0", "qed"), (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"), (0, b"\xbe\xba\xfe\xca\0\0\0\0", "vmdk"), (0, b"vhdxfile", "vhdx"), (0, b"conectix", "vhd"),
    (64, b"\x7f\x10\xda\xbe", "vdi"), (0, b"WithoutFreeSpace", "parallels"), (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"), (0, b"#!/bin/sh\n#V2.0 Format\n", "cloop"),
    (0, b"\x3a\xff\x26\xed", "Android sparse"),
    (0, b"\x1f\x8b\x08", "gzip"), (0, b"\xfd7zXZ\0", "xz"), (0, b"\x28\xb5\x2f\xfd", "zstd"),
    (0, b"\x04\x22\x4d\x18", "lz4"), (0, b"\x02\x21\x4c\x18", "lz4"), (0, b"\x89LZO\0\r\n\x1a\n", "lzop"),
    (0, b"PK\3\4", "zip"), (0, b"7z\xbc\xaf\x27\x1c", "7z"),
)  # fmt: skip
"""(offset, what stands there, name): the formats' own documents, QEMU's docs/interop among them."""
_TRAILERS = ((-512, b"conectix", "vhd"), (-511, b"conectix", "vhd"), (-512, b"koly", "dmg"))
"""The same, counted from the end: fixed VHD (511 bytes before 2004) and Apple's disk images."""
_BZIP2 = re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)")
_VMDK_TEXT = re.compile(rb"(?:\xef\xbb\xbf)?\s*# *disk descriptorfile", re.IGNORECASE)

_UNPACKERS = {
    "gzip": "gunzip", "xz": "unxz", "zstd": "unzstd", "lz4": "unlz4", "lzop": "lzop -d", "bzip2": "bunzip2",
    "zip": "unzip", "7z": "7z x", "OVA": "tar -xf", "Android sparse": "simg2img",
}  # fmt: skip
_QEMU_NAMES = {"vhd": "vpc"}


def recognise(head: bytes, tail: bytes) -> str:
    """The name of the format of an image that begins and ends so; "" for a raw one, as far as can be seen."""
    for at, mark, name in _MAGIC:
        if head[at:].startswith(mark):
            return name
    for at, mark, name in _TRAILERS:
        if len(tail) >= -at and tail[at:].startswith(mark):
            return name
    if _BZIP2.match(head):
        return "bzip2"
    if _VMDK_TEXT.match(head):
        return "vmdk"
    if head[257:262] == b"ustar" and head[:100].rstrip(b"\0").lower().endswith(b".ovf"):
        return "OVA"
    return ""


def remedy(medium: str, found: str) -> str:
    """How to get a raw disk out of it: a sentence without its full stop."""
    if scheme_of(medium) != "file":
        return f"Let the server read the image as {found}, so that it exports the disk in it"
    path = file_path(medium)
    if found in _UNPACKERS:
        return f"Unpack it: `{_UNPACKERS[found]} {shlex.quote(path)}`"
    files = f"{shlex.quote(path)} {shlex.quote(path + '.raw')}"
    return f"Make it raw: `qemu-img convert -f {_QEMU_NAMES.get(found, found)} -O raw {files}`, or serve it by NBD"


def require_raw(info: ImageInfo) -> None:
    """Raise StorageError for an image that looks like something else."""
    if info.looks_like:
        raise StorageError(
            f"{info.uri} looks like a {info.looks_like} image, and is read as a raw one: the guest would see its bytes"
            " instead of the disk in it.",
            f"{remedy(info.uri, info.looks_like)}. Or, if it is meant so, attach "
            f"{shlex.quote(with_option(info.uri, 'format', 'raw'))}.",
        )
