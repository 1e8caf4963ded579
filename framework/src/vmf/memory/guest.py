"""Guest RAM: one private anonymous mapping that every backend and device works on directly.

Layout of the PC: RAM from 0 up to `LOW_RAM_LIMIT`, the rest from 4 GiB up; between them the hole for MMIO. In the
mapping the two lie back to back, so *offset* and guest-physical address differ above the hole. Dirty tracking,
teleports and snapshots count in offsets and 4-KiB pages of that flat mapping.

Who may write: the vCPU thread (guest, devices), and the teleport target before the machine runs. Pages that were
never touched do not exist: they cost nothing and `touched_ranges` does not list them. The mapping asks for huge pages,
which make guest memory cheaper to fill and faster to use; the first write to 2 MiB then brings all of them to life.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from attrs import frozen

from vmf.errors import ConfigError, MachineError
from vmf.memory.pagemap import PAGE_SIZE as PAGE_SIZE
from vmf.memory.pagemap import PageMap

MIB = 1 << 20
LOW_RAM_LIMIT = 0xE000_0000
HIGH_RAM_BASE = 0x1_0000_0000
MIN_MEMORY_MIB = 1
MAX_MEMORY_MIB = 4 * 1024 * 1024

HUGE_PAGE_SIZE = 2 * MIB
"""What x86-64 maps by one entry of a page directory."""

_MAP_NORESERVE = 0x4000  # <asm-generic/mman.h>; `mmap` has no name for it before Python 3.13


@frozen
class RamRegion:
    """Guest-physical [gpa, gpa+size) lies at mapping offset [offset, offset+size)."""

    gpa: int
    size: int
    offset: int


class GuestMemory:
    """The machine's RAM.

    Attributes:
        size: bytes.
        buffer: writable view of the whole mapping.
        address: host virtual address of the mapping, a multiple of the huge page size.
        regions: ascending by gpa.
        clear_observers: called after every `clear`, on its thread, with the page ranges that had been touched, and
            once the guest has been loaded anew.
    """

    def __init__(self, size: int, *, huge_pages: bool = True) -> None:
        """Reserve `size` bytes (a multiple of the page size) of zeroed RAM; host memory is used as it is touched.

        Args:
            huge_pages: ask the kernel for them, where it has any to give.
        """
        if size <= 0 or size % PAGE_SIZE:
            raise ConfigError(f"memory size {size} is not a positive multiple of {PAGE_SIZE} bytes.")
        self.size = size
        self.clear_observers: list[Callable[[npt.NDArray[np.uint64]], None]] = []
        self.regions = self.layout(size)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        try:
            self._pagemap = PageMap()
        except OSError as error:
            raise MachineError(
                f"cannot open /proc/self/pagemap: {error.strerror}.", "Mount /proc; vmf needs it to find used memory."
            ) from error
        try:
            self._map = mmap.mmap(-1, size + HUGE_PAGE_SIZE, flags=flags)
        except OSError as error:
            raise MachineError(
                f"cannot reserve {size // MIB} MiB of guest RAM: {error.strerror}.",
                "The limit is the process's (`ulimit -v`) or the host's (vm.overcommit_memory=2, see proc(5)). Raise it"
                " or give the machine less memory with `vmf modifyvm NAME --memory MIB`.",
            ) from error
        whole = memoryview(self._map)
        self._anchor = ctypes.c_char.from_buffer(self._map)
        start = ctypes.addressof(self._anchor)
        self._shift = -start % HUGE_PAGE_SIZE
        self.address = start + self._shift
        self.buffer = whole[self._shift : self._shift + size]
        whole.release()
        # A forked child must not share guest RAM: every page that the guest writes would be copied first.
        advices = [mmap.MADV_DONTFORK, mmap.MADV_DONTDUMP]
        advices.append(mmap.MADV_HUGEPAGE if huge_pages else mmap.MADV_NOHUGEPAGE)
        for advice in advices:
            with contextlib.suppress(OSError):  # a kernel that was built without it
                self._map.madvise(advice)
        self._closed = False

    @staticmethod
    def layout(size: int) -> tuple[RamRegion, ...]:
        """Where `size` bytes of RAM lie."""
        low = min(size, LOW_RAM_LIMIT)
        regions = (RamRegion(0, low, 0),)
        return (*regions, RamRegion(HIGH_RAM_BASE, size - low, low)) if size > low else regions

    @property
    def pages(self) -> int:
        return self.size // PAGE_SIZE

    def offset_of(self, gpa: int, size: int = 1) -> int:
        """Mapping offset of [gpa, gpa+size). Raises MachineError when it is not wholly inside one RAM region."""
        for region in self.regions:
            if region.gpa <= gpa and gpa + size <= region.gpa + region.size:
                return region.offset + gpa - region.gpa
        raise MachineError(f"guest-physical {gpa:#x}+{size:#x} is not RAM of this machine.")

    def view(self, gpa: int, size: int) -> memoryview:
        """Writable view of guest-physical [gpa, gpa+size), no copy. Release it before `close`."""
        offset = self.offset_of(gpa, size)
        return self.buffer[offset : offset + size]

    def read(self, gpa: int, size: int) -> bytes:
        offset = self.offset_of(gpa, size)
        return bytes(self.buffer[offset : offset + size])

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        offset = self.offset_of(gpa, len(data) or 1)
        self.buffer[offset : offset + len(data)] = data

    def touched_ranges(self) -> npt.NDArray[np.uint64]:
        """Ranges of pages that have ever been touched: array of shape (n, 2), [first page, end page) each row.

        Asks the kernel's page tables, without looking at memory: untouched stretches cost next to nothing.
        """
        try:
            runs = self._pagemap.existing(self.address, 0, self.pages)
        except OSError as error:
            raise MachineError(f"cannot find the used pages of guest RAM: {error.strerror}.") from error
        if len(runs) < 2:
            return runs
        cuts = np.flatnonzero(runs[1:, 0] != runs[:-1, 1])  # rows that touch become one
        first = np.concatenate((runs[:1, 0], runs[cuts + 1, 0]))
        return np.stack((first, np.concatenate((runs[cuts, 1], runs[-1:, 1]))), axis=1)

    def give_back(self, first_page: int, end_page: int) -> None:
        """Zero these pages by giving them back to the host; dirty trackers do not see it."""
        start = self._shift + first_page * PAGE_SIZE
        self._map.madvise(mmap.MADV_DONTNEED, start, (end_page - first_page) * PAGE_SIZE)

    def clear(self) -> None:
        """Zero everything and give the host memory back (power-on reset).

        The kernel does not count this as a write, so whoever tracks writes is told by `clear_observers`.
        """
        touched = self.touched_ranges() if self.clear_observers else None
        self.give_back(0, self.pages)
        self.tell_observers(touched)

    def tell_observers(self, runs: npt.NDArray[np.uint64] | None = None) -> None:
        """These pages, by default all that exist, were written otherwise than by the guest: a reset has loaded it."""
        if self.clear_observers:
            told = self.touched_ranges() if runs is None else runs
            for observer in tuple(self.clear_observers):
                observer(told)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        del self._anchor
        try:
            self.buffer.release()
            self._map.close()
        except BufferError:
            pass  # somebody still holds a view: the mapping goes when that view goes
        self._pagemap.close()
