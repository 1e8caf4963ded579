"""Files that a user gives: machine definitions, guest images."""

from __future__ import annotations

import bz2
import functools
import gzip
import lzma
import os
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import lz4.block

from fuzzing import Choices, Finding, Target
from vmf.errors import ConfigError, ImageError
from vmf.machine import config
from vmf.machine.boot.elf import load_stream, parse_elf
from vmf.machine.boot.guest import load_guest
from vmf.machine.boot.payload import unpack
from vmf.memory.guest import MIB, GuestMemory

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

RAM = 8 * MIB
LOAD_AT = 2 * MIB

# -- definitions

DEFINITION = """\
version = 1
name = "web"
memory_mib = 256
uuid = "6ecd8c99-4036-403d-bf84-cf8400f67836"
description = "a\\nmachine"
cpu_backend = "unicorn"
kernel = "/boot/vmlinuz"
initrd = "/boot/initrd.img"
cmdline = "console=ttyS0"
devices = ["pc"]

[device_options.pc]
color = "green"

[teleporter]
enabled = true
port = 6000
address = "::1"
transport = "tls"
tls_dir = "/etc/vmf/tls"
allow = ["alpha", "beta.example.org"]

[cpuid]
portability_level = "2"
set = ["aes"]
remove = ["sse4.2"]
peers = ["otherhost:6000", "[::1]:6001"]
"""


def definition(data: bytes) -> None:
    """A definition is refused with ConfigError, or written back it is the same machine."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return  # `config.load` refuses it before
    try:
        machine = config.parse(text, "web.toml")
    except ConfigError:
        return
    if config.parse(config.dump(machine), "again") != machine:
        raise Finding("a definition changes when it is written and read")


def definition_seeds() -> Iterator[bytes]:
    yield DEFINITION.encode()
    yield b'version = 1\nname = "x"\nmemory_mib = 1\nimage = "/i"\n'
    head = 'version = 1\nname = "x"\nmemory_mib = 1\n'
    for section in DEFINITION.split("\n\n")[1:]:
        yield (head + section).encode()
    for line in DEFINITION.splitlines():
        yield (head + line + "\n").encode()
    yield (head + 'cpuid = {portability_level = "auto", peers = ["h:1"]}\n').encode()
    yield (head + "teleporter = {port = 1979-05-27T07:32:00Z, address = [[[1.5]]]}\n").encode()


# -- images


def elf(text: bytes, *, linux: bool = False) -> bytes:
    """A smallest ELF64 program for the bare machine, or one that says it is Linux."""
    base = 0xFFFF_FFFF_8000_0000 if linux else 0
    text = text + (b"Linux version 6.1 (nobody)" if linux else b"")
    ident = b"\x7fELF\2\1\1\0" + bytes(8)
    header = ident + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, LOAD_AT, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 7, 120, base + LOAD_AT, LOAD_AT, len(text), len(text) + 64, 0x1000)
    return header + load + text


def _lz4(data: bytes) -> bytes:
    block = lz4.block.compress(data, store_size=False)
    return b"\x02\x21\x4c\x18" + struct.pack("<I", len(block)) + block


def _with_size(compress: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    return lambda data: compress(data) + struct.pack("<I", len(data))


COMPRESSORS: tuple[Callable[[bytes], bytes], ...] = (
    _with_size(_lz4),
    lambda data: gzip.compress(data, 1, mtime=0),
    _with_size(
        lambda data: lzma.compress(data, lzma.FORMAT_XZ, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 16}])
    ),
    _with_size(zstd.compress),
    _with_size(bz2.compress),
    _with_size(
        lambda data: lzma.compress(data, lzma.FORMAT_ALONE, filters=[{"id": lzma.FILTER_LZMA1, "dict_size": 1 << 16}])
    ),
    lambda data: data,
)


def bzimage(payload: bytes) -> bytes:
    """A bzImage around a payload."""
    head = bytearray(2 * 512)
    head[0x1F1] = 1
    head[0x1FE:0x206] = b"\x55\xaa\xeb\x6aHdrS"
    struct.pack_into("<H", head, 0x206, 0x020F)
    head[0x211] = 1
    struct.pack_into("<I", head, 0x22C, 0x7FFF_FFFF)
    struct.pack_into("<H", head, 0x236, 1)
    struct.pack_into("<I", head, 0x238, 2047)
    struct.pack_into("<II", head, 0x248, 16, len(payload))
    return bytes(head) + bytes(16) + payload


@functools.cache
def _memory() -> GuestMemory:
    return GuestMemory(RAM)


@functools.cache
def _file() -> int:
    return os.memfd_create("fuzz-image")


def _path(data: bytes) -> Path:
    os.ftruncate(_file(), 0)
    os.pwrite(_file(), data, 0)
    return Path(f"/proc/self/fd/{_file()}")


def image(data: bytes) -> None:
    """A kernel, or a bare-metal image: ImageError, or a vCPU state that points into RAM."""
    memory = _memory()
    try:
        state = load_guest(memory, _path(data), None, None, 1_000_000)
    except (ImageError, ConfigError):
        return
    finally:
        memory.clear()
    if not 0 <= state.rip < RAM:
        raise Finding(f"an image is entered at {state.rip:#x}")


def image_seeds() -> Iterator[bytes]:
    yield elf(b"\xf4" * 16)
    yield elf(b"\xf4" * 16, linux=True)
    for compress in COMPRESSORS:
        yield bzimage(compress(elf(b"\xf4" * 16, linux=True)))
    yield b"\xf4" * 64
    yield b"\x1f\x8b" + bytes(600)


def payload(data: bytes) -> None:
    """What is compressed in a bzImage, alone: ImageError, or never more than it said, and an ELF image in RAM."""
    choices = Choices(data)
    limit = RAM >> choices.number() % 8
    packed = choices.rest()
    memory = _memory()
    total = 0

    def counted() -> Iterator[memoryview]:
        nonlocal total
        for piece in unpack(memoryview(packed), limit, "kernel x"):
            total += len(piece)
            yield piece

    try:
        load_stream(counted(), memory, MIB, "kernel x")
    except ImageError:
        pass
    finally:
        memory.clear()
    if total > max(limit, len(packed)):
        raise Finding(f"{total} bytes came out where {limit} were allowed")


def payload_seeds() -> Iterator[bytes]:
    for compress in COMPRESSORS:
        yield b"\0" + compress(elf(b"\xf4" * 16, linux=True))
        yield b"\3" + compress(bytes(9000))


def headers(data: bytes) -> None:
    """ELF headers alone."""
    try:
        parsed = parse_elf(data, "image x")
    except ImageError:
        return
    if not parsed.segments or parsed.file_end < 0 or not parsed.start <= parsed.entry < parsed.end:
        raise Finding("an ELF image without anything to enter")


def headers_seeds() -> Iterator[bytes]:
    yield elf(b"\xf4" * 16)
    yield elf(b"", linux=True)


TARGETS = (
    Target("definition", definition, definition_seeds, 2048, 1.0),
    Target("image", image, image_seeds, 4096, 1.0),
    Target("payload", payload, payload_seeds, 2048, 1.0),
    Target("headers", headers, headers_seeds, 1024, 0.25),
)
