"""The vCPU thread, with a fake vCPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from vmf.cpu.backend import ExitReason, Vcpu, VmExit
from vmf.cpu.state import VcpuState
from vmf.errors import MachineError
from vmf.machine.clock import MachineClock
from vmf.machine.timers import TimerQueue
from vmf.machine.vcpu_thread import VcpuThread


class FakeVcpu(Vcpu):
    """Runs until kicked or its deadline; `behave` may end a slice in another way."""

    def __init__(self, behave: Callable[[], VmExit | None] = lambda: None) -> None:
        self._kicked = threading.Event()
        self.behave = behave
        self.slices = 0

    def run(self, deadline_ns: int | None) -> VmExit:
        self.slices += 1
        result = self.behave()
        if result is not None:
            return result
        timeout = None if deadline_ns is None else max(0.0, (deadline_ns - time.monotonic_ns()) / 1e9)
        self._kicked.wait(timeout)
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


class Bench:
    def __init__(self) -> None:
        self.clock = MachineClock()
        self.timers = TimerQueue(self.clock)
        self.exits: list[VmExit] = []
        self.crashes: list[BaseException] = []
        self.ended = threading.Event()
        self.thread = VcpuThread("test", self.clock, self.timers, self._exit, self._crash)

    def _exit(self, exit_: VmExit) -> None:
        self.exits.append(exit_)
        self.ended.set()

    def _crash(self, error: BaseException) -> None:
        self.crashes.append(error)
        self.ended.set()

    def go(self, vcpu: Vcpu) -> None:
        def go() -> None:
            self.clock.start()
            self.thread.attach(vcpu)
            self.thread.set_running(True)

        self.thread.call(go)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.thread.close()


def test_call_returns_the_result_and_raises_the_exception_of_the_callable(bench: Bench) -> None:
    assert bench.thread.call(lambda: threading.current_thread().name) == "vcpu-test"
    with pytest.raises(ZeroDivisionError):
        bench.thread.call(lambda: 1 // 0)
    assert bench.thread.call(lambda: bench.thread.call(lambda: 7)) == 7


@pytest.mark.parametrize("halting", [False, True])
def test_posts_reach_a_running_and_a_halted_machine(bench: Bench, halting: bool) -> None:
    bench.go(FakeVcpu(lambda: VmExit(ExitReason.HALTED) if halting else None))
    for number in range(500):
        assert bench.thread.call(lambda number=number: number) == number


def test_a_halted_machine_sleeps(bench: Bench) -> None:
    vcpu = FakeVcpu(lambda: VmExit(ExitReason.HALTED))
    bench.go(vcpu)
    time.sleep(0.2)
    assert vcpu.slices < 5
    assert bench.thread.asleep
    bench.thread.call(lambda: bench.thread.attach(FakeVcpu(lambda: None)))
    assert not bench.thread.call(lambda: bench.thread.asleep)


@pytest.mark.parametrize("halting", [False, True])
def test_timers_fire_in_order_and_not_early(bench: Bench, halting: bool) -> None:
    fired: list[tuple[int, int]] = []
    done = threading.Event()

    def arm() -> None:
        for number, delay_ms in enumerate((30, 10, 20)):

            def fire(number: int = number) -> None:
                fired.append((number, bench.clock.now()))
                if len(fired) == 3:
                    done.set()

            bench.timers.timer(fire).arm(bench.clock.now() + delay_ms * 1_000_000)

    bench.go(FakeVcpu(lambda: VmExit(ExitReason.HALTED) if halting else None))
    start = bench.clock.now()
    bench.thread.call(arm)
    assert done.wait(60)
    assert [number for number, _ in fired] == [1, 2, 0]
    assert all(when - start >= delay for (_, when), delay in zip(fired, (10**7, 2 * 10**7, 3 * 10**7), strict=True))


def test_a_cancelled_and_a_rearmed_timer(bench: Bench) -> None:
    fired: list[str] = []
    done = threading.Event()

    def arm() -> None:
        cancelled = bench.timers.timer(lambda: fired.append("cancelled"))
        cancelled.arm(bench.clock.now() + 1_000_000)
        cancelled.cancel()
        moved = bench.timers.timer(lambda: fired.append("moved"))
        moved.arm(bench.clock.now() + 1_000_000)
        moved.arm(bench.clock.now() + 20_000_000)
        bench.timers.timer(done.set).arm(bench.clock.now() + 40_000_000)

    bench.go(FakeVcpu())
    bench.thread.call(arm)
    assert done.wait(60)
    assert fired == ["moved"]


def test_an_error_exit_stops_the_machine_and_is_reported(bench: Bench) -> None:
    bench.go(FakeVcpu(lambda: VmExit(ExitReason.ERROR, "broken")))
    assert bench.ended.wait(60)
    assert bench.exits == [VmExit(ExitReason.ERROR, "broken")]
    assert not bench.thread.running


def test_a_crash_in_a_posted_callable_stops_the_machine_and_leaves_the_thread_alive(bench: Bench) -> None:
    bench.go(FakeVcpu())

    def crash() -> None:
        raise KeyError("device bug")

    bench.thread.post(crash)
    assert bench.ended.wait(60)
    assert isinstance(bench.crashes[0], KeyError)
    assert bench.thread.call(lambda: 1) == 1


def test_throttling_leaves_the_asked_share(bench: Bench) -> None:
    def burn() -> VmExit:
        end = time.perf_counter() + 0.005
        while time.perf_counter() < end:
            pass
        return VmExit(ExitReason.KICKED)

    vcpu = FakeVcpu(burn)
    bench.thread.set_throttle(0.9)
    bench.go(vcpu)
    time.sleep(1)
    slices = vcpu.slices
    bench.thread.set_throttle(0)
    time.sleep(0.5)
    faster = vcpu.slices - slices
    assert faster > 2 * slices, (slices, faster)
    assert slices >= 2


def test_calls_after_the_end_are_refused(bench: Bench) -> None:
    bench.thread.close()
    with pytest.raises(MachineError):
        bench.thread.call(lambda: None)
