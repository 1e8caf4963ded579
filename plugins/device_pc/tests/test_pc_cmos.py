"""CMOS memory and real-time clock, and the ports for reset and power-off."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

SECOND = 10**9


def set_mode(pc: Any, binary: bool, hours24: bool) -> None:
    pc.cmos_write(0x0B, (4 if binary else 0) | (2 if hours24 else 0))


def read_time(pc: Any, binary: bool = False, hours24: bool = True) -> datetime:
    """As a driver does."""

    def number(raw: int) -> int:
        return raw if binary else (raw >> 4) * 10 + (raw & 15)

    hour = pc.cmos_read(4)
    decoded = number(hour) if hours24 else number(hour & 0x7F) % 12 + (12 if hour & 0x80 else 0)
    year = number(pc.cmos_read(0x32)) * 100 + number(pc.cmos_read(9))
    return datetime(
        year, number(pc.cmos_read(8)), number(pc.cmos_read(7)), decoded, number(pc.cmos_read(2)),
        number(pc.cmos_read(0)), tzinfo=UTC,
    )  # fmt: skip


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("hours24", [False, True])
@given(shift=st.integers(0, 10**9))
def test_the_time_in_every_format(make_pc: Any, binary: bool, hours24: bool, shift: int) -> None:
    pc = make_pc()
    set_mode(pc, binary, hours24)
    pc.wall_shift = shift * SECOND
    assert read_time(pc, binary, hours24) == datetime.fromtimestamp(1_700_000_000 + shift, UTC)


@pytest.mark.parametrize("hold", [False, True])
def test_the_guest_sets_the_time_and_it_goes_on(pc: Any, hold: bool) -> None:
    if hold:
        pc.cmos_write(0x0B, 0x82)
    for register, value in ((0x32, 0x20), (9, 0x31), (8, 0x12), (7, 0x31), (4, 0x23), (2, 0x59), (0, 0x58)):
        pc.cmos_write(register, value)
    pc.advance(5 * SECOND if hold else 0)
    assert read_time(pc) == datetime(2031, 12, 31, 23, 59, 58, tzinfo=UTC)
    pc.cmos_write(0x0B, 0x02)
    pc.advance(3 * SECOND)
    assert read_time(pc) == datetime(2032, 1, 1, 0, 0, 1, tzinfo=UTC)
    pc.cmos.reset()
    assert read_time(pc) == datetime(2032, 1, 1, 0, 0, 1, tzinfo=UTC), "the time is battery-backed"


def test_update_in_progress_shows_just_before_the_second_changes(pc: Any) -> None:
    assert not pc.cmos_read(0x0A) & 0x80
    pc.advance(SECOND - 200_000)
    assert pc.cmos_read(0x0A) & 0x80
    pc.advance(200_000)
    assert not pc.cmos_read(0x0A) & 0x80


def test_periodic_interrupts(pc: Any) -> None:
    pc.init_pics()
    pc.cmos_write(0x0A, 0x26)  # 1024 Hz
    pc.cmos_write(0x0B, 0x42)
    count = 0
    for _ in range(2048):
        pc.run_for(SECOND // 1024 + 1)
        vectors = pc.interrupts()
        assert vectors in ([0x38], [])
        count += len(vectors)
        assert bool(vectors) == bool(pc.cmos_read(0x0C) & 0x40)
    assert 2046 <= count <= 2048
    pc.advance(1000 * SECOND)
    assert pc.interrupts() == [0x38], "one after a pause"
    assert pc.cmos_read(0x0C) & 0xC0 == 0xC0
    assert pc.cmos_read(0x0C) == 0


def test_update_interrupts_once_a_second(pc: Any) -> None:
    pc.init_pics()
    pc.advance(SECOND // 3)
    pc.cmos_write(0x0B, 0x12)
    pc.cmos_read(0x0C)
    for _ in range(5):
        pc.run_for(SECOND)
        assert pc.interrupts() == [0x38]
        assert pc.cmos_read(0x0C) & 0x90 == 0x90


def test_the_update_flag_is_there_for_those_who_poll(pc: Any) -> None:
    pc.cmos_read(0x0C)
    assert not pc.cmos_read(0x0C) & 0x10
    pc.advance(SECOND)
    assert pc.cmos_read(0x0C) & 0x90 == 0x10


@pytest.mark.parametrize(
    ("hour", "minute", "second", "expected"),
    [
        (0x22, 0x13, 0x25, 5),  # the start is 22:13:20
        (0x22, 0x13, 0x20, 86400),
        (0xFF, 0x13, 0x10, 3590),
        (0xFF, 0xFF, 0x19, 59),
        (0xFF, 0xFF, 0xFF, 1),
        (0x03, 0xC0, 0x00, 17200),
    ],
)
def test_alarms(pc: Any, hour: int, minute: int, second: int, expected: int) -> None:
    pc.init_pics()
    for register, value in ((5, hour), (3, minute), (1, second)):
        pc.cmos_write(register, value)
    pc.cmos_write(0x0B, 0x22)
    pc.run_for(expected * SECOND - 1)
    assert pc.interrupts() == []
    pc.run_for(2000)
    assert pc.interrupts() == [0x38]
    assert pc.cmos_read(0x0C) & 0xA0 == 0xA0


def test_memory_size_and_free_bytes(pc: Any) -> None:
    assert pc.cmos_read(0x15) | pc.cmos_read(0x16) << 8 == 640
    assert pc.cmos_read(0x17) | pc.cmos_read(0x18) << 8 == 63 * 1024
    assert pc.cmos_read(0x34) | pc.cmos_read(0x35) << 8 == 48 * 16
    pc.cmos_write(0x40, 0x99)
    assert pc.cmos_read(0x40 | 0x80) == 0x99, "bit 7 of the index masks NMI"


@given(st.lists(st.tuples(st.integers(0, 127), st.integers(0, 255)), max_size=60))
def test_no_write_breaks_it(make_pc: Any, writes: list[tuple[int, int]]) -> None:
    pc = make_pc()
    for index, value in writes:
        pc.cmos_write(index, value)
        pc.run_for(10**7)
    for index in range(128):
        assert 0 <= pc.cmos_read(index) <= 0xFF
    pc.cmos.restore(pc.cmos.save())


@pytest.mark.parametrize(
    ("port", "size", "value", "request_"),
    [
        (0x64, 1, 0xFE, "reset"), (0xCF9, 1, 0x06, "reset"), (0x92, 1, 0x01, "reset"),
        (0x604, 2, 0x2000, "power off"), (0x605, 1, 0x20, "power off"), (0xF4, 1, 0, "power off"),
        (0x64, 1, 0xD1, None), (0xCF9, 1, 0x02, None), (0x92, 1, 0x02, None), (0x604, 2, 0x0001, None),
    ],
)  # fmt: skip
def test_reset_and_power_off(pc: Any, port: int, size: int, value: int, request_: str | None) -> None:
    pc.bus.port_write(port, size, value)
    assert pc.requests == ([request_] if request_ else [])


def test_the_absent_keyboard_controller_never_makes_a_driver_wait(pc: Any) -> None:
    assert not pc.inb(0x64) & 2, "input buffer empty: a command can be written at once"
    assert pc.inb(0x64) & 1, "output buffer full for ever: the flush of i8042 gives up"
