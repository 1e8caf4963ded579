"""A device that arms a timer in the past, again and again, holds up neither the machine's control nor, for good, its
guest; and it is named."""

from __future__ import annotations

import logging
import threading
import time

import pytest

from vmf.cpu.backend import ExitReason, Vcpu, VmExit
from vmf.cpu.state import VcpuState
from vmf.machine.clock import MachineClock
from vmf.machine.timers import TOO_LATE, Timer, TimerQueue
from vmf.machine.vcpu_thread import VcpuThread

PATIENCE_S = 60


class CountingVcpu(Vcpu):
    """Counts the slices in which the guest has time to do something."""

    def __init__(self) -> None:
        self._kicked = threading.Event()
        self.slices = 0

    def run(self, deadline_ns: int | None) -> VmExit:
        left = 1.0 if deadline_ns is None else (deadline_ns - time.monotonic_ns()) / 1e9
        if left > 0 and not self._kicked.wait(left):
            self.slices += 1
        self._kicked.clear()
        return VmExit(ExitReason.KICKED)

    def halted_for_good(self) -> bool:
        return False

    def kick(self) -> None:
        self._kicked.set()

    def save(self) -> VcpuState:
        raise AssertionError

    def restore(self, state: VcpuState) -> None:
        raise AssertionError

    def read_tsc(self) -> int:
        return 0

    def write_tsc(self, value: int) -> None: ...

    def invalidate_code(self, gpa: int, size: int) -> None: ...

    def close(self) -> None: ...


class Hasty:
    """A device whose timer is always due already."""

    kind = "test.hasty"

    def __init__(self, queue: TimerQueue, clock: MachineClock, behind_ns: int) -> None:
        self._clock, self._behind = clock, behind_ns
        self.fired = 0
        self.enough = threading.Event()
        self.timer: Timer = queue.timer(self._tick)

    def _tick(self) -> None:
        self.fired += 1
        if self.fired > TOO_LATE:
            self.enough.set()
        self.timer.arm(self._clock.now() - self._behind)


def test_a_pass_fires_each_timer_once() -> None:
    clock = MachineClock()
    queue = TimerQueue(clock)
    fired: list[str] = []

    def again(name: str) -> None:
        fired.append(name)
        timers[name].arm(0)

    timers = {name: queue.timer(lambda name=name: again(name)) for name in "ab"}  # type: ignore[misc]
    timers["a"].arm(-2)
    timers["b"].arm(-1)
    queue.run_due()
    assert fired == ["a", "b"]
    clock.set(10**9)
    queue.run_due()
    assert fired == ["a", "b", "a", "b"]


def test_what_a_callback_cancels_or_arms_anew_does_not_fire_in_its_pass() -> None:
    queue = TimerQueue(MachineClock())
    fired: list[str] = []
    later, never = queue.timer(lambda: fired.append("later")), queue.timer(lambda: fired.append("never"))

    def first() -> None:
        never.cancel()
        later.arm(10**9)

    queue.timer(first).arm(-3)
    later.arm(-2)
    never.arm(-1)
    queue.run_due()
    assert fired == []
    assert (later.deadline, never.deadline) == (10**9, None)


def test_a_callback_that_raises_takes_no_other_timer_with_it() -> None:
    queue = TimerQueue(MachineClock())
    fired: list[str] = []

    def wrong() -> None:
        raise ValueError("wrong")

    queue.timer(wrong).arm(-2)
    other = queue.timer(lambda: fired.append("other"))
    other.arm(-1)
    with pytest.raises(ValueError, match="wrong"):
        queue.run_due()
    assert (fired, other.deadline) == ([], -1)
    queue.run_due()
    assert fired == ["other"]


@pytest.mark.parametrize("behind_ns", [0, 1, 10**9])
def test_the_machine_can_be_stopped_and_its_guest_gets_on(behind_ns: int, caplog: pytest.LogCaptureFixture) -> None:
    clock = MachineClock()
    queue = TimerQueue(clock)
    thread = VcpuThread("test", clock, queue, lambda _exit: None, lambda _error: None)
    vcpu, device = CountingVcpu(), Hasty(queue, clock, behind_ns)
    closed = threading.Thread(target=thread.close, daemon=True)
    try:

        def go() -> None:
            clock.start()
            device.timer.arm(clock.now() - behind_ns)
            thread.attach(vcpu)
            thread.set_running(True)

        with caplog.at_level(logging.WARNING):
            thread.call(go)
            assert device.enough.wait(PATIENCE_S)
        assert vcpu.slices > 0
        assert [record.getMessage() for record in caplog.records if "device test.hasty" in record.getMessage()]
        assert thread.call(lambda: 42) == 42
    finally:
        closed.start()
        closed.join(PATIENCE_S)
    assert not closed.is_alive()


def test_a_post_that_posts_itself_does_not_keep_the_thread_from_ending() -> None:
    clock = MachineClock()
    thread = VcpuThread("test", clock, TimerQueue(clock), lambda _exit: None, lambda _error: None)

    def again() -> None:
        thread.post(again)

    thread.post(again)
    closed = threading.Thread(target=thread.close, daemon=True)
    closed.start()
    closed.join(PATIENCE_S)
    assert not closed.is_alive()
