"""Timers on guest time; touched on the vCPU thread only."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

from vmf.machine.clock import MachineClock


class Timer:
    """One armed or idle timer; owned by a device, which saves its deadline as part of its own state."""

    __slots__ = ("_callback", "_queue", "_serial", "deadline")

    def __init__(self, queue: TimerQueue, callback: Callable[[], None]) -> None:
        self._queue = queue
        self._callback = callback
        self._serial = -1
        self.deadline: int | None = None
        """Guest time in ns, or None while idle."""

    def arm(self, deadline: int) -> None:
        """Call back once guest time reaches `deadline` ns (at once, from the run loop, if that has passed)."""
        self.deadline = deadline
        self._serial = self._queue._push(self, deadline)

    def cancel(self) -> None:
        self.deadline = None
        self._serial = -1


class TimerQueue:
    """All timers of a machine."""

    def __init__(self, clock: MachineClock) -> None:
        self._clock = clock
        self._heap: list[tuple[int, int, Timer]] = []
        self._serials = itertools.count()
        self.on_earlier: Callable[[], None] | None = None
        """Called when a timer was armed that is due before all others: the vCPU may be running towards a deadline
        that is now too late. Set by the run loop, to the vCPU's kick, while the vCPU runs."""

    def timer(self, callback: Callable[[], None]) -> Timer:
        """A new idle timer. The callback runs on the vCPU thread and may re-arm it."""
        return Timer(self, callback)

    def _push(self, timer: Timer, deadline: int) -> int:
        serial = next(self._serials)
        heap = self._heap
        heapq.heappush(heap, (deadline, serial, timer))
        # An idle entry still at the top does not matter: the present slice ends at its deadline, or has ended before.
        if heap[0][1] == serial and self.on_earlier is not None:
            self.on_earlier()
        return serial

    def next_deadline(self) -> int | None:
        """Guest time of the earliest armed timer, ns."""
        heap = self._heap
        while heap and heap[0][2]._serial != heap[0][1]:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def run_due(self) -> None:
        """Fire every timer whose time has come."""
        now = self._clock.now()
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            _, _, timer = heapq.heappop(self._heap)
            timer.cancel()
            timer._callback()
