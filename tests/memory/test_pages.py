"""Page-run arithmetic against naive sets of page numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmf.memory import pages
from vmf.memory.dirty import PageRuns
from vmf.memory.guest import PAGE_SIZE

rows = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=12)


def as_runs(pairs: list[tuple[int, int]]) -> PageRuns:
    return np.array(pairs, dtype=np.uint64).reshape(-1, 2)


def as_set(runs: PageRuns) -> set[int]:
    return {page for first, end in runs.tolist() for page in range(first, end)}


def assert_normal(runs: PageRuns) -> None:
    assert runs.dtype == np.uint64
    assert runs.ndim == 2
    assert runs.shape[1] == 2
    assert (runs[:, 1] > runs[:, 0]).all()
    assert (runs[1:, 0] > runs[:-1, 1]).all()


@given(rows)
def test_merge_is_the_same_set_in_normal_form(pairs: list[tuple[int, int]]) -> None:
    merged = pages.merge(as_runs(pairs))
    assert_normal(merged)
    assert as_set(merged) == as_set(as_runs(pairs))
    assert pages.count(merged) == len(as_set(merged))


@given(rows, rows)
def test_set_operations(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> None:
    left, right = as_runs(a), as_runs(b)
    for operation, expected in (
        (pages.union, as_set(left) | as_set(right)),
        (pages.intersect, as_set(left) & as_set(right)),
        (pages.subtract, as_set(left) - as_set(right)),
    ):
        result = operation(left, right)
        assert_normal(result)
        assert as_set(result) == expected


@given(rows)
def test_conversions_round_trip(pairs: list[tuple[int, int]]) -> None:
    runs = pages.merge(as_runs(pairs))
    mask = pages.to_mask(runs, 64)
    assert set(np.flatnonzero(mask).tolist()) == as_set(runs)
    for again in (
        pages.from_mask(mask),
        pages.from_numbers(pages.to_numbers(runs)),
        pages.from_byte_ranges(pages.to_byte_ranges(runs)),
    ):
        assert again.dtype == np.uint64
        assert again.tolist() == runs.tolist()


@given(rows, st.integers(1, 9), st.one_of(st.none(), st.integers(1, 3)))
def test_batches_are_bounded_full_and_in_order(pairs: list[tuple[int, int]], limit: int, max_runs: int | None) -> None:
    runs = pages.merge(as_runs(pairs))
    cut = list(pages.batches(runs, limit * PAGE_SIZE + 17, max_runs))
    assert [page for batch in cut for first, end in batch.tolist() for page in range(first, end)] == sorted(
        as_set(runs)
    )
    for batch in cut:
        assert 0 < pages.count(batch) <= limit
        assert max_runs is None or len(batch) <= max_runs
    if max_runs is None:
        assert all(pages.count(batch) == limit for batch in cut[:-1])


def test_batches_refuse_less_than_a_page() -> None:
    with pytest.raises(ValueError, match="less than one page"):
        list(pages.batches(pages.full(3), PAGE_SIZE - 1))


@given(rows, st.sets(st.integers(0, 59)), st.integers(0, PAGE_SIZE - 1))
def test_split_zero_small(pairs: list[tuple[int, int]], dirty: set[int], byte: int) -> None:
    memory = bytearray(60 * PAGE_SIZE)
    for page in dirty:
        memory[page * PAGE_SIZE + byte] = 1
    runs = pages.merge(as_runs(pairs))
    data, zero = pages.split_zero(memoryview(memory), runs)
    assert_normal(data)
    assert_normal(zero)
    assert as_set(data) == as_set(runs) & dirty
    assert as_set(zero) == as_set(runs) - dirty


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99, 1.0])
def test_split_zero_large_crosses_every_chunk_boundary(share: float) -> None:
    """More pages than one group, long and single-page runs, a single set bit anywhere in the page."""
    total = pages._GROUP_PAGES + 3000
    random = np.random.default_rng(7)
    memory = np.zeros((total, PAGE_SIZE // 8), dtype=np.uint64)
    dirty = np.flatnonzero(random.random(total) < share)
    memory[dirty, random.integers(0, PAGE_SIZE // 8, len(dirty))] = np.uint64(1) << random.integers(
        0, 64, len(dirty), dtype=np.uint64
    )
    asked = random.random(total) < 0.7
    asked[5000:60000] = True
    expected = np.zeros(total, dtype=bool)
    expected[dirty] = True
    data, zero = pages.split_zero(memory.data.cast("B"), pages.from_mask(asked))
    assert np.array_equal(pages.to_mask(data, total), asked & expected)
    assert np.array_equal(pages.to_mask(zero, total), asked & ~expected)


@given(rows, st.booleans())
def test_marks_are_set_on_the_pages_and_nowhere_else(pairs: list[tuple[int, int]], value: bool) -> None:
    runs = as_runs([(min(pair), max(pair)) for pair in pairs])
    flags = np.full(61, not value)
    pages.mark(flags, runs, value)
    assert set(np.flatnonzero(flags == value).tolist()) == as_set(runs)


def test_mostly_data_has_looked_at_every_run() -> None:
    memory = np.ones(64 * PAGE_SIZE, dtype=np.uint8)
    everything = as_runs([(0, 40), (48, 64)])
    assert pages.mostly_data(memory.data, everything)
    assert not pages.mostly_data(memory.data, as_runs([(page, page + 1) for page in range(0, 64, 2)])), "not worth it"
    for first in (0, 48):
        memory[:] = 1
        memory[first * PAGE_SIZE : (first + 8) * PAGE_SIZE] = 0  # as long as the steps in which it looks
        assert not pages.mostly_data(memory.data, everything)
