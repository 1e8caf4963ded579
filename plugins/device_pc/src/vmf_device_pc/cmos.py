"""CMOS memory and real-time clock (Motorola MC146818A data sheet; PC/AT layout), ports 0x70/0x71, interrupt 8.

Theory of operation
    The clock shows the host's wall time in UTC plus `offset`, which is what the guest changes when it sets the time.
    So a guest that was paused, or that moved to another host, reads the right time. Nothing ticks: registers are
    computed when read. While the guest holds SET (register B), the time stands still in `frozen`, and clearing SET
    makes it the present. One timer waits for the next interrupt that the guest has enabled; update-ended and alarm
    flags that nobody waits for are worked out when register C is read.

    Registers hold BCD or binary, 12 or 24 hours, as register B says; `wall` is always a plain number of seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from vmf.device import fields
from vmf.device.base import Device, DeviceEnvironment, Payload
from vmf.device.interrupts import IrqLine
from vmf.errors import StateError
from vmf.memory.guest import HIGH_RAM_BASE, MIB, GuestMemory
from vmf_device_pc.ports import Port, read_ones

INDEX_PORT, DATA_PORT = 0x70, 0x71
RTC_IRQ = 8
SIZE = 128
NS = 1_000_000_000
OSCILLATOR_HZ = 32768
UPDATE_NS = 244_000
"""UIP is set this long before the seconds change."""

SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM = range(6)
WEEKDAY, DAY, MONTH, YEAR = 6, 7, 8, 9
REG_A, REG_B, REG_C, REG_D = 10, 11, 12, 13
CENTURY = 0x32
A_UPDATE_IN_PROGRESS, A_DIVIDER, A_DIVIDER_NORMAL, A_RATE = 0x80, 0x70, 0x20, 0x0F
B_SET, B_PERIODIC, B_ALARM, B_UPDATE, B_SQUARE, B_BINARY, B_24H = 0x80, 0x40, 0x20, 0x10, 0x08, 0x04, 0x02
C_INTERRUPT, C_PERIODIC, C_ALARM, C_UPDATE = 0x80, 0x40, 0x20, 0x10
D_VALID = 0x80
DONT_CARE = 0xC0
PM = 0x80

_TIME_REGISTERS = frozenset({SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY})
_ALARM_REGISTERS = frozenset({SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM})
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST, _LAST = -2_208_988_800, 253_402_300_799  # 1900-01-01 and 9999-12-31, as far as a century register goes
_OFFSET_LIMIT = (_LAST - _FIRST) * NS
_DAY = 86400


def wall_of(seconds: int) -> datetime:
    """Seconds since 1970 as a date, kept inside what the registers can show."""
    return _EPOCH + timedelta(seconds=min(max(seconds, _FIRST), _LAST))


class CmosRtc(Device):
    """The CMOS memory with its clock. `wall_clock` gives the host's time in ns since 1970 (UTC)."""

    kind = "pc.cmos"
    writes_ram = False
    VERSION = 1
    SCHEMA: fields.Schema = {
        "index": fields.integer(0, SIZE - 1),
        "memory": fields.octets(SIZE, SIZE),
        "offset_ns": fields.integer(-_OFFSET_LIMIT, _OFFSET_LIMIT),
        "frozen": fields.optional(fields.integer(_FIRST, _LAST)),
        "seen_second": fields.integer(-(1 << 62), 1 << 62),
        "deadline": fields.optional(fields.TIME),
        "period_start": fields.TIME,
    }

    def __init__(self, environment: DeviceEnvironment, wall_clock: Callable[[], int] = time.time_ns) -> None:
        self._wall_clock = wall_clock
        self._clock = environment.clock
        self._irq: IrqLine = environment.irq_line(RTC_IRQ)
        self._timer = environment.timers.timer(self._wake)
        self._memory = bytearray(SIZE)
        self._index = 0
        self._offset = 0
        self._frozen: int | None = None
        self._seen_second = 0
        self._period_start = 0
        """Guest time from which periodic interrupts count."""
        self._memory[REG_A] = A_DIVIDER_NORMAL | 6
        self._memory[REG_B] = B_24H
        self._memory[REG_D] = D_VALID
        self._describe_machine(environment.memory)
        self._seen_second = self._now_ns() // NS
        environment.bus.claim_ports(self.kind, INDEX_PORT, 1, Port(read_ones, self._write_index))
        environment.bus.claim_ports(self.kind, DATA_PORT, 1, Port(self._read_data, self._write_data))

    def _describe_machine(self, memory: GuestMemory) -> None:
        """The bytes from which firmware and old systems learn what is there."""
        put = self._memory
        low = memory.regions[0].size
        put[0x14] = 0x02  # equipment: a mathematics coprocessor
        put[0x15:0x17] = (640).to_bytes(2, "little")
        above_1m = min(0xFFFF, max(0, low - MIB) >> 10)
        put[0x17:0x19] = put[0x30:0x32] = above_1m.to_bytes(2, "little")
        above_16m = min(0xFFFF, max(0, low - 16 * MIB) >> 16)
        put[0x34:0x36] = above_16m.to_bytes(2, "little")
        above_4g = sum(region.size for region in memory.regions if region.gpa >= HIGH_RAM_BASE) >> 16
        put[0x5B:0x5E] = min(0xFF_FFFF, above_4g).to_bytes(3, "little")

    # -- time

    def _now_ns(self) -> int:
        return self._wall_clock() + self._offset

    def _time(self) -> datetime:
        return wall_of(self._now_ns() // NS if self._frozen is None else self._frozen)

    def _encode(self, value: int) -> int:
        return value if self._memory[REG_B] & B_BINARY else value // 10 << 4 | value % 10

    def _decode(self, value: int) -> int:
        return value if self._memory[REG_B] & B_BINARY else (value >> 4) * 10 + (value & 15)

    def _encode_hour(self, hour: int) -> int:
        if self._memory[REG_B] & B_24H:
            return self._encode(hour)
        return self._encode(hour % 12 or 12) | (PM if hour >= 12 else 0)

    def _decode_hour(self, value: int) -> int:
        if self._memory[REG_B] & B_24H:
            return self._decode(value)
        return self._decode(value & ~PM) % 12 + (12 if value & PM else 0)

    def _read_time(self, register: int) -> int:
        now = self._time()
        if register == SECONDS:
            return self._encode(now.second)
        if register == MINUTES:
            return self._encode(now.minute)
        if register == HOURS:
            return self._encode_hour(now.hour)
        if register == WEEKDAY:
            return self._encode(now.isoweekday() % 7 + 1)  # 1 is Sunday
        if register == DAY:
            return self._encode(now.day)
        if register == MONTH:
            return self._encode(now.month)
        if register == YEAR:
            return self._encode(now.year % 100)
        return self._encode(now.year // 100)

    def _write_time(self, register: int, value: int) -> None:
        """Set one field of the time; a value that makes no date is clipped into the nearest one."""
        now = self._time()
        second, minute, hour, day, month, year = now.second, now.minute, now.hour, now.day, now.month, now.year
        if register == SECONDS:
            second = min(self._decode(value), 59)
        elif register == MINUTES:
            minute = min(self._decode(value), 59)
        elif register == HOURS:
            hour = min(self._decode_hour(value), 23)
        elif register == DAY:
            day = min(max(self._decode(value), 1), 31)
        elif register == MONTH:
            month = min(max(self._decode(value), 1), 12)
        elif register == YEAR:
            year = year // 100 * 100 + min(self._decode(value), 99)
        elif register == CENTURY:
            year = min(max(self._decode(value), 19), 99) * 100 + year % 100
        else:
            return  # the day of the week follows from the date
        # Day 31 may be written before the month it belongs to: the first of the month plus days keeps it meaningful.
        first = datetime(year, month, 1, hour, minute, second, tzinfo=UTC)
        seconds = (first - _EPOCH) // timedelta(seconds=1) + (day - 1) * _DAY
        seconds = min(max(seconds, _FIRST), _LAST)
        if self._frozen is not None:
            self._frozen = seconds
        else:
            self._set_time(seconds)

    def _set_time(self, seconds: int) -> None:
        """Make `seconds` the present, keeping the fraction of the second."""
        self._offset += (seconds - self._now_ns() // NS) * NS
        self._seen_second = seconds
        self._rearm()

    # -- interrupts

    def _period_ticks(self) -> int:
        """Oscillator clocks between periodic interrupts, 0 for none."""
        rate = self._memory[REG_A] & A_RATE
        if not rate:
            return 0
        return 1 << (rate + 6 if rate <= 2 else rate - 1)

    def _next_alarm(self, after: int) -> int:
        """The first second after `after` that the alarm registers match; at most a day away, or a day when never."""
        wanted_hour, wanted_minute, wanted_second = (
            None if raw >= DONT_CARE else decode(raw)
            for raw, decode in (
                (self._memory[HOURS_ALARM], self._decode_hour),
                (self._memory[MINUTES_ALARM], self._decode),
                (self._memory[SECONDS_ALARM], self._decode),
            )
        )
        for seconds in (after + 1, (after + 1) // _DAY * _DAY + _DAY):
            midnight, of_day = seconds // _DAY * _DAY, seconds % _DAY
            for hour in range(of_day // 3600, 24) if wanted_hour is None else (wanted_hour,):
                for minute in range(60) if wanted_minute is None else (wanted_minute,):
                    begin = hour * 3600 + minute * 60
                    if begin + 59 < of_day:
                        continue
                    second = max(0, of_day - begin) if wanted_second is None else wanted_second
                    if begin + second >= of_day and hour < 24 and minute < 60 and second < 60:
                        return midnight + begin + second
        return after + _DAY

    def _collect(self) -> None:
        """Set the flags of everything that has happened since the last time."""
        now = self._now_ns() // NS
        flags = self._memory[REG_C]
        if self._frozen is None and now != self._seen_second:
            if now > self._seen_second:
                flags |= C_UPDATE
                if self._next_alarm(self._seen_second) <= now:
                    flags |= C_ALARM
            self._seen_second = now
        ticks = self._period_ticks()
        if ticks:
            guest_now = self._clock.now()
            elapsed = max(0, guest_now - self._period_start) * OSCILLATOR_HZ // NS // ticks * ticks
            if elapsed:
                flags |= C_PERIODIC
                self._period_start += -(-elapsed * NS // OSCILLATOR_HZ)
        self._set_flags(flags & ~C_INTERRUPT)

    def _set_flags(self, flags: int) -> None:
        if flags & self._memory[REG_B] & (C_PERIODIC | C_ALARM | C_UPDATE):
            flags |= C_INTERRUPT
        self._memory[REG_C] = flags
        self._irq.set_level(bool(flags & C_INTERRUPT))

    def _rearm(self) -> None:
        """Wait for the next thing that the guest wants to be told."""
        enabled = self._memory[REG_B]
        guest_now = self._clock.now()
        deadlines = []
        ticks = self._period_ticks()
        if enabled & B_PERIODIC and ticks:
            deadlines.append(self._period_start + -(-ticks * NS // OSCILLATOR_HZ))
        if self._frozen is None and enabled & (B_UPDATE | B_ALARM):
            now_ns = self._now_ns()
            now = now_ns // NS
            second = now + 1 if enabled & B_UPDATE else self._next_alarm(now)
            deadlines.append(guest_now + second * NS - now_ns)
        if deadlines:
            # Not before a microsecond from now, whatever the wall clock says: the callback must not chase itself.
            self._timer.arm(max(min(deadlines), guest_now + 1000))
        else:
            self._timer.cancel()

    def _wake(self) -> None:
        self._collect()
        self._rearm()

    # -- ports

    def _write_index(self, _offset: int, _size: int, value: int) -> None:
        self._index = value & (SIZE - 1)  # bit 7 masks NMI, of which this machine has no source

    def _read_data(self, _offset: int, _size: int) -> int:
        index = self._index
        if index in _TIME_REGISTERS:
            return self._read_time(index)
        if index == REG_A:
            return self._memory[REG_A] | (A_UPDATE_IN_PROGRESS if self._updating() else 0)
        if index == REG_C:
            self._collect()
            flags = self._memory[REG_C]
            self._set_flags(0)
            return flags
        return self._memory[index]

    def _updating(self) -> bool:
        return self._frozen is None and self._now_ns() % NS >= NS - UPDATE_NS

    def _write_data(self, _offset: int, _size: int, value: int) -> None:
        index, value = self._index, value & 0xFF
        if index in _TIME_REGISTERS:
            self._write_time(index, value)
        elif index == REG_A:
            self._memory[REG_A] = value & ~A_UPDATE_IN_PROGRESS
            self._period_start = self._clock.now()
            self._rearm()
        elif index == REG_B:
            self._write_b(value)
        elif index in (REG_C, REG_D):
            pass  # read-only
        else:
            self._memory[index] = value
            if index in _ALARM_REGISTERS:
                self._rearm()

    def _write_b(self, value: int) -> None:
        before = self._memory[REG_B]
        self._collect()
        if value & B_SET:
            value &= ~B_UPDATE
            if self._frozen is None:
                self._frozen = min(max(self._now_ns() // NS, _FIRST), _LAST)
        self._memory[REG_B] = value
        if value & B_PERIODIC and not before & B_PERIODIC:
            self._period_start = self._clock.now()
        if not value & B_SET and self._frozen is not None:
            seconds, self._frozen = self._frozen, None
            self._set_time(seconds)
        self._set_flags(self._memory[REG_C] & ~C_INTERRUPT)
        self._rearm()

    # -- life

    def reset(self) -> None:
        """The RESET pin: interrupts off. Time and memory are battery-backed."""
        self._memory[REG_B] &= ~(B_PERIODIC | B_ALARM | B_UPDATE | B_SQUARE)
        self._index = 0
        self._set_flags(0)
        self._rearm()

    def save(self) -> Payload:
        return Payload(
            self.kind,
            self.VERSION,
            {
                "index": self._index,
                "memory": bytes(self._memory),
                "offset_ns": self._offset,
                "frozen": self._frozen,
                "seen_second": self._seen_second,
                "deadline": self._timer.deadline,
                "period_start": self._period_start,
            },
        )

    def restore(self, payload: Payload) -> None:
        values = fields.read(payload, self.kind, self.VERSION, self.SCHEMA)
        memory = values["memory"]
        if (
            memory[REG_A] & A_UPDATE_IN_PROGRESS
            or bool(memory[REG_B] & B_SET) != (values["frozen"] is not None)
            or memory[REG_D] != D_VALID
        ):
            raise StateError(f"{self.kind}: its saved state is wrong: the clock is in a state it does not have.")
        self._index = values["index"]
        self._memory[:] = memory
        self._offset = values["offset_ns"]
        self._frozen = values["frozen"]
        self._seen_second = values["seen_second"]
        self._period_start = values["period_start"]
        self._irq.set_level(bool(memory[REG_C] & C_INTERRUPT))
        # Wall seconds pass during a teleport too, and the hosts' clocks may differ: what is due is found anew.
        if values["deadline"] is None:
            self._timer.cancel()
        else:
            self._rearm()
