"""The machine's clock and the guest's TSC stop and start as one: with hosts, clocks and a vCPU of the test's own, in
which every reading takes time and the scheduler comes in between."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from vmf.cpu.backend import Vcpu, VmExit
from vmf.cpu.state import VcpuState
from vmf.machine.clock import MachineClock
from vmf.machine.guest_time import GuestTime

KHZ = 2_595_124
MS = 1_000_000
BOUND_NS = 500_000


class World:
    """Real time, which passes whenever anybody looks at it."""

    def __init__(self, seed: int, look_ns: tuple[int, int] = (50, 300)) -> None:
        self.now = 5_000_000_000
        self._look_ns = look_ns
        self.random = random.Random(seed)

    def look(self) -> int:
        # As measured: some 100 ns a call, and now and then the scheduler takes a time slice.
        self.now += self.random.randrange(*self._look_ns)
        if self.random.random() < 0.02:
            self.now += self.random.randrange(50_000, 4_000_000)
        return self.now

    def pass_time(self, ns: int) -> None:
        self.now += ns


class FakeVcpu(Vcpu):
    """Its TSC counts with real time as long as it exists, whether it runs or not."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._offset = world.random.randrange(1 << 40)

    def _counter(self) -> int:
        return self._world.look() * KHZ // 1_000_000

    def read_tsc(self) -> int:
        return self._counter() + self._offset

    def write_tsc(self, value: int) -> None:
        self._offset = value - self._counter()

    def run(self, deadline_ns: int | None) -> VmExit:
        raise AssertionError

    def halted_for_good(self) -> bool:
        return False

    def kick(self) -> None: ...

    def save(self) -> VcpuState:
        raise AssertionError

    def restore(self, state: VcpuState) -> None:
        raise AssertionError

    def invalidate_code(self, gpa: int, size: int) -> None: ...

    def close(self) -> None: ...


class Host:
    """A host whose monotonic clock began at another time."""

    def __init__(self, world: World, ahead_ns: int) -> None:
        self.world, self.ahead_ns = world, ahead_ns

    def now(self) -> int:
        return self.world.look() + self.ahead_ns

    def machine(self) -> tuple[GuestTime, FakeVcpu]:
        time = GuestTime(MachineClock(self.now))
        time.tsc_khz = KHZ
        return time, FakeVcpu(self.world)


