"""Loading Linux by the boot protocol."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vmf.errors import ConfigError, ImageError
from vmf.machine.boot import default_cmdline, load_guest, load_linux, with_clock
from vmf.memory.guest import HIGH_RAM_BASE, LOW_RAM_LIMIT, MIB, GuestMemory

FORMATS = ["lz4", "gzip", "xz", "zstd", "bzip2", "lzma", "plain"]
TSC_KHZ = 2_000_000


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    ram = GuestMemory(64 * MIB)
    yield ram
    ram.close()


@pytest.fixture(scope="module")
def kernels(images: Any, tmp_path_factory: Any) -> dict[str, Path]:
    """The same kernel in every format, and as it is ("vmlinux")."""
    folder = tmp_path_factory.mktemp("kernels")
    vmlinux = images.vmlinux()
    paths = {"vmlinux": folder / "vmlinux"}
    paths["vmlinux"].write_bytes(vmlinux)
    for name in FORMATS:
        paths[name] = folder / name
        paths[name].write_bytes(images.bzimage(images.compressors[name](vmlinux)))
    return paths


def boot_params(memory: GuestMemory, state: Any) -> bytes:
    return memory.read(state.registers["rsi"], 4096)


@pytest.mark.parametrize("name", [*FORMATS, "vmlinux"])
def test_every_format_gives_the_same_ram_and_entry(
    memory: GuestMemory, kernels: dict[str, Path], images: Any, name: str
) -> None:
    state = load_linux(memory, kernels[name], None, "console=ttyS0", TSC_KHZ)
    text = images.vmlinux()[0x1000 : 0x1000 + (3 << 20) - 1000]
    assert memory.read(images.load_at, len(text)) == text
    assert state.rip == images.load_at
    assert (state.tsc, state.tsc_khz) == (0, TSC_KHZ)


def test_the_vcpu_stands_as_the_protocol_asks(memory: GuestMemory, kernels: dict[str, Path]) -> None:
    state = load_linux(memory, kernels["lz4"], None, "", TSC_KHZ)
    assert state.cr0 & 0x8000_0001 == 0x8000_0001
    assert state.cr4 & 0x20
    assert state.efer == 0x500
    assert not state.rflags & 0x200
    assert state.segments["cs"].selector == 0x10
    assert state.segments["cs"].access & 0x2000, "64-bit code"
    assert {state.segments[name].selector for name in ("ds", "es", "ss")} == {0x18}
    # The descriptors in memory are what the hidden parts say: a guest that reloads them must find the same.
    for name in ("cs", "ds"):
        segment = state.segments[name]
        low, high = struct.unpack("<II", memory.read(state.gdtr.base + segment.selector, 8))
        assert high >> 8 & 0xF0FF == segment.access
        assert (low & 0xFFFF, low >> 16, high & 0xFF0000FF) == (0xFFFF, 0, 0)


@pytest.mark.parametrize("gpa", [0, 0x1000, 0x100_0000, 0x3FFF_F000, 0xE000_0000, 0xFFFF_F123])
def test_the_first_4_gib_are_mapped_one_to_one(memory: GuestMemory, kernels: dict[str, Path], gpa: int) -> None:
    state = load_linux(memory, kernels["vmlinux"], None, "", TSC_KHZ)

    def entry(table: int, index: int) -> int:
        value = int(struct.unpack("<Q", memory.read(table + 8 * index, 8))[0])
        assert value & 3 == 3
        return value

    pdpt = entry(state.cr3, gpa >> 39) & ~0xFFF
    directory = entry(pdpt, gpa >> 30 & 511) & ~0xFFF
    page = entry(directory, gpa >> 21 & 511)
    assert page & 0x80
    assert page & ~0xFFF | gpa & 0x1F_FFFF == gpa


def test_boot_params(memory: GuestMemory, kernels: dict[str, Path], tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"initrd!" * 1000)
    state = load_linux(memory, kernels["gzip"], initrd, "a=b c", TSC_KHZ)
    params = boot_params(memory, state)
    assert params[0x202:0x206] == b"HdrS"
    assert params[0x210] == 0xFF
    assert params[0x1EF] == 0, "the sentinel: this zero page was cleared"
    (cmdline,) = struct.unpack_from("<I", params, 0x228)
    assert memory.read(cmdline, 6) == b"a=b c\0"
    start, size = struct.unpack_from("<II", params, 0x218)
    assert size == 7000
    assert start % 4096 == 0
    assert start + 7000 <= memory.size < start + 7000 + 4096, "as high as possible"
    assert memory.read(start, size) == initrd.read_bytes()


def test_initrd_stays_below_what_the_kernel_allows(memory: GuestMemory, images: Any, tmp_path: Path) -> None:
    kernel, initrd = tmp_path / "k", tmp_path / "i"
    kernel.write_bytes(images.bzimage(images.compressors["lz4"](images.vmlinux()), initrd_max=0x1FF_FFFF))
    initrd.write_bytes(b"x" * 5000)
    state = load_linux(memory, kernel, initrd, "", TSC_KHZ)
    start, _ = struct.unpack_from("<II", boot_params(memory, state), 0x218)
    assert start == 0x200_0000 - 8192
    initrd.write_bytes(b"x" * (16 * MIB))
    with pytest.raises(ImageError, match=r"initrd .* does not fit"):
        load_linux(memory, kernel, initrd, "", TSC_KHZ)


@pytest.mark.parametrize("mib", [64, 3584, 3585, 8192])
def test_the_memory_map_lists_ram_and_only_ram(kernels: dict[str, Path], mib: int) -> None:
    memory = GuestMemory(mib * MIB)
    try:
        params = boot_params(memory, load_linux(memory, kernels["lz4"], None, "", TSC_KHZ))
    finally:
        memory.close()
    entries = [struct.unpack_from("<QQI", params, 0x2D0 + 20 * index) for index in range(params[0x1E8])]
    assert (0xA0000, 0x60000, 2) in entries
    ram = [(start, size) for start, size, kind in entries if kind == 1]
    assert sum(size for _, size in ram) == mib * MIB - 0x60000
    ends = {start + size for start, size in ram}
    assert ends == {0xA0000, min(mib * MIB, LOW_RAM_LIMIT)} | (
        {HIGH_RAM_BASE + mib * MIB - LOW_RAM_LIMIT} if mib > 3584 else set()
    )


def test_the_command_line_is_limited_by_the_kernel(memory: GuestMemory, images: Any, tmp_path: Path) -> None:
    kernel = tmp_path / "k"
    kernel.write_bytes(images.bzimage(images.compressors["lz4"](images.vmlinux()), cmdline_size=300))
    load_linux(memory, kernel, None, "x" * 300, TSC_KHZ)
    with pytest.raises(ConfigError, match="cmdline: 301 bytes are more than the 300"):
        load_linux(memory, kernel, None, "x" * 301, TSC_KHZ)
    with pytest.raises(ConfigError, match="cmdline"):
        load_linux(memory, kernel, None, "a\0b", TSC_KHZ)


def test_load_guest_takes_the_default_command_line(memory: GuestMemory, kernels: dict[str, Path]) -> None:
    load_guest(memory, kernels["lz4"], None, None, TSC_KHZ)
    assert memory.read(0x20000, len(default_cmdline()) + 1) == default_cmdline().encode() + b"\0"


@pytest.mark.parametrize(
    ("given", "got"),
    [
        ("console=ttyS0", "tsc=reliable tsc_early_khz=2000000 console=ttyS0"),
        ("", "tsc=reliable tsc_early_khz=2000000"),
        ("a tsc=unstable b", "tsc_early_khz=2000000 a tsc=unstable b"),
        ("tsc-early-khz=1 tsc=recalibrate", "tsc-early-khz=1 tsc=recalibrate"),
        ("single -- tsc=mine", "tsc=reliable tsc_early_khz=2000000 single -- tsc=mine"),
        ("notsc xtsc=1", "tsc=reliable tsc_early_khz=2000000 notsc xtsc=1"),
    ],
)
def test_linux_is_told_of_its_clock_whatever_the_command_line(given: str, got: str) -> None:
    assert with_clock(given, TSC_KHZ) == got
    assert with_clock(got, TSC_KHZ) == got


def test_linux_on_intel_asks_the_cpu_for_the_rate(memory: GuestMemory, kernels: dict[str, Path]) -> None:
    load_guest(memory, kernels["lz4"], None, "console=ttyS0", TSC_KHZ)
    assert memory.read(0x20000, 27) == b"tsc=reliable console=ttyS0\0"
    load_guest(memory, kernels["lz4"], None, "console=ttyS0", TSC_KHZ, tell_tsc=True)
    expected = f"tsc=reliable tsc_early_khz={TSC_KHZ} console=ttyS0\0".encode()
    assert memory.read(0x20000, len(expected)) == expected


def test_only_what_was_loaded_costs_memory(memory: GuestMemory, kernels: dict[str, Path]) -> None:
    load_linux(memory, kernels["lz4"], None, "", TSC_KHZ)
    pages = sum(int(end - start) for start, end in memory.touched_ranges())
    assert pages * 4096 <= 8 << 20  # in huge pages, of 64 MiB
