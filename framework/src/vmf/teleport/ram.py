"""Moving guest RAM: one round at the source, placing pages at the target.

What is not sent is what makes it fast. Pages that were never touched are holes of the memfd on both sides. In the
first round pages that hold only zeros need nothing either, as the target's RAM begins empty; later a page that has
become zero costs eight bytes. Everything else goes from the mapping to the socket without a copy in between, in
batches small enough that a cancel is heard and the rates mean something.

A page may change between the look and the sending; the dirty tracker sees that and it comes again in the next round.
That is why the tracker starts before the first look. A tracker that compares contents (`needs_staging`) must know
what was sent, so with such a one a batch is first copied by the tracker, and judged and sent from the copy.

At the target it is fresh memory that costs, several times more than the copying: received straight into the mapping,
every page is a fault that allocates and zeroes a page only to overwrite it. The first round's long runs therefore
take another way (`_FreshWriter`): received into small buffers that stay in the cache, and written to the memfd by a
second thread with pwrite(2), which allocates pages without a fault and without zeroing them. Measured, 1 GiB fresh:
1.2 s of CPU on one thread by the mapping, 0.9 s on two by pwrite. Everything else is received in place.
"""

from __future__ import annotations

import mmap
import os
import queue
import threading
from collections.abc import Callable

import numpy as np
from attrs import define

from vmf.errors import MachineError
from vmf.machine import pages
from vmf.machine.dirty import DirtyTracker, PageRuns
from vmf.machine.memory import PAGE_SIZE, GuestMemory
from vmf.teleport.link import Link
from vmf.teleport.protocol import messages as m
from vmf.teleport.protocol.runs import MAX_RUNS, pack_runs, unpack_runs
from vmf.transport.base import Channel

BATCH_BYTES = 8 << 20
"""Raw data in one PAGES message."""
_FRESH_RUN_BYTES = 128 << 10
"""Runs of round 1 that are on average at least this long are worth a system call each."""
_BUFFERS = 4
_BUFFER_BYTES = 512 << 10
_PUNCH_PAGES = 16
"""Runs of zeros at least this long are given back to the host, shorter ones overwritten."""


@define
class RamCounters:
    """Totals of a teleport.

    Attributes:
        sent_bytes: raw page data handed to the channel.
        pages, zero_pages: pages sent with contents; pages found zero.
    """

    sent_bytes: int = 0
    pages: int = 0
    zero_pages: int = 0


class RamSender:
    """The source's side."""

    def __init__(self, memory: GuestMemory, link: Link, tracker: DirtyTracker) -> None:
        self._memory = memory
        self._link = link
        self._tracker = tracker
        self._staging: memoryview | None = None
        self.counters = RamCounters()

    def send_round(
        self, number: int, runs: PageRuns, *, stopped: bool, after_batch: Callable[[int], None] | None = None
    ) -> None:
        """Send the pages of `runs`. `after_batch(remaining_bytes)` may raise to end it between two batches.

        Args:
            number: of the round; zero pages of round 1 are not mentioned, as the target's RAM is empty.
            stopped: the guest stands still, so that nothing needs to be staged.
        """
        staged = self._tracker.needs_staging and not stopped
        remaining = pages.count(runs) * PAGE_SIZE
        zeros: list[PageRuns] = []
        for batch in pages.batches(runs, BATCH_BYTES):
            size = pages.count(batch) * PAGE_SIZE
            data, zero = self._send_staged(number, batch) if staged else self._send_direct(number, batch)
            counters = self.counters
            counters.sent_bytes += data * PAGE_SIZE
            counters.pages += data
            counters.zero_pages += pages.count(zero)
            if number > 1 and len(zero):
                zeros.append(zero)
            remaining -= size
            if after_batch is not None:
                after_batch(remaining)
        if zeros:
            every = pages.merge(np.concatenate(zeros))
            for start in range(0, len(every), MAX_RUNS):
                self._link.send(m.Zeros(number, pack_runs(every[start : start + MAX_RUNS])))

    def _send_direct(self, number: int, batch: PageRuns) -> tuple[int, PageRuns]:
        buffer = self._memory.buffer
        data, zero = pages.split_zero(buffer, batch)
        if len(data):
            self._link.send_pages(number, data, buffer, pages.to_byte_ranges(data))
        return pages.count(data), zero

    def _send_staged(self, number: int, batch: PageRuns) -> tuple[int, PageRuns]:
        if self._staging is None:
            self._staging = memoryview(bytearray(BATCH_BYTES))
        staging = self._staging[: self._tracker.stage(batch, self._staging)]
        data, zero = pages.split_zero(staging, pages.full(pages.count(batch)))  # numbered within the copy
        numbers = pages.to_numbers(batch)
        if len(data):
            runs = pages.from_numbers(numbers[pages.to_numbers(data)])
            self._link.send_pages(number, runs, staging, pages.to_byte_ranges(data))
        return pages.count(data), pages.from_numbers(numbers[pages.to_numbers(zero)])


