"""Sets of pages as NumPy arrays of runs, and the arithmetic on them.

A *run* is a row `[first page, end page)`; `PageRuns` is an array of them, shape (n, 2), dtype uint64. A *normal*
array is ascending, disjoint, without empty rows, and neighbours do not touch; `merge` makes any array normal, and
every function here that returns runs returns a normal array (except `batches`, whose cuts are the point).

Nothing here loops over pages or runs in Python, and nothing allocates in proportion to guest RAM: what is looked at
page by page goes through scratch arrays that fit the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from vmf.memory.dirty import PageRuns
from vmf.memory.guest import PAGE_SIZE

ByteRanges = npt.NDArray[np.uint64]
"""Shape (n, 2): offset and length in bytes, as `vmf.transport.Channel.send_ranges` takes them."""
PageNumbers = npt.NDArray[np.uint64]

_WORDS = PAGE_SIZE // 8
_SCAN_PAGES = 256
"""Pages looked at in one NumPy call: 1 MiB, so that a gathered copy is still in the cache when it is reduced."""
_SLICE_RUNS = 8
"""A scan chunk of at most this many runs is reduced run by run in place; of more, it is gathered first."""
_SAMPLED = 8
"""Of so many neighbours `mostly_data` looks at one."""
_GROUP_PAGES = 1 << 16
"""Pages whose page numbers are held as an array at the same time (512 KiB)."""


def empty() -> PageRuns:
    """No page at all."""
    return np.empty((0, 2), dtype=np.uint64)


def full(pages: int) -> PageRuns:
    """The pages 0 to `pages`-1."""
    return np.array([[0, pages]] if pages else [], dtype=np.uint64).reshape(-1, 2)


def count(runs: PageRuns) -> int:
    """Number of pages."""
    return int((runs[:, 1] - runs[:, 0]).sum()) if len(runs) else 0


def merge(runs: PageRuns) -> PageRuns:
    """The normal form of any rows: sorted, overlapping and touching rows made one, empty rows dropped."""
    runs = runs[runs[:, 1] > runs[:, 0]]
    if len(runs) < 2:
        return runs
    first, end = runs[:, 0], runs[:, 1]
    if np.any(first[1:] < first[:-1]):
        runs = runs[np.argsort(first, kind="stable")]
        first, end = runs[:, 0], runs[:, 1]
    reach = np.maximum.accumulate(end)
    opens = np.empty(len(runs), dtype=bool)
    opens[0] = True
    np.greater(first[1:], reach[:-1], out=opens[1:])
    starts = np.flatnonzero(opens)
    if len(starts) == len(runs):
        return runs
    lasts = np.append(starts[1:], len(runs)) - 1
    return np.stack((first[starts], reach[lasts]), axis=1)


def mark(flags: npt.NDArray[np.bool_], runs: PageRuns, value: bool) -> None:
    """Set the elements of these pages."""
    if len(runs) <= _SLICE_RUNS:
        for first, end in runs.tolist():
            flags[first:end] = value
    else:
        flags[to_numbers(runs).astype(np.intp)] = value


def _combine(a: PageRuns, b: PageRuns, sign: int, level: int) -> PageRuns:
    """Pages where `in a + sign * in b` equals `level`, by one sweep over all edges of both (normal) arrays."""
    edges = np.concatenate((a[:, 0], a[:, 1], b[:, 0], b[:, 1]))
    steps = np.concatenate(
        (
            np.ones(len(a), dtype=np.int8),
            np.full(len(a), -1, dtype=np.int8),
            np.full(len(b), sign, dtype=np.int8),
            np.full(len(b), -sign, dtype=np.int8),
        )
    )
    order = np.argsort(edges, kind="stable")
    edges = edges[order]
    depth = np.cumsum(steps[order], dtype=np.int8)
    # Of several edges at the same page only the last one's depth is true; the rows between them are empty.
    hit = np.flatnonzero((depth[:-1] == level) & (edges[1:] > edges[:-1]))
    return merge(np.stack((edges[hit], edges[hit + 1]), axis=1))


def union(a: PageRuns, b: PageRuns) -> PageRuns:
    """Pages in either."""
    return merge(np.concatenate((a, b)))


def intersect(a: PageRuns, b: PageRuns) -> PageRuns:
    """Pages in both."""
    a, b = merge(a), merge(b)
    return _combine(a, b, 1, 2) if len(a) and len(b) else empty()


def subtract(a: PageRuns, b: PageRuns) -> PageRuns:
    """Pages of `a` that are not in `b`."""
    a, b = merge(a), merge(b)
    return _combine(a, b, -1, 1) if len(a) and len(b) else a


def from_numbers(numbers: PageNumbers) -> PageRuns:
    """Runs of ascending, distinct page numbers."""
    if not len(numbers):
        return empty()
    cuts = np.flatnonzero(np.diff(numbers) != 1)
    first = np.concatenate((numbers[:1], numbers[cuts + 1]))
    end = np.concatenate((numbers[cuts], numbers[-1:])) + np.uint64(1)
    return np.stack((first, end), axis=1).astype(np.uint64, copy=False)


def to_numbers(runs: PageRuns) -> PageNumbers:
    """Every page number, in order: 8 bytes a page, so cut large sets with `batches` first."""
    lengths = (runs[:, 1] - runs[:, 0]).astype(np.int64)
    total = int(lengths.sum())
    before = np.cumsum(lengths) - lengths
    shift = np.repeat(runs[:, 0].astype(np.int64) - before, lengths)
    return (shift + np.arange(total, dtype=np.int64)).astype(np.uint64)


def from_mask(mask: npt.NDArray[np.bool_]) -> PageRuns:
    """Runs of the pages whose element is true."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    return edges.reshape(-1, 2).astype(np.uint64)


