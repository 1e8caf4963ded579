"""Multiboot images (Multiboot Specification 0.6.96): 32-bit ELF files with a multiboot header, as kvm-unit-tests and
many small systems are.

The entry contract (section 3.2): 32-bit protected mode without paging, flat segments, interrupts off, EAX = 0x2BADB002,
EBX = the information structure. That has the memory map, the command line (after the image's own path, as other loaders
do it) and one module, when there is an initrd; it lies below 1 MiB, images are loaded above.
"""

from __future__ import annotations

import struct
from pathlib import Path

from attrs import evolve

from vmf.cpu.state import DescriptorTable, Segment, VcpuState
from vmf.errors import ConfigError, ImageError
from vmf.machine.boot.elf import check_fits, parse_elf
from vmf.machine.boot.image import MULTIBOOT_SEARCH, ImageFile, multiboot_header, open_image
from vmf.machine.boot.longmode import (
    CODE_SELECTOR,
    DATA_SELECTOR,
    GDT_GPA,
    LOADER_END,
    initial_state,
    low_ram_end,
)
from vmf.memory.guest import PAGE_SIZE, GuestMemory

EAX_MAGIC = 0x2BADB002
INFO_GPA = 0x9000
_INFO_SIZE = 0x78
_MAP_GPA = INFO_GPA + 0x100
_MODULE_GPA = INFO_GPA + 0x300
_NAME_GPA = INFO_GPA + 0x340
STRINGS_GPA = 0x20000
_LOADER_NAME = b"vmf\0"

# Bits of `flags` in the information structure, and of the header (sections 3.3 and 3.1.2).
INFO_MEMORY, INFO_CMDLINE, INFO_MODULES, INFO_MAP, INFO_LOADER = 1 << 0, 1 << 2, 1 << 3, 1 << 6, 1 << 9
HEADER_VIDEO = 1 << 2
_HEADER_MUST = 0xFFFF
"""A loader that does not know one of these bits must refuse the image."""
_HEADER_KNOWN = 1 << 0 | 1 << 1
"""Modules on page boundaries, memory information: both always."""

_RAM, _RESERVED = 1, 2
_LOW_END, _LEGACY_END = 0xA0000, 0x10_0000
_CODE32 = 0xC09B  # G, D, present, code, readable, accessed
_CR0 = 0x11  # PE, ET
_GDT = struct.pack("<4Q", 0, 0, 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)


def load_multiboot(
    memory: GuestMemory, path: Path, initrd: Path | None, cmdline: str | None, tsc_khz: int, role: str = "kernel"
) -> VcpuState:
    """Load a multiboot image into zeroed RAM.

    Raises ImageError for a wrong or too large image or initrd, and ConfigError for a wrong command line.
    """
    if memory.size < LOADER_END:
        raise ImageError(
            f"the machine has {memory.size} bytes of RAM, less than the 1 MiB that loading a guest needs.",
            "Give it more with `vmf modifyvm NAME --memory MIB`.",
        )
    with open_image(role, path) as image:
        _check_header(image)
        elf = parse_elf(image.head, image.what, bits=32)
        check_fits(elf, memory, LOADER_END, image.what)
        if elf.file_end > image.size:
            raise image.truncated(f"it has {image.size} bytes where its headers speak of {elf.file_end}")
        for segment in elf.segments:
            if segment.file_size:
                with memory.view(segment.paddr, segment.file_size) as view:
                    image.read_into(segment.offset, view)
    flags = INFO_MEMORY | INFO_CMDLINE | INFO_MAP | INFO_LOADER
    info = bytearray(_INFO_SIZE)
    struct.pack_into("<II", info, 4, _LOW_END >> 10, (low_ram_end(memory) - _LEGACY_END) >> 10)
    strings = _string(f"{path} {cmdline or ''}".rstrip())
    struct.pack_into("<I", info, 16, STRINGS_GPA)
    if initrd is not None:
        module = STRINGS_GPA + len(strings)
        strings += _string(str(initrd))
        start, end = _put_module(memory, initrd, elf.end)
        memory.write(_MODULE_GPA, struct.pack("<4I", start, end, module, 0))
        struct.pack_into("<II", info, 20, 1, _MODULE_GPA)
        flags |= INFO_MODULES
    memory.write(STRINGS_GPA, strings)
    table = _memory_map(memory)
    memory.write(_MAP_GPA, table)
    memory.write(_NAME_GPA, _LOADER_NAME)
    struct.pack_into("<II", info, 44, len(table), _MAP_GPA)
    struct.pack_into("<I", info, 64, _NAME_GPA)
    struct.pack_into("<I", info, 0, flags)
    memory.write(INFO_GPA, info)
    memory.write(GDT_GPA, _GDT)
    return _entry_state(elf.entry, tsc_khz)


def _entry_state(entry: int, tsc_khz: int) -> VcpuState:
    state = initial_state(entry, {"rax": EAX_MAGIC, "rbx": INFO_GPA, "rsp": 0}, 0, tsc_khz)
    code = Segment(CODE_SELECTOR, 0, 0xFFFF_FFFF, _CODE32)
    data = evolve(state.segments["ds"], selector=DATA_SELECTOR)
    segments = {**dict.fromkeys(state.segments, data), "cs": code}
    return evolve(state, segments=segments, cr0=_CR0, cr3=0, efer=0, gdtr=DescriptorTable(GDT_GPA, len(_GDT) - 1))


def _check_header(image: ImageFile) -> None:
    flags = multiboot_header(image.head)
    if flags is None:
        raise image.wrong(
            f"is a 32-bit ELF image without a multiboot header in its first {MULTIBOOT_SEARCH} bytes",
            "Use an image for multiboot loaders (`grub-file --is-x86-multiboot FILE` tells), or a 64-bit one.",
        )
    unknown = flags & _HEADER_MUST & ~_HEADER_KNOWN
    if unknown & HEADER_VIDEO:
        raise image.wrong("asks for a video mode, and this machine has no display", "Build it for a text console.")
    if unknown:
        raise image.wrong(f"asks its loader for features that are not known here ({unknown:#x})", "Build it without.")


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    if b"\0" in data or b"\n" in data:
        raise ConfigError("cmdline: a command line cannot hold NUL or newline.", "Remove it.")
    return data + b"\0"


def _put_module(memory: GuestMemory, path: Path, lowest: int) -> tuple[int, int]:
    """As high as it goes, on a page boundary. Start and end."""
    top = low_ram_end(memory)
    with open_image("initrd", path) as image:
        start = (top - image.size) & ~(PAGE_SIZE - 1)
        if start < lowest:
            mib = -(-(lowest + image.size + PAGE_SIZE) // (1 << 20))
            raise ImageError(
                f"{image.what} ({image.size} bytes) does not fit between the image's end at {lowest:#x} and {top:#x}.",
                f"Give the machine at least {mib} MiB with `vmf modifyvm NAME --memory {mib}`.",
            )
        with memory.view(start, image.size) as view:
            image.read_into(0, view)
        return start, start + image.size


def _memory_map(memory: GuestMemory) -> bytes:
    entries = [(0, _LOW_END, _RAM), (_LOW_END, _LEGACY_END, _RESERVED)]
    for region in memory.regions:
        begin, end = max(region.gpa, _LEGACY_END), region.gpa + region.size
        if begin < end:
            entries.append((begin, end, _RAM))
    return b"".join(struct.pack("<IQQI", 20, begin, end - begin, kind) for begin, end, kind in entries)
