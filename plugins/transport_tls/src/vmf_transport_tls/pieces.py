"""Ranges of guest RAM in pieces that suit encryption.

A TLS record holds at most 16 KiB, and each call of the TLS library makes or reads at most one. Scattered single pages
are therefore gathered (and scattered) by NumPy in a small buffer that stays in the processor's cache, 128 pages at a
time, and long runs are encrypted from guest RAM and decrypted into it without any copy in between.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from vmf.memory.guest import PAGE_SIZE
from vmf.transport.base import ByteRanges

GATHER_PAGES = 128
LONG_BYTES = 64 << 10
"""Runs from this length on go without the gathering copy."""

PageIndexes = npt.NDArray[np.intp]


def pieces(size: int, ranges: ByteRanges) -> Iterator[tuple[int, int] | PageIndexes]:
    """What to move, in order: (offset, length) of a run, or the indexes of up to `GATHER_PAGES` pages.

    Raises ValueError for a range that leaves a buffer of `size` bytes.
    """
    if not len(ranges):
        return
    offset, length = ranges[:, 0], ranges[:, 1]
    limit = np.uint64(size)
    if bool(((offset > limit) | (length > limit - np.minimum(offset, limit))).any()):
        raise ValueError(f"a byte range leaves the buffer of {size} bytes")
    page = np.uint64(PAGE_SIZE)
    short = (length < np.uint64(LONG_BYTES)) & (offset % page == 0) & (length % page == 0)
    edges = np.flatnonzero(np.diff(short)) + 1
    for first, last in zip([0, *edges.tolist()], [*edges.tolist(), len(ranges)], strict=True):
        if not short[first]:
            yield from map(tuple, ranges[first:last].tolist())
            continue
        starts = (offset[first:last] // page).astype(np.intp)
        counts = (length[first:last] // page).astype(np.intp)
        before = np.cumsum(counts) - counts
        indexes = np.repeat(starts - before, counts) + np.arange(int(counts.sum()), dtype=np.intp)
        for at in range(0, len(indexes), GATHER_PAGES):
            yield indexes[at : at + GATHER_PAGES]


def page_rows(base: memoryview) -> npt.NDArray[np.uint8]:
    """The whole pages of a buffer as rows, in place."""
    whole = np.frombuffer(base, dtype=np.uint8)
    return whole[: whole.size // PAGE_SIZE * PAGE_SIZE].reshape(-1, PAGE_SIZE)
