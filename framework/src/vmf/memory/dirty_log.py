"""Dirty tracking by the engine's own log of what its guest writes (KVM's), where the kernel has nothing better.

Theory of operation
-------------------
An engine's log sees the guest's writes and no others. Whoever else writes guest RAM must therefore be known:

- devices. One that writes RAM on its own (DMA) does so with ordinary stores, and reports only what matters to
  translated code. So this tracker is for machines none of whose devices has `writes_ram`.
- a reset, which clears RAM and loads the guest anew: `GuestMemory` tells its observers before and after.

Compared with `vmf.memory.dirty_uffd` it sees less and is no faster, so it comes after it; compared with
`vmf.memory.dirty_hash`, which reads all of RAM in every round and in the downtime, it costs next to nothing. Linux
before 6.7 has no asynchronous write-protect: Debian 12, RHEL 9.
"""

from __future__ import annotations

import numpy as np

from vmf.cpu.backend import WriteLog
from vmf.errors import MachineError
from vmf.memory import pages
from vmf.memory.dirty import DirtyTracker, PageRuns
from vmf.memory.guest import GuestMemory


class LogTracker(DirtyTracker):
    """See the module's theory of operation."""

    name = "log"

    def __init__(self, memory: GuestMemory, log: WriteLog) -> None:
        self._memory = memory
        self._log = log
        self._rewritten: list[PageRuns] = []
        self._started = False

    def start(self) -> None:
        """Raises MachineError when the engine refuses."""
        self.stop()
        self._log.start()
        self._started = True
        self._memory.clear_observers.append(self._rewritten.append)

    def collect(self) -> PageRuns:
        if not self._started:
            raise MachineError("dirty tracking has not been started.")
        found = []
        while self._rewritten:
            found.append(self._rewritten.pop())
        found.append(pages.from_numbers(self._log.collect()))
        return pages.merge(np.concatenate(found))

    def stop(self) -> None:
        if self._rewritten.append in self._memory.clear_observers:
            self._memory.clear_observers.remove(self._rewritten.append)
        self._rewritten.clear()
        if self._started:
            self._started = False
            self._log.stop()
