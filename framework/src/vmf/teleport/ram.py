"""Moving guest RAM: one round at the source, placing pages at the target.

What is not sent is what makes it fast. Pages that were never touched do not exist on either side. Pages that hold only
zeros need nothing either as long as the target has nothing else in their place, as its RAM begins empty; a page that
has become zero after it was sent costs eight bytes. Everything else goes from the mapping to the socket and from the
socket to the mapping without a copy in between, in batches small enough that a cancel is heard and the rates mean
something.

A page may change between the look and the sending; the dirty tracker sees that and it comes again in the next round.
That is why the tracker starts before the first look. A tracker that compares contents (`needs_staging`) must know
what was sent, so with such a one a batch is first copied by the tracker, and judged and sent from the copy.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from attrs import define

from vmf.machine import pages
from vmf.machine.dirty import DirtyTracker, PageRuns
from vmf.machine.memory import PAGE_SIZE, GuestMemory
from vmf.teleport.link import Link
from vmf.teleport.protocol import messages as m
from vmf.teleport.protocol.runs import MAX_RUNS, pack_runs, unpack_runs

BATCH_BYTES = 8 << 20
"""Raw data in one PAGES message."""
_GIVEN_BACK_PAGES = 16
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
        self._there = np.zeros(memory.pages, dtype=bool)
        """Pages at whose place the target has something. Host memory is used only for parts that are written."""
        self.counters = RamCounters()

    def send_round(
        self, number: int, runs: PageRuns, *, stopped: bool, after_batch: Callable[[int], None] | None = None
    ) -> None:
        """Send the pages of `runs`. `after_batch(remaining_bytes)` may raise to end it between two batches.

        Args:
            number: of the round.
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
            zeros.append(self._to_mention(zero))
            remaining -= size
            if after_batch is not None:
                after_batch(remaining)
        if zeros:
            every = pages.merge(np.concatenate(zeros))
            for start in range(0, len(every), MAX_RUNS):
                self._link.send(m.Zeros(number, pack_runs(every[start : start + MAX_RUNS])))

    def _to_mention(self, zero: PageRuns) -> PageRuns:
        """Those of these pages, zero now, that are not zero at the target."""
        if not len(zero):
            return zero
        numbers = pages.to_numbers(zero).astype(np.intp)
        numbers = numbers[self._there[numbers]]
        self._there[numbers] = False
        return pages.from_numbers(numbers.astype(np.uint64))

    def _send_direct(self, number: int, batch: PageRuns) -> tuple[int, PageRuns]:
        buffer = self._memory.buffer
        data, zero = pages.split_zero(buffer, batch)
        if len(data):
            self._link.send_pages(number, data, buffer, pages.to_byte_ranges(data))
            self._there[pages.to_numbers(data).astype(np.intp)] = True
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
            self._there[pages.to_numbers(runs).astype(np.intp)] = True
        return pages.count(data), pages.from_numbers(numbers[pages.to_numbers(zero)])


class RamReceiver:
    """The target's side."""

    def __init__(self, memory: GuestMemory, link: Link) -> None:
        self._memory = memory
        self._link = link
        self.counters = RamCounters()

    def place(self, message: m.Pages) -> None:
        size = message.bulk
        self._link.channel.recv_ranges(self._memory.buffer, pages.to_byte_ranges(unpack_runs(message.runs)))
        self._link.bulk_received(size)
        self.counters.sent_bytes += size
        self.counters.pages += size // PAGE_SIZE

    def clear(self, message: m.Zeros) -> None:
        runs = unpack_runs(message.runs)
        self.counters.zero_pages += pages.count(runs)
        long = runs[:, 1] - runs[:, 0] >= _GIVEN_BACK_PAGES
        for first, end in runs[long].tolist():
            self._memory.give_back(first, end)
        words = np.frombuffer(self._memory.buffer, dtype=np.uint64).reshape(-1, PAGE_SIZE // 8)
        short = runs[~long]
        if len(short):
            words[pages.to_numbers(short).astype(np.intp)] = 0
