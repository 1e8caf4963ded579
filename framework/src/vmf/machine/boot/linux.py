"""Linux by the 64-bit boot protocol of x86 (Documentation/arch/x86/boot.rst and zero-page.rst in the kernel).

The kernel is unpacked on the host and entered at the ELF entry point of vmlinux (startup_64), at the address it was
linked for: the decompressor inside the bzImage does not run, and with it neither relocation nor KASLR. Only a bzImage
without a packed kernel, or with one packed in a way that is not known here, is entered itself. What the
protocol asks for is what `longmode` sets up: 64-bit mode, identity-mapped, CS = 0x10, DS = ES = SS = 0x18,
interrupts off, RSI = boot_params.

Nothing tells this machine's devices through firmware tables: there is no ACPI, no MP table, no EFI.
"""

from __future__ import annotations

import struct
from pathlib import Path

from attrs import frozen

from vmf.cpu.state import VcpuState
from vmf.errors import ConfigError, ImageError
from vmf.machine.boot.elf import ElfImage, check_fits, load_stream, parse_elf
from vmf.machine.boot.image import ImageFile, ImageKind, kind_of, open_image, u32
from vmf.machine.boot.longmode import (
    BOOT_PARAMS_GPA,
    CMDLINE_GPA,
    CR4_PAE,
    LOADER_END,
    initial_state,
    low_ram_end,
    write_environment,
)
from vmf.machine.boot.payload import can_unpack, unpack
from vmf.memory.guest import PAGE_SIZE, GuestMemory

# Offsets in the setup header and, equally, in boot_params (boot.rst "The Real-Mode Kernel Header").
SETUP_HEADER = 0x1F1
SETUP_SECTS = 0x1F1
BOOT_FLAG = 0x1FE
JUMP = 0x200
HEADER_MAGIC = 0x202
PROTOCOL_VERSION = 0x206
TYPE_OF_LOADER = 0x210
LOADFLAGS = 0x211
RAMDISK_IMAGE = 0x218
RAMDISK_SIZE = 0x21C
CODE32_START = 0x214
CMD_LINE_PTR = 0x228
INITRD_ADDR_MAX = 0x22C
XLOADFLAGS = 0x236
CMDLINE_SIZE = 0x238
PAYLOAD_OFFSET = 0x248
PAYLOAD_LENGTH = 0x24C
PREF_ADDRESS = 0x258
INIT_SIZE = 0x260
ENTRY_64 = 0x200
"""The 64-bit entry point, from where the protected-mode part was loaded."""
# Offsets in boot_params only (zero-page.rst).
ALT_MEM_K = 0x1E0
E820_ENTRIES = 0x1E8
E820_TABLE = 0x2D0

LOADED_HIGH = 1 << 0
XLF_KERNEL_64 = 1 << 0
LOADER_UNDEFINED = 0xFF
E820_RAM = 1
E820_RESERVED = 2
LEGACY_HOLE_START = 0xA0000
LEGACY_HOLE_END = 0x10_0000

_MIN_PROTOCOL = 0x020C  # 2.12, Linux 3.8: the first with xloadflags, so the first that can say "64-bit entry"
_MAX_CMDLINE = 0x7_0000  # what lies between CMDLINE_GPA and the stack, generously below it
_DEFAULT_CMDLINE_SIZE = 2047  # COMMAND_LINE_SIZE - 1 on x86
_DEFAULT_INITRD_MAX = 0x7FFF_FFFF


@frozen
class _Kernel:
    """A kernel in RAM, to be entered at `entry`; up to `end` the RAM is its own. `header` is its setup header, bytes
    0x1F1 and up."""

    entry: int
    end: int
    header: bytes
    cmdline_size: int
    initrd_max: int


def default_cmdline() -> str:
    """The command line of machines whose user gave none.

    A user's own command line replaces this one as a whole, as with QEMU's `-append`. The parts: the serial console; the
    clock as of `with_clock`; no mitigations, which cost much in an interpreter-like engine and protect nothing there;
    no self-tests of the crypto modules (a second of boot time).
    """
    return "console=ttyS0 tsc=reliable mitigations=off cryptomgr.notests"


def with_clock(cmdline: str, tsc_khz: int = 0) -> str:
    """`cmdline` with what Linux needs for right time in front of it, unless it has settings of its own for that.

    `tsc=reliable`: the TSC is the clock without being checked against the 8254's interrupts, which come late on a busy
    host; the machine keeps the TSC's rate, also across teleports. `tsc_early_khz=`, if a rate is given: Linux believes
    CPUID leaf 0x15 of an Intel CPU only. On others it measures the TSC with the 8254; a virtual one takes too long to
    read for that, and Linux would count interrupts instead. In front, as what follows `--` is for the init program.
    """
    words = cmdline.split()
    own = words[: words.index("--")] if "--" in words else words
    named = {word.strip('"').partition("=")[0].replace("-", "_") for word in own}
    wanted = {"tsc": "reliable"} | ({"tsc_early_khz": str(tsc_khz)} if tsc_khz else {})
    return " ".join([*(f"{name}={value}" for name, value in wanted.items() if name not in named), cmdline]).strip()