class _FreshWriter:
    """A thread that writes to RAM's memfd what another thread received into its buffers."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[tuple[memoryview, int, int] | threading.Event | None] = queue.SimpleQueue()
        for _ in range(_BUFFERS):
            self._free.put(memoryview(bytearray(_BUFFER_BYTES)))
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="vmf-teleport-ram", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (job := self._full.get()) is not None:
            if isinstance(job, threading.Event):
                job.set()
                continue
            buffer, offset, size = job
            done = 0
            try:
                while done < size and self._error is None:
                    done += os.pwrite(self._fd, buffer[done:size], offset + done)
            except OSError as error:
                self._error = error
            self._free.put(buffer)

    def receive(self, channel: Channel, offset: int, length: int) -> None:
        """The next `length` bytes of the channel to that place in RAM, some time before `flush` returns."""
        end = offset + length
        while offset < end:
            size = min(_BUFFER_BYTES, end - offset)
            buffer = self._free.get()
            try:
                channel.recv_into(buffer[:size])
            except BaseException:
                self._free.put(buffer)
                raise
            self._full.put((buffer, offset, size))
            offset += size

    def flush(self) -> None:
        """Everything received so far is in RAM. Raises MachineError when the host could not take it."""
        done = threading.Event()
        self._full.put(done)
        done.wait()
        if self._error is not None:
            raise MachineError(
                f"guest RAM could not be written: {self._error.strerror}.", "Free memory on the target host."
            )

    def close(self) -> None:
        self._full.put(None)
        self._thread.join()


class RamReceiver:
    """The target's side."""

    def __init__(self, memory: GuestMemory, link: Link) -> None:
        self._memory = memory
        self._link = link
        self._mapping: mmap.mmap | None = None
        self._fresh: _FreshWriter | None = None
        self.counters = RamCounters()

    def place(self, message: m.Pages) -> None:
        size = message.bulk
        ranges = pages.to_byte_ranges(unpack_runs(message.runs))
        if message.round == 1 and size >= len(ranges) * _FRESH_RUN_BYTES:
            if self._fresh is None:
                self._fresh = _FreshWriter(self._memory.fd)
            for offset, length in ranges.tolist():
                self._fresh.receive(self._link.channel, offset, length)
        else:
            self.flush()
            self._link.channel.recv_ranges(self._memory.buffer, ranges)
        self._link.bulk_received(size)
        self.counters.sent_bytes += size
        self.counters.pages += size // PAGE_SIZE

    def flush(self) -> None:
        """Everything that came is in RAM."""
        if self._fresh is not None:
            self._fresh.flush()

    def clear(self, message: m.Zeros) -> None:
        self.flush()
        runs = unpack_runs(message.runs)
        self.counters.zero_pages += pages.count(runs)
        long = runs[:, 1] - runs[:, 0] >= _PUNCH_PAGES
        if long.any():
            if self._mapping is None:
                # Removing pages is an operation on the file; a mapping of our own reaches it as well as any.
                self._mapping = mmap.mmap(self._memory.fd, self._memory.size)
            for first, end in runs[long].tolist():
                self._mapping.madvise(mmap.MADV_REMOVE, first * PAGE_SIZE, (end - first) * PAGE_SIZE)
        words = np.frombuffer(self._memory.buffer, dtype=np.uint64).reshape(-1, PAGE_SIZE // 8)
        short = runs[~long]
        if len(short):
            words[pages.to_numbers(short).astype(np.intp)] = 0

    def close(self) -> None:
        """Afterwards nothing is written any more; idempotent."""
        if self._fresh is not None:
            self._fresh.close()
            self._fresh = None
        if self._mapping is not None:
            self._mapping.close()
            self._mapping = None
