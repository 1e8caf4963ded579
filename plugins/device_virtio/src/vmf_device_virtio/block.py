"""virtio-blk (virtio 1.2, section 5.2): hard disks, DVDs and floppies as block devices.

Theory of operation
    A request is taken apart on the vCPU thread into views of guest RAM, which an I/O thread hands to the drive: data
    goes between image and guest RAM by one system call. What has come back is told to the guest on the vCPU thread.

    The cache is write-back: a write is durable after the next flush that is begun after the write was reported. A
    driver that does not know about flushes (it did not accept the feature) gets one after each write.

    Discard is a hint that may do nothing; write-zeroes always does what it says. Both are bounded in one request, so
    that none of them takes long.

    At rest (`quiesce`) no request is under way: all have been reported to the guest, so that the rings in guest RAM
    are all there is to know, and the saved state is only registers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from struct import Struct
from typing import Any

from vmf.device import fields
from vmf.device.base import DeviceEnvironment
from vmf.errors import StateError, StorageFull, VmfError
from vmf.memory.scattered import total_bytes
from vmf.storage import SECTOR_SIZE, Drive
from vmf_device_virtio.iothreads import ABORT_SECONDS, END_SECONDS, IoThreads
from vmf_device_virtio.pci import HostBridge
from vmf_device_virtio.queue import Chain, QueueError
from vmf_device_virtio.transport import VirtioDevice

log = logging.getLogger(__name__)

# Feature bits.
F_SEG_MAX, F_READ_ONLY, F_BLOCK_SIZE = 1 << 2, 1 << 5, 1 << 6
F_FLUSH, F_TOPOLOGY, F_DISCARD, F_WRITE_ZEROES = 1 << 9, 1 << 10, 1 << 13, 1 << 14

# Request types and their results.
T_IN, T_OUT, T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES = 0, 1, 4, 8, 11, 13
_DONE = -1
S_OK, S_IOERR, S_UNSUPPORTED = b"\0", b"\1", b"\2"

_HEADER = Struct("<IIQ")
"""Type, reserved, sector."""
_SEGMENT = Struct("<QII")
"""Of discard and write-zeroes: sector, count, flags."""
_SEGMENT_UNMAP = 1
_CONFIGURATION = Struct("<QIIHBBIBBHIBBHIIIIIB3x")
_ID_SIZE = 20

QUEUE_SIZE = 256
SEGMENTS_MAX = QUEUE_SIZE - 2
MAX_RANGES = 16
"""Segments of a discard or write-zeroes request."""
MAX_RANGE_SECTORS = (64 << 20) // SECTOR_SIZE
THREADS = 4
AT_ONCE_MAX = 128 << 10
"""Bytes. What is read from the host's page cache on the vCPU thread: more goes quicker beside it."""


COLD_READS = 16
"""After a large read that was not in the page cache, so many go to the storage without a look."""
SMALL_MAX = 16 << 10
"""Bytes; see `_Request.small`."""


class _Request:
    """One request under way; a job of the I/O threads."""

    __slots__ = (
        "cached_only", "chain", "drive", "error", "kind", "length", "missed", "offset", "result", "segments", "small",
        "sync", "views",
    )  # fmt: skip

    def __init__(self, chain: Chain, drive: Drive, kind: int, offset: int, views: Sequence[memoryview]) -> None:
        self.chain = chain
        self.drive = drive
        self.kind = kind
        self.offset = offset
        self.views = views
        self.segments: list[tuple[int, int, bool]] = []
        self.sync = False
        self.small = False
        """A write that costs less than the waking of a thread, so several of them are done and told together."""
        self.cached_only = self.missed = False
        """Read from the page cache only; it was not all there."""
        self.length = 0
        """Bytes written into guest RAM, without the status."""
        self.result = S_OK
        self.error: Exception | None = None

    def run_at_once(self) -> bool:
        """Do a read that needs no waiting."""
        try:
            return self.drive.readv_at_once(self.offset, self.views)
        except Exception:  # noqa: BLE001 - a thread will find the same, and report it
            return False

    def run(self) -> None:
        drive, kind = self.drive, self.kind
        if self.cached_only:
            self.missed = not self.run_at_once()
            return
        try:
            if kind == T_IN:
                drive.readv(self.offset, self.views)
            elif kind == T_OUT:
                drive.writev(self.offset, self.views)
            elif kind == T_DISCARD:
                for offset, length, _ in self.segments:
                    drive.discard(offset, length)
            elif kind == T_WRITE_ZEROES:
                for offset, length, unmap in self.segments:
                    drive.write_zeroes(offset, length, may_unmap=unmap)
            if kind == T_FLUSH or self.sync:
                drive.flush()
        except Exception as error:  # noqa: BLE001 - a storage plugin's mistake: the guest sees an error, and goes on
            self.result, self.error = S_IOERR, error


