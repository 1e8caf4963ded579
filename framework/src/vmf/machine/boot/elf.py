"""ELF64 program headers, and loading them into guest RAM.

Only the ELF header and the program headers matter to a loader (System V ABI, ELF-64 object file format), and the
kernel inside a bzImage arrives as a stream whose end the section headers are: this is why a general ELF library,
which wants to seek to the section headers first, is not used here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from attrs import frozen

from vmf.errors import ImageError
from vmf.memory.guest import GuestMemory

ELF_MAGIC = b"\x7fELF"
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_HEADER_32 = struct.Struct("<16sHHIIIIIHHHHHH")
_PROGRAM_HEADER_32 = struct.Struct("<IIIIIIII")
MAX_PROGRAM_HEADERS = 512
MAX_HEAD = _HEADER.size + MAX_PROGRAM_HEADERS * _PROGRAM_HEADER.size
"""Program headers must lie within this many bytes from the start (linkers put them after the ELF header)."""

_PT_LOAD = 1
_PT_INTERP = 3
_ET_EXEC = 2
_EM_386 = 3
_EM_X86_64 = 62
_OSABI_GNU = 3
_MACHINES = {3: "32-bit x86", 8: "MIPS", 20: "PowerPC", 21: "PowerPC64", 22: "S390", 40: "ARM", 183: "ARM64",
             243: "RISC-V", 247: "eBPF", 258: "LoongArch"}  # fmt: skip
_TYPES = {1: "an object file or kernel module", 3: "a shared object or relocatable program", 4: "a core dump"}

_REMEDY = "Use an x86-64 Linux kernel (bzImage or vmlinux), or a bare-metal image linked at a fixed address."


@frozen
class ElfSegment:
    """One PT_LOAD: file [offset, offset+file_size) goes to gpa `paddr`; the rest up to `memory_size` is zero."""

    offset: int
    vaddr: int
    paddr: int
    file_size: int
    memory_size: int


@frozen
class ElfImage:
    """What to load. `segments` holds at least one segment with content, in the order of the file's headers."""

    entry: int
    segments: tuple[ElfSegment, ...]

    @property
    def file_end(self) -> int:
        """The file must have at least this many bytes."""
        return max(segment.offset + segment.file_size for segment in self.segments)

    @property
    def start(self) -> int:
        return min(segment.paddr for segment in self.segments)

    @property
    def end(self) -> int:
        return max(segment.paddr + segment.memory_size for segment in self.segments)


def head_size(data: bytes | bytearray) -> int:
    """How many bytes from the start hold all headers, as far as `data` can tell (at least the ELF header's own)."""
    if len(data) < _HEADER.size:
        return _HEADER.size
    fields: tuple[int, ...] = _HEADER.unpack_from(data)[1:]
    return min(MAX_HEAD, max(_HEADER.size, fields[4] + fields[9] * _PROGRAM_HEADER.size))


