"""Multiboot images, and bzImages that are entered as they are."""

from __future__ import annotations

import struct
from contextlib import closing
from pathlib import Path

import pytest

from vmf.cpu.state import AR_DB, AR_LONG
from vmf.errors import ConfigError, ImageError
from vmf.machine.boot import ImageKind, identify, load_guest, load_image
from vmf.memory.guest import GuestMemory

MIB = 1 << 20
LOAD_AT = 0x40_0000


def multiboot_elf(text: bytes = b"\xf4" * 64, *, flags: int = 0, checksum: int | None = None, load_at: int = LOAD_AT,
                  machine: int = 3, memory_size: int | None = None) -> bytes:  # fmt: skip
    """An ELF32 file with one PT_LOAD at file offset 0x1000 that begins with the multiboot header; entered behind it."""
    ident = b"\x7fELF" + bytes([1, 1, 1, 0]) + bytes(8)
    header = struct.pack(
        "<III", 0x1BADB002, flags, -(0x1BADB002 + flags) & 0xFFFF_FFFF if checksum is None else checksum
    )
    body = header + bytes(4) + text
    elf = ident + struct.pack("<HHIIIIIHHHHHH", 2, machine, 1, load_at + 16, 52, 0, 0, 52, 32, 1, 40, 0, 0)
    size = len(body) if memory_size is None else memory_size
    elf += struct.pack("<8I", 1, 0x1000, load_at, load_at, len(body), size, 7, 0x1000)
    return elf.ljust(0x1000, b"\0") + body


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "guest.elf"
    path.write_bytes(multiboot_elf())
    return path


def text_at(memory: GuestMemory, gpa: int) -> str:
    return memory.read(gpa, 300).split(b"\0")[0].decode()


def test_multiboot_entry_and_information(image: Path, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"content" * 1000)
    assert identify(image) is ImageKind.MULTIBOOT
    with closing(GuestMemory(64 * MIB)) as memory:
        state = load_guest(memory, image, initrd, "one two=3", 1_000_000)
        assert (state.rip, state.registers["rax"], state.rflags) == (LOAD_AT + 16, 0x2BADB002, 2)
        assert (state.cr0, state.cr3, state.cr4, state.efer) == (0x11, 0, 0, 0)
        cs = state.segments["cs"]
        assert (cs.base, cs.limit, bool(cs.access & AR_DB), bool(cs.access & AR_LONG)) == (0, 0xFFFF_FFFF, True, False)
        assert all((state.segments[name].base, state.segments[name].limit) == (0, 0xFFFF_FFFF) for name in ("ds", "ss"))
        info = struct.unpack("<30I", memory.read(state.registers["rbx"], 120))
        assert info[0] == 0x24D
        assert info[1:3] == (640, 63 * 1024)
        assert text_at(memory, info[4]) == f"{image} one two=3"
        start, end, name, _ = struct.unpack("<4I", memory.read(info[6], 16))
        assert info[5] == 1
        assert start % 4096 == 0
        assert memory.read(start, end - start) == initrd.read_bytes()
        assert text_at(memory, name) == str(initrd)
        table, entries = memory.read(info[12], info[11]), []
        while table:
            size, base, length, kind = struct.unpack_from("<IQQI", table)
            entries.append((base, length, kind))
            table = table[size + 4 :]
        assert entries == [(0, 0xA0000, 1), (0xA0000, 0x60000, 2), (MIB, 63 * MIB, 1)]
        assert text_at(memory, info[16]) == "vmf"
        assert memory.read(LOAD_AT + 16, 64) == b"\xf4" * 64