class Guest:
    """One guest, wherever it is; `check` compares its two clocks with real time and the time it was held back."""

    def __init__(self, seed: int, look_ns: tuple[int, int] = (50, 300)) -> None:
        self.world = World(seed, look_ns)
        self._narrow_ns = 3 * look_ns[1]
        self.host = Host(self.world, 0)
        self.time, self.vcpu = self.host.machine()
        self.time.start(self.vcpu)
        self.left_out = 0
        self.began_ns, self.first_tsc = self._read()
        self.begun = self.world.now

    def _read(self) -> tuple[int, int]:
        while True:
            before = self.world.now
            pair = self.time.clock.now(), self.vcpu.read_tsc()
            if self.world.now - before < self._narrow_ns:
                return pair

    def errors(self) -> tuple[int, int]:
        """(guest clock - real time, TSC - guest clock), ns since the beginning."""
        guest_ns, tsc = self._read()
        passed = self.world.now - self.begun - self.left_out
        clock = guest_ns - self.began_ns
        return clock - passed, (tsc - self.first_tsc) * 1_000_000 // KHZ - clock

    def check(self) -> None:
        clock, tsc = self.errors()
        assert abs(clock) < BOUND_NS
        assert abs(tsc) < BOUND_NS

    def work(self) -> None:
        self.world.pass_time(self.world.random.randrange(1, 200) * MS)

    def teleport(self, downtime_ns: int) -> None:
        """Stop, scan, send, save, and start elsewhere, with the stop told exactly."""
        time = self.time
        time.stop(self.vcpu)
        self.world.pass_time(downtime_ns // 2)
        stopped = time.stopped
        assert stopped is not None
        there = Host(self.world, self.world.random.randrange(-(10**9), 10**15))
        self.world.pass_time(downtime_ns // 2)
        new, vcpu = there.machine()
        new.hold(stopped.guest_ns, stopped.tsc)
        new.start(vcpu, stopped.host_ns - self.host.ahead_ns + there.ahead_ns)
        self.host, self.time, self.vcpu = there, new, vcpu

    def fail(self) -> None:
        """A teleport that failed after the stop."""
        self.time.stop(self.vcpu)
        self.world.pass_time(self.world.random.randrange(1, 30_000) * MS)
        self.time.start(self.vcpu)

    def pause(self, also: Callable[[], None] = lambda: None) -> None:
        self.time.stop(self.vcpu)
        self.time.leave_out()
        stopped = self.time.stopped
        assert stopped is not None
        self.world.pass_time(self.world.random.randrange(1, 5000) * MS)
        also()
        resumed = self.time.start(self.vcpu)
        self.left_out += resumed - stopped.host_ns

    def switch(self) -> None:
        new = FakeVcpu(self.world)
        self.time.hand_over(self.vcpu, new)
        self.vcpu = new

    def switch_while_paused(self) -> None:
        def switch() -> None:
            self.vcpu = FakeVcpu(self.world)

        self.pause(switch)


KINDS: dict[str, Callable[[Guest], None]] = {
    "quick": lambda guest: guest.teleport(2 * MS),
    "slow link": lambda guest: guest.teleport(538 * MS),
    "failed": Guest.fail,
    "paused": Guest.pause,
    "switched": Guest.switch,
    "switched while paused": Guest.switch_while_paused,
}


@pytest.mark.parametrize("look_ns", [(50, 300), (3000, 15000)], ids=["in the process", "by system calls"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_of_a_kind(kind: str, seed: int, look_ns: tuple[int, int]) -> None:
    guest = Guest(seed, look_ns)
    for _ in range(100):
        guest.work()
        KINDS[kind](guest)
    guest.check()


@pytest.mark.parametrize("seed", range(5))
def test_a_hundred_in_turns(seed: int) -> None:
    guest = Guest(seed)
    order = random.Random(seed)
    for _ in range(100):
        guest.work()
        KINDS[order.choice(list(KINDS))](guest)
        guest.check()


def test_nothing_goes_back() -> None:
    guest = Guest(1)
    last = (0, 0)
    for kind in [*KINDS.values()] * 10:
        seen = guest._read()
        assert seen > last
        assert seen[1] > last[1]
        last = seen
        kind(guest)


def test_time_stands_still_from_the_stop_on() -> None:
    """Scan, send and save take their time, and what is saved is of the stop."""
    guest = Guest(2)
    guest.time.stop(guest.vcpu)
    stopped, guest_ns = guest.time.stopped, guest.time.clock.now()
    guest.world.pass_time(500 * MS)
    guest.time.stop(guest.vcpu)
    assert guest.time.stopped == stopped
    assert stopped is not None
    assert guest.time.clock.now() == guest_ns == stopped.guest_ns


def test_a_pause_that_a_teleport_meets_stays_a_pause() -> None:
    guest = Guest(3)
    guest.time.stop(guest.vcpu)
    guest.time.leave_out()
    before = guest.time.clock.now()
    guest.world.pass_time(3600 * 1000 * MS)
    guest.time.stop(guest.vcpu)  # the teleport's, which fails
    guest.time.start(guest.vcpu)
    assert guest.time.clock.now() - before < 100 * MS


def test_a_guest_that_has_not_run_has_no_time() -> None:
    """Started paused: neither clock counts until it is resumed."""
    world = World(4)
    time, vcpu = Host(world, 0).machine()
    time.hold(0, 0)
    world.pass_time(10_000 * MS)
    time.start(vcpu)
    assert time.clock.now() < 100 * MS
    assert vcpu.read_tsc() < 100 * KHZ


@pytest.mark.parametrize("tsc_in_suspend", ["counts on", "begins anew"])
@pytest.mark.parametrize("then", ["runs", "stops", "is switched"])
def test_a_suspended_host_suspends_the_guest(then: str, tsc_in_suspend: str) -> None:
    """CLOCK_MONOTONIC stands still in a suspend, CLOCK_BOOTTIME does not, and the TSC does as it likes."""
    world = World(5)
    suspended = 0
    clock = MachineClock(lambda: world.look() - suspended)
    time = GuestTime(clock, boottime=world.look)
    time.tsc_khz = KHZ
    vcpu = FakeVcpu(world)
    time.start(vcpu)

    def read() -> tuple[int, int]:
        while True:
            before = world.now
            pair = clock.now(), vcpu.read_tsc()
            if world.now - before < 1000:
                return pair

    first = read()
    for _ in range(20):
        world.pass_time(400 * MS)
        time.keep(vcpu)
    before = read()
    world.pass_time(7200 * 1000 * MS)
    suspended = 7200 * 1000 * MS
    if tsc_in_suspend == "begins anew":
        vcpu._offset -= world.now * KHZ // 1_000_000
    if then == "runs":
        time.keep(vcpu)
    elif then == "stops":
        time.stop(vcpu)
        time.start(vcpu)
    else:
        new = FakeVcpu(world)
        time.hand_over(vcpu, new)
        vcpu = new
    after = read()
    assert 0 < after[0] - before[0] < 100 * MS
    assert 0 < after[1] - before[1] < 100 * KHZ
    assert abs((after[1] - first[1]) * 1_000_000 // KHZ - (after[0] - first[0])) < BOUND_NS


def test_a_busy_host_is_not_taken_for_a_suspended_one() -> None:
    world = World(6)
    time = GuestTime(MachineClock(world.look), boottime=world.look)
    time.tsc_khz = KHZ
    vcpu = FakeVcpu(world)
    time.start(vcpu)
    written: list[int] = []
    vcpu.write_tsc = written.append  # type: ignore[method-assign]
    for number in range(2000):
        world.pass_time((1 + number % 7) * MS)
        if number % 10 == 0:
            world.random.seed(number)
        time.keep(vcpu)
    assert written == []
