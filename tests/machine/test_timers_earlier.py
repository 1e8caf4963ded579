"""A timer that the guest arms while it runs is not late, whatever the slice was waiting for."""

from __future__ import annotations

import threading
import time

import pytest

from vmf.cpu.backend import ExitReason, Vcpu, VmExit
from vmf.cpu.state import VcpuState
from vmf.machine.clock import MachineClock
from vmf.machine.timers import TimerQueue
from vmf.machine.vcpu_thread import VcpuThread


def test_only_the_earliest_timer_tells() -> None:
    queue = TimerQueue(MachineClock())
    told: list[int] = []
    queue.on_earlier = lambda: told.append(1)
    first, second = queue.timer(lambda: None), queue.timer(lambda: None)
    first.arm(100)
    assert len(told) == 1
    second.arm(200)
    assert len(told) == 1
    second.arm(50)
    assert len(told) == 2


class ArmingVcpu(Vcpu):
    """In its first slice the guest arms a timer, then halts or runs on."""

    def __init__(self, arm: object, halts: bool) -> None:
        self._arm = arm
        self._halts = halts
        self._kicked = threading.Event()

    def run(self, deadline_ns: int | None) -> VmExit:
        arm, self._arm = self._arm, None
        if callable(arm):
            arm()
        if self._halts:
            return VmExit(ExitReason.HALTED)
        self._kicked.wait(None if deadline_ns is None else max(0.0, (deadline_ns - time.monotonic_ns()) / 1e9))
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


@pytest.mark.parametrize("halts", [False, True])
@pytest.mark.parametrize("other_timer", [False, True])
def test_a_timer_armed_within_a_slice_fires_in_time(halts: bool, other_timer: bool) -> None:
    clock = MachineClock()
    timers = TimerQueue(clock)
    fired = threading.Event()
    timer = timers.timer(fired.set)
    thread = VcpuThread("test", clock, timers, lambda _exit: None, lambda _error: None)
    try:

        def go() -> None:
            clock.start()
            if other_timer:
                timers.timer(lambda: None).arm(clock.now() + 60 * 10**9)
            thread.attach(ArmingVcpu(lambda: timer.arm(clock.now() + 5_000_000), halts))
            thread.set_running(True)

        thread.call(go)
        assert fired.wait(60)
    finally:
        thread.close()
