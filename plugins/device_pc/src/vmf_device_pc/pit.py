"""The 8254 interval timer (Intel 8254 data sheet) with the PC's port 0x61.

Theory of operation
    No counter ever counts. A channel remembers the guest time `start` at which its count was loaded; its value, its
    OUT pin and its next edge are integer arithmetic on guest time, so they are exact however seldom anyone looks:
    `ticks = (now - start) * 1193182 // 10**9`. Only channel 0 has a timer, armed for its next rising edge of OUT,
    which is the edge on interrupt 0.

    Guests without another clock count these interrupts, so none of a periodic count may be lost: not while the host is
    busy, nor in the time that a teleport adds. `_edge` is the guest time of the oldest edge that was not delivered yet,
    which may have passed long ago. An edge waits until the one before has been acknowledged, and those that are late
    come at `CATCH_UP` times the rate. Guests that mask the interrupt do not count: then late edges make one, as on the
    chip; so do those that come faster than `FASTEST_NS` or are older than `OLDEST_NS`. A pause by the user makes none
    late, as guest time stands still.

    Channels 0 and 1 have GATE tied high; that of channel 2 is bit 0 of port 0x61. A channel with GATE low (modes 0
    and 4) or waiting for its trigger (modes 1 and 5) has no `start`; `frozen` holds the ticks it had counted.

Differences from the chip: a new count written in modes 2 and 3 takes effect at once, not at the end of the period.
"""

from __future__ import annotations

from typing import Any

from vmf.device import fields
from vmf.device.base import Device, DeviceEnvironment, Payload
from vmf.device.interrupts import IrqLine, LatchingLine
from vmf.errors import StateError
from vmf.machine.clock import MachineClock
from vmf_device_pc.ports import Port, read_ones

FREQUENCY_HZ = 1_193_182
NS = 1_000_000_000
PIT_PORT = 0x40
CONTROL_PORT = 0x43
PORT_61 = 0x61
PIT_IRQ = 0
REFRESH_NS = 15_085
"""Half period of the DRAM refresh signal that bit 4 of port 0x61 shows."""

CATCH_UP = 2
"""By so much faster than they are due do late edges come: more would take a slow guest's time for anything else."""
FASTEST_NS = 200_000
"""Edges with a shorter period may be lost: a guest that wants that many cannot be owed any."""
OLDEST_NS = 600 * NS
"""Edges that are later than this are lost."""

ACCESS_LATCH, ACCESS_LOW, ACCESS_HIGH, ACCESS_WORD = 0, 1, 2, 3


def ticks_at(elapsed_ns: int) -> int:
    """Whole input clocks in `elapsed_ns`."""
    return elapsed_ns * FREQUENCY_HZ // NS