class VirtioBlock(VirtioDevice):
    """A drive."""

    kind = "virtio.blk"
    TYPE = 2
    PCI_CLASS = 0x0180
    QUEUES = (QUEUE_SIZE,)
    SCHEMA: fields.Schema = {
        "sectors": fields.integer(0, (1 << 63) // SECTOR_SIZE),
        "read_only": fields.boolean,
    }

    def __init__(self, environment: DeviceEnvironment, bridge: HostBridge, slot: int, drive: Drive) -> None:
        features = F_SEG_MAX | F_BLOCK_SIZE | F_FLUSH | F_TOPOLOGY
        features |= F_READ_ONLY if drive.read_only else F_DISCARD | F_WRITE_ZEROES
        super().__init__(environment, bridge, slot, features)
        drive.claim(self.kind)
        self._drive = drive
        self._sectors = drive.size // SECTOR_SIZE
        self._errors = 0
        self._parked: list[_Request] = []
        """Writes for which there was no room. The guest has not heard of them, and the machine pauses."""
        name = f"disk at port {drive.port}"
        self._threads: IoThreads[_Request] = IoThreads(name, THREADS, environment.post, self._finished)
        self._quick: IoThreads[_Request] = IoThreads(
            f"{name}, cached", 1, environment.post, self._finished, environment.guest_waits
        )
        """For the host's page cache: its kernel takes writes of one file one after the other anyway, and several
        threads would fight for its lock, and for the processor with the guest."""
        self._cold = 0
        """Large reads that are not looked for in the page cache, as the last one was not there."""

    # -- what the driver sees

    def configuration(self) -> bytes:
        drive = self._drive
        exponent = max((drive.block_size // SECTOR_SIZE).bit_length() - 1, 0)
        ranges = (0, 0, 0, 0, 0) if drive.read_only else (
            MAX_RANGE_SECTORS, MAX_RANGES, max(drive.block_size // SECTOR_SIZE, 1), MAX_RANGE_SECTORS, MAX_RANGES
        )  # fmt: skip
        return _CONFIGURATION.pack(
            self._sectors, 0, SEGMENTS_MAX, 0, 0, 0, SECTOR_SIZE, exponent, 0, 1, 0, 1, 0, 1, *ranges, 1
        )

    def medium_changed(self, drive: Drive) -> None:
        """The driver is told to read the size again."""
        if drive is self._drive:
            self._sectors = drive.size // SECTOR_SIZE
            self.configuration_changed()

    # -- requests

    def notified(self, number: int) -> None:
        queue = self.queues[0]
        small: list[_Request] = []
        cached = not self._drive.writes_wait
        try:
            while (chain := queue.pop()) is not None:
                request = self._request(chain)
                if request.kind == _DONE or (
                    request.kind == T_IN and request.length <= AT_ONCE_MAX and request.run_at_once()
                ):
                    self._report(request)
                elif not cached or not self._is_quick(request):
                    self._threads.submit(request)
                elif request.small:
                    small.append(request)
                else:
                    self._quick.submit(request)
        finally:
            if small:
                self._quick.submit(*small)
            self.completed(queue)

    def _is_quick(self, request: _Request) -> bool:
        """Of an image in the page cache: a write, or a large read that may find everything there."""
        if request.kind != T_IN:
            return request.kind == T_OUT and not request.sync
        if request.length <= AT_ONCE_MAX:  # it was looked for already
            return False
        if self._cold:
            self._cold -= 1
            return False
        request.cached_only = True
        return True

    def _request(self, chain: Chain) -> _Request:
        """Take a request apart. Raises QueueError when it is none at all."""
        readable, writable = chain.readable, chain.writable
        if not readable or not writable:
            raise QueueError("a request without header or status")
        header = readable[0]
        if len(header) == _HEADER.size:
            readable = readable[1:]
        else:  # drivers may cut a request into buffers as they like (section 2.7.4)
            header, readable = _split(readable, _HEADER.size)
            if len(header) < _HEADER.size:
                raise QueueError("a request without header")
        if len(writable[-1]) > 1:
            writable = [*writable[:-1], writable[-1][:-1]]
        else:
            writable = writable[:-1]
        kind, _, sector = _HEADER.unpack_from(header)
        offset = sector * SECTOR_SIZE
        if kind == T_IN:
            request = _Request(chain, self._drive, kind, offset, writable)
            request.length = total_bytes(chain.writable) - 1
            if not self._within(offset, request.length):
                return _done(chain, self._drive, S_IOERR)
        elif kind == T_OUT:
            request = _Request(chain, self._drive, kind, offset, readable)
            length = total_bytes(chain.readable) - _HEADER.size
            if not self._within(offset, length):
                return _done(chain, self._drive, S_IOERR)
            request.sync = not self.features & F_FLUSH
            request.small = length <= SMALL_MAX
        elif kind == T_FLUSH:
            request = _Request(chain, self._drive, kind, 0, [])
        elif kind in (T_DISCARD, T_WRITE_ZEROES):
            request = _Request(chain, self._drive, kind, 0, [])
            request.sync = not self.features & F_FLUSH
            if refusal := self._ranges(request, readable):
                return _done(chain, self._drive, refusal)
        elif kind == T_GET_ID:
            return self._identify(chain, writable)
        else:
            return _done(chain, self._drive, S_UNSUPPORTED)
        return request

    def _within(self, offset: int, length: int) -> bool:
        return length % SECTOR_SIZE == 0 and offset + length <= self._sectors * SECTOR_SIZE

    def _ranges(self, request: _Request, readable: Sequence[memoryview]) -> bytes:
        """The segments of a discard or write-zeroes request; the refusal, or b"" when all is well."""
        data = b"".join(readable)
        if len(data) % _SEGMENT.size or not data:
            return S_IOERR
        if len(data) > _SEGMENT.size * MAX_RANGES:
            return S_IOERR
        for sector, count, flags in _SEGMENT.iter_unpack(data):
            if flags & ~_SEGMENT_UNMAP or (flags and request.kind == T_DISCARD):
                return S_UNSUPPORTED
            if count > MAX_RANGE_SECTORS or sector + count > self._sectors or self._drive.read_only:
                return S_IOERR
            request.segments.append((sector * SECTOR_SIZE, count * SECTOR_SIZE, bool(flags)))
        return b""

    def _identify(self, chain: Chain, writable: Sequence[memoryview]) -> _Request:
        serial = self._drive.serial.encode("ascii", "replace")[:_ID_SIZE].ljust(_ID_SIZE, b"\0")
        if sum(map(len, writable)) < _ID_SIZE:
            return _done(chain, self._drive, S_IOERR)
        written = 0
        for view in writable:
            part = serial[written : written + len(view)]
            view[: len(part)] = part
            written += len(part)
        return _done(chain, self._drive, S_OK, written)

    def _report(self, request: _Request) -> None:
        chain, length = request.chain, request.length
        chain.writable[-1][-1:] = request.result
        if length:
            self.wrote(chain)
        self.queues[0].push(chain.head, length + 1)

    def _finished(self, requests: list[_Request]) -> None:
        queue = self.queues[0]
        if not queue.active:
            return  # the driver broke its rings meanwhile: there is nobody to tell
        for request in requests:
            if request.missed:
                request.cached_only = request.missed = False
                self._cold = COLD_READS
                self._threads.submit(request)
                continue
            if isinstance(request.error, StorageFull) and request.kind in (T_OUT, T_WRITE_ZEROES):
                self._park(request, request.error)
                continue
            if request.error is not None:
                self._log(request.error)
            self._report(request)
        self.completed(queue)

    def _park(self, request: _Request, error: StorageFull) -> None:
        """Keep a write until there is room, as a disk that is only full is no broken disk."""
        self._parked.append(request)
        self._drive.problem = f"A write of the guest waits for room: {error.message}"
        self._environment.request_pause(
            f"a write of the guest to the drive at port {self._drive.port} waits for room: {error.message}"
            " Make room there, then resume the machine."
        )

    def resumed(self) -> None:
        """Write once more what there was no room for."""
        parked, self._parked = self._parked, []
        self._drive.problem = ""
        for request in parked:
            request.result, request.error = S_OK, None
            self._threads.submit(request)

    def migration_blocker(self) -> str:
        return f"{len(self._parked)} writes wait for room where the image is kept" if self._parked else ""

    def _log(self, error: Exception) -> None:
        """For people: the first error, the second, the fourth, ... as a guest may try for ever."""
        self._errors += 1
        if not self._errors & (self._errors - 1):
            unexpected = None if isinstance(error, VmfError) else error
            log.warning("port %d, error %d: %s", self._drive.port, self._errors, error, exc_info=unexpected)

    # -- life

    def _reset_device(self) -> None:
        super()._reset_device()
        self._parked = []  # its rings are gone: nobody waits for it
        self._drive.problem = ""

    def quiesce(self) -> None:
        self.stop_work()

    def stop_work(self) -> None:
        self._quick.drain()  # which may hand something on to the others
        self._threads.drain()

    def save_own(self) -> dict[str, Any]:
        if self._parked:
            raise StateError(
                f"the drive at port {self._drive.port} has writes that wait for room where its image is kept.",
                "Make room there, and resume the machine.",
            )
        return {"sectors": self._sectors, "read_only": self._drive.read_only}

    def check_own(self, values: dict[str, Any]) -> None:
        drive = self._drive
        here = drive.size // SECTOR_SIZE
        if values["sectors"] != here:
            raise StateError(
                f"{self.kind}: the drive at port {drive.port} has {values['sectors'] * SECTOR_SIZE} bytes at the"
                f" source and {here * SECTOR_SIZE} here.",
                "Give both machines the same image.",
            )
        if values["read_only"] != drive.read_only:
            words = {True: "read-only", False: "writable"}
            raise StateError(
                f"{self.kind}: the drive at port {drive.port} is {words[values['read_only']]} at the source and"
                f" {words[drive.read_only]} here.",
                "Attach it alike on both machines.",
            )

    def restore_own(self, values: dict[str, Any]) -> None:
        self._sectors = values["sectors"]

    def close(self) -> None:
        end = time.monotonic() + END_SECONDS
        for threads in (self._quick, self._threads):
            try:
                threads.drain(max(end - time.monotonic(), 0.0))
            except StateError:
                self._drive.abort()
                try:
                    threads.drain(ABORT_SECONDS)
                except StateError as error:
                    log.warning("port %d: %s", self._drive.port, error)
            threads.close()
        for queue in self.queues:
            queue.stop()


def _done(chain: Chain, drive: Drive, result: bytes, length: int = 0) -> _Request:
    """A request that needs no thread: refused, or answered."""
    request = _Request(chain, drive, _DONE, 0, [])
    request.result, request.length = result, length
    return request


def _split(views: Sequence[memoryview], size: int) -> tuple[memoryview, list[memoryview]]:
    """The first `size` bytes (copied; fewer when there are no more), and the rest."""
    head = bytearray()
    rest = list(views)
    while rest and len(head) < size:
        view = rest.pop(0)
        missing = size - len(head)
        head += view[:missing]
        if len(view) > missing:
            rest.insert(0, view[missing:])
    return memoryview(bytes(head)), rest
