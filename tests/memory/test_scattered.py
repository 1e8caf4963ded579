"""Pieces of guest RAM as one list of buffers: the same whether looked at as views or as iovecs."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmf.memory.guest import GuestMemory
from vmf.memory.scattered import RamRanges, total_bytes

SIZE = 1 << 20


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    ram = GuestMemory(SIZE)
    ram.buffer[:] = np.random.default_rng(1).bytes(SIZE)
    yield ram
    ram.close()


pieces = st.lists(st.tuples(st.integers(0, SIZE - 9000), st.integers(1, 9000)), min_size=1, max_size=20)


@given(rows=pieces, first=st.integers(-22, 22), end=st.integers(-22, 22))
def test_it_is_a_sequence_of_views(memory: GuestMemory, rows: list[tuple[int, int]], first: int, end: int) -> None:
    views = [memory.buffer[start : start + length] for start, length in rows]
    ranges = RamRanges(memory, np.array(rows, dtype=np.uint64))
    assert len(ranges) == len(views)
    assert list(ranges) == views
    assert [ranges[n] for n in range(-len(views), len(views))] == views * 2
    part = ranges[first:end]
    assert isinstance(part, RamRanges)
    assert list(part) == views[first:end]
    assert total_bytes(part) == total_bytes(views[first:end]) == part.nbytes
    assert total_bytes(ranges) == total_bytes(views)
    with pytest.raises(IndexError):
        ranges[len(views)]


@given(rows=pieces)
def test_iovecs_are_the_same_memory(memory: GuestMemory, rows: list[tuple[int, int]]) -> None:
    ranges = RamRanges(memory, np.array(rows, dtype=np.uint64))
    found = [ctypes.string_at(address, length) for address, length in ranges.iovecs().tolist()]
    assert found == [bytes(view) for view in ranges]


def test_it_keeps_the_mapping() -> None:
    """Storage that still writes into RAM when the machine is gone must not write into what came after it."""
    ram = GuestMemory(SIZE)
    ranges = RamRanges(ram, np.array([(4096, 4096)], dtype=np.uint64))
    ram.close()
    ((address, length),) = ranges.iovecs().tolist()
    ctypes.memset(address, 0x5A, length)
    assert bytes(ranges[0]) == b"\x5a" * 4096
