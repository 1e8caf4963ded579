"""Guest time.

One clock per machine, in nanoseconds since the machine's power-on, from which every device timer counts. It runs
with the host's monotonic clock and stands still while the machine is paused by its user. A teleport advances it by
the downtime (measured between the two hosts, see `vmf.teleport`), so that the guest's wall clock is right afterwards;
it never goes back.
"""

from __future__ import annotations

import time


class MachineClock:
    """Guest nanoseconds. Read on any thread; started, stopped and set on the vCPU thread."""

    def __init__(self) -> None:
        self._base = 0
        self._started_at: int | None = None

    @property
    def running(self) -> bool:
        return self._started_at is not None

    def now(self) -> int:
        """Guest time in ns."""
        started_at = self._started_at
        if started_at is None:
            return self._base
        return self._base + time.monotonic_ns() - started_at

    def host_deadline(self, guest_ns: int) -> int:
        """The `time.monotonic_ns()` value at which a running clock will show `guest_ns`."""
        if self._started_at is None:
            raise RuntimeError("a stopped clock has no deadlines")
        return guest_ns - self._base + self._started_at

    def start(self) -> None:
        if self._started_at is None:
            self._started_at = time.monotonic_ns()

    def stop(self) -> None:
        self._base, self._started_at = self.now(), None

    def set(self, guest_ns: int) -> None:
        """Set the time of a stopped clock (restoring a state)."""
        if self._started_at is not None:
            raise RuntimeError("a running clock cannot be set")
        self._base = guest_ns