def to_mask(runs: PageRuns, pages: int) -> npt.NDArray[np.bool_]:
    """One bool for each of the pages 0 to `pages`-1. Raises IndexError for a page beyond them."""
    runs = merge(runs)
    steps = np.zeros(pages + 1, dtype=np.int8)
    steps[runs[:, 0].astype(np.int64)] += 1
    steps[runs[:, 1].astype(np.int64)] -= 1
    return np.cumsum(steps[:-1], dtype=np.int8).astype(bool)


def to_byte_ranges(runs: PageRuns) -> ByteRanges:
    """The same memory as (offset, length) in bytes."""
    return np.stack((runs[:, 0], runs[:, 1] - runs[:, 0]), axis=1) * np.uint64(PAGE_SIZE)


def from_byte_ranges(ranges: ByteRanges) -> PageRuns:
    """The pages that (offset, length) rows in bytes touch, wholly or in part."""
    ranges = ranges[ranges[:, 1] > 0]
    first = ranges[:, 0] // np.uint64(PAGE_SIZE)
    end = (ranges[:, 0] + ranges[:, 1] + np.uint64(PAGE_SIZE - 1)) // np.uint64(PAGE_SIZE)
    return merge(np.stack((first, end), axis=1))


def batches(runs: PageRuns, max_bytes: int, max_runs: int | None = None) -> Iterator[PageRuns]:
    """Cut runs, in order, into arrays of at most `max_bytes` (and `max_runs` rows); none is empty.

    Every batch but the last holds exactly `max_bytes`, rounded down to pages, unless `max_runs` cuts it shorter.
    `max_bytes` is at least one page. The cuts are made for `_GROUP_PAGES`-sized pieces of the input at a time, so the
    memory needed does not grow with the set.
    """
    limit = max_bytes // PAGE_SIZE
    if limit < 1:
        raise ValueError(f"max_bytes {max_bytes} is less than one page of {PAGE_SIZE} bytes")
    if max_runs is not None and max_runs < 1:
        raise ValueError(f"max_runs {max_runs} is less than 1")
    runs = runs[runs[:, 1] > runs[:, 0]]
    if not len(runs):
        return
    lengths = (runs[:, 1] - runs[:, 0]).astype(np.int64)
    ends = np.cumsum(lengths)
    total = int(ends[-1])
    step = max_runs if max_runs is not None else len(runs) + 1
    position = 0
    row = 0  # the row that holds the page at `position`
    while position < total:
        last = min(position + limit, total)
        stop = int(np.searchsorted(ends, last, side="left")) + 1
        batch = runs[row:stop].copy()
        batch[0, 0] = runs[row, 1] - np.uint64(int(ends[row]) - position)
        batch[-1, 1] = runs[stop - 1, 1] - np.uint64(int(ends[stop - 1]) - last)
        for start in range(0, len(batch), step):
            yield batch[start : start + step]
        position = last
        row = stop - 1 if last < int(ends[stop - 1]) else stop


