"""KVM's own dirty log: an option, measured and not used by default.

It sees what the guest writes and nothing else: neither emulated devices nor the host's system calls, which the core's
userfaultfd tracker sees as well as the guest (`vmf.machine.dirty_uffd`). So it can only ever be half a tracker, and
benchmarks/bench_kvm.py shows what it would save. It is here for hosts whose kernel has no asynchronous write-protect
(before Linux 6.7), where a tracker could combine it with checksums of what devices wrote.

Protocol: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 with INITIALLY_SET, so that nothing is write-protected before the first
round and clearing happens in one call for a whole slot.
"""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

from vmf.machine.memory import PAGE_SIZE, GuestMemory
from vmf_cpu_kvm import abi

PROTECT_FLAGS = 3
"""KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET."""


class KvmDirtyLog:
    """The log of a VM made with `dirty_log=True`."""

    def __init__(self, vm: int, memory: GuestMemory) -> None:
        self._vm = vm
        self._memory = memory
        self._bitmaps = [
            np.zeros(-(-region.size // PAGE_SIZE // 64), dtype=np.uint64) for region in memory.regions
        ]

    def collect(self) -> npt.NDArray[np.uint64]:
        """Pages (of the RAM mapping) that the guest wrote since the last call; the first call reports all of RAM.

        A write during the call is reported by this or by the next one.
        """
        found = []
        for slot, (region, bitmap) in enumerate(zip(self._memory.regions, self._bitmaps, strict=True)):
            address = bitmap.ctypes.data_as(ctypes.c_void_p).value or 0
            abi.ioctl(self._vm, abi.GET_DIRTY_LOG, abi.buffer_of(abi.DIRTY_LOG, slot, 0, address))
            pages = region.size // PAGE_SIZE
            dirty = np.flatnonzero(np.unpackbits(bitmap.view(np.uint8), bitorder="little")[:pages])
            if dirty.size:
                arguments = (slot, pages, 0, address)
                abi.ioctl(self._vm, abi.CLEAR_DIRTY, abi.buffer_of(abi.CLEAR_DIRTY_LOG, *arguments))
                found.append(dirty.astype(np.uint64) + np.uint64(region.offset // PAGE_SIZE))
        return np.concatenate(found) if found else np.zeros(0, dtype=np.uint64)
