"""The tracker on top of an engine's own log of what its guest writes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

from vmf.cpu.backend import WriteLog
from vmf.errors import ConfigError, MachineError
from vmf.memory import dirty_uffd
from vmf.memory.dirty import open_tracker
from vmf.memory.dirty_log import LogTracker
from vmf.memory.guest import MIB, PAGE_SIZE, GuestMemory


class Log(WriteLog):
    """What a test says the guest wrote."""

    def __init__(self) -> None:
        self.written: list[int] = []
        self.running = False

    def start(self) -> None:
        self.running = True

    def collect(self) -> npt.NDArray[np.uint64]:
        assert self.running
        numbers, self.written = sorted(set(self.written)), []
        return np.array(numbers, dtype=np.uint64)

    def stop(self) -> None:
        self.running = False


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    ram = GuestMemory(4 * MIB, huge_pages=False)
    yield ram
    ram.close()


@pytest.fixture
def old_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VMF_DIRTY_TRACKER", raising=False)
    monkeypatch.setattr(dirty_uffd, "uffd_unusable", lambda: "an old kernel")


def test_reports_what_the_log_says(memory: GuestMemory) -> None:
    log = Log()
    tracker = LogTracker(memory, log)
    with pytest.raises(MachineError):
        tracker.collect()
    tracker.start()
    assert tracker.collect().tolist() == []
    log.written = [9, 3, 4, 4]
    assert tracker.collect().tolist() == [[3, 5], [9, 10]]
    assert tracker.collect().tolist() == []
    tracker.stop()
    tracker.stop()
    assert not log.running
    assert memory.clear_observers == []


def test_a_reset_counts_as_written_before_and_after_the_guest_is_loaded(memory: GuestMemory) -> None:
    memory.write(7 * PAGE_SIZE, b"old guest")
    log = Log()
    tracker = LogTracker(memory, log)
    tracker.start()
    memory.clear()
    log.written = [8]
    assert tracker.collect().tolist() == [[7, 9]], "what the old guest had, zero now, and what the log says"
    memory.write(20 * PAGE_SIZE, b"new guest")
    memory.tell_observers()
    assert tracker.collect().tolist() == [[20, 21]]
    tracker.stop()


@pytest.mark.usefixtures("old_kernel")
def test_chosen_where_the_kernel_does_not_help_and_the_log_tells_all(memory: GuestMemory) -> None:
    tracker = open_tracker(memory, Log())
    assert tracker.name == "log"
    assert tracker.passed_over == (("uffd", "an old kernel"),)
    tracker = open_tracker(memory, "it does not see what devices write (virtio.block)")
    assert tracker.name == "hash"
    assert tracker.passed_over[1] == ("log", "it does not see what devices write (virtio.block)")


def test_can_be_asked_for(memory: GuestMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMF_DIRTY_TRACKER", "log")
    assert open_tracker(memory, Log()).name == "log"
    with pytest.raises(MachineError, match="the CPU backend unicorn has none"):
        open_tracker(memory, "the CPU backend unicorn has none")
    monkeypatch.setenv("VMF_DIRTY_TRACKER", "magic")
    with pytest.raises(ConfigError, match="uffd, log, hash"):
        open_tracker(memory, Log())
