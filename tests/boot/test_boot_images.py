"""What is not a guest is refused with one clear error, and damage never does anything else."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmf.cpu.state import VcpuState
from vmf.errors import ConfigError, ImageError, VmfError
from vmf.machine.boot import ImageKind, identify, load_guest, load_image, load_linux
from vmf.memory.guest import MIB, GuestMemory

TSC_KHZ = 1_000_000


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    ram = GuestMemory(32 * MIB)
    yield ram
    ram.close()


def write(folder: Path, data: bytes) -> Path:
    path = folder / "image"
    path.write_bytes(data)
    return path


def test_a_flat_image(memory: GuestMemory, tmp_path: Path) -> None:
    code = b"\xfa\xf4\xeb\xfd" + os.urandom(100)
    path = write(tmp_path, code)
    assert identify(path) is ImageKind.FLAT
    state = load_image(memory, path, TSC_KHZ)
    assert memory.read(MIB, len(code)) == code
    assert state.rip == MIB
    assert state.registers["rdi"] == state.registers["rsi"] == 32 * MIB
    assert state.registers["rdx"] == TSC_KHZ
    assert state.registers["rsp"] % 16 == 8
    assert state.cr4 & 0x600 == 0x600


def test_a_bare_metal_elf(memory: GuestMemory, images: Any, tmp_path: Path) -> None:
    text = os.urandom(10_000)
    path = write(tmp_path, images.elf(text, paddr=0x40_0000, entry=0x40_0010, memory_size=20_000))
    assert identify(path) is ImageKind.ELF
    state = load_guest(memory, path, None, None, TSC_KHZ)
    assert state.rip == 0x40_0010
    assert memory.read(0x40_0000, len(text)) == text


def test_kinds(images: Any, tmp_path: Path) -> None:
    assert identify(write(tmp_path, images.vmlinux())) is ImageKind.VMLINUX
    assert identify(write(tmp_path, images.bzimage(b"x" * 100))) is ImageKind.BZIMAGE


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"#!/bin/sh\necho hello\n", "text file"),
        (b"\x1f\x8b\x08" + bytes(100), "gzip"),
        (b"07070100" + bytes(100), "cpio"),
        (b"QFI\xfb" + bytes(600), "qcow2"),
        (b"MZ" + bytes(100), "truncated"),
        (b"MZ" + bytes(2000), "EFI program"),
        (bytes(0x38) + b"ARM\x64" + bytes(100), "ARM64"),
        (b"\xeb\x3c" + bytes(508) + b"\x55\xaa" + bytes(100), "boot sector or disk image"),
        (bytes(10_000), "zero"),
        (b"\x7fELF\x01\x01" + bytes(100), "32-bit"),
        (b"\x7fELF\x02\x01", "truncated"),
    ],
)
def test_what_is_no_guest(memory: GuestMemory, tmp_path: Path, data: bytes, words: str) -> None:
    path = write(tmp_path, data)
    for load in (
        lambda: identify(path),
        lambda: load_image(memory, path, TSC_KHZ),
        lambda: load_linux(memory, path, None, "", TSC_KHZ),
        lambda: load_guest(memory, path, None, None, TSC_KHZ),
    ):
        with pytest.raises(ImageError, match=words) as error:
            load()
        assert str(path) in error.value.message
        assert error.value.remedy


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"machine": 183}, "ARM64"),
        ({"machine": 3}, "32-bit x86"),
        ({"kind": 1}, "object file"),
        ({"kind": 3}, "relocatable"),
        ({"elf_class": 1}, "32-bit"),
        ({"entry": 0x50_0000}, "entry point 0x500000 outside"),
        ({"paddr": 0x8_0000}, "below 0x100000 is the loader's"),
        ({"paddr": 31 * MIB, "memory_size": 2 * MIB}, "needs RAM from .* has 32 MiB"),
        ({"paddr": 0xE000_0000}, "needs RAM"),
        ({"memory_size": 10}, "damaged"),
    ],
)
def test_wrong_elf_images(memory: GuestMemory, images: Any, tmp_path: Path, changes: Any, words: str) -> None:
    path = write(tmp_path, images.elf(b"\xf4" * 100, **changes))
    with pytest.raises(ImageError, match=words) as error:
        load_image(memory, path, TSC_KHZ)
    assert error.value.remedy


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loadflags": 0}, "zImage"),
        ({"version": 0x0209}, "2.09, which has no 64-bit entry"),
        ({"xloadflags": 0}, "32-bit kernel"),
    ],
)
def test_wrong_kernels(memory: GuestMemory, images: Any, tmp_path: Path, changes: Any, words: str) -> None:
    path = write(tmp_path, images.bzimage(images.compressors["lz4"](images.vmlinux()), **changes))
    with pytest.raises(ImageError, match=words):
        load_linux(memory, path, None, "", TSC_KHZ)


@pytest.mark.parametrize("name", ["lz4", "gzip", "xz", "zstd", "bzip2", "lzma"])
def test_a_decompression_bomb_is_refused_before_it_grows(
    memory: GuestMemory, images: Any, tmp_path: Path, name: str
) -> None:
    bomb = images.compressors[name](bytes(64 * MIB))
    path = write(tmp_path, images.bzimage(bomb))
    with pytest.raises(ImageError, match="unpacks to 67108864 bytes"):
        load_linux(memory, path, None, "", TSC_KHZ)
    lying = bomb[:-4] + struct.pack("<I", 3 * MIB)
    path.write_bytes(images.bzimage(lying))
    with pytest.raises(ImageError):
        load_linux(memory, path, None, "", TSC_KHZ)


def test_a_kernel_too_large_says_how_much_memory_it_needs(images: Any, tmp_path: Path) -> None:
    small = GuestMemory(16 * MIB)
    try:
        path = write(tmp_path, images.bzimage(images.compressors["lz4"](images.vmlinux())))
        with pytest.raises(ImageError, match="--memory 20"):
            load_linux(small, path, None, "", TSC_KHZ)
    finally:
        small.close()


def test_paths_that_cannot_be_read(memory: GuestMemory, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path, words in (
        (tmp_path, "is a directory"),
        (tmp_path / "missing", "No such file"),
        (fifo, "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path / "a\0b", "cannot be opened"),
        (tmp_path / ("n" * 300), "cannot be opened"),
    ):
        with pytest.raises(ImageError, match=words):
            identify(path)


def test_bare_metal_takes_no_initrd_and_no_command_line(memory: GuestMemory, tmp_path: Path) -> None:
    path = write(tmp_path, b"\xf4\x80" * 100)
    with pytest.raises(ConfigError, match="initrd"):
        load_guest(memory, path, path, None, TSC_KHZ)
    with pytest.raises(ConfigError, match="cmdline"):
        load_guest(memory, path, None, "quiet", TSC_KHZ)
    with pytest.raises(ImageError, match="not a Linux kernel"):
        load_linux(memory, path, None, "", TSC_KHZ)


def outcome_of(memory: GuestMemory, path: Path) -> VcpuState | ImageError | ConfigError:
    """What loading gives; any other exception fails the test."""
    try:
        return load_guest(memory, path, None, None, TSC_KHZ)
    except (ImageError, ConfigError) as error:
        return error


@pytest.fixture(scope="module")
def small(images: Any) -> dict[str, bytes]:
    """Small valid images of each kind."""
    vmlinux = images.vmlinux(20_000)
    made = {name: images.bzimage(compress(vmlinux)) for name, compress in images.compressors.items()}
    return {**made, "vmlinux": vmlinux, "elf": images.elf(b"\xf4" * 500, paddr=0x20_0000)}


@settings(max_examples=600, deadline=None)
@given(data=st.data())
def test_any_damage_gives_success_or_one_image_error(
    memory: GuestMemory, small: dict[str, bytes], tmp_path_factory: Any, data: Any
) -> None:
    image = bytearray(small[data.draw(st.sampled_from(sorted(small)))])
    # Half of the damage goes to the headers, where it matters most.
    where = st.one_of(st.integers(0, min(0x1000, len(image)) - 1), st.integers(0, len(image) - 1))
    for _ in range(data.draw(st.integers(0, 3))):
        image[data.draw(where)] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        del image[data.draw(where) :]
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(image)
    outcome = outcome_of(memory, path)
    if isinstance(outcome, ConfigError):  # a header that says the command line must be tiny
        assert "cmdline" in outcome.message
    elif isinstance(outcome, ImageError):
        assert outcome.message
        assert outcome.remedy
    else:
        memory.offset_of(outcome.rip)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=3000))
def test_any_bytes_are_identified_or_refused(memory: GuestMemory, tmp_path_factory: Any, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random"
    path.write_bytes(data)
    outcome = outcome_of(memory, path)
    assert not isinstance(outcome, VmfError) or outcome.remedy