def test_multiboot_as_an_image_and_without_anything(image: Path) -> None:
    with closing(GuestMemory(64 * MIB)) as memory:
        state = load_image(memory, image, 1_000_000)
        info = struct.unpack("<30I", memory.read(state.registers["rbx"], 120))
        assert info[0] == 0x245
        assert text_at(memory, info[4]) == str(image)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (multiboot_elf(checksum=1), "32-bit ELF image without a multiboot header"),
        (multiboot_elf(flags=4), "video mode"),
        (multiboot_elf(flags=0x100), "not known here"),
        (multiboot_elf(machine=62), "not x86-64"),
        (multiboot_elf(load_at=0x8000), "below 0x100000 is the loader's"),
        (multiboot_elf(memory_size=80 * MIB), "needs RAM"),
        (multiboot_elf()[:0x1008], "without a multiboot header"),
        (multiboot_elf()[:-8], "truncated"),
        (multiboot_elf()[:60], "32-bit"),
    ],
)
def test_wrong_multiboot_images_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "wrong.elf"
    path.write_bytes(content)
    with closing(GuestMemory(64 * MIB)) as memory, pytest.raises(ImageError, match=words):
        load_guest(memory, path, None, None, 1_000_000)


def test_wrong_company_is_refused(image: Path, tmp_path: Path) -> None:
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(61 * MIB)
    with closing(GuestMemory(64 * MIB)) as memory:
        with pytest.raises(ImageError, match="does not fit"):
            load_guest(memory, image, big, None, 1_000_000)
        with pytest.raises(ConfigError, match="NUL or newline"):
            load_guest(memory, image, None, "two\nlines", 1_000_000)


def bzimage_as_it_is(code: bytes, *, address: int = MIB, init_size: int = 0x10000, payload: bytes = b"") -> bytes:
    """A bzImage whose protected-mode part is `code`, at its 64-bit entry."""
    head = bytearray(3 * 512)
    head[0x1F1], head[0x1FE:0x200], head[0x200:0x206] = 2, b"\x55\xaa", b"\xeb\x6aHdrS"
    struct.pack_into("<H", head, 0x206, 0x20F)
    head[0x211] = 1
    struct.pack_into("<I", head, 0x22C, 0x7FFF_FFFF)
    struct.pack_into("<HI", head, 0x236, 1, 255)
    struct.pack_into("<QI", head, 0x258, address, init_size)
    struct.pack_into("<II", head, 0x248, 0x100 if payload else 0, len(payload))
    return bytes(head) + (bytes(0x100) + payload).ljust(0x200, b"\0") + code


@pytest.mark.parametrize("payload", [b"", b"\x89LZO" + bytes(40), b"packed in a new way" + bytes(40)])
def test_a_bzimage_without_a_payload_that_is_known_is_entered_itself(tmp_path: Path, payload: bytes) -> None:
    path, initrd = tmp_path / "memtest", tmp_path / "initrd"
    path.write_bytes(bzimage_as_it_is(b"\xf4" * 100, payload=payload, address=2 * MIB))
    initrd.write_bytes(b"x" * 5000)
    with closing(GuestMemory(16 * MIB)) as memory:
        state = load_guest(memory, path, initrd, "console=ttyS0", 1_000_000)
        assert state.rip == 2 * MIB + 0x200
        assert memory.read(state.rip, 100) == b"\xf4" * 100
        params = memory.read(state.registers["rsi"], 4096)
        assert struct.unpack_from("<I", params, 0x214) == (2 * MIB,)
        assert text_at(memory, struct.unpack_from("<I", params, 0x228)[0]).endswith("console=ttyS0")
        assert struct.unpack_from("<I", params, 0x21C) == (5000,)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (bzimage_as_it_is(b"", init_size=0)[:-0x100], "16-bit code"),
        (bzimage_as_it_is(b"\xf4" * 8, address=0x8000), "below 0x100000 is the loader's"),
        (bzimage_as_it_is(b"\xf4" * 8, init_size=16 * MIB), "needs RAM up to"),
    ],
)
def test_wrong_bzimages_without_a_payload_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "wrong"
    path.write_bytes(content)
    with closing(GuestMemory(16 * MIB)) as memory, pytest.raises(ImageError, match=words):
        load_guest(memory, path, None, None, 1_000_000)
