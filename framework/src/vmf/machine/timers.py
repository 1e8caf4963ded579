"""Timers on guest time; touched on the vCPU thread only.

A pass (`TimerQueue.run_due`) fires what was due when it began, each timer once: what a callback arms is for a later
pass. So a pass ends, and requests to stop the machine come in between. A timer that is armed again in the past, by a
device with a fault or one that cannot keep up, fires a little later than now, so that the guest runs in between, too.
The log names a device that does so again and again.
"""

from __future__ import annotations

import heapq
import itertools
import logging
from collections.abc import Callable
from typing import Protocol

from vmf.machine.clock import MachineClock
from vmf.plugins.containment import Culprit, guarded

log = logging.getLogger(__name__)

LEAST_WAIT_NS = 20_000
"""Soonest that a timer fires which a callback has armed."""
TOO_LATE = 1000
"""So many times in a row armed in the past by a callback: then the owner is named."""


def owner_of(callback: Callable[[], None]) -> str:
    """Whose callback it is, for people: a device's kind, else the function's own name."""
    if known := getattr(callback, "owner", ""):
        return str(known)
    kind = getattr(getattr(callback, "__self__", None), "kind", None)
    if isinstance(kind, str) and kind:
        return f"device {kind}"
    name = getattr(callback, "__qualname__", type(callback).__qualname__)
    return f"{getattr(callback, '__module__', None) or '?'}.{name}"


class Timer:
    """One armed or idle timer; owned by a device, which saves its deadline as part of its own state."""

    __slots__ = ("_callback", "_late", "_queue", "_serial", "deadline")

    def __init__(self, queue: TimerQueue, callback: Callable[[], None]) -> None:
        self._queue = queue
        self._callback = callback
        self._serial = -1
        self._late = 0
        self.deadline: int | None = None
        """Guest time in ns, or None while idle."""

    def arm(self, deadline: int) -> None:
        """Call back once guest time reaches `deadline` ns (in the next pass of the run loop, if that has passed)."""
        if type(deadline) is not int:  # a float would travel on into the engine
            raise TypeError(f"a timer's deadline is whole nanoseconds, not {type(deadline).__name__}")
        self.deadline = deadline
        self._serial = self._queue._push(self, deadline)

    def cancel(self) -> None:
        self.deadline = None
        self._serial = -1


class Timers(Protocol):
    """Where a device gets its timers."""

    def timer(self, callback: Callable[[], None]) -> Timer:
        """A new idle timer. The callback runs on the vCPU thread and may re-arm it."""

    def of_plugin(self, culprit: Culprit) -> Timers:
        """For one plugin: what a callback raises is told under its name."""


class PluginTimers:
    """`Timers` of one plugin."""

    def __init__(self, queue: TimerQueue, culprit: Culprit) -> None:
        self._queue = queue
        self._culprit = culprit

    def timer(self, callback: Callable[[], None]) -> Timer:
        name = owner_of(callback)
        call = guarded(self._culprit, f"a timer of {name}", callback)
        call.owner = f"{name} of the {self._culprit.plugin}"  # type: ignore[attr-defined]
        return Timer(self._queue, call)

    def of_plugin(self, culprit: Culprit) -> Timers:
        return PluginTimers(self._queue, culprit)


class TimerQueue:
    """All timers of a machine."""

    def __init__(self, clock: MachineClock) -> None:
        self._clock = clock
        self._heap: list[tuple[int, int, Timer]] = []
        self._serials = itertools.count()
        self._passing = False
        self.on_earlier: Callable[[], None] | None = None
        """Called when a timer was armed that is due before all others: the vCPU may be running towards a deadline
        that is now too late. Set by the run loop, to the vCPU's kick, while the vCPU runs."""

    def timer(self, callback: Callable[[], None]) -> Timer:
        """A new idle timer. The callback runs on the vCPU thread and may re-arm it."""
        return Timer(self, callback)

    def of_plugin(self, culprit: Culprit) -> Timers:
        """See `Timers`."""
        return PluginTimers(self, culprit)

    def _push(self, timer: Timer, deadline: int) -> int:
        serial = next(self._serials)
        if self._passing:
            deadline = self._postponed(timer, deadline)
        heap = self._heap
        heapq.heappush(heap, (deadline, serial, timer))
        # An idle entry still at the top does not matter: the present slice ends at its deadline, or has ended before.
        if heap[0][1] == serial and self.on_earlier is not None:
            self.on_earlier()
        return serial

    def _postponed(self, timer: Timer, deadline: int) -> int:
        """When a timer that a callback arms fires."""
        now = self._clock.now()
        if deadline > now:
            timer._late = 0
        else:
            timer._late += 1
            if timer._late == TOO_LATE:
                log.warning(
                    "%s has armed its timer in the past %d times in a row, which slows the guest down. "
                    "This is a fault of that device; report it to its author.",
                    owner_of(timer._callback),
                    TOO_LATE,
                )
        return max(deadline, now + LEAST_WAIT_NS)

    def next_deadline(self) -> int | None:
        """Guest time of the earliest armed timer, ns."""
        heap = self._heap
        while heap and heap[0][2]._serial != heap[0][1]:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def run_due(self) -> None:
        """Fire every timer whose time has come, once; what a callback raises is raised, the others keep their turn."""
        now = self._clock.now()
        due: list[tuple[int, int, Timer]] = []
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            due.append(heapq.heappop(self._heap))
        due.reverse()
        self._passing = True
        try:
            while due:
                _, serial, timer = due.pop()
                if timer._serial == serial:  # no callback before has cancelled it or armed it anew
                    timer.cancel()
                    timer._callback()
        finally:
            self._passing = False
            for entry in due:
                heapq.heappush(self._heap, entry)
