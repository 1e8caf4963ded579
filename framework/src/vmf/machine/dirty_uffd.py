"""Dirty tracking by the kernel: userfaultfd's asynchronous write-protect and the PAGEMAP_SCAN ioctl.

Theory of operation
-------------------
The RAM mapping is registered with a userfaultfd whose feature WP_ASYNC is on. The kernel then keeps one bit in every
page-table entry of the mapping, "write-protected". The first write to such a page clears the bit and goes on, without
any message to anybody, at the price of one minor fault (about 1 µs). PAGEMAP_SCAN walks the page table, returns the
runs of entries whose bit is clear ("written"), and with PM_SCAN_WP_MATCHING sets the bit again in the same step,
under the page-table lock: a write either came before and is in the result, or faults and is in the next one.

What counts as written, as found by experiment (Linux 6.18):

- an entry that is present without the bit: written, or mapped anew since (also by a mere read);
- an *empty* entry without the bit's marker: the page may have been written and then taken away by reclaim. So pages
  that were never there are reported as well, and the scan leaves markers for them. Pages that are holes of the memfd
  were never written, so the result is cut down to the pages that exist; those known to exist are not asked for again.

Markers need page tables (2 MiB for each GiB of RAM) and every later scan walks them, so only the 2-MiB stretches of
RAM in which at least one page exists are *watched*. Every `collect` first looks for pages in the rest (SEEK_DATA, one
system call for each stretch that comes to life) and watches their stretches too: all pages of a new stretch that
exist are then reported as written, which is true. A page that comes to life after that look is found by the next one.

Pages that the first round of a teleport sends must be asked for (`GuestMemory.touched_ranges`) after `start`.

No page fault is ever delivered to us, so the descriptor is opened with UFFD_USER_MODE_ONLY, which needs no privilege;
faults that the kernel itself takes, as recv(2) into guest RAM does, are resolved asynchronously all the same.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform

import numpy as np
import numpy.typing as npt

from vmf.errors import MachineError, VmfError
from vmf.machine import pages
from vmf.machine.dirty import DirtyTracker, PageRuns
from vmf.machine.memory import PAGE_SIZE, GuestMemory

# <asm/unistd_64.h>, <asm-generic/unistd.h>
_NR_USERFAULTFD = {"x86_64": 323, "aarch64": 282}

# <linux/userfaultfd.h>
_UFFD_USER_MODE_ONLY = 1
_UFFD_API = 0xAA
_UFFD_FEATURE_PAGEFAULT_FLAG_WP = 1 << 0
_UFFD_FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12
_UFFD_FEATURE_WP_UNPOPULATED = 1 << 13
_UFFD_FEATURE_WP_ASYNC = 1 << 15
_UFFDIO_REGISTER_MODE_WP = 1 << 1
_UFFDIO_API = 0xC018AA3F  # _IOWR(UFFDIO, 0x3F, struct uffdio_api)
_UFFDIO_REGISTER = 0xC020AA00  # _IOWR(UFFDIO, 0x00, struct uffdio_register)
_UFFDIO_UNREGISTER = 0x8010AA01  # _IOR(UFFDIO, 0x01, struct uffdio_range)

# <linux/fs.h>
_PAGEMAP_SCAN = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg)
_PM_SCAN_WP_MATCHING = 1 << 0
_PM_SCAN_CHECK_WPASYNC = 1 << 1
_PAGE_IS_WRITTEN = 1 << 1

_FEATURES = (
    _UFFD_FEATURE_PAGEFAULT_FLAG_WP
    | _UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    | _UFFD_FEATURE_WP_UNPOPULATED
    | _UFFD_FEATURE_WP_ASYNC
)
_STRETCH_BYTES = 512 * PAGE_SIZE
"""What one page table maps."""
_SCAN_ROWS = 1 << 15
"""Rows of the result array: 768 KiB. More runs than that take several calls."""


class _UffdioApi(ctypes.Structure):
    _fields_ = [("api", ctypes.c_uint64), ("features", ctypes.c_uint64), ("ioctls", ctypes.c_uint64)]


class _UffdioRange(ctypes.Structure):
    _fields_ = [("start", ctypes.c_uint64), ("len", ctypes.c_uint64)]


class _UffdioRegister(ctypes.Structure):
    _fields_ = [("range", _UffdioRange), ("mode", ctypes.c_uint64), ("ioctls", ctypes.c_uint64)]


class _PmScanArg(ctypes.Structure):
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


def _call(fd: int, request: int, argument: ctypes.Structure) -> int:
    """ioctl(2), again after EINTR; raises OSError."""
    while True:
        result = int(_ioctl(fd, request, ctypes.addressof(argument)))
        if result >= 0:
            return result
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def _open_userfaultfd() -> int:
    """A userfaultfd with the features of `_FEATURES`. Raises MachineError with the reason."""
    call = _NR_USERFAULTFD.get(platform.machine())
    if platform.system() != "Linux" or call is None:
        raise MachineError(f"userfaultfd is not known on {platform.system()} {platform.machine()}.")
    flags = os.O_CLOEXEC | os.O_NONBLOCK | _UFFD_USER_MODE_ONLY
    fd = int(_libc.syscall(ctypes.c_long(call), ctypes.c_int(flags)))
    if fd < 0:
        number = ctypes.get_errno()
        why = {
            errno.ENOSYS: "this kernel has no userfaultfd",
            errno.EPERM: "userfaultfd is forbidden here (a seccomp filter or container policy)",
            errno.EINVAL: "this kernel's userfaultfd has no user mode (Linux 5.11)",
        }.get(number, os.strerror(number))
        raise MachineError(f"{why}.")
    try:
        _call(fd, _UFFDIO_API, _UffdioApi(_UFFD_API, _FEATURES, 0))
    except OSError as error:
        os.close(fd)
        raise MachineError("this kernel's userfaultfd has no asynchronous write-protect (Linux 6.7).") from error
    return fd


class UffdTracker(DirtyTracker):
    """See the module's theory of operation."""

    name = "uffd"

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._uffd = -1
        self._pagemap = -1
        self._rows = np.empty((0, 3), dtype=np.uint64)
        self._known = pages.empty()
        self._cleared: list[PageRuns] = []
        self._watched = pages.empty()

    def start(self) -> None:
        """Raises MachineError when the kernel refuses."""
        self.stop()
        memory = self._memory
        self._uffd = _open_userfaultfd()
        try:
            self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            register = _UffdioRegister(_UffdioRange(memory.address, memory.size), _UFFDIO_REGISTER_MODE_WP, 0)
            _call(self._uffd, _UFFDIO_REGISTER, register)
            self._rows = np.empty((_SCAN_ROWS, 3), dtype=np.uint64)
            self._watch_new_stretches()
            self._known = memory.touched_ranges()
            for first, end in self._watched.tolist():
                self._scan(None, first, end)
            memory.clear_observers.append(self._cleared.append)
        except OSError as error:
            self.stop()
            raise MachineError(
                f"the kernel cannot track writes to guest RAM: {error.strerror}.",
                "Set VMF_DIRTY_TRACKER=hash to compare pages instead.",
            ) from error

    def _watch_new_stretches(self) -> None:
        """Find stretches outside the watched ones in which a page exists by now, and watch them from now on."""
        memory = self._memory
        found: list[tuple[int, int]] = []
        for first, end in pages.subtract(pages.full(memory.pages), self._watched).tolist():
            position = first * PAGE_SIZE
            while position < end * PAGE_SIZE:
                data = memory.next_data(position)
                if data >= end * PAGE_SIZE:
                    break
                start = data // _STRETCH_BYTES * _STRETCH_BYTES
                position = min(start + _STRETCH_BYTES, memory.size)
                found.append((start // PAGE_SIZE, position // PAGE_SIZE))
        if found:
            self._watched = pages.union(self._watched, np.array(found, dtype=np.uint64))

    def _scan(self, rows: npt.NDArray[np.uint64] | None, first_page: int, end_page: int) -> PageRuns:
        """Runs of written entries, not normal, protecting them again; with no `rows` to put them in, only protect."""
        base = self._memory.address
        end = base + end_page * PAGE_SIZE
        argument = _PmScanArg(
            size=ctypes.sizeof(_PmScanArg),
            flags=_PM_SCAN_WP_MATCHING | _PM_SCAN_CHECK_WPASYNC,
            start=base + first_page * PAGE_SIZE,
            end=end,
            vec=0 if rows is None else rows.ctypes.data,
            vec_len=0 if rows is None else len(rows),
            category_mask=_PAGE_IS_WRITTEN,
            return_mask=_PAGE_IS_WRITTEN,
        )
        found: list[PageRuns] = []
        while True:
            number = _call(self._pagemap, _PAGEMAP_SCAN, argument)
            if rows is not None and number:
                found.append((rows[:number, :2] - np.uint64(base)) // np.uint64(PAGE_SIZE))
            if argument.walk_end >= end:
                break
            argument.start = argument.walk_end
        return np.concatenate(found) if found else pages.empty()

    def collect(self) -> PageRuns:
        if self._uffd < 0:
            raise MachineError("dirty tracking has not been started.")
        cleared = pages.empty()
        while self._cleared:
            cleared = pages.union(cleared, self._cleared.pop())
        try:
            self._watch_new_stretches()
            written = pages.merge(
                np.concatenate(
                    [pages.empty()] + [self._scan(self._rows, first, end) for first, end in self._watched.tolist()]
                )
            )
        except OSError as error:
            raise MachineError(f"reading the written pages of guest RAM failed: {error.strerror}.") from error
        fresh = pages.subtract(written, self._known)
        if not len(fresh):
            return pages.union(written, cleared) if len(cleared) else written
        # Asked after the scan: a page that came into being before the scan is there, one that came later may be.
        exist = self._memory.touched_within(fresh)
        self._known = pages.union(self._known, exist)
        return pages.union(pages.subtract(written, pages.subtract(fresh, exist)), cleared)

    def stop(self) -> None:
        if self._cleared.append in self._memory.clear_observers:
            self._memory.clear_observers.remove(self._cleared.append)
        self._cleared.clear()
        if self._uffd >= 0:
            whole = _UffdioRange(self._memory.address, self._memory.size)
            try:
                _call(self._uffd, _UFFDIO_UNREGISTER, whole)
            except OSError:
                pass  # not registered, or the mapping is gone; closing frees the rest
            os.close(self._uffd)
            self._uffd = -1
        if self._pagemap >= 0:
            os.close(self._pagemap)
            self._pagemap = -1
        self._rows = np.empty((0, 3), dtype=np.uint64)
        self._known = pages.empty()
        self._watched = pages.empty()


@functools.cache
def uffd_unusable() -> str | None:
    """Why `UffdTracker` cannot work here, found by trying it on three pages; None when it works."""
    memory = GuestMemory(3 * PAGE_SIZE)
    tracker = UffdTracker(memory)
    try:
        memory.buffer[0] = 1
        tracker.start()
        before = tracker.collect()
        memory.buffer[0] = 2
        memory.buffer[PAGE_SIZE] = 2
        after = tracker.collect()
        if len(before) or after.tolist() != [[0, 2]] or len(tracker.collect()):
            return "this kernel's PAGEMAP_SCAN does not report the pages that were written."
    except VmfError as error:
        return error.message
    finally:
        tracker.stop()
        memory.close()
    return None
