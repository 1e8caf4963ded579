"""Guest RAM: what exists of it, how it is given back, and that the two ways to find out agree."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmf.errors import ConfigError, MachineError
from vmf.memory import pagemap, pages
from vmf.memory.guest import HIGH_RAM_BASE, HUGE_PAGE_SIZE, LOW_RAM_LIMIT, MIB, PAGE_SIZE, GuestMemory


@pytest.mark.parametrize("huge", [False, True])
def test_only_what_was_written_exists(huge: bool) -> None:
    memory = GuestMemory(64 * MIB, huge_pages=huge)
    assert memory.touched_ranges().tolist() == []
    assert memory.buffer[40 * MIB] == 0  # a read brings nothing to life
    assert 40 * MIB // PAGE_SIZE not in pages.to_numbers(memory.touched_ranges())
    memory.buffer[5 * MIB] = 1
    memory.buffer[memory.size - 1] = 1
    touched = pages.to_numbers(memory.touched_ranges()).tolist()
    assert {5 * MIB // PAGE_SIZE, memory.pages - 1} <= set(touched)
    if not huge:
        assert len(touched) == 2
    memory.clear()
    assert memory.touched_ranges().tolist() == []
    assert memory.buffer[5 * MIB] == 0
    memory.close()


def test_the_mapping_is_aligned_for_huge_pages() -> None:
    for size in (PAGE_SIZE, 3 * MIB, 64 * MIB):
        memory = GuestMemory(size)
        assert memory.address % HUGE_PAGE_SIZE == 0
        assert len(memory.buffer) == size
        memory.buffer[:4] = b"\1\2\3\4"
        assert os.pread(os.open("/proc/self/mem", os.O_RDONLY), 4, memory.address) == b"\1\2\3\4"
        memory.close()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1023), st.integers(1, 40)), max_size=20), st.booleans())
def test_both_ways_to_find_existing_pages_agree(writes: list[tuple[int, int]], huge: bool) -> None:
    memory = GuestMemory(1024 * PAGE_SIZE, huge_pages=huge)
    for first, count in writes:
        end = min(first + count, 1024)
        memory.buffer[first * PAGE_SIZE : end * PAGE_SIZE] = b"\x01" * ((end - first) * PAGE_SIZE)
    page_map = pagemap.PageMap()
    slow = pages.merge(page_map.existing_by_entries(memory.address, 0, memory.pages))
    assert slow.tolist() == memory.touched_ranges().tolist()
    page_map.close()
    memory.close()


def test_a_part_is_given_back() -> None:
    memory = GuestMemory(8 * MIB, huge_pages=False)
    words = np.frombuffer(memory.buffer, dtype=np.uint64).reshape(-1, 512)
    words[:, 0] = 7
    memory.give_back(10, 20)
    assert not words[10:20].any()
    assert words[9, 0] == words[20, 0] == 7
    memory.close()


def test_ram_above_the_hole() -> None:
    memory = GuestMemory(LOW_RAM_LIMIT + 16 * MIB)
    memory.write(HIGH_RAM_BASE, b"high")
    assert bytes(memory.buffer[LOW_RAM_LIMIT : LOW_RAM_LIMIT + 4]) == b"high"
    with pytest.raises(MachineError, match="not RAM"):
        memory.read(LOW_RAM_LIMIT - 2, 4)
    memory.close()


def test_a_wrong_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="4097"):
        GuestMemory(4097)
