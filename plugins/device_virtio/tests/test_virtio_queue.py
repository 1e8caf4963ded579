"""Virtqueues against drivers that make mistakes, or worse."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmf.memory.guest import GuestMemory
from vmf.memory.scattered import RamRanges, total_bytes
from vmf_device_virtio import queue as queue_module
from vmf_device_virtio.queue import QueueError, Virtqueue

SIZE = 8
DESC, AVAIL, USED, DATA, TABLE = 0x1000, 0x2000, 0x3000, 0x4000, 0x8000


@pytest.fixture
def queue(memory: GuestMemory) -> Virtqueue:
    memory.write(DESC, bytes(0x4000))
    made = Virtqueue(memory, SIZE)
    made.desc, made.driver, made.device = DESC, AVAIL, USED
    made.start(event_index=True)
    return made


def put(memory: GuestMemory, index: int, *row: int, table: int = DESC) -> None:
    memory.write(table + 16 * index, struct.pack("<QIHH", *row))


def offer(memory: GuestMemory, *heads: int, index: int | None = None) -> None:
    memory.write(AVAIL, struct.pack(f"<HH{len(heads)}H", 0, len(heads) if index is None else index, *heads))


def test_a_chain_with_an_indirect_table(queue: Virtqueue, memory: GuestMemory) -> None:
    memory.write(DATA, b"to the device")
    put(memory, 3, DATA + 0x100, 48, 4, 0)
    put(memory, 0, DATA, 13, 1, 2, table=DATA + 0x100)
    put(memory, 2, DATA + 0x800, 0x100, 3, 1, table=DATA + 0x100)
    put(memory, 1, DATA + 0x900, 0x100, 2, 0, table=DATA + 0x100)
    offer(memory, 3)
    chain = queue.pop()
    assert chain is not None
    assert chain.head == 3
    assert [bytes(view) for view in chain.readable] == [b"to the device"]
    assert [len(view) for view in chain.writable] == [0x100, 0x100]
    assert chain.ranges == [(DATA + 0x800, 0x200)], "neighbours are one range"
    assert queue.pop() is None


def ordinary(rows: list[tuple[int, int]], readable: int) -> list[list[int]]:
    """A table as drivers write it: address, length, flags, next; the last one's next says nothing."""
    flags = [0 if n < readable else 2 for n in range(len(rows))]
    return [[*row, flags[n] | (n < len(rows) - 1), n + 1] for n, row in enumerate(rows)]


buffers = st.tuples(st.integers(0, (16 << 20) - 70000), st.integers(1, 70000))
spoilt = st.tuples(
    st.integers(0, 299), st.integers(0, 3),
    st.one_of(st.sampled_from([0, 1, 2, 3, 4, 5, 0xFFFF, 16 << 20, (16 << 20) - 8]), st.integers(0, (1 << 64) - 1)),
)  # fmt: skip


