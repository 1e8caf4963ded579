"""Guest RAM: one memfd-backed shared mapping that every backend and device works on directly.

Layout of the PC: RAM from 0 up to `LOW_RAM_LIMIT`, the rest from 4 GiB up; between them the hole for MMIO. In the
memfd (and in the mapping) the two lie back to back, so *offset* and guest-physical address differ above the hole.
Dirty tracking, teleports and snapshots count in offsets and 4-KiB pages of that flat mapping.

Who may write: the vCPU thread (guest, devices), and the teleport target before the machine runs. Pages that were
never touched are holes of the memfd: they cost nothing and `touched_ranges` does not list them.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from attrs import frozen

from vmf.errors import ConfigError, MachineError

PAGE_SIZE = 4096
MIB = 1 << 20
LOW_RAM_LIMIT = 0xE000_0000
HIGH_RAM_BASE = 0x1_0000_0000
MIN_MEMORY_MIB = 1
MAX_MEMORY_MIB = 4 * 1024 * 1024

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
        fd: the memfd.
        buffer: writable view of the whole mapping.
        address: host virtual address of the mapping.
        regions: ascending by gpa.
        clear_observers: called after every `clear`, on its thread, with the page ranges that had been touched.
    """

    def __init__(self, size: int) -> None:
        """Reserve `size` bytes (a multiple of the page size) of zeroed RAM; host memory is used as it is touched."""
        if size <= 0 or size % PAGE_SIZE:
            raise ConfigError(f"memory size {size} is not a positive multiple of {PAGE_SIZE} bytes.")
        self.size = size
        self.clear_observers: list[Callable[[npt.NDArray[np.uint64]], None]] = []
        low = min(size, LOW_RAM_LIMIT)
        regions = [RamRegion(0, low, 0)]
        if size > low:
            regions.append(RamRegion(HIGH_RAM_BASE, size - low, low))
        self.regions = tuple(regions)
        try:
            self.fd = os.memfd_create("vmf-ram", os.MFD_CLOEXEC)
            os.ftruncate(self.fd, size)
            self._map = mmap.mmap(self.fd, size, flags=mmap.MAP_SHARED | _MAP_NORESERVE)
        except OSError as error:
            raise MachineError(
                f"cannot reserve {size // MIB} MiB of guest RAM: {error.strerror}.",
                "Give the machine less memory with `vmf modifyvm NAME --memory MIB`.",
            ) from error
        self.buffer = memoryview(self._map)
        self._anchor = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(self._anchor)
        self._closed = False

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

        Untouched pages are holes of the memfd, found with SEEK_DATA/SEEK_HOLE (lseek(2)) without looking at memory.
        """
        return self.touched_within(np.array([[0, self.pages]], dtype=np.uint64))

    def touched_within(self, runs: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """The part of `runs` (ascending, disjoint [first page, end page) rows) that has ever been touched.

        Two system calls for every stretch of touched pages, about 1 µs each; nothing for long holes.
        """
        ranges: list[tuple[int, int]] = []
        data = -1  # from where we last looked up to here nothing is touched
        for first, last in runs.tolist():
            position, limit = first * PAGE_SIZE, last * PAGE_SIZE
            while position < limit:
                if data < position:
                    data = self.next_data(position)
                if data >= limit:
                    break
                start = max(data, position)
                end = min(os.lseek(self.fd, start, os.SEEK_HOLE), limit)
                if end <= start:  # the page was given back in between
                    data = -1
                    position = start + PAGE_SIZE
                    continue
                ranges.append((start // PAGE_SIZE, -(-end // PAGE_SIZE)))
                position = end
        return np.array(ranges, dtype=np.uint64).reshape(-1, 2)

    def next_data(self, position: int) -> int:
        """Offset of the first touched byte at or after `position`; `size` when there is none."""
        try:
            return os.lseek(self.fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return self.size
            raise

    def clear(self) -> None:
        """Zero everything and give the host memory back (power-on reset).

        The kernel does not count this as a write, so whoever tracks writes is told by `clear_observers`.
        """
        touched = self.touched_ranges() if self.clear_observers else None
        self._map.madvise(mmap.MADV_REMOVE)
        if touched is not None:
            for observer in tuple(self.clear_observers):
                observer(touched)

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
        os.close(self.fd)