def load_linux(memory: GuestMemory, kernel: Path, initrd: Path | None, cmdline: str, tsc_khz: int) -> VcpuState:
    """Load a Linux kernel (bzImage or ELF vmlinux) into zeroed RAM.

    Args:
        initrd: initial RAM disk, placed as high as the kernel allows; or None.
        cmdline: exactly what the guest gets.
        tsc_khz: rate of the guest's TSC, for the state.

    Returns:
        The vCPU at the kernel's 64-bit entry point.

    Raises:
        ImageError: the kernel or the initrd is missing, damaged, of a wrong kind or too large.
        ConfigError: the command line is too long for this kernel or holds what no command line can.
    """
    write_environment(memory)
    with open_image("kernel", kernel) as image:
        kind = kind_of(image)
        if kind is ImageKind.BZIMAGE:
            loaded = _load_bzimage(memory, image)
        elif kind is ImageKind.VMLINUX:
            loaded = _load_vmlinux(memory, image)
        else:
            raise image.wrong(f"is a {kind.value}, not a Linux kernel")
    params = bytearray(PAGE_SIZE)
    params[SETUP_HEADER : SETUP_HEADER + len(loaded.header)] = loaded.header
    params[TYPE_OF_LOADER] = LOADER_UNDEFINED
    _put_cmdline(memory, params, cmdline, loaded)
    if initrd is not None:
        _put_initrd(memory, params, initrd, loaded)
    _put_memory_map(memory, params)
    memory.write(BOOT_PARAMS_GPA, params)
    return initial_state(loaded.entry, {"rsi": BOOT_PARAMS_GPA}, CR4_PAE, tsc_khz)


def _load_bzimage(memory: GuestMemory, image: ImageFile) -> _Kernel:
    head = image.head
    if len(head) < 0x268:
        raise image.truncated(f"it has only {len(head)} bytes")
    version = int.from_bytes(head[PROTOCOL_VERSION : PROTOCOL_VERSION + 2], "little")
    if not head[LOADFLAGS] & LOADED_HIGH:
        raise image.wrong("is a zImage, which only starts in 16-bit mode")
    if version < _MIN_PROTOCOL:
        raise image.wrong(
            f"speaks boot protocol {version >> 8}.{version & 0xFF:02}, which has no 64-bit entry",
            "Use an x86-64 Linux kernel from 3.8 on.",
        )
    if not head[XLOADFLAGS] & XLF_KERNEL_64:
        raise image.wrong("has no 64-bit entry: it is a 32-bit kernel")
    start = ((head[SETUP_SECTS] or 4) + 1) * 512 + u32(head, PAYLOAD_OFFSET)
    length = u32(head, PAYLOAD_LENGTH)
    if start + length > image.size:
        raise image.truncated(f"it has {image.size} bytes where {start + length} are needed")
    payload = memoryview(image.read(start, length))
    header_end = min(JUMP + 2 + head[JUMP + 1], 0x290)  # the header ends where its first jump goes
    header = bytearray(head[SETUP_HEADER:header_end])
    if can_unpack(payload):
        elf = load_stream(unpack(payload, memory.size, image.what), memory, LOADER_END, image.what)
        entry, end = elf.entry, elf.end
    else:
        entry, end = _place_as_it_is(memory, image, header)
    return _Kernel(entry, end, bytes(header), u32(head, CMDLINE_SIZE) or 255, u32(head, INITRD_ADDR_MAX))


