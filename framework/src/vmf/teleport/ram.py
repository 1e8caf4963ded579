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

import threading
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
from attrs import define

from vmf.errors import RemoteProtocolError, TeleportError
from vmf.memory import pages
from vmf.memory.dirty import DirtyTracker, PageRuns
from vmf.memory.guest import PAGE_SIZE, GuestMemory
from vmf.teleport.link import Link
from vmf.teleport.protocol import messages as m
from vmf.teleport.protocol.runs import MAX_RUNS, pack_runs, unpack_runs

BATCH_BYTES = 8 << 20
"""Raw data in one PAGES message."""
_GIVEN_BACK_PAGES = 16
"""Runs of zeros at least this long are given back to the host, shorter ones overwritten."""


SHORT_S = 1.0
"""How long bytes may be missing after a channel that carried some has ended."""


class Bulk(Protocol):
    """Several channels for pages; see `vmf.teleport.lanes`."""

    def send_pages(self, round_: int, runs: PageRuns, base: memoryview, ranges: pages.ByteRanges) -> None:
        """Send the pages `runs`, whose contents lie at the byte `ranges` of `base`, before `drain` returns."""

    def drain(self) -> None:
        """Everything was sent."""


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

    def __init__(self, memory: GuestMemory, link: Link, tracker: DirtyTracker, bulk: Bulk | None = None) -> None:
        """`bulk`: where pages go that need no copy; None: to `link` like everything else."""
        self._memory = memory
        self._link = link
        self._bulk = bulk
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
        if self._bulk is not None:
            self._bulk.drain()
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
        full = pages.mostly_data(buffer, batch)
        data, zero = (batch, pages.empty()) if full else pages.split_zero(buffer, batch)
        if len(data):
            (self._bulk or self._link).send_pages(number, data, buffer, pages.to_byte_ranges(data))
            pages.mark(self._there, data, True)
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
            pages.mark(self._there, runs, True)
        return pages.count(data), pages.from_numbers(numbers[pages.to_numbers(zero)])


class Arrival:
    """Counts what has come, over all channels, so that the end of a round can be waited for. Any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._short: BaseException | None = None
        self.bytes = 0

    def add(self, count: int) -> None:
        with self._changed:
            self.bytes += count
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """One of the channels failed."""
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def short_of(self, error: BaseException) -> None:
        """One of the channels ended: an error if something is missing."""
        with self._changed:
            self._short = self._short or error
            self._changed.notify_all()

    def wait(self, total: int, patience_s: float) -> None:
        """Until `total` bytes have come. Raises what failed, or TeleportError when nothing came for `patience_s`."""
        with self._changed:
            seen, since = self.bytes, time.monotonic()
            while self.bytes != total:
                if self._failure is not None:
                    raise self._failure
                if self.bytes > total:
                    raise RemoteProtocolError("the source sent more pages than it says.")
                if self.bytes != seen:
                    seen, since = self.bytes, time.monotonic()
                waited = time.monotonic() - since
                if self._short is not None and waited > SHORT_S:
                    raise self._short
                if waited > patience_s:
                    raise TeleportError(f"{total - seen} bytes of pages that the source has sent did not arrive.")
                self._changed.wait(min(SHORT_S, patience_s) / 2)


class RamReceiver:
    """The target's side. `place` may be called by several threads, each for a channel of its own.

    Attributes:
        round: of the pages that are to come; pages of another are refused.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self.arrival = Arrival()
        self.round = 1
        self.zero_pages = 0

    @property
    def counters(self) -> RamCounters:
        received = self.arrival.bytes
        return RamCounters(received, received // PAGE_SIZE, self.zero_pages)

    def place(self, message: m.Pages, link: Link) -> None:
        """Receive the contents from that channel into RAM."""
        if message.round != self.round:
            raise RemoteProtocolError(f"the source sent pages of round {message.round} in round {self.round}.")
        size = message.bulk
        link.channel.recv_ranges(self._memory.buffer, pages.to_byte_ranges(unpack_runs(message.runs)))
        link.bulk_received(size)
        self.arrival.add(size)

    def clear(self, message: m.Zeros) -> None:
        runs = unpack_runs(message.runs)
        self.zero_pages += pages.count(runs)
        long = runs[:, 1] - runs[:, 0] >= _GIVEN_BACK_PAGES
        for first, end in runs[long].tolist():
            self._memory.give_back(first, end)
        words = np.frombuffer(self._memory.buffer, dtype=np.uint64).reshape(-1, PAGE_SIZE // 8)
        short = runs[~long]
        if len(short):
            words[pages.to_numbers(short).astype(np.intp)] = 0
