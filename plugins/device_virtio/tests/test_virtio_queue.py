"""Virtqueues against drivers that make mistakes, or worse."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmf.memory.guest import HIGH_RAM_BASE, LOW_RAM_LIMIT, GuestMemory
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


LOW, HIGH = LOW_RAM_LIMIT, HIGH_RAM_BASE
Row = list[int]
Layout = tuple[list[Row], list[Row]]
"""The queue's own table, and an indirect one."""


@pytest.fixture(scope="module")
def two_regions() -> Iterator[GuestMemory]:
    """RAM below the hole and 1 MiB above it, so that not all of RAM is within the fast path's reach."""
    memory = GuestMemory(LOW + (1 << 20), huge_pages=False)
    yield memory
    memory.close()


edges = st.sampled_from(
    [0, 1, DATA, DESC, LOW - 16, LOW - 1, LOW, HIGH - 1, HIGH, HIGH + 0xFFFF0, HIGH + (1 << 20), 1 << 63, (1 << 64) - 8]
)
plain = st.tuples(st.integers(0x10_0000, LOW - 70000), st.integers(1, 70000))
strange = st.tuples(
    st.one_of(edges, plain.map(lambda p: p[0])), st.sampled_from([0, 1, 16, 17, 0x10000, (1 << 32) - 1])
)
spoilt = st.tuples(
    st.integers(0, 1 << 10), st.integers(0, 3),
    st.one_of(st.integers(0, 40), st.sampled_from([0x8000, 0xFFFF]), edges, st.integers(0, (1 << 64) - 1)),
)  # fmt: skip


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Plain descriptors, then perhaps an indirect table, each as it should be or with some mistakes."""
    sizes = st.one_of(st.integers(1, 40), st.sampled_from([11, 12, 13, 255, 1018, 1023, 1024, 1025]))
    count = draw(sizes)
    step = draw(st.integers(1, 70000))
    rows = [(0x10_0000 + (n * step) % (256 << 20), step) for n in range(count)]
    for at in draw(st.lists(st.integers(0, count - 1), max_size=3)):
        rows[at] = draw(st.one_of(plain, strange))
    before = draw(st.integers(0, SIZE - 1))
    table = ordinary(rows, draw(st.one_of(st.sampled_from([0, 1, count]), st.integers(0, count))))
    first = ordinary(
        draw(st.lists(plain, min_size=before, max_size=before)), draw(st.sampled_from([0, before, before // 2]))
    )
    if first:
        first[-1][2:] = [first[-1][2] | 1, before]
    length = draw(st.one_of(st.just(16 * count), st.integers(0, 16 * count + 40)))
    if draw(st.integers(0, 5)):  # else the chain runs into what is left there: an empty descriptor
        first.append(
            [
                draw(st.sampled_from([TABLE, TABLE, TABLE, TABLE + 8, LOW - 64, HIGH])),
                length,
                draw(st.sampled_from([4, 4, 4, 5, 6])),
                0,
            ]
        )
    for rows_, spoils in ((table, draw(st.lists(spoilt, max_size=2))), (first, draw(st.lists(spoilt, max_size=1)))):
        for index, column, value in spoils:
            if rows_:
                rows_[index % len(rows_)][column] = value & ((1 << 64) - 1, (1 << 32) - 1, 0xFFFF, 0xFFFF)[column]
    return first, table


def in_ram(memory: GuestMemory, address: int, length: int) -> bool:
    return any(r.gpa <= address and address + length <= r.gpa + r.size for r in memory.regions)


def by_the_book(memory: GuestMemory) -> list[tuple[int, int, bool]] | None:
    """A third opinion, from virtio 1.2, section 2.7.5, without a thought of speed: the chain at descriptor 0 as
    (address, length, writable), or None where the driver has broken a rule."""
    table, count, number, found, within = DESC, SIZE, 0, [], False
    while len(found) < queue_module.MAX_CHAIN:
        if number >= count:
            return None
        address, length, flags, following = struct.unpack("<QIHH", memory.read(table + 16 * number, 16))
        if flags & 4:
            legal = (
                not within and not flags & 1 and length and length % 16 == 0 and length // 16 <= queue_module.MAX_CHAIN
            )
            if not legal or not in_ram(memory, address, length):
                return None
            table, count, number, within = address, length // 16, 0, True
            continue
        writable = bool(flags & 2)
        if not length or not in_ram(memory, address, length) or (found and found[-1][2] and not writable):
            return None
        found.append((address, length, writable))
        if not flags & 1:
            return found
        number = following
    return None


def popped(memory: GuestMemory) -> Any:
    """What a queue makes of descriptor 0: its buffers as (offset in RAM, length), or the refusal's text."""
    queue = Virtqueue(memory, SIZE)
    queue.desc, queue.driver, queue.device = DESC, AVAIL, USED
    queue.start(event_index=False)
    try:
        chain = queue.pop()
    except QueueError as error:
        return str(error)
    assert chain is not None
    pieces = chain.ranges if isinstance(chain.ranges, list) else chain.ranges.tolist()
    merged: list[list[int]] = []
    for gpa, size in pieces:
        if merged and merged[-1][0] + merged[-1][1] == gpa:
            merged[-1][1] += size
        else:
            merged.append([gpa, size])
    assert total_bytes(chain.readable) == sum(map(len, chain.readable))
    assert total_bytes(chain.writable) == sum(map(len, chain.writable)) == sum(size for _, size in merged)
    return [[(where(memory, view), len(view)) for view in views] for views in (chain.readable, chain.writable)], merged


