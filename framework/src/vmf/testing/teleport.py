"""For tests of teleports without a guest: a machine that is only RAM and a writer thread, and in-process channels."""

from __future__ import annotations

import queue
import random
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vmf.device.base import Payload
from vmf.errors import StateError, TransportClosed, TransportError, TransportTimeout
from vmf.memory import pages
from vmf.memory.dirty import DirtyTracker, PageRuns
from vmf.memory.guest import PAGE_SIZE, GuestMemory
from vmf.teleport.check import Blocker, compare_descriptions
from vmf.teleport.seam import Stopped
from vmf.transport.base import Address, Buffer, Channel, Listener


class SocketChannel(Channel):
    """A channel on one end of `socket.socketpair()`.

    `on_send` and `on_receive`, when set, see how many bytes went through so far, before the next ones do; they may
    raise or block (fault injection).
    """

    def __init__(self, sock: socket.socket, name: str) -> None:
        self._socket = sock
        self.local = Address("test", name, 0)
        self.remote = Address("test", "peer-of-" + name, 0)
        self.sent = self.received = 0
        self.on_send: Callable[[int], None] | None = None
        self.on_receive: Callable[[int], None] | None = None

    def set_timeout(self, seconds: float | None) -> None:
        try:
            self._socket.settimeout(seconds)
        except OSError as error:
            raise TransportClosed(f"{self.remote}: {error}.") from error

    def send(self, *buffers: Buffer) -> None:
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            while len(view):
                if self.on_send is not None:
                    self.on_send(self.sent)
                try:
                    done = self._socket.send(view)
                except TimeoutError:
                    raise TransportTimeout(f"{self.remote} takes nothing.") from None
                except OSError as error:
                    raise TransportClosed(f"{self.remote} closed the connection ({error}).") from None
                self.sent += done
                view = view[done:]

    def recv_into(self, buffer: memoryview) -> None:
        view = buffer
        while len(view):
            if self.on_receive is not None:
                self.on_receive(self.received)
            try:
                done = self._socket.recv_into(view)
            except TimeoutError:
                raise TransportTimeout(f"{self.remote} is silent.") from None
            except OSError as error:
                raise TransportClosed(f"{self.remote} closed the connection ({error}).") from None
            if not done:
                raise TransportClosed(f"{self.remote} closed the connection.")
            self.received += done
            view = view[done:]

    def shutdown(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it is closed or broken already

    def close(self) -> None:
        self.shutdown()
        self._socket.close()


class QueueListener(Listener):
    """A listener for `SocketChannel`s made by its own `connect`."""

    def __init__(self) -> None:
        self.address = Address("test", "listener", 0)
        self._queue: queue.Queue[Channel | None] = queue.Queue()
        self._down = False
        self.last: SocketChannel | None = None
        """The target's end of the newest connection."""

    def connect(self) -> SocketChannel:
        """The source's end of a new connection. Raises TransportError when nobody listens."""
        if self._down:
            raise TransportError("nobody listens.")
        ours, theirs = socket.socketpair()
        self.last = SocketChannel(theirs, "target")
        self._queue.put(self.last)
        return SocketChannel(ours, "source")

    def accept(self, timeout: float | None) -> Channel:
        try:
            channel = self._queue.get(timeout=timeout)
        except queue.Empty:
            raise TransportTimeout("nobody came.") from None
        if channel is None:
            self._queue.put(None)
            raise TransportClosed("the listener is closed.")
        return channel

    def shutdown(self) -> None:
        self._down = True
        self._queue.put(None)

    def close(self) -> None:
        self.shutdown()


class LoggedTracker(DirtyTracker):
    """Knows the dirty pages because the fake machine tells it; exact."""

    name = "logged"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._dirty: set[int] = set()
        self.active = False

    def note(self, page: int) -> None:
        if self.active:
            with self._lock:
                self._dirty.add(page)

    def start(self) -> None:
        self.active = True

    def collect(self) -> PageRuns:
        with self._lock:
            dirty, self._dirty = self._dirty, set()
        return pages.from_numbers(np.array(sorted(dirty), dtype=np.uint64))

    def stop(self) -> None:
        self.active = False


class FakeMachine:
    """A machine whose guest is a thread that writes random pages.

    Attributes:
        runs: whether the guest runs.
        owner: shared by the machines of one test; checks that no two run at the same time.
        throttle: as last set.
        log: the seam's calls in order.
        fail: names of calls that shall raise.
        delay: seconds that a call of that name takes.
    """

    def __init__(
        self,
        name: str,
        size: int,
        owner: dict[str, bool],
        *,
        rate: float = 0.0,
        tracker: Callable[[GuestMemory], DirtyTracker] | None = None,
        seed: int = 1,
    ) -> None:
        self._name = name
        self._memory = GuestMemory(size)
        self._owner = owner
        self._make_tracker = tracker
        self._logged = LoggedTracker()
        self._rate = rate
        self._random = random.Random(seed)
        self._gate = threading.Event()
        self._parked = threading.Event()
        self._parked.set()
        self._exit = False
        self._runs = False
        self._was_running = False
        self.counter = 0
        self.throttle = 0.0
        self.log: list[str] = []
        self.fail: set[str] = set()
        self.delay: dict[str, float] = {}
        self.blockers: list[Blocker] = []
        self.said: list[str] = []
        self.elapsed_ns: int | None = None
        self.stopped_at_ns = 0
        self.description: dict[str, Any] = {"memory_mib": size >> 20, "devices": [["fake", 0]]}
        self._thread = threading.Thread(target=self._guest, name=f"guest-{name}", daemon=True)
        self._thread.start()

    # For the test

    @property
    def runs(self) -> bool:
        return self._runs

    def start(self) -> None:
        """Let the guest run. Asserts that no other machine of this test does."""
        others = [name for name, runs in self._owner.items() if runs and name != self._name]
        assert not others, f"{self._name} started while {others} run"
        self._owner[self._name] = True
        self._runs = True
        self._gate.set()

    def halt(self) -> None:
        self._gate.clear()
        self._parked.wait()
        self._runs = False
        self._owner[self._name] = False

    def write(self, page: int, data: bytes) -> None:
        """As the guest (or a device) would."""
        self._memory.buffer[page * PAGE_SIZE : page * PAGE_SIZE + len(data)] = data
        self._logged.note(page)

    def close(self) -> None:
        self._exit = True
        self._gate.set()
        self._thread.join()
        self._memory.close()

    def _guest(self) -> None:
        while not self._exit:
            if not self._gate.is_set():
                self._parked.set()
                self._gate.wait()
                continue
            self._parked.clear()
            if not self._gate.is_set():
                continue
            speed = self._rate * (1 - self.throttle)
            if speed <= 0:
                time.sleep(0.001)
                continue
            for _ in range(max(1, int(speed * 0.002))):
                self.counter += 1
                page = self._random.randrange(self._memory.pages)
                kind = self.counter % 4
                self.write(page, bytes(PAGE_SIZE) if kind == 0 else self.counter.to_bytes(8, "little") * 512)
            time.sleep(0.002)
        self._parked.set()

    def _call(self, name: str) -> None:
        self.log.append(name)
        if name in self.delay:
            time.sleep(self.delay[name])
        if name in self.fail:
            raise StateError(f"{name} fails, as the test wants it.")

    # The seam

    @property
    def name(self) -> str:
        return self._name

    @property
    def memory(self) -> GuestMemory:
        return self._memory

    def describe(self) -> Mapping[str, Any]:
        self._call("describe")
        return self.description

    def check(self, source: Mapping[str, Any]) -> Sequence[Blocker]:
        self._call("check")
        return compare_descriptions(self._name, source, self.description)

    def notes(self, source: Mapping[str, Any]) -> Sequence[str]:
        return self.said

    def local_blockers(self, role: str) -> Sequence[Blocker]:
        self._call("local_blockers")
        return self.blockers

    def open_dirty_tracker(self) -> DirtyTracker:
        self._call("open_dirty_tracker")
        return self._make_tracker(self._memory) if self._make_tracker is not None else self._logged

    def set_throttle(self, fraction: float) -> None:
        self.log.append(f"set_throttle {fraction:g}")
        self.throttle = fraction

    def stop(self) -> Stopped:
        self._call("stop")
        self._was_running = self._runs
        self.halt()
        self.stopped_at_ns = time.monotonic_ns()
        return Stopped(self._was_running, self.stopped_at_ns)

    def save(self) -> Sequence[Payload]:
        self._call("save")
        return [Payload("fake.cpu", 1, {"counter": self.counter, "registers": [1, 2, 3], "blob": b"x" * 100})]

    def undo_stop(self) -> None:
        self._call("undo_stop")
        if self._was_running:
            self.start()

    def mark_handed_over(self) -> None:
        self._call("mark_handed_over")

    def take_back(self) -> None:
        self._call("take_back")

    def mark_teleported(self) -> None:
        self._call("mark_teleported")

    def restore(self, payloads: Sequence[Payload]) -> None:
        self._call("restore")
        (payload,) = payloads
        self.counter = payload.body["counter"]

    def resume(self, stopped_at_ns: int, running: bool) -> int:
        self._call("resume")
        now = time.monotonic_ns()
        self.elapsed_ns = now - stopped_at_ns if running else 0
        if running:
            self.start()
        return now

    def discard_arrival(self) -> None:
        self._call("discard_arrival")
        self._memory.clear()
        self.counter = 0
