"""KVM's own dirty log.

It sees what the guest writes and nothing else: neither emulated devices nor the host's system calls, which the core's
userfaultfd tracker sees as well as the guest (`vmf.memory.dirty_uffd`), and benchmarks/bench_kvm.py shows that it
would save little beside that one. Where the kernel has no asynchronous write-protect (before Linux 6.7) the other
choice is to compare all of RAM in every round, so there it is used for machines whose devices write no RAM
(`vmf.memory.dirty_log`).

Protocol: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 with INITIALLY_SET, so that starting it protects nothing at once, and
clearing happens in one call for a whole slot.
"""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

from vmf.cpu.backend import WriteLog
from vmf.errors import MachineError
from vmf.memory.guest import PAGE_SIZE, GuestMemory
from vmf_cpu_kvm import abi

PROTECT_FLAGS = 3
"""KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET."""


class KvmDirtyLog(WriteLog):
    """The log of one VM; logging is on from the VM's making (`dirty_log=True`) or from `start`."""

    def __init__(self, vm: int, memory: GuestMemory) -> None:
        self._vm = vm
        self._memory = memory
        self._bitmaps = [np.zeros(-(-region.size // PAGE_SIZE // 64), dtype=np.uint64) for region in memory.regions]

    def start(self) -> None:
        self._set_flags(abi.MEM_LOG_DIRTY_PAGES)
        self.collect()  # everything is in it at first; taking it away protects the pages

    def stop(self) -> None:
        """Also when the VM has gone."""
        try:
            self._set_flags(0)
        except MachineError:
            pass  # a log that goes on costs a little time and does no harm

    def _set_flags(self, flags: int) -> None:
        for slot, region in enumerate(self._memory.regions):
            arguments = (slot, flags, region.gpa, region.size, self._memory.address + region.offset)
            try:
                abi.ioctl(self._vm, abi.SET_USER_MEMORY_REGION, abi.buffer_of(abi.MEMORY_REGION, *arguments))
            except OSError as error:
                raise MachineError(f"KVM does not log the guest's writes: {error.strerror}.") from error

    def collect(self) -> npt.NDArray[np.uint64]:
        """As the base class says; without `start` the first call reports all of RAM."""
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
