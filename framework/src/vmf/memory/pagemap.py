"""What the kernel's page tables say of a mapping: which pages exist, and which were written.

Two ways to ask. The ioctl PAGEMAP_SCAN (Linux 6.7) returns runs of pages by category, walks empty stretches in one step
and can write-protect what it reports under the page-table lock. `/proc/self/pagemap` itself, 8 bytes a page, is there
on every Linux and answers the first question only.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os

import numpy as np
import numpy.typing as npt

Runs = npt.NDArray[np.uint64]
"""Shape (n, 2): rows [first page, end page), counted from the start of the mapping."""

PAGE_SIZE = 4096

# <linux/fs.h>
_PAGEMAP_SCAN = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg)
WP_MATCHING = 1 << 0
CHECK_WPASYNC = 1 << 1
WRITTEN = 1 << 1
PRESENT = 1 << 3
SWAPPED = 1 << 4
ZERO_FRAME = 1 << 5
"""Mapped to the kernel's page of zeros: read, never written."""

# Documentation/admin-guide/mm/pagemap.rst
_ENTRY_EXISTS = np.uint64(1 << 63 | 1 << 62)  # present, swapped
_ENTRIES = 1 << 16
"""Entries of the page map read at once: 512 KiB for 256 MiB of memory."""

_ROWS = 1 << 12


class _Argument(ctypes.Structure):
    """struct pm_scan_arg"""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "size",
            "flags",
            "start",
            "end",
            "walk_end",
            "vec",
            "vec_len",
            "max_pages",
            "category_inverted",
            "category_mask",
            "category_anyof_mask",
            "return_mask",
        )
    ]


# CDLL (not PyDLL) functions run without the GIL; `fcntl.ioctl` would copy or refuse these arguments.
_libc = ctypes.CDLL(None, use_errno=True)
_ioctl = _libc.ioctl
_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_ioctl.restype = ctypes.c_int


def call(fd: int, request: int, argument: ctypes.Structure) -> int:
    """ioctl(2), again after EINTR; raises OSError."""
    while True:
        result = int(_ioctl(fd, request, ctypes.addressof(argument)))
        if result >= 0:
            return result
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


class PageMap:
    """This process's page map, open. Errors: OSError."""

    def __init__(self) -> None:
        self._fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._rows = np.empty((_ROWS, 3), dtype=np.uint64)

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def use_rows(self, number: int) -> None:
        """Have room for so many runs in one system call (24 bytes each); more runs take more calls."""
        self._rows = np.empty((number, 3), dtype=np.uint64)

    def scan(
        self, address: int, first: int, end: int, *, mask: int, any_of: int = 0, inverted: int = 0, flags: int = 0
    ) -> Runs:
        """Runs of the pages first to end-1 of the mapping at `address` whose categories match, ascending.

        A page matches when all categories of `mask` and one of `any_of` hold, those of `inverted` being turned round.
        Runs of one call to the next may touch.
        """
        limit = address + end * PAGE_SIZE
        rows = self._rows
        argument = _Argument(
            size=ctypes.sizeof(_Argument),
            flags=flags,
            start=address + first * PAGE_SIZE,
            end=limit,
            vec=rows.ctypes.data,
            vec_len=len(rows),
            category_inverted=inverted,
            category_mask=mask,
            category_anyof_mask=any_of,
            return_mask=mask & ~inverted,  # what differs here would cut runs
        )
        found: list[Runs] = []
        while argument.start < limit:
            number = call(self._fd, _PAGEMAP_SCAN, argument)
            if number:
                found.append((rows[:number, :2] - np.uint64(address)) // np.uint64(PAGE_SIZE))
            argument.start = argument.walk_end
        return np.concatenate(found) if found else np.empty((0, 2), dtype=np.uint64)

    def existing(self, address: int, first: int, end: int) -> Runs:
        """Runs of the pages of the mapping at `address` that have contents of their own, in memory or swapped out."""
        if scan_works():
            return self.scan(address, first, end, mask=ZERO_FRAME, inverted=ZERO_FRAME, any_of=PRESENT | SWAPPED)
        return self.existing_by_entries(address, first, end)

    def existing_by_entries(self, address: int, first: int, end: int) -> Runs:
        """The same for kernels without PAGEMAP_SCAN: pages that were only read may count as well."""
        found: list[Runs] = []
        for start in range(first, end, _ENTRIES):
            number = min(_ENTRIES, end - start)
            data = os.pread(self._fd, number * 8, (address // PAGE_SIZE + start) * 8)
            exists = np.zeros(number + 2, dtype=np.int8)
            exists[1 : 1 + len(data) // 8] = (np.frombuffer(data, dtype=np.uint64) & _ENTRY_EXISTS) != 0
            found.append(np.flatnonzero(np.diff(exists)).reshape(-1, 2).astype(np.uint64) + np.uint64(start))
        return np.concatenate(found) if found else np.empty((0, 2), dtype=np.uint64)


@functools.cache
def scan_works() -> bool:
    """Whether this kernel has PAGEMAP_SCAN."""
    page = ctypes.create_string_buffer(2 * PAGE_SIZE)
    start = -(-ctypes.addressof(page) // PAGE_SIZE) * PAGE_SIZE
    ctypes.memset(start, 1, PAGE_SIZE)
    pagemap = PageMap()
    try:
        found = pagemap.scan(start, 0, 1, mask=ZERO_FRAME, inverted=ZERO_FRAME, any_of=PRESENT | SWAPPED)
        return bool(found.tolist() == [[0, 1]])
    except OSError:
        return False
    finally:
        pagemap.close()