def _gathered_zero(
    words: npt.NDArray[np.uint64], numbers: npt.NDArray[np.intp], scratch: npt.NDArray[np.uint64]
) -> npt.NDArray[np.bool_]:
    """Which of the rows `numbers` hold zeros only. Fresh memory would cost page faults: `scratch`."""
    rows = scratch[: len(numbers)]
    np.take(words, numbers, axis=0, out=rows, mode="clip")
    return _zero_in_place(rows)


def _zero_in_place(rows: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    # with keepdims, as that is the call which the type stubs of every NumPy accept
    return np.asarray(np.bitwise_or.reduce(rows, axis=1, keepdims=True).ravel() == 0)


def _zero_rows(words: npt.NDArray[np.uint64], scratch: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Which rows of a (pages, words) array hold zeros only.

    The first word of each row is looked at first: where it is not zero the other 63 cache lines of the page are not
    touched at all. Too few candidates left are gathered, many are reduced in place with the rest.
    """
    zero: npt.NDArray[np.bool_] = words[:, 0] == 0
    candidates = np.flatnonzero(zero)
    if len(candidates) * 2 > len(words):
        return _zero_in_place(words)
    if len(candidates):
        zero[candidates] = _gathered_zero(words, candidates, scratch)
    return zero


def _zero_numbers(
    words: npt.NDArray[np.uint64], batch: PageRuns, out: npt.NDArray[np.bool_], scratch: npt.NDArray[np.uint64]
) -> None:
    """Set `out[i]` to whether the batch's i-th page is zero; a batch is at most `_SCAN_PAGES` pages."""
    if len(batch) <= _SLICE_RUNS:
        at = 0
        for first, end in batch.tolist():
            out[at : at + end - first] = _zero_rows(words[first:end], scratch)
            at += end - first
        return
    numbers = to_numbers(batch).astype(np.intp)
    zero: npt.NDArray[np.bool_] = words[numbers, 0] == 0
    candidates = np.flatnonzero(zero)
    if len(candidates):
        zero[candidates] = _gathered_zero(words, numbers[candidates], scratch)
    out[:] = zero


def mostly_data(buffer: memoryview, runs: PageRuns) -> bool:
    """Whether a look at some of these pages finds none that may be zero; False without a look at many short runs.

    Where memory is full, a look at every page costs as much as sending some more of them: each is a miss in every
    cache. Who sends them all then sends a few zero pages as data at most, which is no harm.
    """
    if len(runs) > _SLICE_RUNS:
        return False
    words = np.frombuffer(buffer, dtype=np.uint64).reshape(-1, _WORDS)
    return all(bool(words[first:end:_SAMPLED, 0].all()) for first, end in runs.tolist())


def split_zero(buffer: memoryview, runs: PageRuns) -> tuple[PageRuns, PageRuns]:
    """Part (normal) runs into those that hold data and those that are all zeros: (data, zero).

    `buffer` is the whole RAM mapping. Pages that were never touched should have been left out of `runs` before
    (`GuestMemory.touched_ranges`): merely reading a hole of a memfd makes the host allocate that page.

    Pages may change while this looks at them: a page is called zero only if every word was zero when it was read, so
    a later write is for the dirty tracker to report.
    """
    words = np.frombuffer(buffer, dtype=np.uint64).reshape(-1, _WORDS)
    data: list[PageRuns] = [empty()]
    zeros: list[PageRuns] = [empty()]
    mask = np.empty(_GROUP_PAGES, dtype=bool)
    scratch = np.empty((_SCAN_PAGES, _WORDS), dtype=np.uint64)
    for group in batches(runs, _GROUP_PAGES * PAGE_SIZE):
        at = 0
        for chunk in batches(group, _SCAN_PAGES * PAGE_SIZE):
            pages = count(chunk)
            _zero_numbers(words, chunk, mask[at : at + pages], scratch)
            at += pages
        flags = mask[:at]
        if not flags.any():
            data.append(group)
        elif flags.all():
            zeros.append(group)
        else:
            numbers = to_numbers(group)
            data.append(from_numbers(numbers[~flags]))
            zeros.append(from_numbers(numbers[flags]))
    return merge(np.concatenate(data)), merge(np.concatenate(zeros))