def _place_as_it_is(memory: GuestMemory, image: ImageFile, header: bytearray) -> tuple[int, int]:
    """Put the protected-mode part of a bzImage where it wants to be: what has no packed kernel in it (memtest86+), or
    one that only its own code can unpack. Entry (boot.rst "64-bit BOOT PROTOCOL") and end."""
    head = image.head
    start = ((head[SETUP_SECTS] or 4) + 1) * 512
    size = image.size - start
    address = int.from_bytes(head[PREF_ADDRESS : PREF_ADDRESS + 8], "little") or LOADER_END
    end = address + max(u32(head, INIT_SIZE), size)
    if size <= ENTRY_64:
        raise image.truncated(f"it has {image.size} bytes, of which {start} are 16-bit code")
    if address < LOADER_END:
        raise image.wrong(f"wants to be loaded at {address:#x}; below {LOADER_END:#x} is the loader's")
    if end > low_ram_end(memory):
        mib = -(-end // (1 << 20))
        raise ImageError(
            f"{image.what} needs RAM up to {end:#x}; the machine has {memory.size >> 20} MiB.",
            f"Give it at least {mib} MiB with `vmf modifyvm NAME --memory {mib}`.",
        )
    with memory.view(address, size) as view:
        image.read_into(start, view)
    struct.pack_into("<I", header, CODE32_START - SETUP_HEADER, address)
    return address + ENTRY_64, end


def _load_vmlinux(memory: GuestMemory, image: ImageFile) -> _Kernel:
    elf = load_elf_file(memory, image)
    # A vmlinux has no setup header: this is what its bzImage's would say, as far as the kernel itself reads it.
    header = bytearray(0x268 - SETUP_HEADER)

    def put(layout: str, offset: int, value: int) -> None:
        struct.pack_into(layout, header, offset - SETUP_HEADER, value)

    put("<H", BOOT_FLAG, 0xAA55)
    put("<I", HEADER_MAGIC, int.from_bytes(b"HdrS", "little"))
    put("<H", PROTOCOL_VERSION, 0x020F)
    put("<B", LOADFLAGS, LOADED_HIGH)
    put("<I", INITRD_ADDR_MAX, _DEFAULT_INITRD_MAX)
    put("<H", XLOADFLAGS, XLF_KERNEL_64)
    put("<I", CMDLINE_SIZE, _DEFAULT_CMDLINE_SIZE)
    return _Kernel(elf.entry, elf.end, bytes(header), _DEFAULT_CMDLINE_SIZE, _DEFAULT_INITRD_MAX)


def load_elf_file(memory: GuestMemory, image: ImageFile) -> ElfImage:
    """Load an ELF file: each segment is read by the kernel straight into guest RAM."""
    elf = parse_elf(image.head, image.what)
    check_fits(elf, memory, LOADER_END, image.what)
    if elf.file_end > image.size:
        raise image.truncated(f"it has {image.size} bytes where its headers speak of {elf.file_end}")
    for segment in elf.segments:
        if segment.file_size:
            with memory.view(segment.paddr, segment.file_size) as view:
                image.read_into(segment.offset, view)
    return elf


def _put_cmdline(memory: GuestMemory, params: bytearray, cmdline: str, kernel: _Kernel) -> None:
    data = cmdline.encode("utf-8", "surrogateescape")
    limit = min(kernel.cmdline_size, _MAX_CMDLINE)
    if len(data) > limit:
        raise ConfigError(
            f"cmdline: {len(data)} bytes are more than the {limit} this kernel takes.",
            "Shorten the command line. The bytes include the settings of the TSC that vmf puts in front of it.",
        )
    if b"\0" in data or b"\n" in data:
        raise ConfigError("cmdline: a command line cannot hold NUL or newline.", "Remove it.")
    memory.write(CMDLINE_GPA, data + b"\0")
    struct.pack_into("<I", params, CMD_LINE_PTR, CMDLINE_GPA)


def _put_initrd(memory: GuestMemory, params: bytearray, path: Path, kernel: _Kernel) -> None:
    top = min(low_ram_end(memory), kernel.initrd_max + 1)
    with open_image("initrd", path) as image:
        start = (top - image.size) & ~(PAGE_SIZE - 1)
        if start < kernel.end:
            mib = -(-(kernel.end + image.size + PAGE_SIZE) // (1 << 20))
            raise ImageError(
                f"{image.what} ({image.size} bytes) does not fit between the kernel's end at {kernel.end:#x} and "
                f"{top:#x}.",
                f"Give the machine at least {mib} MiB with `vmf modifyvm NAME --memory {mib}`."
                if top == low_ram_end(memory)
                else "Use a smaller initrd.",
            )
        with memory.view(start, image.size) as view:
            image.read_into(0, view)
        struct.pack_into("<I", params, RAMDISK_IMAGE, start)
        struct.pack_into("<I", params, RAMDISK_SIZE, image.size)


def _put_memory_map(memory: GuestMemory, params: bytearray) -> None:
    """e820: RAM as `memory.regions` say, without the legacy hole. The MMIO hole is simply not listed, so that the
    guest finds room for PCI there."""
    entries: list[tuple[int, int, int]] = [
        (0, LEGACY_HOLE_START, E820_RAM),
        (LEGACY_HOLE_START, LEGACY_HOLE_END, E820_RESERVED),
    ]
    for region in memory.regions:
        begin, end = max(region.gpa, LEGACY_HOLE_END), region.gpa + region.size
        if begin < end:
            entries.append((begin, end, E820_RAM))
    for index, (begin, end, kind) in enumerate(entries):
        struct.pack_into("<QQI", params, E820_TABLE + index * 20, begin, end - begin, kind)
    params[E820_ENTRIES] = len(entries)
    # Kibibytes above 1 MiB for the few places that do not look at e820.
    struct.pack_into("<I", params, ALT_MEM_K, (low_ram_end(memory) - LEGACY_HOLE_END) >> 10)
