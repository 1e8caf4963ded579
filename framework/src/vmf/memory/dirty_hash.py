"""Dirty tracking where the kernel does not help: compare what a page holds with what was sent of it.

Theory of operation
-------------------
A second copy of RAM to compare with would double the machine, so 16 bytes a page are kept: two NH hashes (Black et
al., "UMAC: Fast and Secure Message Authentication", 1999) with independent random keys. NH adds a 32-bit key to every
32-bit half word and sums the products of the pairs modulo 2^64. It is proven that two different pages collide with
probability at most 2^-32 over the choice of the key, whatever the pages hold; two independent keys make that 2^-64.
The keys are drawn anew at every `start` from the operating system's generator, so nothing in a guest can aim at a
collision. Comparing 2^20 pages (4 GiB) in 1,000 rounds has a chance of 2^-34 to miss one page.

*Which* hash is kept matters. A page that holds A when it is looked at, B when it is sent and A again at the next look
would be taken for unchanged while the target has B; lock words do just that. So the hash that counts is that of the
bytes that were sent. `stage` makes a copy of the pages, keeps the hash of *the copy*, and the copy is what must be
sent. A page without such a hash (never sent, or sent some other way) is dirty. Zero pages must be looked for in the
copy as well.

Only pages that were ever touched are looked at. Every `collect` reads all that were sent (at about 0.7 GB/s), also
the one during the downtime: this tracker is for small machines and old kernels.
"""

from __future__ import annotations

import secrets

import numpy as np
import numpy.typing as npt

from vmf.errors import MachineError
from vmf.memory import pages
from vmf.memory.dirty import DirtyTracker, PageRuns
from vmf.memory.guest import PAGE_SIZE, GuestMemory

_WORDS = PAGE_SIZE // 8
_CHUNK_PAGES = 64
"""Pages hashed in one go: 256 KiB, so that all scratch arrays stay in the processor's cache."""

Words = npt.NDArray[np.uint64]


class PageHasher:
    """Two NH hashes of each page, with keys of its own. Not for use by two threads at once (scratch arrays)."""

    def __init__(self) -> None:
        keys = np.frombuffer(secrets.token_bytes(2 * PAGE_SIZE), dtype=np.uint32)
        self._keys = keys.reshape(2, PAGE_SIZE // 4)
        self._sum = np.empty((_CHUNK_PAGES, PAGE_SIZE // 4), dtype=np.uint32)
        self._low = np.empty((_CHUNK_PAGES, _WORDS), dtype=np.uint64)

    def hash(self, words: Words, out: Words) -> None:
        """Hash the rows of `words`, shape (n, 512), n at most `_CHUNK_PAGES`, into `out`, shape (n, 2)."""
        number = len(words)
        halves = words.view(np.uint32)
        low = self._low[:number]
        for index in range(2):
            summed = self._sum[:number]
            np.add(halves, self._keys[index], out=summed)
            high = summed.view(np.uint64)
            np.bitwise_and(high, np.uint64(0xFFFF_FFFF), out=low)
            np.right_shift(high, np.uint64(32), out=high)
            np.multiply(low, high, out=low)
            np.sum(low, axis=1, out=out[:, index])


class HashTracker(DirtyTracker):
    """See the module's theory of operation."""

    name = "hash"
    needs_staging = True

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._hasher: PageHasher | None = None
        self._hashes = np.empty((0, 2), dtype=np.uint64)
        self._sent = np.empty(0, dtype=bool)
        self._cleared: list[PageRuns] = []
        self._gathered = np.empty((0, _WORDS), dtype=np.uint64)
        self._found = np.empty((0, 2), dtype=np.uint64)

    def start(self) -> None:
        self.stop()
        self._hasher = PageHasher()
        # numpy.zeros takes host memory only for the pages of these arrays that are written: 16 bytes a page sent
        self._hashes = np.zeros((self._memory.pages, 2), dtype=np.uint64)
        self._sent = np.zeros(self._memory.pages, dtype=bool)
        self._gathered = np.empty((_CHUNK_PAGES, _WORDS), dtype=np.uint64)
        self._found = np.empty((_CHUNK_PAGES, 2), dtype=np.uint64)
        self._memory.clear_observers.append(self._cleared.append)

    def _started(self) -> PageHasher:
        if self._hasher is None:
            raise MachineError("dirty tracking has not been started.")
        return self._hasher

    def _words(self) -> Words:
        return np.frombuffer(self._memory.buffer, dtype=np.uint64).reshape(-1, _WORDS)

    def collect(self) -> PageRuns:
        """As the base class says, with "written" meaning "differs from what was last staged, or never staged"."""
        hasher = self._started()
        words = self._words()
        dirty = [pages.empty()]
        touched = self._memory.touched_ranges()
        for chunk in pages.batches(touched, _CHUNK_PAGES * PAGE_SIZE):
            numbers = pages.to_numbers(chunk).astype(np.intp)
            sent = self._sent[numbers]
            known = numbers[sent]
            if len(known):
                rows = self._gathered[: len(known)]
                np.take(words, known, axis=0, out=rows, mode="clip")
                found = self._found[: len(known)]
                hasher.hash(rows, found)
                same = (found == self._hashes[known]).all(axis=1)
                sent[np.flatnonzero(sent)[~same]] = False
            if not sent.all():
                stale = numbers[~sent]
                self._sent[stale] = False
                dirty.append(pages.from_numbers(stale.astype(np.uint64)))
        # Cleared pages may be holes now, which are not looked at above.
        while self._cleared:
            cleared = self._cleared.pop()
            for chunk in pages.batches(cleared, _CHUNK_PAGES * PAGE_SIZE):
                self._sent[pages.to_numbers(chunk).astype(np.intp)] = False
            dirty.append(cleared)
        return pages.merge(np.concatenate(dirty))

    def stage(self, runs: PageRuns, into: memoryview) -> int:
        """Raises ValueError when `into` is too short."""
        hasher = self._started()
        total = pages.count(runs)
        if into.nbytes < total * PAGE_SIZE:
            raise ValueError(f"{total} pages do not fit into {into.nbytes} bytes")
        words = self._words()
        copy = np.frombuffer(into, dtype=np.uint64, count=total * _WORDS).reshape(-1, _WORDS)
        at = 0
        for chunk in pages.batches(runs, _CHUNK_PAGES * PAGE_SIZE):
            numbers = pages.to_numbers(chunk).astype(np.intp)
            rows = copy[at : at + len(numbers)]
            np.take(words, numbers, axis=0, out=rows, mode="clip")
            found = self._found[: len(numbers)]
            hasher.hash(rows, found)
            self._hashes[numbers] = found
            self._sent[numbers] = True
            at += len(numbers)
        return total * PAGE_SIZE

    def stop(self) -> None:
        if self._cleared.append in self._memory.clear_observers:
            self._memory.clear_observers.remove(self._cleared.append)
        self._cleared.clear()
        self._hasher = None
        self._hashes = np.empty((0, 2), dtype=np.uint64)
        self._sent = np.empty(0, dtype=bool)
        self._gathered = np.empty((0, _WORDS), dtype=np.uint64)
        self._found = np.empty((0, 2), dtype=np.uint64)