@pytest.mark.skipif(queue_module.take is None, reason="no compiler where it was installed: there is only one way")
@settings(max_examples=400, deadline=None)
@given(
    rows=st.lists(buffers, min_size=1, max_size=300), readable=st.integers(0, 300), spoil=st.lists(spoilt, max_size=2)
)
def test_long_tables_are_taken_apart_alike(
    memory: GuestMemory, rows: list[tuple[int, int]], readable: int, spoil: list[tuple[int, int, int]]
) -> None:
    """At once and one by one: the same buffers, and the same mistakes are found."""
    table = ordinary(rows, min(readable, len(rows)))
    for index, column, value in spoil:
        table[index % len(table)][column] = value & ((1 << 64) - 1, (1 << 32) - 1, 0xFFFF, 0xFFFF)[column]
    memory.write(DESC, bytes(0x4000))
    for index, row in enumerate(table):
        put(memory, index, *row, table=TABLE)
    put(memory, 0, TABLE, 16 * len(table), 4, 0)
    offer(memory, 0)
    seen: list[Any] = []
    for threshold in (1, 1 << 20):
        queue = Virtqueue(memory, SIZE)
        queue.desc, queue.driver, queue.device = DESC, AVAIL, USED
        queue.start(event_index=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(queue_module, "LONG_TABLE", threshold)
            try:
                chain = queue.pop()
            except QueueError as error:
                seen.append(str(error))
                continue
        assert chain is not None
        pieces = chain.ranges if isinstance(chain.ranges, list) else chain.ranges.tolist()
        written = [gpa + n for gpa, size in pieces for n in (0, size - 1)]
        seen.append(
            (list(chain.readable), list(chain.writable), total_bytes(chain.readable), sum(s for _, s in pieces))
        )
        assert all(0 <= gpa < memory.size for gpa in written)
    assert seen[0] == seen[1]
    if not spoil:
        assert not isinstance(seen[0], str)


def test_an_ordinary_long_table_is_taken_apart_at_once(queue: Virtqueue, memory: GuestMemory) -> None:
    rows = ordinary([(0x10_0000 + 0x8000 * n, 0x4000) for n in range(60)], 1)
    for index, row in enumerate(rows):
        put(memory, index, *row, table=TABLE)
    put(memory, 0, TABLE, 16 * len(rows), 4, 0)
    offer(memory, 0)
    chain = queue.pop()
    assert chain is not None
    assert isinstance(chain.writable, RamRanges) == (queue_module.take is not None)
    assert total_bytes(chain.writable) == 59 * 0x4000


BAD = {
    "a loop": [(DATA, 16, 1, 1), (DATA, 16, 1, 0)],
    "beyond the table": [(DATA, 16, 1, SIZE)],
    "outside of RAM": [(1 << 40, 16, 0, 0)],
    "over the end of RAM": [((16 << 20) - 8, 16, 0, 0)],
    "wrapping around": [((1 << 64) - 8, 16, 0, 0)],
    "empty": [(DATA, 0, 0, 0)],
    "readable behind writable": [(DATA, 16, 3, 1), (DATA, 16, 0, 0)],
    "indirect with next": [(DATA, 16, 5, 1), (DATA, 16, 0, 0)],
    "indirect of an odd size": [(DATA, 15, 4, 0)],
    "indirect outside of RAM": [(1 << 40, 16, 4, 0)],
    "indirect in indirect": [(DESC, 16, 4, 0)],
}


@pytest.mark.parametrize("rows", BAD.values(), ids=BAD)
def test_bad_chains(queue: Virtqueue, memory: GuestMemory, rows: list[tuple[int, int, int, int]]) -> None:
    for index, row in enumerate(rows):
        put(memory, index, *row)
    offer(memory, 0)
    with pytest.raises(QueueError):
        queue.pop()


def test_bad_indices(queue: Virtqueue, memory: GuestMemory) -> None:
    offer(memory, SIZE)
    with pytest.raises(QueueError, match="descriptor 8"):
        queue.pop()
    offer(memory, 0, index=SIZE + 2)
    with pytest.raises(QueueError, match="requests in a queue"):
        queue.pop()


@pytest.mark.parametrize("place", ["desc", "driver", "device"])
@pytest.mark.parametrize("gpa", [(16 << 20) - 2, 1 << 33, (1 << 64) - 64])
def test_rings_must_be_ram(memory: GuestMemory, place: str, gpa: int) -> None:
    queue = Virtqueue(memory, SIZE)
    queue.desc, queue.driver, queue.device = DESC, AVAIL, USED
    setattr(queue, place, gpa)
    with pytest.raises(QueueError, match="not RAM"):
        queue.start(event_index=True)


@given(start=st.integers(0, 0xFFFF), pushes=st.integers(1, SIZE), event=st.integers(-SIZE, SIZE))
def test_event_index(memory: GuestMemory, start: int, pushes: int, event: int) -> None:
    """An interrupt exactly when the index passes the one that the driver named, also around the wrap."""
    queue = Virtqueue(memory, SIZE)
    queue.desc, queue.driver, queue.device = DESC, AVAIL, USED
    queue.used_index = start
    queue.start(event_index=True)
    memory.write(AVAIL + 4 + 2 * SIZE, struct.pack("<H", start + event & 0xFFFF))
    for _ in range(pushes):
        queue.push(0, 0)
    assert queue.wants_interrupt() == (0 <= event < pushes)
    assert not queue.wants_interrupt(), "asked twice"


@settings(max_examples=500)
@given(
    rows=st.lists(
        st.tuples(
            st.one_of(st.integers(0, (1 << 64) - 1), st.sampled_from([DESC, DATA, DATA + 64])),
            st.one_of(st.integers(0, (1 << 32) - 1), st.sampled_from([16, 32, 128])),
            st.integers(0, 7),
            st.integers(0, SIZE + 1),
        ),
        max_size=SIZE,
    ),
    heads=st.lists(st.integers(0, SIZE), max_size=SIZE),
)
def test_whatever_the_rings_say(memory: GuestMemory, rows: list[Any], heads: list[int]) -> None:
    """Views of RAM or a QueueError, and nothing else."""
    memory.write(DESC, bytes(0x4000))
    queue = Virtqueue(memory, SIZE)
    queue.desc, queue.driver, queue.device = DESC, AVAIL, USED
    queue.start(event_index=False)
    for index, row in enumerate(rows):
        put(memory, index, *row)
        put(memory, index, *row, table=DATA)
    offer(memory, *heads)
    try:
        while (chain := queue.pop()) is not None:
            total = sum(len(view) for view in chain.writable)
            assert total == sum(size for _, size in chain.ranges)
            assert all(gpa + size <= memory.size for gpa, size in chain.ranges)
    except QueueError:
        pass
