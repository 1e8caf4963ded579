"""What every dirty tracker promises, and that none misses a write made while it looks."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmf.errors import ConfigError, MachineError
from vmf.memory import pages
from vmf.memory.dirty import DirtyTracker, PageRuns, open_tracker, tracker_kinds
from vmf.memory.dirty_hash import PageHasher
from vmf.memory.guest import MIB, PAGE_SIZE, GuestMemory

BATCH = 1 * MIB


@pytest.fixture(params=["uffd", "hash"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name = str(request.param)
    reason = {kind.name: kind.unusable() for kind in tracker_kinds()}[name]
    if reason:
        pytest.skip(f"dirty tracker {name} cannot work here: {reason}")
    monkeypatch.setenv("VMF_DIRTY_TRACKER", name)
    return name


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """Without huge pages, so that exactly the pages that a test writes exist."""
    ram = GuestMemory(64 * MIB, huge_pages=False)
    yield ram
    ram.close()


@pytest.fixture
def tracker(kind: str, memory: GuestMemory) -> Iterator[DirtyTracker]:
    opened = open_tracker(memory)
    assert opened.name == kind
    yield opened
    opened.stop()


class Copy:
    """The other side of a teleport: takes pages in rounds, by way of `stage` where the tracker wants that."""

    def __init__(self, memory: GuestMemory, tracker: DirtyTracker) -> None:
        self.memory, self.tracker = memory, tracker
        self.pages = np.zeros((memory.pages, PAGE_SIZE), dtype=np.uint8)
        self.bounce = bytearray(BATCH)

    def take(self, runs: PageRuns) -> None:
        source = np.frombuffer(self.memory.buffer, dtype=np.uint8).reshape(-1, PAGE_SIZE)
        for batch in pages.batches(runs, BATCH):
            numbers = pages.to_numbers(batch).astype(np.intp)
            if self.tracker.needs_staging:
                size = self.tracker.stage(batch, memoryview(self.bounce))
                assert size == len(numbers) * PAGE_SIZE
                self.pages[numbers] = np.frombuffer(self.bounce, dtype=np.uint8, count=size).reshape(-1, PAGE_SIZE)
            else:
                self.pages[numbers] = source[numbers]

    def differing(self) -> list[int]:
        source = np.frombuffer(self.memory.buffer, dtype=np.uint8).reshape(-1, PAGE_SIZE)
        return np.flatnonzero((source != self.pages).any(axis=1)).tolist()


def test_reports_exactly_the_written_pages(tracker: DirtyTracker, memory: GuestMemory) -> None:
    memory.buffer[5 * PAGE_SIZE] = 1
    memory.buffer[6 * PAGE_SIZE] = 1
    memory.buffer[900 * PAGE_SIZE + 7] = 1
    tracker.start()
    copy = Copy(memory, tracker)
    copy.take(memory.touched_ranges())
    assert tracker.collect().tolist() == []
    memory.buffer[6 * PAGE_SIZE + 4095] = 9  # known page
    memory.buffer[7 * PAGE_SIZE] = 9  # its untouched neighbour
    memory.buffer[9000 * PAGE_SIZE] = 9  # far away, where no page table is yet
    memory.buffer[memory.size - 1] = 9
    dirty = tracker.collect()
    assert dirty.dtype == np.uint64
    assert dirty.tolist() == [[6, 8], [9000, 9001], [memory.pages - 1, memory.pages]]
    copy.take(dirty)
    assert tracker.collect().tolist() == []
    assert copy.differing() == []


def test_never_touched_pages_are_never_reported_nor_brought_to_life(tracker: DirtyTracker, memory: GuestMemory) -> None:
    memory.buffer[0] = 1
    tracker.start()
    for _ in range(3):
        Copy(memory, tracker).take(tracker.collect())
    assert memory.touched_ranges().tolist() == [[0, 1]]


def test_writes_by_the_kernel_are_seen(tracker: DirtyTracker, memory: GuestMemory) -> None:
    memory.buffer[: 8 * PAGE_SIZE] = bytes(8 * PAGE_SIZE)
    tracker.start()
    copy = Copy(memory, tracker)
    copy.take(memory.touched_ranges())
    assert tracker.collect().tolist() == []
    here, there = socket.socketpair()
    with here, there:
        there.sendall(b"x" * (PAGE_SIZE + 1))
        view = memory.buffer[3 * PAGE_SIZE : 8 * PAGE_SIZE]
        assert here.recv_into(view, PAGE_SIZE + 1, socket.MSG_WAITALL) == PAGE_SIZE + 1
        view.release()
    assert tracker.collect().tolist() == [[3, 5]]


def test_a_page_that_changes_back_after_it_was_sent_is_reported(tracker: DirtyTracker, memory: GuestMemory) -> None:
    memory.buffer[0] = 1
    tracker.start()
    copy = Copy(memory, tracker)
    memory.buffer[0] = 2
    copy.take(memory.touched_ranges())
    memory.buffer[0] = 1
    copy.take(tracker.collect())
    assert copy.differing() == []


def test_clearing_ram_is_not_lost(tracker: DirtyTracker, memory: GuestMemory) -> None:
    memory.buffer[: 64 * PAGE_SIZE] = b"\xaa" * (64 * PAGE_SIZE)
    tracker.start()
    copy = Copy(memory, tracker)
    copy.take(memory.touched_ranges())
    tracker.collect()
    memory.clear()
    memory.buffer[PAGE_SIZE] = 1
    assert tracker.collect().tolist() == [[0, 64]]
    copy.take(np.array([[0, 64]], dtype=np.uint64))
    assert copy.differing() == []


def test_start_again_begins_anew(tracker: DirtyTracker, memory: GuestMemory) -> None:
    memory.buffer[0] = 1
    tracker.start()
    tracker.stop()
    tracker.stop()
    with pytest.raises(MachineError, match="not been started"):
        tracker.collect()
    tracker.start()
    copy = Copy(memory, tracker)
    copy.take(memory.touched_ranges())
    assert tracker.collect().tolist() == []
    memory.buffer[0] = 2
    assert tracker.collect().tolist() == [[0, 1]]


def test_a_written_page_of_a_huge_page_is_reported_alone(kind: str) -> None:
    memory = GuestMemory(8 * MIB)
    words = np.frombuffer(memory.buffer, dtype=np.uint64).reshape(-1, 512)
    words[700, 0] = 1
    if memory.touched_ranges().tolist() != [[512, 1024]]:
        pytest.skip("this kernel gives no huge pages")
    tracker = open_tracker(memory)
    tracker.start()
    copy = Copy(memory, tracker)
    copy.take(memory.touched_ranges())
    assert tracker.collect().tolist() == []
    words[701, 5] = 1
    words[1023, 511] = 1
    assert tracker.collect().tolist() == [[701, 702], [1023, 1024]]
    words[1500, 0] = 1  # a huge page that comes to life
    copy.take(tracker.collect())
    copy.take(tracker.collect())
    words[1501, 0] = 1
    assert tracker.collect().tolist() in ([[701, 702], [1023, 1024], [1501, 1502]], [[1501, 1502]])
    tracker.stop()


def test_reading_untouched_ram_is_no_write(tracker: DirtyTracker, memory: GuestMemory) -> None:
    memory.buffer[0] = 1
    tracker.start()
    copy = Copy(memory, tracker)
    copy.take(memory.touched_ranges())
    assert memory.buffer[5 * PAGE_SIZE] == 0
    assert tracker.collect().tolist() == []
    memory.buffer[5 * PAGE_SIZE] = 1
    assert tracker.collect().tolist() == [[5, 6]]


@pytest.mark.parametrize("huge", [False, True])
def test_no_write_is_missed_while_three_threads_write(kind: str, huge: bool) -> None:
    """Whole rounds against writers that fill, scatter and flip there and back; at the end the copy must be equal."""
    memory = GuestMemory(64 * MIB, huge_pages=huge)
    tracker = open_tracker(memory)
    words = np.frombuffer(memory.buffer, dtype=np.uint64)
    stop = threading.Event()
    third = memory.pages // 3

    def fill() -> None:
        random = np.random.default_rng(1)
        while not stop.is_set():
            first = int(random.integers(0, third - 64)) * 512
            words[first : first + 64 * 512] = random.integers(0, 1 << 62, dtype=np.uint64)

    def scatter() -> None:
        random = np.random.default_rng(2)
        while not stop.is_set():
            at = random.integers(third * 512, 2 * third * 512, 500)
            words[at] = random.integers(0, 1 << 62, 500, dtype=np.uint64)

    def flip() -> None:
        cell = words[2 * third * 512 : memory.pages * 512 : 512]
        while not stop.is_set():
            np.bitwise_xor(cell, np.uint64(1), out=cell)

    writers = [threading.Thread(target=target) for target in (fill, scatter, flip)]
    flipping = words[2 * third * 512 :: 512]
    flipping[:] = 2
    tracker.start()
    copy = Copy(memory, tracker)
    for writer in writers:
        writer.start()
    try:
        copy.take(memory.touched_ranges())
        seen = 0
        for _ in range(40 if tracker.name == "uffd" else 6):
            runs = tracker.collect()
            seen += pages.count(runs)
            copy.take(runs)
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    copy.take(tracker.collect())
    assert copy.differing() == []
    assert seen > 1000, "the writers wrote nothing, so the test shows nothing"
    tracker.stop()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 4 * MIB // PAGE_SIZE - 1), st.integers(1, 3)), max_size=12), max_size=6)
)
def test_uffd_equals_a_list_of_what_was_written(rounds: list[list[tuple[int, int]]]) -> None:
    kinds = {kind.name: kind for kind in tracker_kinds()}
    reason = kinds["uffd"].unusable()
    if reason:
        pytest.skip(f"dirty tracker uffd cannot work here: {reason}")
    memory = GuestMemory(4 * MIB, huge_pages=False)
    tracker = kinds["uffd"].make(memory)
    tracker.start()
    for writes in rounds:
        expected: set[int] = set()
        for first, length in writes:
            end = min(first + length, memory.pages)
            memory.buffer[first * PAGE_SIZE : end * PAGE_SIZE] = b"\x55" * ((end - first) * PAGE_SIZE)
            expected.update(range(first, end))
        assert pages.to_numbers(tracker.collect()).tolist() == sorted(expected)
    tracker.stop()
    memory.close()


def test_more_runs_than_one_scan_returns(memory: GuestMemory) -> None:
    from vmf.memory import dirty_uffd

    if reason := dirty_uffd.uffd_unusable():
        pytest.skip(f"dirty tracker uffd cannot work here: {reason}")
    tracker = dirty_uffd.UffdTracker(memory)
    tracker.start()
    assert tracker._pagemap is not None
    tracker._pagemap.use_rows(3)
    words = np.frombuffer(memory.buffer, dtype=np.uint64).reshape(-1, 512)
    words[0:1000:2, 0] = 1
    assert pages.to_numbers(tracker.collect()).tolist() == list(range(0, 1000, 2))
    assert tracker.collect().tolist() == []
    tracker.stop()


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="needs root and setpriv to drop it")
def test_uffd_works_without_privilege() -> None:
    """The user nobody, no capability, no way to gain any; also a write by the kernel (the user-mode-only case)."""
    script = (
        "import os, sys\n"
        "from vmf.memory.dirty_uffd import UffdTracker, uffd_unusable\n"
        "from vmf.memory.guest import GuestMemory\n"
        "assert os.getuid() != 0\n"
        "reason = uffd_unusable()\n"
        "if reason: print('unusable:', reason); sys.exit()\n"
        "m = GuestMemory(1 << 20, huge_pages=False); m.buffer[:] = bytes(1 << 20)\n"
        "t = UffdTracker(m); t.start()\n"
        "r, w = os.pipe(); os.write(w, b'x' * 5000); os.readv(r, [m.buffer[8192:16384]])\n"
        "print(t.collect().tolist())\n"
    )
    drop = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all", "--no-new-privs"]
    done = subprocess.run([*drop, sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    if done.returncode and "Permission denied" in done.stderr:
        pytest.skip(f"the user nobody cannot run this Python: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("unusable"):
        pytest.skip(done.stdout.strip())
    assert done.stdout.strip() == "[[2, 4]]"


def test_choice_by_environment(memory: GuestMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMF_DIRTY_TRACKER", "hash")
    assert open_tracker(memory).name == "hash"
    monkeypatch.setenv("VMF_DIRTY_TRACKER", "magic")
    with pytest.raises(ConfigError, match="magic"):
        open_tracker(memory)


def test_the_fallback_says_why_not_the_better_one(memory: GuestMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmf.memory import dirty_uffd

    monkeypatch.delenv("VMF_DIRTY_TRACKER", raising=False)
    monkeypatch.setattr(dirty_uffd, "uffd_unusable", lambda: "no such thing")
    tracker = open_tracker(memory)
    assert tracker.name == "hash"
    assert tracker.passed_over == (("uffd", "no such thing"),)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 511), st.integers(0, 511), st.integers(0, 63))
def test_hash_tells_pages_apart(one: int, other: int, bit: int) -> None:
    """Single bits, and the same bit in two words (where sums of plain products fail)."""
    hasher = PageHasher()
    words = np.zeros((3, 512), dtype=np.uint64)
    words[1, one] ^= np.uint64(1 << bit)
    words[2, one] ^= np.uint64(1 << bit)
    words[2, other] ^= np.uint64(1 << bit)
    out = np.empty((3, 2), dtype=np.uint64)
    hasher.hash(words, out)
    assert out[0].tolist() != out[1].tolist()
    assert (out[0].tolist() == out[2].tolist()) == (one == other)
    again = np.empty((3, 2), dtype=np.uint64)
    hasher.hash(words, again)
    assert again.tolist() == out.tolist()


def test_nh_against_its_definition() -> None:
    hasher = PageHasher()
    words = np.random.default_rng(3).integers(0, 1 << 64, (1, 512), dtype=np.uint64)
    out = np.empty((1, 2), dtype=np.uint64)
    hasher.hash(words, out)
    halves = words.view(np.uint32)[0].tolist()
    for index in range(2):
        keys = hasher._keys[index].tolist()
        total = 0
        for i in range(0, 1024, 2):
            total += ((halves[i] + keys[i]) % 2**32) * ((halves[i + 1] + keys[i + 1]) % 2**32)
        assert int(out[0, index]) == total % 2**64


@settings(max_examples=20, deadline=None)
@given(first=st.integers(0, 200), count=st.integers(1, 64), offset=st.integers(0, PAGE_SIZE - 1))
def test_what_the_kernel_writes_for_a_device_is_seen(first: int, count: int, offset: int) -> None:
    """A disk's data arrives by preadv(2), with no store of any program."""
    kinds = [kind.name for kind in tracker_kinds() if kind.name in ("uffd", "hash") and not kind.unusable()]
    ram = GuestMemory(2 * MIB)
    descriptor = os.open("/dev/urandom", os.O_RDONLY)
    try:
        ram.buffer[:] = bytes(ram.size)
        for name in kinds:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("VMF_DIRTY_TRACKER", name)
                tracker = open_tracker(ram)
            tracker.start()
            tracker.collect()
            start = first * PAGE_SIZE + offset
            end = min(start + count * PAGE_SIZE, ram.size)
            view = ram.buffer[start:end]
            assert os.readv(descriptor, [view]) == end - start
            view.release()
            found = {page for a, b in tracker.collect().tolist() for page in range(a, b)}
            tracker.stop()
            assert set(range(start // PAGE_SIZE, -(-end // PAGE_SIZE))) <= found, name
    finally:
        os.close(descriptor)
        ram.close()
