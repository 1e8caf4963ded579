"""Guest images of the tests' own making."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
import sys
from collections.abc import Callable

import lz4.block
import pytest

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

LOAD_AT = 0x100_0000
KERNEL_MAP = 0xFFFF_FFFF_8000_0000


def make_elf(
    text: bytes,
    *,
    paddr: int = LOAD_AT,
    vaddr: int | None = None,
    entry: int | None = None,
    memory_size: int | None = None,
    machine: int = 62,
    kind: int = 2,
    elf_class: int = 2,
    extra: bytes = b"",
) -> bytes:
    """An ELF64 file with one PT_LOAD at file offset 0x1000."""
    ident = b"\x7fELF" + bytes([elf_class, 1, 1, 0]) + bytes(8)
    header = ident + struct.pack(
        "<HHIQQQIHHHHHH", kind, machine, 1, paddr if entry is None else entry, 64, 0, 0, 64, 56, 1, 64, 0, 0
    )
    load = struct.pack(
        "<IIQQQQQQ", 1, 7, 0x1000, paddr if vaddr is None else vaddr, paddr, len(text),
        len(text) if memory_size is None else memory_size, 0x1000,
    )  # fmt: skip
    return (header + load).ljust(0x1000, b"\0") + text + extra


def make_vmlinux(size: int = 3 << 20) -> bytes:
    """A kernel in form: linked at __START_KERNEL_map, with a banner, and relocations behind it."""
    body = b"\xf4" * 64 + b"Linux version 6.1.0-test (nobody) " + bytes(range(256)) * ((size - 98) // 256)
    return make_elf(body, vaddr=KERNEL_MAP + LOAD_AT, memory_size=size + (1 << 20), extra=b"\x5a" * 4096)


def _lz4(data: bytes) -> bytes:
    out = b"\x02\x21\x4c\x18"
    for position in range(0, len(data), 8 << 20):
        block = lz4.block.compress(data[position : position + (8 << 20)], store_size=False)
        out += struct.pack("<I", len(block)) + block
    return out


def _with_size(compress: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    return lambda data: compress(data) + struct.pack("<I", len(data))


def _xz(data: bytes) -> bytes:
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}]
    return lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_CRC32, filters=filters)


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "lz4": _with_size(_lz4),
    "gzip": lambda data: gzip.compress(data, 1),
    "xz": _with_size(_xz),
    "zstd": _with_size(zstd.compress),
    "bzip2": _with_size(bz2.compress),
    "lzma": _with_size(lambda data: lzma.compress(data, lzma.FORMAT_ALONE)),
    "plain": lambda data: data,
}


def make_bzimage(
    payload: bytes,
    *,
    version: int = 0x020F,
    loadflags: int = 1,
    xloadflags: int = 1,
    cmdline_size: int = 2047,
    initrd_max: int = 0x7FFF_FFFF,
) -> bytes:
    """A bzImage around a compressed payload: setup of two sectors, 256 bytes of stub, the payload, a trailer."""
    head = bytearray(3 * 512)
    head[0x1F1] = 2
    head[0x1FE:0x200] = b"\x55\xaa"
    head[0x200:0x202] = b"\xeb\x6a"
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, version)
    head[0x211] = loadflags
    struct.pack_into("<I", head, 0x22C, initrd_max)
    struct.pack_into("<H", head, 0x236, xloadflags)
    struct.pack_into("<I", head, 0x238, cmdline_size)
    struct.pack_into("<II", head, 0x248, 0x100, len(payload))
    return bytes(head) + bytes(0x100) + payload + bytes(100)


class Images:
    """The makers, as one fixture."""

    elf = staticmethod(make_elf)
    vmlinux = staticmethod(make_vmlinux)
    bzimage = staticmethod(make_bzimage)
    compressors = COMPRESSORS
    load_at = LOAD_AT


@pytest.fixture(scope="session")
def images() -> Images:
    return Images()