def ns_of(ticks: int) -> int:
    """The smallest elapsed time in ns by which `ticks` input clocks have passed."""
    return -(-ticks * NS // FREQUENCY_HZ)


def from_bcd(value: int) -> int:
    """Four decimal digits; what is no digit counts as its value."""
    return (value & 15) + (value >> 4 & 15) * 10 + (value >> 8 & 15) * 100 + (value >> 12 & 15) * 1000


def to_bcd(value: int) -> int:
    return int(str(value % 10000), 16)


class _Channel:
    """One counter."""

    __slots__ = (
        "_clock", "access", "bcd", "frozen", "gate", "latched", "low_byte", "mode", "null_count", "read_high",
        "reload", "start", "status", "write_high",
    )  # fmt: skip

    SCHEMA: fields.Schema = {
        "mode": fields.integer(0, 5),
        "access": fields.integer(1, 3),
        "bcd": fields.boolean,
        "gate": fields.boolean,
        "reload": fields.integer(0, 0x10000),
        "start": fields.optional(fields.TIME),
        "frozen": fields.integer(0, fields.MAX_TIME),
        "null_count": fields.boolean,
        "low_byte": fields.BYTE,
        "write_high": fields.boolean,
        "read_high": fields.boolean,
        "latched": fields.optional(fields.integer(0, 0xFFFF)),
        "status": fields.optional(fields.BYTE),
    }

    def __init__(self, clock: MachineClock) -> None:
        self._clock = clock
        self.power_on()

    def power_on(self) -> None:
        self.mode = 0
        self.access = ACCESS_WORD
        self.bcd = False
        self.gate = True
        self.reload = 0
        """The count, 1 to 65536; 0 while none was written since the control word."""
        self.start: int | None = None
        self.frozen = 0
        self.null_count = True
        self.low_byte = 0
        self.write_high = False
        self.read_high = False
        self.latched: int | None = None
        self.status: int | None = None

    # -- counting

    @property
    def ticks(self) -> int:
        """Input clocks counted since the count was loaded."""
        if self.start is None:
            return self.frozen
        return max(0, ticks_at(self._clock.now() - self.start))

    def value(self) -> int:
        """The counting element as the guest reads it."""
        reload, ticks = self.reload, self.ticks
        modulus = 10000 if self.bcd else 0x10000
        if not reload:
            count = 0
        elif self.mode == 2:
            count = reload - ticks % reload
        elif self.mode == 3:
            count = reload - 2 * ticks % reload & ~1 if reload > 1 else 0
        else:
            count = (reload - ticks) % modulus
        count %= modulus
        return to_bcd(count) if self.bcd else count

    def out(self) -> bool:
        """The OUT pin."""
        if not self.reload:
            return self.mode != 0
        ticks = self.ticks
        if self.mode == 0:
            return ticks >= self.reload
        if self.mode == 1:
            return self.start is None or ticks >= self.reload
        if self.start is None:
            return True
        if self.mode == 2:
            return ticks % self.reload != self.reload - 1
        if self.mode == 3:
            return ticks % self.reload < (self.reload + 1) // 2
        return ticks != self.reload

    def first_rise(self) -> int | None:
        """Guest time of the first rising edge of OUT after the count was loaded, or None. It may have passed already:
        the host can take its time between the loading and the asking, and the edge must not be lost by that."""
        if self.start is None or not self.reload:
            return None
        return self.start + ns_of(self.reload + 1 if self.mode >= 4 else self.reload)

    @property
    def period(self) -> int:
        """Ns between two rising edges of OUT, 0 when there is one at most."""
        return ns_of(self.reload) if self.start is not None and self.reload and self.mode in (2, 3) else 0

    def rise_after(self, edge: int) -> int:
        """Guest time of the periodic rising edge after the one at `edge`."""
        assert self.start is not None
        return self.start + ns_of((max(0, ticks_at(edge - self.start)) // self.reload + 1) * self.reload)

    # -- programming

    def control(self, access: int, mode: int, bcd: bool) -> None:
        self.mode = mode if mode < 6 else mode - 4  # the top bit of modes 2 and 3 is not decoded
        self.access = access
        self.bcd = bcd
        self.reload = 0
        self.start = None
        self.frozen = 0
        self.null_count = True
        self.write_high = self.read_high = False
        self.latched = self.status = None

    def write(self, value: int) -> bool:
        """A byte of the count; whether the count is complete."""
        if self.access == ACCESS_LOW:
            self._load(value)
        elif self.access == ACCESS_HIGH:
            self._load(value << 8)
        elif self.write_high:
            self.write_high = False
            self._load(value << 8 | self.low_byte)
        else:
            self.write_high = True
            self.low_byte = value
            if self.mode == 0:  # the first byte stops the counting, and OUT stays low until the new count ends
                self.frozen = 0
                self.start = None
            return False
        return True

    def _load(self, count: int) -> None:
        if self.bcd:
            self.reload = from_bcd(count) or 10000
        else:
            self.reload = count or 0x10000
        if self.mode in (1, 5):
            return  # counts from the next trigger on
        self.frozen = 0
        self.null_count = False
        self.start = self._clock.now() if self.gate else None

    def set_gate(self, gate: bool) -> None:
        if gate == self.gate:
            return
        self.gate = gate
        if not self.reload:
            return
        if not gate:
            if self.mode in (0, 4):
                self.frozen, self.start = self.ticks, None
            elif self.mode in (2, 3):
                self.frozen, self.start = 0, None
            return
        self.null_count = False
        if self.mode in (0, 4):
            self.start = max(0, self._clock.now() - ns_of(self.frozen))
        else:
            self.start = self._clock.now()

    def latch_count(self) -> None:
        if self.latched is None:
            self.latched = self.value()

    def latch_status(self) -> None:
        if self.status is None:
            self.status = (
                (0x80 if self.out() else 0)
                | (0x40 if self.null_count else 0)
                | self.access << 4
                | self.mode << 1
                | self.bcd
            )

    def read(self) -> int:
        if self.status is not None:
            status, self.status = self.status, None
            return status
        value = self.value() if self.latched is None else self.latched
        if self.access == ACCESS_LOW:
            self.latched = None
            return value & 0xFF
        if self.access == ACCESS_HIGH:
            self.latched = None
            return value >> 8
        if self.read_high:
            self.read_high = False
            self.latched = None
            return value >> 8
        self.read_high = True
        return value & 0xFF

    def save(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.SCHEMA}

    def load(self, values: dict[str, Any]) -> None:
        for name in self.SCHEMA:
            setattr(self, name, values[name])


class Pit8254(Device):
    """Three counters and port 0x61."""

    kind = "pc.i8254"
    writes_ram = False
    VERSION = 1
    SCHEMA: fields.Schema = {
        "channels": fields.listing(3, fields.record(_Channel.SCHEMA)),
        "speaker": fields.boolean,
        "irq_level": fields.boolean,
        "deadline": fields.optional(fields.TIME),
    }

    def __init__(self, environment: DeviceEnvironment) -> None:
        self._clock = environment.clock
        self._irq: IrqLine = environment.irq_line(PIT_IRQ)
        self._latching = self._irq if isinstance(self._irq, LatchingLine) else None
        self._irq_level = False
        self._timer = environment.timers.timer(self._tick)
        self._edge: int | None = None
        self._channels = [_Channel(self._clock) for _ in range(3)]
        self._channels[2].gate = False
        self._speaker = False
        bus = environment.bus
        for number, channel in enumerate(self._channels):
            bus.claim_ports(self.kind, PIT_PORT + number, 1, self._port(number, channel))
        bus.claim_ports(self.kind, CONTROL_PORT, 1, Port(read_ones, self._write_control))
        bus.claim_ports(self.kind, PORT_61, 1, Port(self._read_61, self._write_61))

    def _port(self, number: int, channel: _Channel) -> Port:
        def read(_offset: int, _size: int) -> int:
            return channel.read()

        def write(_offset: int, _size: int, value: int) -> None:
            channel.write(value & 0xFF)

        def write_channel_0(_offset: int, _size: int, value: int) -> None:
            if channel.write(value & 0xFF) or channel.mode == 0:
                self._schedule()

        return Port(read, write if number else write_channel_0)

    def _write_control(self, _offset: int, _size: int, value: int) -> None:
        selected = value >> 6 & 3
        if selected == 3:  # read-back
            for number, channel in enumerate(self._channels):
                if value & 2 << number:
                    if not value & 0x20:
                        channel.latch_count()
                    if not value & 0x10:
                        channel.latch_status()
            return
        channel = self._channels[selected]
        access = value >> 4 & 3
        if access == ACCESS_LATCH:
            channel.latch_count()
            return
        channel.control(access, value >> 1 & 7, bool(value & 1))
        if selected == 0:
            self._schedule()

    def _read_61(self, _offset: int, _size: int) -> int:
        channel = self._channels[2]
        return (
            (0x01 if channel.gate else 0)
            | (0x02 if self._speaker else 0)
            | (0x10 if self._clock.now() // REFRESH_NS & 1 else 0)
            | (0x20 if channel.out() else 0)
        )

    def _write_61(self, _offset: int, _size: int, value: int) -> None:
        self._speaker = bool(value & 2)
        self._channels[2].set_gate(bool(value & 1))

    # -- interrupt 0

    def _schedule(self) -> None:
        """Channel 0 was programmed: drive its OUT, and wait for its next rising edge."""
        channel = self._channels[0]
        # In the modes that begin with OUT high the line is kept low until the first edge: only edges count here.
        self._set_irq(False)
        self._edge = channel.first_rise()
        if self._edge is None:
            self._timer.cancel()
        else:
            self._timer.arm(self._edge)

    def _tick(self) -> None:
        """The edge at `_edge` is due, or later."""
        channel, now, line = self._channels[0], self._clock.now(), self._latching
        edge, period = self._edge, channel.period
        waiting = line is not None and line.latched
        if edge is not None and period and waiting and line is not None and not line.masked and period >= FASTEST_NS:
            self._edge = max(edge, channel.rise_after(now - OLDEST_NS))
            self._timer.arm(now + period // CATCH_UP)
            return
        self._set_irq(False)
        self._set_irq(True)
        if edge is None or not period:
            self._edge = None
        elif waiting or line is None or period < FASTEST_NS:
            self._edge = channel.rise_after(now)
            self._timer.arm(self._edge)
        else:
            self._edge = max(channel.rise_after(edge), channel.rise_after(now - OLDEST_NS))
            self._timer.arm(self._edge if self._edge > now else now + period // CATCH_UP)

    def _set_irq(self, level: bool) -> None:
        if level != self._irq_level:
            self._irq_level = level
            self._irq.set_level(level)

    # -- life

    def reset(self) -> None:
        for channel in self._channels:
            channel.power_on()
        self._channels[2].gate = False
        self._speaker = False
        self._schedule()

    def save(self) -> Payload:
        body = {
            "channels": [channel.save() for channel in self._channels],
            "speaker": self._speaker,
            "irq_level": self._irq_level,
            # Not computed anew by the reader: an edge that is due, but was not delivered yet, must not be lost.
            "deadline": self._edge,
        }
        return Payload(self.kind, self.VERSION, body)

    def restore(self, payload: Payload) -> None:
        values = fields.read(payload, self.kind, self.VERSION, self.SCHEMA)
        if not (values["channels"][0]["gate"] and values["channels"][1]["gate"]):
            raise StateError(f"{self.kind}: its saved state is wrong: the gates of channels 0 and 1 are always high.")
        for channel, state in zip(self._channels, values["channels"], strict=True):
            channel.load(state)
        self._speaker = values["speaker"]
        self._irq_level = values["irq_level"]
        self._irq.set_level(self._irq_level)
        self._edge = values["deadline"]
        if self._edge is None:
            self._timer.cancel()
        else:
            self._timer.arm(self._edge)
