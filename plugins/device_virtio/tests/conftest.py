"""A PC without a CPU and a driver in Python: what a guest would do to the devices, access by access."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest

from vmf.device.base import Device, DeviceEnvironment
from vmf.errors import StorageError, StorageFull
from vmf.machine.bus import Bus
from vmf.machine.clock import MachineClock
from vmf.machine.timers import TimerQueue
from vmf.memory.guest import GuestMemory
from vmf.storage import Drive, DriveType, StorageImage
from vmf_device_virtio import plugin

QUEUE_AT, BUFFERS_AT = 0x10_0000, 0x20_0000
DISK_SIZE = 1 << 20


class FakeImage(StorageImage):
    """An image in memory that tells what was done to it, and waits when it is told to."""

    def __init__(self, size: int = DISK_SIZE) -> None:
        self.uri, self.size, self.read_only = "test:", size, False
        self.content = bytearray(size)
        self.log: list[tuple[Any, ...]] = []
        self.go = threading.Event()
        self.go.set()
        self.broken = self.full = False
        self.aborted = False
        self.at_once = False

    def _step(self, *what: Any) -> None:
        assert self.go.wait(30)
        if self.broken:
            raise StorageError("the disk is on fire.")
        if self.full and what[0] in ("write", "zeroes"):
            raise StorageFull("test: cannot be written: the file system is full.", "Free some space there.")
        self.log.append(what)

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self._step("read", offset, sum(map(len, buffers)))
        for buffer in buffers:
            buffer[:] = self.content[offset : offset + len(buffer)]
            offset += len(buffer)

    def readv_at_once(self, offset: int, buffers: Sequence[memoryview]) -> bool:
        if self.at_once:
            self.readv(offset, buffers)
        return self.at_once

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self._step("write", offset, sum(map(len, buffers)))
        for buffer in buffers:
            self.content[offset : offset + len(buffer)] = buffer
            offset += len(buffer)

    def flush(self) -> None:
        self._step("flush")

    def discard(self, offset: int, length: int) -> None:
        self._step("discard", offset, length)

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        self._step("zeroes", offset, length, may_unmap)
        self.content[offset : offset + length] = bytes(length)

    def abort(self) -> None:
        self.aborted = self.broken = True
        self.go.set()

    def close(self) -> None: ...


class Line:
    def __init__(self) -> None:
        self.level = False

    def set_level(self, level: bool) -> None:
        self.level = level


class Pc:
    """Bus, RAM and the devices of the plugin; `posts` is what a vCPU thread would run."""

    def __init__(self, memory: GuestMemory, drives: Sequence[Drive], options: Mapping[str, Any]) -> None:
        self.memory, self.bus = memory, Bus()
        self.lines: dict[int, list[Line]] = {}
        self.posts: list[Callable[[], None]] = []
        self.posted = threading.Condition()
        self.written: list[tuple[int, int]] = []
        self.output: list[bytes] = []
        self.pauses: list[str] = []
        clock = MachineClock()

        def line(number: int) -> Line:
            made = Line()
            self.lines.setdefault(number, []).append(made)
            return made

        def post(function: Callable[[], None]) -> None:
            with self.posted:
                self.posts.append(function)
                self.posted.notify()

        self.elcr: dict[int, int] = {}
        for port in (0x4D0, 0x4D1):
            self.bus.claim_ports("elcr", port, 1, Elcr(self, port))
        environment = DeviceEnvironment(
            bus=self.bus, memory=memory, clock=clock, timers=TimerQueue(clock), irq_line=line,
            provide_interrupts=lambda *_: None, post=post, request_power_off=lambda: None, request_reset=lambda: None,
            request_pause=self.pauses.append,
            serial_output=self.output.append, memory_written=lambda gpa, size: self.written.append((gpa, size)),
            options=options, drives=drives,
        )  # fmt: skip
        self.devices: Sequence[Device] = plugin.vmf_create_device(environment)
        for device in self.devices:
            device.reset()

    def run_posts(self, until: Callable[[], bool]) -> None:
        """Be the vCPU thread until something is so."""
        while not until():
            with self.posted:
                assert self.posted.wait_for(lambda: self.posts, 10), "nothing came back"
                posts, self.posts = self.posts, []
            for function in posts:
                function()

    def device(self, kind: str) -> Any:
        return next(device for device in self.devices if device.kind == kind)

    # -- configuration space, by ports

    def config_read(self, slot: int, offset: int, size: int) -> int:
        self.bus.port_write(0xCF8, 4, 0x8000_0000 | slot << 11 | offset & 0xFC)
        return self.bus.port_read(0xCFC + offset % 4, size)

    def config_write(self, slot: int, offset: int, size: int, value: int) -> None:
        self.bus.port_write(0xCF8, 4, 0x8000_0000 | slot << 11 | offset & 0xFC)
        self.bus.port_write(0xCFC + offset % 4, size, value)

    def interrupted(self) -> bool:
        return any(line.level for lines in self.lines.values() for line in lines)


class Elcr:
    def __init__(self, pc: Pc, port: int) -> None:
        self.io_write = lambda _offset, _size, value: pc.elcr.__setitem__(port, value)
        self.io_read = lambda _offset, _size: 0


class Driver:
    """The driver of the virtio device in a slot; finds everything by the capabilities, as a guest does."""

    def __init__(self, pc: Pc, slot: int) -> None:
        self.pc, self.slot = pc, slot
        self.places: dict[int, int] = {}
        self.multiplier = 0
        bar = pc.config_read(slot, 0x10, 4) & ~15
        at = pc.config_read(slot, 0x34, 1)
        while at:
            if pc.config_read(slot, at, 1) == 9:
                kind, offset = pc.config_read(slot, at + 3, 1), pc.config_read(slot, at + 8, 4)
                self.places[kind] = bar + offset
                if kind == 2:
                    self.multiplier = pc.config_read(slot, at + 16, 4)
            at = pc.config_read(slot, at + 1, 1)
        self.size = 8
        self.tails: dict[int, int] = {}
        self.seen: dict[int, int] = {}

    def read(self, kind: int, offset: int, size: int) -> int:
        return self.pc.bus.mmio_read(self.places[kind] + offset, size)

    def write(self, kind: int, offset: int, size: int, value: int) -> None:
        self.pc.bus.mmio_write(self.places[kind] + offset, size, value)

    def offered(self) -> int:
        features = 0
        for select in (0, 1):
            self.write(1, 0, 4, select)
            features |= self.read(1, 4, 4) << 32 * select
        return features

    def start(self, features: int | None = None, queues: int = 1) -> None:
        """Up to DRIVER_OK (virtio 1.2, section 3.1.1)."""
        self.write(1, 0x14, 1, 0)
        self.write(1, 0x14, 1, 3)
        accepted = self.offered() if features is None else features | 1 << 32
        for select in (0, 1):
            self.write(1, 8, 4, select)
            self.write(1, 0xC, 4, accepted >> 32 * select & 0xFFFF_FFFF)
        self.write(1, 0x14, 1, 11)
        assert self.read(1, 0x14, 1) & 8
        for number in range(queues):
            self.write(1, 0x16, 2, number)
            self.write(1, 0x18, 2, self.size)
            base = self.ring(number)
            self.pc.memory.write(base, bytes(0x3000))
            for place, gpa in ((0x20, base), (0x28, base + 0x1000), (0x30, base + 0x2000)):
                self.write(1, place, 4, gpa)
                self.write(1, place + 4, 4, 0)
            self.write(1, 0x1C, 2, 1)
            self.tails[number] = self.seen[number] = 0
        self.write(1, 0x14, 1, 15)

    def ring(self, number: int) -> int:
        return QUEUE_AT + number * 0x4000

    def descriptors(self, number: int, rows: Sequence[tuple[int, int, int, int]], first: int = 0) -> None:
        for index, row in enumerate(rows, first):
            self.pc.memory.write(self.ring(number) + 16 * index, struct.pack("<QIHH", *row))

    def make_available(self, number: int, head: int, notify: bool = True) -> None:
        base, tail = self.ring(number) + 0x1000, self.tails[number]
        self.pc.memory.write(base + 4 + 2 * (tail % self.size), struct.pack("<H", head))
        self.tails[number] = tail + 1
        self.pc.memory.write(base + 2, struct.pack("<H", self.tails[number] & 0xFFFF))
        if notify:
            self.notify(number)

    def notify(self, number: int) -> None:
        self.write(2, number * self.multiplier, 2, number)

    def used(self, number: int = 0) -> list[tuple[int, int]]:
        """What has come back since the last call: (head, bytes written)."""
        base, found = self.ring(number) + 0x2000, []
        (index,) = struct.unpack("<H", self.pc.memory.read(base + 2, 2))
        while self.seen[number] & 0xFFFF != index:
            found.append(struct.unpack("<II", self.pc.memory.read(base + 4 + 8 * (self.seen[number] % self.size), 8)))
            self.seen[number] += 1
        return found

    def send(self, *parts: tuple[int, bytes | int], head: int = 0, number: int = 0, notify: bool = True) -> None:
        """One request as a chain from descriptor `head` on: (gpa, bytes) to the device, (gpa, length) from it."""
        rows = []
        for index, (gpa, what) in enumerate(parts):
            flags = 0 if isinstance(what, bytes) else 2
            if isinstance(what, bytes):
                self.pc.memory.write(gpa, what)
            length = len(what) if isinstance(what, bytes) else what
            last = index == len(parts) - 1
            rows.append((gpa, length, flags | (0 if last else 1), 0 if last else head + index + 1))
        self.descriptors(number, rows, head)
        self.make_available(number, head, notify)

    def wait(self, number: int = 0, count: int = 1) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []

        def there() -> bool:
            found.extend(self.used(number))
            return len(found) >= count

        self.pc.run_posts(there)
        return found


@pytest.fixture(scope="session")
def memory() -> Iterator[GuestMemory]:
    ram = GuestMemory(16 << 20)
    yield ram
    ram.close()


class Bench:
    """Makes PCs and drivers, and closes them."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.made: list[Pc] = []

    def drive(self, image: FakeImage | None, port: int = 0, kind: DriveType = DriveType.HDD, **more: Any) -> Drive:
        size = image.size if image is not None else 0
        made = Drive(port, kind, "test:" if image else "", size=size, **more)
        if image is not None:
            made.attach(image)
        return made

    def pc(self, *drives: Drive, **options: Any) -> Pc:
        made = Pc(self.memory, drives, options)
        self.made.append(made)
        return made

    def disk(self, image: FakeImage, features: int | None = None, **more: Any) -> Driver:
        """A started driver of a machine's only disk."""
        driver = Driver(self.pc(self.drive(image, **more)), plugin.FIRST_DRIVE_SLOT)
        driver.start(features)
        return driver

    image = FakeImage
    driver = Driver


@pytest.fixture
def bench(memory: GuestMemory) -> Iterator[Bench]:
    made = Bench(memory)
    yield made
    for pc in made.made:
        for device in pc.devices:
            device.close()
