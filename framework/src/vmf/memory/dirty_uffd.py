"""Dirty tracking by the kernel: userfaultfd's asynchronous write-protect and the PAGEMAP_SCAN ioctl.

Theory of operation
-------------------
The RAM mapping is registered with a userfaultfd whose feature WP_ASYNC is on. The kernel then keeps one bit in every
page-table entry of the mapping, "write-protected". The first write to such a page clears the bit and goes on, without
any message to anybody, at the price of one minor fault (about 1 µs). PAGEMAP_SCAN walks the page table, returns the
runs of entries whose bit is clear ("written"), and with PM_SCAN_WP_MATCHING sets the bit again in the same step,
under the page-table lock: a write either came before and is in the result, or faults and is in the next one.

An entry that is present without the bit was written, or came to life since the last scan: that is a write, too, except
where it maps the kernel's page of zeros (a mere read), which is left out. Empty entries must not be protected: the
kernel would keep a marker for each, which needs page tables for the whole of RAM. The scan therefore asks for entries
that are present or swapped out. A huge page is one entry with one bit; the first write to a protected one splits it
into 4-KiB entries that carry the bit, so that a single page counts as written.

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

from vmf.errors import MachineError, VmfError
from vmf.memory import pagemap, pages
from vmf.memory.dirty import DirtyTracker, PageRuns
from vmf.memory.guest import PAGE_SIZE, GuestMemory

# <asm/unistd_64.h>, <asm-generic/unistd.h>
_NR_USERFAULTFD = {"x86_64": 323, "aarch64": 282}

# <linux/userfaultfd.h>
_UFFD_USER_MODE_ONLY = 1
_UFFD_API = 0xAA
_UFFD_FEATURE_PAGEFAULT_FLAG_WP = 1 << 0
_UFFD_FEATURE_WP_ASYNC = 1 << 15
_UFFDIO_REGISTER_MODE_WP = 1 << 1
_UFFDIO_API = 0xC018AA3F  # _IOWR(UFFDIO, 0x3F, struct uffdio_api)
_UFFDIO_REGISTER = 0xC020AA00  # _IOWR(UFFDIO, 0x00, struct uffdio_register)
_UFFDIO_UNREGISTER = 0x8010AA01  # _IOR(UFFDIO, 0x01, struct uffdio_range)

_FEATURES = _UFFD_FEATURE_PAGEFAULT_FLAG_WP | _UFFD_FEATURE_WP_ASYNC
_SCAN_ROWS = 1 << 15
"""Rows of the result array: 768 KiB. More runs than that take several calls."""


class _UffdioApi(ctypes.Structure):
    _fields_ = [("api", ctypes.c_uint64), ("features", ctypes.c_uint64), ("ioctls", ctypes.c_uint64)]


class _UffdioRange(ctypes.Structure):
    _fields_ = [("start", ctypes.c_uint64), ("len", ctypes.c_uint64)]


class _UffdioRegister(ctypes.Structure):
    _fields_ = [("range", _UffdioRange), ("mode", ctypes.c_uint64), ("ioctls", ctypes.c_uint64)]


_libc = ctypes.CDLL(None, use_errno=True)


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
        pagemap.call(fd, _UFFDIO_API, _UffdioApi(_UFFD_API, _FEATURES, 0))
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
        self._pagemap: pagemap.PageMap | None = None
        self._cleared: list[PageRuns] = []

    def start(self) -> None:
        """Raises MachineError when the kernel refuses."""
        self.stop()
        memory = self._memory
        self._uffd = _open_userfaultfd()
        try:
            self._pagemap = pagemap.PageMap()
            self._pagemap.use_rows(_SCAN_ROWS)
            register = _UffdioRegister(_UffdioRange(memory.address, memory.size), _UFFDIO_REGISTER_MODE_WP, 0)
            pagemap.call(self._uffd, _UFFDIO_REGISTER, register)
            self._scan(self._pagemap)
            memory.clear_observers.append(self._cleared.append)
        except OSError as error:
            self.stop()
            raise MachineError(
                f"the kernel cannot track writes to guest RAM: {error.strerror}.",
                "Set VMF_DIRTY_TRACKER=hash to compare pages instead.",
            ) from error

    def _scan(self, page_map: pagemap.PageMap) -> PageRuns:
        """Runs of written pages; protects them again."""
        return page_map.scan(
            self._memory.address,
            0,
            self._memory.pages,
            mask=pagemap.WRITTEN | pagemap.ZERO_FRAME,
            inverted=pagemap.ZERO_FRAME,
            any_of=pagemap.PRESENT | pagemap.SWAPPED,
            flags=pagemap.WP_MATCHING | pagemap.CHECK_WPASYNC,
        )

    def collect(self) -> PageRuns:
        if self._pagemap is None:
            raise MachineError("dirty tracking has not been started.")
        found = []
        while self._cleared:
            found.append(self._cleared.pop())
        try:
            found.append(self._scan(self._pagemap))
        except OSError as error:
            raise MachineError(f"reading the written pages of guest RAM failed: {error.strerror}.") from error
        return pages.merge(np.concatenate(found))

    def stop(self) -> None:
        if self._cleared.append in self._memory.clear_observers:
            self._memory.clear_observers.remove(self._cleared.append)
        self._cleared.clear()
        if self._uffd >= 0:
            whole = _UffdioRange(self._memory.address, self._memory.size)
            try:
                pagemap.call(self._uffd, _UFFDIO_UNREGISTER, whole)
            except OSError:
                pass  # not registered, or the mapping is gone; closing frees the rest
            os.close(self._uffd)
            self._uffd = -1
        if self._pagemap is not None:
            self._pagemap.close()
            self._pagemap = None


@functools.cache
def uffd_unusable() -> str | None:
    """Why `UffdTracker` cannot work here, found by trying it on three pages; None when it works."""
    memory = GuestMemory(3 * PAGE_SIZE, huge_pages=False)
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
