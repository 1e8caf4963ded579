"""A PC without a CPU: bus, devices, and a clock that the test moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from vmf.device.base import Device, DeviceEnvironment
from vmf.device.interrupts import InterruptController, IrqLine
from vmf.machine.bus import Bus
from vmf.machine.clock import MachineClock
from vmf.machine.timers import TimerQueue
from vmf.memory.guest import GuestMemory
from vmf_device_pc.cmos import CmosRtc
from vmf_device_pc.control import SystemControl
from vmf_device_pc.pic import Pic8259
from vmf_device_pc.pit import Pit8254
from vmf_device_pc.uart import Uart16550

WALL_AT_START = 1_700_000_000 * 10**9


class Pc:
    """`outb`/`inb` as a guest does, `advance` for time."""

    def __init__(self, memory: GuestMemory) -> None:
        self.bus = Bus()
        self.clock = MachineClock()
        self.timers = TimerQueue(self.clock)
        self.output: list[bytes] = []
        self.requests: list[str] = []
        self.wall_shift = 0
        provided: dict[str, Any] = {}

        def provide(controller: InterruptController, lines: Callable[[int], IrqLine]) -> None:
            provided.update(controller=controller, lines=lines)

        environment = DeviceEnvironment(
            bus=self.bus,
            memory=memory,
            clock=self.clock,
            timers=self.timers,
            irq_line=lambda number: provided["lines"](number),
            provide_interrupts=provide,
            post=lambda function: function(),
            request_power_off=lambda: self.requests.append("power off"),
            request_reset=lambda: self.requests.append("reset"),
            serial_output=self.output.append,
        )
        self.environment = environment
        self.pic = Pic8259(environment)
        self.pit = Pit8254(environment)
        self.uart = Uart16550(environment)
        self.cmos = CmosRtc(environment, wall_clock=lambda: WALL_AT_START + self.clock.now() + self.wall_shift)
        self.control = SystemControl(environment, self.uart.flush)
        self.devices: tuple[Device, ...] = (self.pic, self.pit, self.uart, self.cmos, self.control)

    def outb(self, port: int, *values: int) -> None:
        for value in values:
            self.bus.port_write(port, 1, value)

    def inb(self, port: int) -> int:
        return self.bus.port_read(port, 1)

    def advance(self, ns: int) -> None:
        """Let time pass at once, as after a pause, then fire what is due."""
        self.clock.set(self.clock.now() + ns)
        self.timers.run_due()

    def run_for(self, ns: int) -> None:
        """Let time pass as it does for a running machine: from timer to timer."""
        end = self.clock.now() + ns
        while (deadline := self.timers.next_deadline()) is not None and deadline <= end:
            self.clock.set(max(deadline, self.clock.now()))
            self.timers.run_due()
        self.clock.set(end)

    def init_pics(self, mask: int = 0) -> None:
        """As Linux does: vectors 0x30 and 0x38, normal EOI, lines in `mask` masked."""
        for base, vector, cascade in ((0x20, 0x30, 0x04), (0xA0, 0x38, 0x02)):
            self.outb(base, 0x11)
            self.outb(base + 1, vector, cascade, 0x01)
        self.outb(0x21, mask & 0xFF)
        self.outb(0xA1, mask >> 8)

    def interrupts(self, limit: int = 100) -> list[int]:
        """Take and end every pending interrupt; the vectors."""
        vectors = []
        while self.pic.pending() and len(vectors) < limit:
            vector = self.pic.acknowledge()
            vectors.append(vector)
            if vector >= 0x38:
                self.outb(0xA0, 0x20)
            self.outb(0x20, 0x20)
        return vectors

    def cmos_read(self, index: int) -> int:
        self.outb(0x70, index)
        return self.inb(0x71)

    def cmos_write(self, index: int, value: int) -> None:
        self.outb(0x70, index)
        self.outb(0x71, value)


@pytest.fixture(scope="session")
def memory() -> Iterator[GuestMemory]:
    ram = GuestMemory(64 << 20)
    yield ram
    ram.close()


@pytest.fixture(scope="session")
def make_pc(memory: GuestMemory) -> Callable[[], Pc]:
    return lambda: Pc(memory)


@pytest.fixture
def pc(make_pc: Callable[[], Pc]) -> Pc:
    return make_pc()