def where(memory: GuestMemory, view: memoryview) -> int:
    """The offset in RAM at which a view begins."""
    return np.frombuffer(view, dtype=np.uint8).ctypes.data - memory.address


def offset(memory: GuestMemory, gpa: int) -> int:
    return next(r.offset + gpa - r.gpa for r in memory.regions if r.gpa <= gpa < r.gpa + r.size)


def agree(memory: GuestMemory, layout: Layout) -> Any:
    """At once, one by one, and by the book: the same buffers in the same order, or the same refusal."""
    first, table = layout
    memory.write(DESC, bytes(TABLE + 16 * 1100 - DESC))
    for index, row in enumerate(first):
        put(memory, index, *row)
    memory.write(TABLE, b"".join(struct.pack("<QIHH", *row) for row in table))
    offer(memory, 0)
    seen: list[Any] = []
    for threshold in (1, queue_module.LONG_TABLE, 1 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(queue_module, "LONG_TABLE", threshold)
            seen.append(popped(memory))
    assert seen[0] == seen[1] == seen[2]
    expected = by_the_book(memory)
    if expected is None:
        assert isinstance(seen[0], str), "the driver broke a rule, and it was not seen"
        return seen[0]
    assert not isinstance(seen[0], str), f"refused, but allowed: {seen[0]}"
    views = [[(offset(memory, a), n) for a, n, writable in expected if writable == kind] for kind in (False, True)]
    assert seen[0][0] == views
    return seen[0]


@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(layout=layouts())
def test_every_layout_is_taken_apart_alike(two_regions: GuestMemory, layout: Layout) -> None:
    agree(two_regions, layout)


LONG = [(0x10_0000 + 0x8000 * n, 0x1000) for n in range(20)]


def turned(index: int, column: int, value: int) -> list[Row]:
    """A table in which one value of one row is another one."""
    rows = ordinary(LONG, 8)
    rows[index][column] = value
    return rows


READ, WRITE = [[DATA, 16, 1, 1]], [[DATA, 16, 3, 1]]
MIXED: dict[str, tuple[list[Row], list[Row], str]] = {
    "plain before a long table": (READ, ordinary(LONG, 3), ""),
    "writable before a writable table": (WRITE, ordinary(LONG, 0), ""),
    "writable before a readable row": (WRITE, ordinary(LONG, 1), "readable buffer behind"),
    "longer than a chain may be": (READ, ordinary(LONG[:1] * 1024, 1), "does not end"),
    "as long as a chain may be": (READ, ordinary(LONG[:1] * 1023, 1), ""),
    "a table of the greatest length": ([], ordinary(LONG[:1] * 1024, 1), ""),
    "a table that is too long": ([], ordinary(LONG[:1] * 1025, 1), "indirect"),
    "a row in RAM above the hole": ([], ordinary([*LONG[:19], (HIGH, 64)], 1), ""),
    "a row that reaches into the hole": ([], ordinary([*LONG[:19], (LOW - 8, 16)], 1), "not RAM"),
    "a row that wraps around": ([], ordinary([*LONG[:19], ((1 << 64) - 8, 16)], 1), "not RAM"),
    "a table within a table": ([], [*ordinary(LONG, 1)[:19], [TABLE, 16, 4, 0]], "indirect"),
    "an empty row": ([], ordinary([*LONG[:19], (DATA, 0)], 1), "empty"),
    "a table without its last row": ([], ordinary(LONG, 1)[:19], "does not end"),
    "a readable row behind a writable one": ([], turned(5, 2, 3), "readable buffer behind"),
    "a table that skips a row": ([], turned(5, 3, 7), ""),
    "a table with a loop": ([], turned(5, 3, 3), "does not end"),
    "a table that ends early": ([], turned(5, 2, 0), ""),
    "a table that points outside": ([], turned(5, 3, 20), "does not end"),
    "a table with rows left over": ([], [*ordinary(LONG[:15], 1), *ordinary(LONG[:5], 5)], ""),
}


@pytest.mark.parametrize(("first", "table", "refusal"), MIXED.values(), ids=MIXED)
@pytest.mark.parametrize("flags", [4, 6], ids=["", "marked writable"])
def test_plain_descriptors_and_tables_together(
    two_regions: GuestMemory, first: list[Row], table: list[Row], refusal: str, flags: int
) -> None:
    seen = agree(two_regions, ([*first, [TABLE, 16 * len(table), flags, 0]], table))
    assert isinstance(seen, str) == bool(refusal)
    if refusal:
        assert refusal in seen


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
