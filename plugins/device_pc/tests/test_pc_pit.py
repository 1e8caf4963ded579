"""The 8254 and port 0x61."""

from __future__ import annotations

import random
from typing import Any

import pytest

from vmf_device_pc.pit import FREQUENCY_HZ, OLDEST_NS, from_bcd, ns_of, ticks_at, to_bcd

SECOND = 10**9


def program(pc: Any, channel: int, mode: int, count: int) -> None:
    pc.outb(0x43, channel << 6 | 0x30 | mode << 1)
    pc.outb(0x40 + channel, count & 0xFF, count >> 8 & 0xFF)


def read_count(pc: Any, channel: int) -> int:
    pc.outb(0x43, channel << 6)
    return int(pc.inb(0x40 + channel) | pc.inb(0x40 + channel) << 8)


@pytest.mark.parametrize("ticks", [1, 2, 3, 4772, 65536, 10**9])
def test_edges_come_at_the_first_nanosecond_that_shows_them(ticks: int) -> None:
    assert ticks_at(ns_of(ticks)) == ticks
    assert ticks_at(ns_of(ticks) - 1) == ticks - 1


@pytest.mark.parametrize("mode", [2, 3])
def test_a_periodic_interrupt_keeps_its_rate_exactly(pc: Any, mode: int) -> None:
    pc.init_pics()
    program(pc, 0, mode, 4772)  # 250 Hz, as Linux asks
    ticks = 0
    for _ in range(4000):
        pc.run_for(SECOND // 1000)
        ticks += len(pc.interrupts())
    edges = 4 * FREQUENCY_HZ // 4772
    assert ticks == edges
    assert pc.timers.next_deadline() == ns_of((edges + 1) * 4772)


def take(pc: Any, seconds: float, within_ms: int = 1) -> int:
    """A guest that answers within so many milliseconds: interrupts in that time."""
    ticks = 0
    for _ in range(int(seconds * 1000) // within_ms):
        pc.run_for(within_ms * SECOND // 1000)
        ticks += len(pc.interrupts())
    return ticks


@pytest.mark.parametrize("mode", [2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_no_interrupt_of_a_guest_that_counts_them_is_lost(pc: Any, mode: int, seed: int) -> None:
    """Whatever keeps the guest from taking them: the busy host, or its own CLI."""
    order = random.Random(seed)
    pc.init_pics()
    program(pc, 0, mode, 4772)
    ticks = 0
    for _ in range(50):
        pc.run_for(order.randrange(0, SECOND // 10))  # in which it does not take any
        ticks += take(pc, order.randrange(0, 100) / 1000)
    ticks += take(pc, 5)
    assert ticks == ticks_at(pc.clock.now()) // 4772


def test_late_interrupts_come_one_by_one(pc: Any) -> None:
    """A teleport adds half a second: no storm, but twice the rate until the guest has caught up."""
    pc.init_pics()
    program(pc, 0, 2, 11932)  # 100 Hz
    pc.advance(SECOND // 2)
    assert pc.interrupts() == [0x30]
    assert take(pc, 0.1) in (19, 20, 21)
    take(pc, 0.6)
    assert take(pc, 1) == 100


def test_interrupts_that_are_too_old_are_lost(pc: Any) -> None:
    pc.init_pics()
    program(pc, 0, 2, 0)
    pc.advance(10 * 3600 * SECOND)
    ticks = take(pc, 800, within_ms=10)  # 36 ticks a second
    owed = (OLDEST_NS + 800 * SECOND) // ns_of(0x10000)
    assert abs(ticks - owed) <= 2


def test_a_guest_that_masks_them_gets_one(pc: Any) -> None:
    pc.init_pics(mask=1)
    program(pc, 0, 2, 4772)
    pc.run_for(10 * SECOND)
    assert pc.interrupts() == []
    pc.outb(0x21, 0)
    assert pc.interrupts() == [0x30]
    assert take(pc, 1) in (249, 250, 251)


def test_interrupts_too_fast_to_be_taken_are_not_owed(pc: Any) -> None:
    pc.init_pics()
    program(pc, 0, 2, 119)  # 100 us
    pc.run_for(SECOND // 10)
    assert pc.interrupts() == [0x30]
    assert take(pc, 0.1) <= 101


def test_late_interrupts_move_with_the_machine(pc: Any, make_pc: Any) -> None:
    pc.init_pics()
    program(pc, 0, 2, 4772)
    pc.run_for(SECOND)
    assert pc.interrupts() == [0x30]
    other = make_pc()
    other.clock.set(pc.clock.now())
    for device, twin in zip(pc.devices, other.devices, strict=True):
        twin.restore(device.save())
    assert 1 + take(other, 5) == ticks_at(other.clock.now()) // 4772


def test_a_long_stall_makes_one_interrupt_at_once_and_no_storm(pc: Any) -> None:
    pc.init_pics()
    program(pc, 0, 2, 1193)
    calls = []
    original = pc.pic.wire_changed
    pc.pic.wire_changed = lambda number, level: (calls.append(level), original(number, level))
    pc.advance(3600 * SECOND)
    assert calls.count(True) == 1
    assert pc.interrupts() == [0x30]
    assert 0 < pc.timers.next_deadline() - pc.clock.now() <= ns_of(1193)


def test_a_one_shot_fires_once(pc: Any) -> None:
    pc.init_pics()
    for mode, extra in ((0, 0), (4, 1)):
        program(pc, 0, mode, 1000)
        pc.run_for(ns_of(1000 + extra) - 1)
        assert pc.interrupts() == []
        pc.run_for(1)
        assert pc.interrupts() == [0x30]
        pc.run_for(SECOND)
        assert pc.interrupts() == []
        assert pc.timers.next_deadline() is None


def test_the_count_runs_down_and_can_be_latched(pc: Any) -> None:
    program(pc, 0, 2, 10000)
    pc.advance(ns_of(1234))
    pc.outb(0x43, 0x00)
    pc.advance(ns_of(100))
    assert pc.inb(0x40) | pc.inb(0x40) << 8 == 10000 - 1234
    assert read_count(pc, 0) in (10000 - 1334, 10000 - 1335)


def test_mode_3_counts_by_two_and_mode_0_goes_on_below_zero(pc: Any) -> None:
    program(pc, 1, 3, 10000)
    program(pc, 0, 0, 10)
    pc.advance(ns_of(100))
    assert read_count(pc, 1) == 9800
    assert read_count(pc, 0) == 0x10000 - 90


def test_read_back_gives_status_then_count(pc: Any) -> None:
    program(pc, 0, 2, 500)
    pc.advance(ns_of(7))
    pc.outb(0x43, 0xC2)
    assert pc.inb(0x40) == 0x80 | 0x30 | 2 << 1
    assert pc.inb(0x40) | pc.inb(0x40) << 8 == 493


def test_decimal_counting(pc: Any) -> None:
    assert from_bcd(0x1234) == 1234
    assert to_bcd(1234) == 0x1234
    pc.outb(0x43, 0x35)
    pc.outb(0x40, 0x00, 0x10)
    pc.advance(ns_of(1))
    assert read_count(pc, 0) == 0x0999


def test_channel_2_calibrates_by_port_61(pc: Any) -> None:
    """As Linux' pit_calibrate_tsc: mode 0 with the gate up, poll OUT."""
    pc.outb(0x61, pc.inb(0x61) & ~2 | 1)
    program(pc, 2, 0, FREQUENCY_HZ // 20)
    pc.advance(SECOND // 20 - 10_000)
    assert not pc.inb(0x61) & 0x20
    pc.advance(20_000)
    assert pc.inb(0x61) & 0x20


def test_the_gate_stops_and_resumes_channel_2(pc: Any) -> None:
    pc.outb(0x61, 1)
    program(pc, 2, 0, 1000)
    pc.advance(ns_of(400))
    pc.outb(0x61, 0)
    pc.advance(SECOND)
    assert read_count(pc, 2) == 600
    pc.outb(0x61, 1)
    pc.advance(ns_of(100))
    assert read_count(pc, 2) == 500
    pc.outb(0x43, 0xB2)  # mode 1: the gate's edge triggers
    pc.outb(0x42, 100, 0)
    pc.outb(0x61, 0, 1)
    assert not pc.inb(0x61) & 0x20
    pc.advance(ns_of(100))
    assert pc.inb(0x61) & 0x20


def test_the_refresh_bit_toggles(pc: Any) -> None:
    seen = set()
    for _ in range(8):
        pc.advance(10_000)
        seen.add(pc.inb(0x61) & 0x10)
    assert seen == {0, 0x10}


def test_a_due_edge_survives_a_save_before_its_timer_ran(pc: Any, make_pc: Any) -> None:
    pc.init_pics()
    program(pc, 0, 4, 1000)
    pc.clock.set(pc.clock.now() + SECOND)  # due, but the run loop has not come to it
    other = make_pc()
    other.clock.set(pc.clock.now())
    for device, twin in zip(pc.devices, other.devices, strict=True):
        twin.restore(device.save())
    assert not other.pic.pending()
    other.timers.run_due()
    assert other.interrupts() == [0x30]


@pytest.mark.parametrize("mode", [0, 2, 3, 4])
def test_an_edge_that_passes_while_it_is_programmed_is_not_lost(pc: Any, monkeypatch: Any, mode: int) -> None:
    """A host that is busy elsewhere: a second goes by at every look at the clock."""
    pc.init_pics()
    now = pc.clock.now

    def slow_now() -> int:
        pc.clock.set(now() + SECOND)
        return int(now())

    monkeypatch.setattr(pc.clock, "now", slow_now)
    program(pc, 0, mode, 1000)
    monkeypatch.undo()
    pc.advance(ns_of(1001))
    assert pc.interrupts() == [0x30]
