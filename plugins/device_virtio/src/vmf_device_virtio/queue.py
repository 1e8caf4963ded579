"""Split virtqueues (virtio 1.2, section 2.7): the device's side.

The driver's rings lie in guest RAM and are looked at through views that are made once, when the driver has set the
queue up. Guest and device code take turns on one thread, so that nothing here needs barriers; only the buffers are
used by other threads meanwhile.

Whatever the driver writes into its rings is checked: addresses must be RAM, chains end, indices run ahead by at most
the queue's size. QueueError says what is wrong; the device then asks the driver for a reset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from struct import Struct
from typing import Any

import numpy as np

from vmf.device import fields
from vmf.memory.guest import GuestMemory
from vmf.memory.scattered import RamRanges, Ranges

try:
    from vmf_device_virtio._ring import take
except ImportError:  # no compiler where it was installed
    take = None  # type: ignore[assignment]

DESCRIPTOR = Struct("<QIHH")
"""Address, length, flags, next."""
DESC_NEXT, DESC_WRITE, DESC_INDIRECT = 1, 2, 4
AVAIL_NO_INTERRUPT = 1
MAX_CHAIN = 1024
"""Buffers in one request, as many as one system call takes."""
_U16 = 0xFFFF
LONG_TABLE = 12
"""Descriptors in an indirect table from which on `_at_once` is quicker than one by one."""


class QueueError(Exception):
    """The driver has broken the rules; the text says which."""


class Chain:
    """One request of the driver.

    Attributes:
        head: to be given back with `Virtqueue.push`.
        readable, writable: views of its buffers, in order: from and to the driver.
        ranges: guest-physical (address, size) of the writable ones: a list with neighbours merged, or an array.
    """

    __slots__ = ("head", "ranges", "readable", "writable")

    def __init__(self, head: int) -> None:
        self.head = head
        self.readable: Sequence[memoryview] = ()
        self.writable: Sequence[memoryview] = ()
        self.ranges: list[tuple[int, int]] | Ranges


class Virtqueue:
    """One queue. `size` and the three addresses are the driver's to set, until it enables the queue."""

    SCHEMA: fields.Schema = {
        "size": fields.integer(0, 0x8000),
        "enabled": fields.boolean,
        "desc": fields.integer(0, (1 << 64) - 1),
        "driver": fields.integer(0, (1 << 64) - 1),
        "device": fields.integer(0, (1 << 64) - 1),
        "last_avail": fields.integer(0, _U16),
        "used_index": fields.integer(0, _U16),
    }

    def __init__(self, memory: GuestMemory, max_size: int) -> None:
        self._memory = memory
        self._low = memory.regions[0].size
        self.max_size = max_size
        self._desc = self._avail = self._used = self._ring = memoryview(b"")
        self.event_index = False
        self._signalled = 0
        self.reset()

    def reset(self) -> None:
        self.stop()
        self.size = self.max_size
        self.enabled = False
        self.desc = self.driver = self.device = 0
        self.last_avail = self.used_index = self._signalled = 0
        self.event_index = False

    @property
    def active(self) -> bool:
        """The views are there."""
        return len(self._avail) > 0

    def start(self, *, event_index: bool) -> None:
        """Look at the rings. Raises QueueError when they are not in RAM."""
        self.stop()
        size = self.size
        self.event_index = event_index
        self._desc = self._view(self.desc, 16 * size)
        self._avail = self._view(self.driver, 6 + 2 * size).cast("H")
        used = self._view(self.device, 6 + 8 * size)
        self._used = used.cast("H")
        self._ring = used[4 : 4 + 8 * size].cast("I")
        self._signalled = self.used_index
        if event_index:
            self._used[2 + 4 * size] = self.last_avail

    def stop(self) -> None:
        """Let go of guest RAM."""
        self._desc = self._avail = self._used = self._ring = memoryview(b"")

    def _view(self, gpa: int, size: int) -> memoryview:
        if gpa + size <= self._low:
            return self._memory.buffer[gpa : gpa + size]
        for region in self._memory.regions:
            if region.gpa <= gpa and gpa + size <= region.gpa + region.size:
                start = region.offset + gpa - region.gpa
                return self._memory.buffer[start : start + size]
        raise QueueError(f"{gpa:#x}+{size:#x} is not RAM")

    def pop(self) -> Chain | None:
        """The next request, or None. Raises QueueError."""
        avail, last, size = self._avail, self.last_avail, self.size
        waiting = (avail[1] - last) & _U16
        if not waiting:
            return None
        if waiting > size:
            raise QueueError(f"{waiting} requests in a queue of {size}")
        head = avail[2 + last % size]
        self.last_avail = last = (last + 1) & _U16
        if self.event_index:
            self._used[2 + 4 * size] = last  # tell us of the next one
        if head >= size:
            raise QueueError(f"descriptor {head} in a queue of {size}")
        return self._chain(head)

    def _chain(self, head: int) -> Chain:
        chain = Chain(head)
        table, count, number = self._desc, self.size, head
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        ranges: list[tuple[int, int]] = []
        chain.readable, chain.writable, chain.ranges = readable, writable, ranges
        buffer, low, unpack = self._memory.buffer, self._low, DESCRIPTOR.unpack_from
        end = -1  # of the last writable range
        left = MAX_CHAIN
        while True:
            address, length, flags, following = unpack(table, number * 16)
            if flags & DESC_INDIRECT:
                if table is not self._desc or flags & DESC_NEXT or not length or length % 16 or length > 16 * MAX_CHAIN:
                    raise QueueError("an indirect table that is none")
                table, count, number = self._view(address, length), length // 16, 0
                # At once only what is the whole chain: buffers before the table count for order, length and result.
                if count >= LONG_TABLE and not (readable or writable) and self._at_once(chain, table):
                    return chain
                continue
            if not length:
                raise QueueError("an empty buffer")
            view = buffer[address : address + length] if address + length <= low else self._view(address, length)
            if flags & DESC_WRITE:
                writable.append(view)
                if address == end:
                    ranges[-1] = (ranges[-1][0], ranges[-1][1] + length)
                else:
                    ranges.append((address, length))
                end = address + length
            elif writable:
                raise QueueError("a readable buffer behind a writable one")
            else:
                readable.append(view)
            if not flags & DESC_NEXT:
                return chain
            left -= 1
            if following >= count or not left:
                raise QueueError("a chain that does not end")
            number = following

    def _at_once(self, chain: Chain, table: memoryview) -> bool:
        """Take apart a whole table that is one chain in order and in low RAM; False, with nothing done, when it is
        anything else, right or wrong."""
        if take is None:
            return False
        rows = np.empty((len(table) // DESCRIPTOR.size, 2), dtype=np.uint64)
        found = take(table, self._low, rows)
        if found is None:
            return False
        readable, sent, asked = found
        chain.readable = RamRanges(self._memory, rows[:readable], sent)
        chain.writable = RamRanges(self._memory, rows[readable:], asked)
        chain.ranges = rows[readable:]
        return True

    def push(self, head: int, written: int) -> None:
        """Give a request back with the number of bytes written into it."""
        used, size, index = self._used, self.size, self.used_index
        slot = index % size * 2
        ring = self._ring
        ring[slot] = head
        ring[slot + 1] = written
        self.used_index = used[1] = (index + 1) & _U16

    def wants_interrupt(self) -> bool:
        """After pushes: whether the driver is to be interrupted for what was pushed since the last time."""
        old, new = self._signalled, self.used_index
        if old == new:
            return False
        self._signalled = new
        if self.event_index:
            return (new - self._avail[2 + self.size] - 1) & _U16 < (new - old) & _U16
        return not self._avail[0] & AVAIL_NO_INTERRUPT

    # -- state

    def save(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.SCHEMA}

    def acceptable(self, values: Mapping[str, Any]) -> bool:
        """What the schema cannot say."""
        size: int = values["size"]
        return 0 < size <= self.max_size and not size & (size - 1)

    def restore(self, values: Mapping[str, Any]) -> None:
        """Take over the registers; the rings are looked at by `start`."""
        self.stop()
        for name in self.SCHEMA:
            setattr(self, name, values[name])
        self._signalled = self.used_index
