"""Unpacking the kernel inside a bzImage, piece by piece.

The payload is one compressed file followed by its unpacked size (32 bits, little-endian; for gzip that is the
format's own trailer): scripts/Makefile.lib of the kernel. The size is the bound on what is unpacked, so a
decompression bomb costs one piece at most. LZ4 payloads are in the legacy frame format: magic, then blocks of at most
8 MiB unpacked, each a 32-bit compressed size and the data.
"""

from __future__ import annotations

import bz2
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import lz4.block

from vmf.errors import ImageError
from vmf.machine.boot.elf import ELF_MAGIC
from vmf.machine.boot.image import u32

PIECE = 4 << 20
"""Bytes unpacked at a time."""

_LZ4_LEGACY_MAGIC = b"\x02\x21\x4c\x18"
_LZ4_BLOCK = 8 << 20
_LZ4_MAX_COMPRESSED = _LZ4_BLOCK + _LZ4_BLOCK // 255 + 16
_DICTIONARY_LIMIT = 256 << 20
"""Bytes an xz or lzma decoder may use (the kernel's dictionaries are at most 128 MiB)."""


class _Corrupt(Exception):
    """The compressed data is wrong; the text says how."""


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    def decompress(self, data: Any, max_length: int = -1) -> bytes: ...


def _stream(decompressor: _Decompressor, data: memoryview) -> Iterator[memoryview]:
    piece = decompressor.decompress(data, PIECE)
    while True:
        if piece:
            yield memoryview(piece)
        if decompressor.eof:
            return
        if decompressor.needs_input:
            raise _Corrupt("its end is missing")
        piece = decompressor.decompress(b"", PIECE)


def _gzip(data: memoryview) -> Iterator[memoryview]:
    decompressor = zlib.decompressobj(wbits=31)
    rest: Any = data
    while not decompressor.eof:
        piece = decompressor.decompress(rest, PIECE)
        rest = decompressor.unconsumed_tail
        if not piece and not rest and not decompressor.eof:
            raise _Corrupt("its end is missing")
        if piece:
            yield memoryview(piece)


def _lz4_legacy(data: memoryview) -> Iterator[memoryview]:
    position = 4
    while position < len(data):
        if data[position : position + 4] == _LZ4_LEGACY_MAGIC:  # frames may be concatenated
            position += 4
            continue
        if position + 4 > len(data):
            raise _Corrupt("its end is missing")
        size = int.from_bytes(data[position : position + 4], "little")
        position += 4
        if not 0 < size <= _LZ4_MAX_COMPRESSED or position + size > len(data):
            raise _Corrupt(f"an LZ4 block claims {size} bytes")
        yield memoryview(lz4.block.decompress(data[position : position + size], uncompressed_size=_LZ4_BLOCK))
        position += size


def _xz(data: memoryview) -> Iterator[memoryview]:
    return _stream(lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_DICTIONARY_LIMIT), data)


def _lzma(data: memoryview) -> Iterator[memoryview]:
    return _stream(lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_DICTIONARY_LIMIT), data)


def _bzip2(data: memoryview) -> Iterator[memoryview]:
    return _stream(bz2.BZ2Decompressor(), data)


def _zstd(data: memoryview) -> Iterator[memoryview]:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    try:
        yield from _stream(zstd.ZstdDecompressor(), data)
    except zstd.ZstdError as error:
        raise _Corrupt(str(error)) from error


def _plain(data: memoryview) -> Iterator[memoryview]:
    for position in range(0, len(data), PIECE):
        yield data[position : position + PIECE]


_Unpacker = Callable[[memoryview], Iterator[memoryview]]

# magic, name, unpacker, whether the size follows the compressed file
_FORMATS: tuple[tuple[bytes, str, _Unpacker | None, bool], ...] = (
    (_LZ4_LEGACY_MAGIC, "LZ4", _lz4_legacy, True),
    (b"\x1f\x8b", "gzip", _gzip, False),
    (b"\xfd7zXZ\0", "xz", _xz, True),
    (b"\x28\xb5\x2f\xfd", "zstd", _zstd, True),
    (b"BZh", "bzip2", _bzip2, True),
    (b"\x5d\0\0", "LZMA", _lzma, True),
    (b"\x89LZO", "LZO", None, True),
)


def can_unpack(payload: memoryview) -> bool:
    """Whether there is a payload, in a form that `unpack` knows."""
    start = payload[:8].tobytes()
    return start.startswith(ELF_MAGIC) or any(
        start.startswith(magic) and unpacker is not None for magic, _, unpacker, _ in _FORMATS
    )


def unpack(payload: memoryview, limit: int, what: str) -> Iterator[memoryview]:
    """Yield the unpacked kernel in pieces. Raises ImageError naming `what` on any damage.

    Args:
        limit: RAM size; a kernel that says it is larger is refused before anything is unpacked.
    """
    start = payload[:8].tobytes()
    if start.startswith(ELF_MAGIC):
        yield from _plain(payload)
        return
    known = next((entry for entry in _FORMATS if start.startswith(entry[0])), None)
    if known is None:
        raise ImageError(
            f"{what} is compressed in a way this program does not know (it begins with {start.hex()}).",
            "Use a kernel compressed with LZ4, gzip, xz, zstd, bzip2 or LZMA, or its vmlinux.",
        )
    magic, name, unpacker, size_follows = known
    if unpacker is None:
        raise ImageError(
            f"{what} is compressed with {name}, which is not supported.",
            "Use its vmlinux (scripts/extract-vmlinux), or build it with CONFIG_KERNEL_LZ4 or another method.",
        )
    damaged = f"{what} is damaged: its {name} payload cannot be unpacked"
    again = "Copy or install it again."
    if len(payload) < len(magic) + 4:
        raise ImageError(f"{damaged}: it has only {len(payload)} bytes.", again)
    declared = u32(payload[-4:].tobytes(), 0)
    if declared > limit:
        raise ImageError(
            f"{what} unpacks to {declared} bytes; the machine has {limit} bytes of RAM.",
            f"Give it at least {-(-declared // (1 << 20)) + 32} MiB with `vmf modifyvm NAME --memory MIB`.",
        )
    total = 0
    try:
        for piece in unpacker(payload[:-4] if size_follows else payload):
            total += len(piece)
            if total > declared:
                raise _Corrupt(f"there is more than the {declared} bytes it speaks of")
            yield piece
    except (_Corrupt, zlib.error, lzma.LZMAError, lz4.block.LZ4BlockError, OSError, EOFError, ValueError) as error:
        raise ImageError(f"{damaged}: {error}.", again) from error
    except MemoryError as error:
        raise ImageError(f"{damaged} in the memory there is.", again) from error
    if total != declared:
        raise ImageError(f"{damaged}: {total} bytes came out instead of {declared}.", again)