def parse_elf(head: bytes | bytearray, what: str, bits: int = 64) -> ElfImage:
    """Parse the headers in `head` (the first bytes of the file) of an ELF file of 64 or 32 bits.

    Raises ImageError naming `what`.
    """
    header, program_header, elf_class, expected = (
        (_HEADER, _PROGRAM_HEADER, 2, _EM_X86_64) if bits == 64 else (_HEADER_32, _PROGRAM_HEADER_32, 1, _EM_386)
    )

    def wrong(why: str, remedy: str = _REMEDY) -> ImageError:
        return ImageError(f"{what} {why}.", remedy)

    if head[:4] != ELF_MAGIC:
        raise wrong("holds no ELF image")
    if len(head) >= 6 and head[4] != elf_class:
        narrow = "is a 32-bit ELF image without a multiboot header"
        raise wrong(narrow if head[4] == 1 else f"has an unknown ELF class {head[4]}")
    if len(head) >= 6 and head[5] != 1:
        raise wrong("is a big-endian ELF image")
    if len(head) < header.size:
        raise wrong(f"is truncated: {len(head)} bytes are less than an ELF header", "Copy or install it again.")
    ident, kind, machine, _, entry, phoff, _, _, _, phentsize, phnum, *_ = header.unpack_from(head)
    if machine != expected:
        raise wrong(f"is for {_MACHINES.get(machine, f'machine type {machine}')}, not x86-64")
    if kind != _ET_EXEC:
        raise wrong(f"is {_TYPES.get(kind, f'an ELF file of unknown type {kind}')}, not a kernel")
    if ident[7] == _OSABI_GNU:
        raise wrong("is a program for Linux, not a kernel")
    if phentsize != program_header.size or not 0 < phnum <= MAX_PROGRAM_HEADERS:
        raise wrong(f"has {phnum} program headers of {phentsize} bytes, which no loader can use")
    if phoff + phnum * phentsize > MAX_HEAD:
        raise wrong(f"has its program headers at {phoff:#x}, not at the start of the file")
    if len(head) < phoff + phnum * phentsize:
        raise wrong("is truncated within its program headers", "Copy or install it again.")
    segments = []
    for index in range(phnum):
        fields = program_header.unpack_from(head, phoff + index * phentsize)
        kind_, offset, vaddr, paddr, file_size, memory_size = (fields[0], *fields[2:7]) if bits == 64 else fields[:6]
        if kind_ == _PT_INTERP:
            raise wrong("is a program for an operating system, not a kernel")
        if kind_ != _PT_LOAD or not memory_size:
            continue
        if file_size > memory_size:
            raise wrong(f"is damaged: segment {index} has more bytes in the file than in memory", "Install it again.")
        segments.append(ElfSegment(offset, vaddr, paddr, file_size, memory_size))
    if not any(segment.file_size for segment in segments):
        raise wrong("has nothing to load")
    image = ElfImage(entry, tuple(segments))
    if not any(segment.paddr <= entry < segment.paddr + segment.file_size for segment in segments):
        raise wrong(f"has its entry point {entry:#x} outside of what it loads")
    return image


def check_fits(image: ElfImage, memory: GuestMemory, lowest: int, what: str) -> None:
    """Raise ImageError unless every segment lies in one region of RAM, from `lowest` up."""
    for segment in image.segments:
        begin, end = segment.paddr, segment.paddr + segment.memory_size
        if begin < lowest:
            raise ImageError(
                f"{what} wants to be loaded at {begin:#x}; below {lowest:#x} is the loader's.",
                f"Link it at {lowest:#x} or above.",
            )
        if not any(region.gpa <= begin and end <= region.gpa + region.size for region in memory.regions):
            mib = -(-end // (1 << 20))
            raise ImageError(
                f"{what} needs RAM from {begin:#x} to {end:#x}; the machine has {memory.size >> 20} MiB.",
                f"Give it at least {mib} MiB with `vmf modifyvm NAME --memory {mib}`."
                if end <= memory.regions[0].size or mib < 3584
                else "Link it below the MMIO hole at 3584 MiB.",
            )


def load_stream(chunks: Iterator[memoryview], memory: GuestMemory, lowest: int, what: str) -> ElfImage:
    """Load an ELF image that arrives piece by piece; each piece is copied once, straight into RAM.

    Raises ImageError when it is no ELF image, does not fit, or ends too early; RAM may hold a part of it then.
    """
    head = bytearray()
    for chunk in chunks:
        head += chunk
        if len(head) >= head_size(head):
            break
    image = parse_elf(head, what)
    check_fits(image, memory, lowest, what)
    position = 0

    def place(chunk: memoryview) -> None:
        end = position + len(chunk)
        for segment in image.segments:
            begin_at, end_at = max(position, segment.offset), min(end, segment.offset + segment.file_size)
            if begin_at < end_at:
                gpa = segment.paddr + begin_at - segment.offset
                memory.write(gpa, chunk[begin_at - position : end_at - position])

    place(memoryview(head))
    position = len(head)
    for chunk in chunks:
        place(chunk)
        position += len(chunk)
    if position < image.file_end:
        raise ImageError(
            f"{what} is truncated: it ends at {position} bytes, its headers speak of {image.file_end}.",
            "Copy or install it again.",
        )
    return image
